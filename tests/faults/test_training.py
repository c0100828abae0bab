"""Tests of ranks that fail, hang, or run out of memory, on a real Slurm."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from interrupting import job, recoveries_of
from misbehaving import profile
from on_slurm import campus, hpcft, jobs, nothing_left, out_of

from hpcft.core import files
from hpcft.core.records import RunRecord
from real_runs import folder_of, losses

pytestmark = pytest.mark.slurm

COMMON = ["-o", "train.max_steps=40", "-o", "train.logging_steps=10"]
FULL = (
    "CUDA out of memory. Tried to allocate 200.00 MiB. GPU 0 has a total capacity of 39.38 GiB of "
    "which 100.00 MiB is free. {others}Including non-PyTorch memory, this process has {own} memory "
    "in use. Of the allocated memory {allocated} is allocated by PyTorch, and {unused} is reserved "
    "by PyTorch but unallocated."
)
OUT_OF_MEMORY = FULL.format(others="", own="39.28 GiB", allocated="37 GiB", unused="110 MiB")
IN_PIECES = FULL.format(others="", own="39.28 GiB", allocated="30 GiB", unused="7.21 GiB")
FOREIGN = FULL.format(
    others="Process 4711 has 38.93 GiB memory in use. ", own="350 MiB", allocated="20 MiB",
    unused="30 MiB",
)  # fmt: skip
EXPANDS = '"expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")'


def raises(when: str, text: str) -> str:
    """Returns lines that raise PyTorch's error of a GPU without memory."""
    return f"if {when}:\n import torch\n raise torch.OutOfMemoryError({text!r})"


def hoards(when: str) -> str:
    """Returns lines that allocate all memory of the job."""
    return (
        f"import time\nif step == 3 and {when}:\n"
        " hoard = b'x' * (int(os.environ['SLURM_MEM_PER_NODE']) << 20)\n time.sleep(1000)"
    )


@dataclass(frozen=True)
class Row:
    """A fault, and the expected recoveries or failure."""

    lines: str
    """Lines of Python that ranks run after each step."""
    recoveries: tuple[tuple[str, str], ...] = ()
    """Cause and action of each recovery."""
    failure: str = ""
    """Failure class; empty if the run completes."""
    state: str = "FAILED"
    """Final state of a run that fails."""
    evidence: str = ""
    """Part of the failure's sentence, or of the evidence of the recovery."""
    rank: int | None = 0
    """Rank that fails."""
    options: tuple[str, ...] = ()
    """Overrides of the recipe."""
    jobs: int = 1
    """Number of jobs that the run takes."""
    memory_gib: float | None = None
    """Memory of a node in the profile; None keeps that of the testbed."""


ROWS = {
    "raises": Row(
        'if step == 3 and rank == 1: raise ValueError("a label that nobody knows")',
        failure="user", evidence="ValueError: a label that nobody knows", rank=1,
        options=("resources.gpus_per_node=2",),
    ),
    "stopped": Row(
        "if step == 20 and rank == 1 and start == 0: os.kill(os.getpid(), 19)",
        (("stuck", "restart"),), evidence="is stopped (SIGSTOP)", rank=1,
        options=("resources.gpus_per_node=2",),
    ),
    "lingers": Row(
        "import threading, time\nif step == 1: threading.Thread(target=time.sleep, "
        "args=[10_000]).start()",
    ),
    "hoards": Row(
        hoards("start == 0"), (("host_oom", "resubmit"),), evidence="xceeded", jobs=2,
    ),
    "hoards_all": Row(
        hoards("True"), (("host_oom", "resubmit"),), failure="host_oom", evidence="xceeded",
        rank=None, jobs=2, memory_gib=2.5,
    ),
    "gpu": Row(
        raises("step == 3 and start == 0", OUT_OF_MEMORY),
        (("out_of_memory", "restart"),), evidence="CUDA out of memory",
    ),
    "pieces": Row(
        raises(f"step == 3 and not {EXPANDS}", IN_PIECES),
        (("fragmentation", "restart"),), evidence="CUDA out of memory",
    ),
    "foreign": Row(
        raises('step == 3 and start == 0', FOREIGN),
        (("foreign_memory", "resubmit"),), evidence="process 4711 38.9 GiB", jobs=2,
    ),
    "ecc": Row(
        'if step == 3 and start < 2: raise RuntimeError('
        '"CUDA error: uncorrectable ECC error encountered")',
        (("bad_node", "resubmit"),) * 2, evidence="uncorrectable ECC error", jobs=3,
    ),
    "nan": Row(
        "", failure="nan", evidence="the loss is nan",
        options=("train.learning_rate=9.9", "train.weight_decay=9.9", "train.save_strategy=steps",
                 "train.save_steps=1", "train.lr_scheduler_type=constant",
                 "train.logging_steps=20"),
    ),
    "hangs": Row(
        "import time; time.sleep(10_000)", failure="stuck", state="TIMEOUT",
        evidence="the time limit was reached before step 1 ", rank=None,
        options=("resources.time_min=1",),
    ),
}  # fmt: skip
QUICK = ("raises",)
EVERY = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ROWS]


