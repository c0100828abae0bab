"""Watchdogs tell a rank that hangs, is stopped or does not end from one that is slow or waits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from builders import Cli, cluster, facts, plan_of, recipe, submitted_run
from hpcft.core.files import read_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import RankError
from hpcft.recovery import log
from hpcft.training.distributed.rank_env import RankInfo
from hpcft.training.distributed.worker_channel import HeartbeatSender
from hpcft.training.supervision import hang_diagnosis, liveness, watchdog
from hpcft.training.supervision.hang_diagnosis import StackReport, StackRequest
from hpcft.training.supervision.watchdog import Watchdog
from real_runs import is_gone, until, worker_pids

pytestmark = pytest.mark.process

# Seconds that a rank of these tests may be quiet in a step.
LIMIT_S = 0.5

# A worker that trains nothing: it does what its arguments say, one after the other.
WORKER = """
import signal, sys, time
from hpcft.training.distributed import worker_channel

heartbeats = worker_channel.connect(int(sys.argv[1]), int(sys.argv[2]))

def hangs():
    while True:
        signal.pause()

for action in sys.argv[3:]:
    name, _, argument = action.partition(":")
    if name == "steps":
        for step in range(1, int(argument) + 1):
            heartbeats.send("training", step)
            time.sleep(0.01)
    elif name == "slow":
        for step in range(1, int(argument) + 1):
            heartbeats.send("training", step)
            time.sleep(0.3)
    elif name == "scores":
        for example in range(10_000):
            heartbeats.send("evaluation", example)
            time.sleep(0.05)
    elif name == "computes":
        heartbeats.send("data", 0)
        while True:
            sum(range(10_000))
    elif name == "joins":
        import torch
        heartbeats.send("training", 1)
        store = torch.distributed.FileStore(argument, 2)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=2)
    elif name == "hangs":
        hangs()
    else:
        heartbeats.send(name, 0)
"""

Start = Callable[..., list[Watchdog]]


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path)


@pytest.fixture
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens all times in proportion."""
    for module, name, seconds in (
        (liveness, "STOPPED_S", 0.3), (liveness, "BUSY_S", 0.3), (liveness, "AWAKE_S", 0.4),
        (watchdog, "FOLDER_POLL_S", 0.1), (watchdog, "EXIT_S", 0.5), (watchdog, "REPORTS_S", 1.0),
        (watchdog, "STACKS_S", 0.2),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, seconds)


@pytest.fixture
def start(paths: RunPaths, short_times: None) -> Iterator[Start]:
    """Starts the workers of a run's ranks, each with its watchdog."""
    workers: list[subprocess.Popen[bytes]] = []
    profile = cluster("local", stuck_after_min=LIMIT_S / 60)
    made = recipe()
    run = submitted_run(paths.folder, made, profile, plan_of(made, profile, facts(1_000_000)))

    def start_workers(*actions_by_rank: str) -> list[Watchdog]:
        watchdogs = []
        for number, actions in enumerate(actions_by_rank):
            rank = RankInfo(number, len(actions_by_rank), number, f"n{number}", "77")
            new = Watchdog(run, rank, 0)
            command = [sys.executable, "-c", WORKER, *map(str, new.worker_fds), *actions.split()]
            worker = subprocess.Popen(command, pass_fds=new.worker_fds)
            new.watch(worker.pid)
            workers.append(worker)
            watchdogs.append(new)
        return watchdogs

    yield start_workers
    for worker in workers:
        worker.kill()
        worker.wait()


def poll_until_hang(watchdogs: list[Watchdog], seconds: float = 20.0) -> tuple[int, RankError]:
    """Polls, as supervisors do, until a watchdog has found a hang; returns its rank and error."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for rank, one in enumerate(watchdogs):
            if error := one.poll():
                return rank, error
        time.sleep(0.02)
    raise AssertionError("no watchdog has found a hang")


def assert_no_hang(watchdogs: list[Watchdog], seconds: float) -> None:
    """Polls for a while, and finds no hang."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert [one.poll() for one in watchdogs] == [None] * len(watchdogs)
        time.sleep(0.02)


def pid_of(watchdog: Watchdog) -> int:
    return watchdog._pid


def test_poll_names_the_rank_that_is_behind_and_writes_all_stacks(
    start: Start, paths: RunPaths
) -> None:
    watchdogs = start("steps:20 hangs", "steps:9 hangs", "steps:20 hangs")
    requester, error = poll_until_hang(watchdogs)
    assert (error.rank, error.node, error.failure, error.job_id) == (1, "n1", "stuck", "77")
    assert error.message.startswith("no step for ")
    assert error.message.endswith(" s after step 9 (steps took 0.0 s)")
    (folder,) = paths.stacks.iterdir()
    assert str(folder) in error.next_step
    assert read_record(folder / "request.json", StackRequest).rank == requester
    assert sorted(file.name for file in folder.glob("?.*")) == [
        "0.json", "0.txt", "1.json", "1.txt", "2.json", "2.txt"
    ]  # fmt: skip
    text = (folder / "2.txt").read_text()
    assert text.startswith("rank 2 on n2: no step for ")
    assert "in hangs" in text
    assert [os.kill(pid_of(one), 0) for one in watchdogs] == [None] * 3, "all workers are alive"


