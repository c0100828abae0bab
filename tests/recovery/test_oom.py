"""Tests of out-of-memory errors: whether memory ran out, and which process held it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcft.core import files
from hpcft.core.log_markers import RESTART_LINE
from hpcft.core.paths import RunPaths
from hpcft.core.records import Attempt, RankError
from hpcft.core.units import GIB
from hpcft.recovery.diagnosis import explain_failure
from hpcft.recovery.diagnosis.oom import parse_gpu_usage, parse_out_of_memory
from hpcft.scheduler.job_state import JobState

CUDA = ("CUDA out of memory. Tried to allocate {wanted}. GPU 0 has a total capacity of 14.74 GiB "
        "of which {free} is free. {who}Of the allocated memory {own} is allocated by PyTorch, and "
        "{kept} is reserved by PyTorch but unallocated. If reserved but unallocated memory is "
        "large try setting PYTORCH_ALLOC_CONF=expandable_segments:True")  # fmt: skip
# A real message from a shared GPU: three processes of other users hold its memory.
SHARED = CUDA.format(
    wanted="1002.00 MiB", free="52.44 MiB", own="4.72 GiB", kept="180.00 MiB",
    who="Process 3347037 has 4.65 GiB memory in use. Process 3320759 has 4.64 GiB memory in use. "
        "Process 3377253 has 5.40 GiB memory in use. ",
)  # fmt: skip


class OutOfMemoryError(RuntimeError):
    """Stand-in with the name of `torch.OutOfMemoryError`, which needs a GPU."""


@pytest.mark.parametrize(
    ("error", "of_host"),
    [
        (OutOfMemoryError(SHARED), False),
        (RuntimeError("CUDA error: out of memory"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), False),
        (RuntimeError("NCCL Error 1: Cuda failure 2 'out of memory'"), False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
                      "allocate memory: you tried to allocate 9 bytes."), True),
        (MemoryError(), True),
        (MemoryError("std::bad_alloc"), True),
        (OSError(12, "Cannot allocate memory"), True),
    ],
)  # fmt: skip
def test_parse_out_of_memory_tells_gpu_from_host_memory(
    error: BaseException, of_host: bool
) -> None:
    shortage = parse_out_of_memory(error)
    assert shortage is not None
    assert shortage.of_host == of_host
    assert 0 < len(shortage.evidence) <= 300


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Connection closed by peer"), ValueError("memory"), KeyError("labels"),
     RuntimeError("CUDA error: an illegal memory access was encountered")],
)  # fmt: skip
def test_parse_out_of_memory_of_another_error_returns_none(error: BaseException) -> None:
    assert parse_out_of_memory(error) is None


def test_parse_gpu_usage_lists_the_other_processes_of_a_shared_gpu() -> None:
    usage = parse_gpu_usage(SHARED)
    assert usage is not None
    assert usage.total == int(14.74 * GIB)
    assert usage.own == int(5.40 * GIB), "in a container the process is known only by its size"
    assert usage.others == (
        ("process 3347037", int(4.65 * GIB)),
        ("process 3320759", int(4.64 * GIB)),
    )
    shortage = parse_out_of_memory(OutOfMemoryError(SHARED), planned_bytes=9 * GIB)
    assert shortage is not None
    assert shortage.foreign == (
        "other processes hold 9.29 GiB of the GPU's 14.7 GiB (process 3347037 4.65 GiB, "
        "process 3320759 4.64 GiB); this run holds 5.4 GiB of the 9 GiB planned"
    )


MINE = "Including non-PyTorch memory, this process has 13.90 GiB memory in use. "
SMALL = "Including non-PyTorch memory, this process has 2.00 GiB memory in use. "
BOGUS = "Including non-PyTorch memory, this process has 17179869184.00 GiB memory in use. "
OTHER = "Process 4711 has 12.20 GiB memory in use. "
DESKTOP = "Process 77 has 310.00 MiB memory in use. "


@pytest.mark.parametrize(
    ("who", "own", "planned_gib", "foreign"),
    [
        (MINE, "13.01 GiB", 12, False),
        (MINE, "13.01 GiB", None, False),
        (OTHER + SMALL, "1.50 GiB", 8, True),
        (OTHER + SMALL, "1.50 GiB", None, True),
        # This process exceeds its plan: the plan was wrong, whatever others hold.
        (OTHER + SMALL, "1.50 GiB", 2, False),
        # Others hold less than is missing: without them memory would have run out too.
        (DESKTOP + MINE, "13.01 GiB", 15, False),
        (OTHER + BOGUS, "1.50 GiB", 8, True),
        # In a container the only process listed is this one, by its number.
        ("Process 4711 has 13.61 GiB memory in use. ", "13.01 GiB", 12, False),
        # No process is listed, and this one holds little of the used memory.
        ("", "2.00 GiB", 8, True),
        ("", "13.50 GiB", 12, False),
    ],
)
def test_parse_out_of_memory_names_other_processes_only_if_they_hold_the_memory(
    who: str, own: str, planned_gib: int | None, foreign: bool
) -> None:
    text = CUDA.format(wanted="1.00 GiB", free="540.00 MiB", who=who, own=own, kept="100.00 MiB")
    planned = None if planned_gib is None else planned_gib * GIB
    shortage = parse_out_of_memory(OutOfMemoryError(text), planned)
    assert shortage is not None
    assert bool(shortage.foreign) == foreign, shortage.foreign


def test_explain_failure_prefers_the_class_that_a_rank_reported(workplace: Path) -> None:
    """The text of the error names other processes, and would blame them."""
    paths = RunPaths(workplace)
    paths.errors.mkdir()
    closed = {"rank": 0, "node": "n1", "at": 1.0, "kind": "RuntimeError",
              "message": "Connection closed by peer"}  # fmt: skip
    text = CUDA.format(wanted="1.00 GiB", free="1.00 MiB", who=OTHER + SMALL, own="1.50 GiB",
                       kept="0 bytes")  # fmt: skip
    reported = {"rank": 1, "node": "n1", "at": 2.0, "kind": "OutOfMemoryError", "message": text,
                "failure": "out_of_memory", "next_step": "set resources.nodes: 2"}  # fmt: skip
    for error in (closed, reported):
        files.write_record(paths.errors / f"{error['rank']}.json", RankError.model_validate(error))
    failure = explain_failure(paths, None, JobState("FAILED"))
    assert (failure.name, failure.next_step) == ("out_of_memory", "set resources.nodes: 2")


def test_explain_failure_ignores_log_lines_before_the_last_restart(workplace: Path) -> None:
    paths = RunPaths(workplace)
    paths.logs.mkdir()
    attempt = Attempt(job_id="7", token="t", submitted_at=1.0, logs=str(paths.logs), host="h")
    log = paths.logs / "7_0_log.err"
    log.write_text(f"{SHARED}\n{RESTART_LINE} with less\nNo space left on device\n")
    assert explain_failure(paths, attempt, JobState("FAILED")).name == "disk"
