"""Tests of the diagnosis: from error files, logs and states to a failure class and advice."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from builders import Runs, run_progress, write_recovery
from hpcft.core.log_markers import RESTART_LINE, SETUP_BEGIN_LINE, SETUP_END_LINE
from hpcft.core.paths import RunPaths
from hpcft.core.rank_errors import read_rank_errors, write_rank_error
from hpcft.core.records import RankError
from hpcft.recovery import diagnosis
from hpcft.recovery.log import read_recoveries
from hpcft.scheduler.job_state import JobState

OOM = ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {wanted}. GPU 0 has a total "
       "capacity of 14.74 GiB of which 0.12 GiB is free. {who}Of the allocated memory {own} is "
       "allocated by PyTorch, and {kept} is reserved by PyTorch but unallocated.")  # fmt: skip
LARGE = "Including non-PyTorch memory, this process has 14.61 GiB memory in use. "
SMALL = "Including non-PyTorch memory, this process has 4.61 GiB memory in use. "
OTHER = "Process 4711 has 10.00 GiB memory in use. "


def oom(who: str, *, own: str = "13.01 GiB", kept: str = "102.51 MiB", wanted: str = "2.25 GiB"):
    return OOM.format(who=who, own=own, kept=kept, wanted=wanted)


# Failure class, and the error of a rank or a library that is evidence of it.
ERRORS = [
    ("foreign_memory", oom(OTHER + SMALL, own="3.90 GiB")),
    ("foreign_memory", oom(SMALL + OTHER, own="3.90 GiB")),
    ("foreign_memory", oom(OTHER + "Process 4712 has 4.00 GiB memory in use. ", own="3.10 GiB")),
    ("gpu_oom", oom(LARGE)),
    ("gpu_oom", oom("Process 4711 has 14.61 GiB memory in use. ")),  # in a container: itself
    ("gpu_oom", oom("Process 7 has 0.01 GiB memory in use. " + LARGE)),  # somebody's desktop
    ("fragmentation", oom(LARGE, own="9.00 GiB", kept="4.51 GiB")),
    ("gpu_oom", "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    ("gpu_oom", "torch.AcceleratorError: CUDA error: out of memory"),
    ("host_oom", "RuntimeError: [enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: "
     "can't allocate memory: you tried to allocate 3221225472 bytes."),
    ("host_oom", "RuntimeError: DataLoader worker (pid 7) is killed by signal: Killed."),
    ("host_oom", "numpy.core._exceptions._ArrayMemoryError: Unable to allocate\nMemoryError"),
    ("host_oom", "OSError: [Errno 12] Cannot allocate memory"),
    ("host_oom", "Killed: the kernel killed it for lack of memory (oom_kill)"),
    ("disk", "OSError: [Errno 28] No space left on device: '/none/u/runs/model.part'"),
    ("disk", "OSError: [Errno 122] Disk quota exceeded: '/home/u/runs/model.part'"),
    ("disk", "safetensors_rust.SafetensorError: I/O error: No space left on device (os error 28)"),
    ("disk", "RuntimeError: PytorchStreamWriter failed writing file data/12: file write failed"),
    ("file_system", "OSError: [Errno 30] Read-only file system: '/scratch/u/runs/progress.json'"),
    ("file_system", "OSError: [Errno 116] Stale file handle: '/scratch/u/train.jsonl'"),
    ("bad_node", "RuntimeError: CUDA error: uncorrectable ECC error encountered"),
    ("bad_node", "RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
    ("access", "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate cached "
     "snapshot folder"),
    ("access", "OSError: We couldn't connect to 'https://huggingface.co' to load the files. Check "
     "your internet connection or see how to run the library in offline mode"),
    ("access", "requests.exceptions.HTTPError: 401 Client Error: Unauthorized for url: x"),
    ("access", "huggingface_hub.errors.GatedRepoError: 403 Client Error. Cannot access gated repo"),
    ("access", "DataError: model: x/y: model.safetensors is gone, as n1 sees it; stage it again, "
     "on a file system that the compute nodes share (HF_HOME)"),
    ("nan", "FloatingPointError: the loss is nan at step 12 (learning rate 0.1)"),
    ("nan", "Exception: Current loss scale already at minimum - cannot decrease scale anymore."),
    ("port", "torch.distributed.DistNetworkError: The server socket has failed to listen on any "
     "local network address. port: 29500, useIpv6: false, code: -98, name: EADDRINUSE, message: "
     "address already in use"),
    ("nccl", "torch.distributed.DistBackendError: NCCL error in: ../ProcessGroupNCCL.cpp:2251, "
     "unhandled system error"),
    ("nccl", "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed "
     "by peer [127.0.0.1]:3456"),
    ("nccl", "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] "
     "Timed out waiting 1800000ms for recv operation to complete"),
    ("rank_died", "Died: the training process was ended by SIGSEGV"),
    ("interrupted", "KeyboardInterrupt: told to end"),
    ("module", "ModuleNotFoundError: No module named 'submitit'"),
    ("device_assert", "torch.AcceleratorError: CUDA error: device-side assert triggered"),
    ("permission", "PermissionError: [Errno 13] Permission denied: '/project/g/train.jsonl'"),
    ("environment", "ModuleNotFoundError: No module named 'sentencepiece'"),
    ("stale_build_lock", "TimeoutError: /cache/cpu_adam/lock: the build lock of a DeepSpeed "
     "operator is still held by process 7 on n1"),
]  # fmt: skip

# Failure class, rank and node that it names, and a line that Slurm or a driver prints into a log.
LOG_LINES = [
    ("host_oom", None, "n1", "slurmstepd-n1: error: StepId=4.0 exceeded memory limit (2708549632 > "
     "2013265920), being killed"),
    ("host_oom", None, "", "slurmstepd: error: Detected 1 oom_kill event in StepId=12.0. Some of "
     "the step tasks have been OOM Killed."),
    ("host_oom", 3, "n2", "srun: error: n2: task 3: Out Of Memory"),
    ("timeout", None, "", "slurmstepd: error: *** JOB 11 ON n1 CANCELLED AT 2026-11-21T13:00:00 "
     "DUE TO TIME LIMIT ***"),
    ("timeout", 0, "", "submitit WARNING (2026-11-21 13:00:00,1) - Job not requeued because: "
     "timed-out and not checkpointable."),
    ("preempted", None, "", "slurmstepd: error: *** STEP 11.0 ON n1 CANCELLED AT "
     "2026-11-21T13:00:00 DUE TO PREEMPTION ***"),
    ("node_failed", None, "", "slurmstepd: error: *** JOB 11 ON n1 CANCELLED AT "
     "2026-11-21T13:00:00 DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***"),
    ("node_failed", None, "n4", "srun: error: Node failure on n4"),
    ("rank_died", 2, "n2", "srun: error: n2: task 2: Killed"),
    ("rank_died", 2, "n2", "srun: error: n2: tasks 2-3: Segmentation fault (core dumped)"),
    ("rank_died", 5, "n3", "srun: error: n3: task 5: Exited with exit code 9"),
    ("module", None, "", "slurmstepd: error: execve(): /opt/none/python: No such file or "
     "directory"),
    ("bad_node", 0, "", "kernel: NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus."),
    ("disk", None, "", "slurmstepd: error: cannot write output: No space left on device"),
    ("gpu_oom", 0, "", "[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate it"),
    ("nccl", 0, "", "[rank1]:[E1121 ProcessGroupNCCL.cpp:629] [Rank 1] Watchdog caught collective "
     "operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for 600012 milliseconds"),
    ("launch", None, "", "srun: fatal: SLURM_MEM_PER_CPU, SLURM_MEM_PER_GPU, and "
     "SLURM_MEM_PER_NODE are mutually exclusive."),
    ("user", 0, "", "json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
]  # fmt: skip
TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n{}\n'


def explain(runs: Runs, state: str = "FAILED", **evidence: Any) -> diagnosis.Failure:
    """Adds a run with this evidence, and explains its failure."""
    paths = runs.add("aaaa0000", **evidence)
    job = runs.find("aaaa0000").job
    return diagnosis.explain_failure(
        paths, job.attempts[-1], JobState(state), read_recoveries(paths)
    )


@pytest.mark.parametrize("by", ["log", "errors"])
@pytest.mark.parametrize(("name", "text"), ERRORS)
def test_explain_failure_finds_the_class_of_an_error(
    name: str, text: str, by: str, runs: Runs
) -> None:
    kind, _, message = text.partition(": ")
    in_log = {"log": TRACEBACK.format(text)}
    failure = explain(runs, **in_log if by == "log" else {"errors": ((kind, message),)})
    assert failure.name == name
    assert failure.evidence[:60] in text, "the decisive line is shown"
    assert (failure.rank, failure.node) == (0, "n0" if by == "errors" else "")
    assert failure.source.endswith("11_0_log.err" if by == "log" else "errors/0.json")
    assert failure.policy in diagnosis.POLICIES
    runs.states = {"11": JobState("FAILED")}
    note = runs.status_of("aaaa0000").note
    assert note == str(failure) == f"{name}: {failure.sentence}; {failure.next_step}"


@pytest.mark.parametrize(("name", "rank", "node", "text"), LOG_LINES)
def test_explain_failure_finds_class_and_place_of_a_log_line(
    name: str, rank: int | None, node: str, text: str, runs: Runs
) -> None:
    failure = explain(runs, log=TRACEBACK.format(text))
    assert (failure.name, failure.rank, failure.node) == (name, rank, node)
    assert failure.evidence[:60] in text


def test_every_class_with_patterns_is_tested() -> None:
    known = {name for name, row in diagnosis.KNOWN.items() if row.patterns}
    shown = {name for name, _ in ERRORS} | {name for name, *_ in LOG_LINES}
    assert known <= shown <= set(diagnosis.KNOWN)


@pytest.mark.parametrize(
    "text",
    [
        "n1:412:412 [0] NCCL WARN NET/IB : No device found.",
        "n1:412:412 [0] NCCL INFO Using network Socket, timeout 22",
        "[W1121 CUDAAllocatorConfig.h:28] Warning: expandable_segments not supported: out of memory"
        " may come earlier",
        "UserWarning: on CUDA out of memory. Tried to allocate is what you would see",
        "warning: 3 rows say 'No space left on device' and are kept",
        "KeyError: 'CUDA out of memory. Tried to allocate 2 GiB'",
        'ValueError: label: expected good or bad, got "[Errno 28] No space left on device"',
        "NVRM: Xid (PCI:0000:3b:00): 31, pid=7, name=python, Ch 00000008",
        "see https://huggingface.co/docs for how to run the library in offline mode",
        "the loss is nan at step 12",
        "Exception ignored in: <function x at 0x7f>",
        "job 12 was oom-killed last week",
    ],
)
def test_explain_failure_ignores_warnings_and_quoted_text(text: str, runs: Runs) -> None:
    failure = explain(runs, log=f"{text}\n", errors=(("ValueError", "the real one"),))
    assert (failure.name, failure.evidence) == ("user", "ValueError: the real one")
    job = runs.find("aaaa0000").job
    (RunPaths(runs.root / "made/aaaa0000").errors / "0.json").unlink()
    left = diagnosis.explain_failure(
        RunPaths(runs.root / "made/aaaa0000"), job.attempts[-1], JobState("?")
    )
    assert left.name in ("rank_died", "user"), left
    assert left.policy in ("requeue", "stop")


# ---------------------------------------------------------------- which of several counts

CLOSED = ("RuntimeError", "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:1")
KERNEL = "slurmstepd: error: Detected 1 oom_kill event in StepId=1.0"


@pytest.mark.parametrize(
    ("errors", "log", "state", "name", "says"),
    [
        # Only Slurm reports a rank that died silently; the others lost their peer.
        ((CLOSED,), KERNEL, "FAILED", "host_oom", "oom_kill"),
        ((CLOSED,), "srun: error: n2: task 1: Killed", "FAILED", "nccl", "rank 0 on n0"),
        ((), "srun: error: n2: task 1: Killed", "FAILED", "rank_died", "rank 1 on n2"),
        ((CLOSED,), "", "OUT_OF_MEMORY", "host_oom", "more host memory than --mem"),
        ((CLOSED,), "", "TIMEOUT", "timeout", "time limit"),
        ((CLOSED,), "", "FAILED", "nccl", "Connection closed by peer"),
        # A rank's own error explains more than the errors of its peers.
        ((CLOSED, ("KeyError", "'x'")), "", "FAILED", "user", "rank 1 on n1: KeyError: 'x'"),
        ((("DataError", "label: no such"),), "", "FAILED", "user", "rank 0 on n0: label: no such"),
        # The earliest of several counts.
        ((("ValueError", "first"), ("ValueError", "second")), "", "FAILED", "user", "first"),
        # An error while the job is being cancelled does not hide the cancellation.
        ((("KeyboardInterrupt", "told to end"),), "", "CANCELLED", "cancelled", "cancelled"),
        ((), "", "FAILED", "rank_died", "without an error message"),
    ],
)
def test_explain_failure_prefers_the_cause_to_its_consequences(
    errors: tuple[tuple[str, str], ...], log: str, state: str, name: str, says: str, runs: Runs
) -> None:
    failure = explain(runs, state, errors=errors, log=log)
    assert (failure.name, says in failure.sentence) == (name, True), failure


@pytest.mark.parametrize(
    ("state", "name", "policy"),
    [
        ("PREEMPTED", "preempted", "requeue"), ("NODE_FAIL", "node_failed", "requeue"),
        ("BOOT_FAIL", "node_failed", "requeue"), ("OUT_OF_MEMORY", "host_oom", "change"),
        ("CANCELLED", "cancelled", "stop"), ("DEADLINE", "timeout", "requeue"),
        ("SPECIAL_EXIT", "requeue_held", "stop"),
    ],
)  # fmt: skip
def test_explain_failure_without_evidence_uses_the_state_of_the_job(
    state: str, name: str, policy: str, runs: Runs
) -> None:
    failure = explain(runs, state)
    assert (failure.name, failure.policy, failure.source) == (name, policy, "")


def test_explain_failure_of_a_time_limit_without_progress_is_stuck(runs: Runs) -> None:
    further = explain(runs, "TIMEOUT", parts=(run_progress(step=30, total_steps=120),))
    assert (further.name, further.policy) == ("timeout", "requeue")
    assert further.evidence == "the time limit was reached at step 30 of 120"
    paths = RunPaths(runs.root / "made/aaaa0000")
    write_recovery(paths, step=30)
    job = runs.find("aaaa0000").job
    recoveries = read_recoveries(paths)
    again = diagnosis.explain_failure(paths, job.attempts[-1], JobState("TIMEOUT"), recoveries)
    assert (again.name, again.policy) == ("stuck", "stop")
    assert again.evidence == "the time limit was reached before step 31 (training)"


def test_explain_failure_ignores_evidence_of_earlier_starts_and_attempts(runs: Runs) -> None:
    log = f"OSError: [Errno 28] No space left on device\n{RESTART_LINE} with less\nAborted\n"
    paths = runs.add("aaaa0000", errors=(("KeyError", "'x'"),), log=log)
    job = runs.find("aaaa0000").job
    attempt, failed = job.attempts[-1], JobState("FAILED")
    assert diagnosis.explain_failure(paths, attempt, failed).name == "user"
    write_recovery(paths, step=3, at=time.time())  # The error was written before.
    left = diagnosis.explain_failure(paths, attempt, failed, read_recoveries(paths))
    assert (left.name, left.evidence) == ("rank_died", "a rank ended without an error message")
    other = attempt.model_copy(update={"job_id": "12"})
    error = read_rank_errors(paths)[0].model_copy(update={"job_id": "11"})
    write_rank_error(paths, error)
    assert diagnosis.explain_failure(paths, other, failed).name == "rank_died"


def test_explain_failure_uses_the_class_that_a_rank_reported(runs: Runs) -> None:
    paths = runs.add("aaaa0000", errors=(CLOSED, ("TimeoutError", "no step for 312 s")))
    error = read_rank_errors(paths)[1].model_copy(update={"failure": "stuck"})
    write_rank_error(paths, error)
    job = runs.find("aaaa0000").job
    failure = diagnosis.explain_failure(paths, job.attempts[-1], JobState("FAILED"))
    assert (failure.name, failure.sentence) == ("stuck", "rank 1 on n1: no step for 312 s")
    assert failure.next_step == diagnosis.KNOWN["stuck"].next_step
    update = {"next_step": "look at it", "failure": "of_another_version"}
    classified = diagnosis.classify(error.model_copy(update=update))
    assert str(classified).endswith("no step for 312 s; look at it")


@pytest.mark.parametrize(
    ("errors", "name", "rank"),
    [
        # When one rank fails, srun stops the others, and each of them reports that.
        ([("", "KeyError", "'x'"), ("preempted", "Ended", "stopped (SIGTERM)")], "user", 0),
        ([("preempted", "Ended", "stopped"), ("", "KeyError", "'x'")], "user", 1),
        ([("", "Died", "ended by SIGKILL"), ("preempted", "Ended", "stopped")], "rank_died", 0),
        ([("preempted", "Ended", "stopped"), ("", "RuntimeError", "Connection closed by peer")],
         "preempted", 0),
        ([("timeout", "Ended", "near"), ("timeout", "Ended", "near")], "timeout", 0),
        # A report that all restarts have failed comes first.
        ([("preempted", "Ended", "stopped"), ("stuck", "Ended", "no progress past step 4")],
         "stuck", 1),
        ([("foreign_memory", "OutOfMemoryError", "x"), ("preempted", "Ended", "stopped")],
         "foreign_memory", 0),
    ],
)  # fmt: skip
def test_explain_failure_does_not_blame_a_rank_that_was_stopped(
    errors: list[tuple[str, str, str]], name: str, rank: int, runs: Runs
) -> None:
    paths = runs.add("aaaa0000")
    for number, (failure_class, kind, message) in enumerate(errors):
        error = RankError(rank=number, node="n1", at=1.0 + number, kind=kind, message=message,
                          failure=failure_class)  # fmt: skip
        write_rank_error(paths, error)
    job = runs.find("aaaa0000").job
    failure = diagnosis.explain_failure(paths, job.attempts[-1], JobState("RUNNING"))
    assert (failure.name, failure.rank) == (name, rank), failure


@pytest.mark.parametrize(
    ("stopped_as", "killed_task", "name", "rank"),
    [
        ("preempted", 1, "rank_died", 1),  # srun has stopped rank 0 after it.
        ("preempted", 0, "preempted", 0),  # It took too long to end after a preemption.
        ("timeout", 1, "timeout", 0),
    ],
)
def test_explain_failure_of_a_killed_supervisor_is_no_preemption(
    stopped_as: str, killed_task: int, name: str, rank: int, runs: Runs
) -> None:
    log = (
        f"srun: error: n2: task {killed_task}: Killed\n"
        "srun: Terminating StepId=11.0\n"
        "slurmstepd: error: *** STEP 11.0 ON n1 CANCELLED AT 2026-01-02T03:04:05 ***\n"
    )
    paths = runs.add("aaaa0000", log=log)
    error = RankError(rank=0, node="n1", at=1.0, kind="Ended", message="stopped (SIGTERM)",
                      failure=stopped_as)  # fmt: skip
    write_rank_error(paths, error)
    attempt = runs.find("aaaa0000").job.attempts[-1]
    for state in ("RUNNING", "FAILED"):
        failure = diagnosis.explain_failure(paths, attempt, JobState(state))
        assert (failure.name, failure.rank) == (name, rank), failure


# ---------------------------------------------------------------- setup, disk, logs


def test_explain_failure_shows_the_setup_line_that_failed(runs: Runs) -> None:
    says = "Lmod has detected the following error: The following module(s) are unknown: cuda/99"
    failure = explain(runs, log=f"{SETUP_BEGIN_LINE}\n{says}\n")
    assert (failure.name, failure.policy) == ("module", "stop")
    assert failure.evidence == f"the profile's setup failed: {says}"
    log = RunPaths(runs.root / "made/aaaa0000").logs / "11_0_log.err"
    run = runs.find("aaaa0000")
    paths, job = run.paths, run.job
    full_disk = "OSError: [Errno 28] No space left on device"
    for lines, name in (
        # A setup that succeeded is no cause.
        ([SETUP_BEGIN_LINE, says, SETUP_END_LINE, full_disk], "disk"),
        # After a restart only the latest start counts.
        ([SETUP_BEGIN_LINE, SETUP_END_LINE, "KeyError: 1", SETUP_BEGIN_LINE, "false"], "module"),
        ([SETUP_BEGIN_LINE], "module"),
    ):
        log.write_text("".join(f"{line}\n" for line in lines))
        failure = diagnosis.explain_failure(
            paths, job.attempts[-1], JobState("FAILED", exit_code="1:0")
        )
        assert failure.name == name
    assert "failed without an error message (exit code 1:0)" in failure.sentence


def test_explain_failure_of_a_full_disk_with_inodes_left_keeps_its_advice(runs: Runs) -> None:
    text = "No space left on device: '/none/u/model.part'"
    failure = explain(runs, errors=(("OSError", f"[Errno 28] {text}"),))
    assert failure.next_step == diagnosis.KNOWN["disk"].next_step


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small file system")
def test_explain_failure_names_a_file_system_without_inodes(runs: Runs, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=4", "none", str(small)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        for name in "abc":
            (small / name).touch()
        with pytest.raises(OSError, match="No space left on device") as full:
            (small / "d").touch()
        failure = explain(runs, errors=(("OSError", str(full.value)),))
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert failure.name == "disk"
    assert failure.next_step.startswith(f"{small} has no inodes left: remove some files")


def test_explain_failure_reads_only_the_end_of_a_long_log(runs: Runs) -> None:
    text = oom(LARGE) + "\n" + "x" * 60_000 + "\nOSError: No space left on device\n"
    assert explain(runs, log=text).name == "disk"


def test_explain_failure_bounds_and_escapes_hostile_logs(runs: Runs) -> None:
    escape = "RuntimeError: [Errno 28]\x1b[2J\u202e No space left on device" + "é" * 5_000
    failure = explain(runs, log=escape, errors=((CLOSED[0], CLOSED[1]),))
    assert failure.name == "disk"
    assert failure.evidence.isprintable()
    assert len(failure.evidence) == 300
    log = RunPaths(runs.root / "made/aaaa0000").logs / "11_0_log.err"
    run = runs.find("aaaa0000")
    paths, job = run.paths, run.job
    for unit in ("RuntimeError: ", "Error", "srun: error: n1: tasks ", "exceeded ", "x: ", "a."):
        log.write_text(unit * (40_000 // len(unit)))
        started = time.perf_counter()
        diagnosis.explain_failure(paths, job.attempts[-1], JobState("FAILED"))
        assert time.perf_counter() - started < 1.0, unit


def test_explain_failure_skips_damaged_errors_and_binary_logs(runs: Runs) -> None:
    paths = runs.add("aaaa0000", errors=(("ValueError", "the reason"),))
    (paths.errors / "7.json").write_text("{")
    (paths.logs / "11_1_log.err").write_bytes(b"\xff\xfe\x00" * 100)
    (paths.logs / "11_99999999999_log.err").write_text("KeyError: 1")
    job = runs.find("aaaa0000").job
    failure = diagnosis.explain_failure(paths, job.attempts[-1], JobState("FAILED"))
    assert "the reason" in failure.sentence