def test_poll_finds_a_stopped_rank_at_once(start: Start, paths: RunPaths) -> None:
    watchdogs = start("scores", "scores")
    assert_no_hang(watchdogs, 0.5)
    os.kill(pid_of(watchdogs[1]), signal.SIGSTOP)
    started = time.monotonic()
    requester, error = poll_until_hang(watchdogs)
    assert time.monotonic() - started < 3.0, "it does not wait until the rank is quiet for long"
    assert (requester, error.rank, error.failure) == (1, 1, "stuck")
    assert error.message.startswith("is stopped (SIGSTOP), no heartbeat for ")
    (folder,) = paths.stacks.iterdir()
    assert "Current thread" in (folder / "0.txt").read_text()
    assert "Thread" not in (folder / "1.txt").read_text()


def test_poll_of_a_slow_rank_finds_no_hang(start: Start) -> None:
    """Long steps allow longer steps; a rank that computes alone is at work."""
    assert_no_hang(start("slow:100", "computes"), 5 * LIMIT_S)


def test_poll_of_a_rank_that_waits_for_a_slow_one_finds_no_hang(
    start: Start, paths: RunPaths
) -> None:
    """One rank has less to score: it requests reports, and another rank still makes progress."""
    watchdogs = start("evaluation hangs", "scores")
    assert_no_hang(watchdogs, 5.5 * LIMIT_S)
    (folder,) = paths.stacks.iterdir()
    first, second = hang_diagnosis.read_reports(folder)
    assert first.quiet_s > 4 * LIMIT_S
    assert second.makes_progress
    os.kill(pid_of(watchdogs[1]), signal.SIGSTOP)
    _, error = poll_until_hang(watchdogs)
    assert error.rank == 1
    assert len(list(paths.stacks.iterdir())) == 2


@pytest.mark.parametrize(
    ("frames", "waits"),
    [
        (["torch/nn/modules/linear.py\", line 125 in forward"], False),
        (["torch/distributed/distributed_c10d.py\", line 3000 in all_reduce"], True),
        (["deepspeed/comm/torch.py\", line 180 in all_reduce"], True),
        (["torch/autograd/graph.py\", line 829 in _engine_run_backward"], True),
        (["torch/nn/parallel/distributed.py\", line 2363 in _distributed_broadcast_coalesced",
          "torch/nn/parallel/distributed.py\", line 2405 in _sync_buffers",
          "torch/nn/parallel/distributed.py\", line 1700 in forward"], True),
        (["hpcft/core/host.py\", line 27 in wait_until",
          "hpcft/training/distributed/rendezvous.py\", line 99 in _wait_for"], True),
    ],
)  # fmt: skip
def test_waits_for_others_reads_the_main_threads_stack(frames: list[str], waits: bool) -> None:
    stack = [*frames, 'training/modes/finetune.py", line 9 in finetune']
    lines = "\n".join(f'  File "/x/{frame}' for frame in stack)
    other = '  File "/x/torch/distributed/elastic/timer.py", line 1 in wait'
    text = (f"Thread 0x1 (most recent call first):\n{other}\n\n"
            f"Current thread 0x2 (most recent call first):\n{lines}\n")  # fmt: skip
    assert hang_diagnosis.waits_for_others(text) == waits


@pytest.mark.slow  # A worker imports torch.
def test_poll_does_not_blame_the_rank_in_a_collective(start: Start, paths: RunPaths) -> None:
    """Both ranks are in the same step, and only their stacks tell them apart."""
    watchdogs = start(f"joins:{paths.folder / 'store'}", "steps:1 hangs")
    _, error = poll_until_hang(watchdogs)
    assert (error.rank, error.phase) == (1, "training")
    reports = hang_diagnosis.read_reports(next(paths.stacks.iterdir()))
    assert [report.waits for report in reports] == [True, False]


def test_poll_suspects_the_rank_whose_supervisor_does_not_respond(start: Start) -> None:
    watchdogs = start("steps:9 hangs", "steps:9 hangs")
    _, error = poll_until_hang(watchdogs[:1])
    assert (error.rank, error.node) == (1, "unknown")
    assert error.message.startswith("its supervisor does not respond; rank 0 on n0: no step for ")


def test_poll_after_a_suspension_of_the_job_finds_no_hang(start: Start) -> None:
    """The supervisor was suspended too, and does not count that time."""
    watchdogs = start("data hangs")
    assert_no_hang(watchdogs, 0.5)
    watchdogs[0]._liveness._polled_at -= 3600
    assert_no_hang(watchdogs, 0.1)