@pytest.fixture(scope="module")
def place(testbed: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's folder for all tests of this module."""
    with campus(tmp_path_factory.mktemp("training")) as folder:
        yield folder


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest, place: Path) -> None:
    """Submits a run per row at once, and waits until all have ended."""
    chosen = [item.callspec.params["name"] for item in request.session.items
              if item.path == request.path and hasattr(item, "callspec")]  # fmt: skip
    for name in chosen:
        row = ROWS[name]
        submitted(name, row.lines, *row.options, memory_gib=row.memory_gib)
    with hpcft("status", "--watch") as command:
        command.communicate(timeout=600)


def submitted(name: str, lines: str, *options: str, memory_gib: float | None = None) -> Path:
    """Submits a run whose ranks run some lines after each step; returns its folder."""
    site = profile(f"p-{name}", lines)
    if memory_gib:
        other = re.sub(
            "(?m)^host_memory_gib: .*", f"host_memory_gib: {memory_gib}", site.read_text()
        )
        site.write_text(other)
    changes = [word for option in (*options, f"name={name}") for word in ("-o", option)]
    with hpcft("submit", "tiny.yaml", "-c", site, *COMMON, *changes) as command:
        said = command.communicate(timeout=120)
        assert command.returncode == 0, said
    return folder_of(name)


def explained(name: str) -> dict[str, Any]:
    """Returns the output of `hpcft explain` for a recipe's only run."""
    with hpcft("explain", name, "--json") as command:
        (row,) = json.loads(out_of(command))
    return dict(row)


@pytest.mark.parametrize("name", EVERY)
def test_a_fault_ends_in_the_expected_recoveries_or_failure(site: None, name: str) -> None:
    row, folder = ROWS[name], folder_of(name)
    recoveries = recoveries_of(name)
    assert [(recovery.cause, recovery.action) for recovery in recoveries] == [*row.recoveries]
    with hpcft("status", name, "--json") as command:
        (shown,) = json.loads(out_of(command))
    with hpcft("collect", name, "--json") as command:
        (line,) = json.loads(out_of(command))
    if row.failure:
        assert shown["state"] == row.state
        failure = explained(name)["failure"]
        assert (failure["class"], failure["rank"]) == (row.failure, row.rank)
        assert row.evidence in failure["sentence"]
        assert failure["node"] in ("n1", "n2", "n3", "n4")
        assert shown["failure"] == failure
        assert line["state"] == row.state
        assert not (folder / "result.json").exists()
    else:
        assert shown["state"] == "COMPLETED", shown["note"]
        assert all(row.evidence in recovery.evidence for recovery in recoveries)
        assert {recovery.rank for recovery in recoveries} <= {row.rank}
        assert files.read_record(folder / "result.json", RunRecord).recoveries == recoveries
        assert line["state"] == "COMPLETED"
    assert len(job(name).attempts) == row.jobs
    assert sorted(jobs(name)) == sorted(attempt.job_id or "" for attempt in job(name).attempts)
    assert nothing_left(folder)


@pytest.mark.slow
def test_a_run_with_a_short_time_limit_completes_after_several_requeues(place: Path) -> None:
    """Slurm signals a limit of one minute soon after the start; the run saves its last step."""
    few = ("train.max_steps=30", "train.logging_steps=1")
    folder = submitted("limit", "import time; time.sleep(2)", *few, "resources.time_min=1")
    calm = submitted("calm", "", *few)
    with hpcft("status", "--watch") as command:
        command.communicate(timeout=500)
    ours, theirs = (files.read_record(f / "result.json", RunRecord) for f in (folder, calm))
    assert {(recovery.cause, recovery.action) for recovery in ours.recoveries} == {
        ("timeout", "requeue")
    }
    assert ours.recoveries[0].evidence == "the time limit is near"
    assert ours.metrics == theirs.metrics
    assert losses(folder) == losses(calm), "the digits differ"
    assert len(jobs("limit")) == 1
    assert nothing_left(folder)