def test_a_worker_that_is_done_and_does_not_end_hangs_at_exit(start: Start) -> None:
    (one,) = start("steps:3 done hangs")
    deadline = time.monotonic() + 20
    while not one.hangs_at_exit:
        assert one.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert_no_hang([one], 1.5 * LIMIT_S)


def test_poll_finds_a_hang_once_the_run_folder_is_back(start: Start, paths: RunPaths) -> None:
    paths.stacks.write_text("a file in the place of the folder")
    watchdogs = start("steps:5 hangs")
    assert_no_hang(watchdogs, 3 * LIMIT_S)
    paths.stacks.unlink()
    assert poll_until_hang(watchdogs)[1].failure == "stuck"


def test_sending_heartbeats_never_blocks(short_times: None) -> None:
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    heartbeats = HeartbeatSender(write_end)
    started = time.perf_counter()
    for step in range(10_000):  # More than a pipe holds.
        heartbeats.send("training", step)
    assert time.perf_counter() - started < 1.0
    os.close(read_end)
    heartbeats.send("training", 0)  # Nobody reads the pipe any more.
    os.close(write_end)


def report(rank: int, **fields: object) -> StackReport:
    """Returns the report of a rank that is quiet for too long in step 5."""
    defaults = {"rank": rank, "node": "n", "phase": "training", "step": 5, "phases": 4,
                "heartbeats": 12, "quiet_s": 500.0, "limit_s": 480.0, "step_s": None,
                "stopped": False, "waits": False}  # fmt: skip
    return StackReport.model_validate(defaults | fields)


@pytest.mark.parametrize(
    ("reports", "late"),
    [
        ([report(0), report(1)], [0, 1]),
        ([report(0), report(1, heartbeats=11), report(2)], [1]),
        ([report(0, phases=3, heartbeats=40), report(1)], [0]),
        ([report(0, waits=True), report(1), report(2, waits=True)], [1]),
        ([report(0, waits=True, heartbeats=11), report(1)], [1]),
        ([report(0, waits=True), report(1, waits=True)], [0, 1]),
        ([report(0, heartbeats=1), report(1, stopped=True, waits=True)], [1]),
    ],
)
def test_find_late_ranks_returns_those_that_others_wait_for(
    reports: list[StackReport], late: list[int]
) -> None:
    assert [found.rank for found in hang_diagnosis.find_late_ranks(reports)] == late


def test_diagnose_hang_of_many_ranks_shortens_the_list(tmp_path: Path) -> None:
    reports = [report(rank, waits=rank < 40) for rank in range(60)]
    error = hang_diagnosis.diagnose_hang(tmp_path, reports, 60, "1")
    assert error is not None
    assert error.message == (
        "no step for 500 s after step 5; the same on ranks 40, 41, 42, 43, 44, 45, 46, 47, "
        "48, 49, 50, 51, 52, 53, 54, 55 and 4 more of 60"
    )
    with_progress = [*reports, report(60, quiet_s=3.0)]
    assert hang_diagnosis.diagnose_hang(tmp_path, with_progress, 61, "1") is None
    all_alike = hang_diagnosis.diagnose_hang(tmp_path, reports[:40], 40, "1")
    assert all_alike is not None
    assert all_alike.message.endswith("; the same on all ranks")
    silent = hang_diagnosis.diagnose_hang(tmp_path, reports[:58], 60, "1")
    assert silent is not None
    assert silent.message.startswith(
        "its supervisor does not respond (nor do those of ranks 59); rank 40 on n: no step"
    )


@pytest.mark.slow
def test_a_run_restarts_after_one_of_its_ranks_was_stopped(tiny: Path, cli: Cli) -> None:
    """All ranks restart from the last checkpoint; their stacks are in the run folder."""
    said = cli("submit", tiny, "-c", "local", "-o", "resources.gpus_per_node=2",
               "-o", "train.max_steps=300", "-o", "train.save_strategy=steps",
               "-o", "train.save_steps=20", "--json")  # fmt: skip
    folder = Path(said.json[0]["folder"])
    until(lambda: log.saved_step(RunPaths(folder)) > 0)
    os.kill(worker_pids(folder)[0], signal.SIGSTOP)
    until(lambda: is_gone(folder))
    (view,) = cli("status", "--json").json
    assert view["state"] == "COMPLETED", view["note"]
    (recovery,) = log.read_recoveries(RunPaths(folder))
    assert (recovery.cause, recovery.action) == ("stuck", "restart")
    assert recovery.step >= 20
    assert "is stopped (SIGSTOP), no step for " in recovery.evidence
    assert recovery.node == os.uname().nodename
    (request,) = (folder / "stacks").iterdir()
    reports = hang_diagnosis.read_reports(request)
    assert [report.stopped for report in reports] == [
        report.rank == recovery.rank for report in reports
    ]
    assert reports[1 - recovery.rank].waits
    assert "/finetune.py" in (request / f"{1 - recovery.rank}.txt").read_text()
