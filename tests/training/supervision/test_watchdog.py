"""A rank that hangs, is stopped or does not end is told from one that is slow or waits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from builders import Cli, cluster, facts, plan_of, recipe
from hpcft.core.files import read_record
from hpcft.core.paths import RunPaths
from hpcft.recovery import log
from hpcft.recovery.diagnosis import RankError
from hpcft.training.distributed.rank_env import RankInfo
from hpcft.training.distributed.worker_channel import HeartbeatSender
from hpcft.training.supervision import hang_diagnosis, liveness, watchdog
from hpcft.training.supervision.hang_diagnosis import StackReport
from hpcft.training.supervision.watchdog import Watchdog
from real_runs import children, gone, until

# Seconds that a rank of these tests may be quiet in a step.
LEAST_S = 0.5

# A training in small: it does what its arguments say, one after the other.
CHILD = """
import signal, sys, time
from hpcft.training.distributed import worker_channel

told = worker_channel.attach(int(sys.argv[1]), int(sys.argv[2]))

def hangs():
    while True:
        signal.pause()

for what in sys.argv[3:]:
    name, _, number = what.partition(":")
    if name == "steps":
        for step in range(1, int(number) + 1):
            told.beat("training", step)
            time.sleep(0.01)
    elif name == "slow":
        for step in range(1, int(number) + 1):
            told.beat("training", step)
            time.sleep(0.3)
    elif name == "asks":
        for example in range(10_000):
            told.beat("evaluation", example)
            time.sleep(0.05)
    elif name == "computes":
        told.beat("data", 0)
        while True:
            sum(range(10_000))
    elif name == "joins":
        import torch
        told.beat("training", 1)
        store = torch.distributed.FileStore(number, 2)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=2)
    elif name == "hangs":
        hangs()
    else:
        told.beat(name, 0)
"""

Start = Callable[..., list[Watchdog]]


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """All times shorter, in proportion."""
    for module, name, seconds in (
        (liveness, "STOPPED_S", 0.3), (liveness, "BUSY_S", 0.3), (liveness, "AWAKE_S", 0.4),
        (watchdog, "LOOK_S", 0.1), (watchdog, "EXIT_S", 0.5), (watchdog, "ANSWERS_S", 1.0),
        (watchdog, "STACKS_S", 0.2),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, seconds)


@pytest.fixture
def start(paths: RunPaths, short: None) -> Iterator[Start]:
    """Starts the children of a run's ranks, each with its watchdog."""
    children: list[subprocess.Popen[bytes]] = []
    site = cluster("local", stuck_after_min=LEAST_S / 60)
    planned = plan_of(recipe(), site, facts(1_000_000))

    def starts(*whats: str) -> list[Watchdog]:
        found = []
        for number, what in enumerate(whats):
            me = RankInfo(number, len(whats), number, f"n{number}", "77")
            watch = Watchdog(paths, me, site, planned, 0)
            command = [sys.executable, "-c", CHILD, *map(str, watch.passed), *what.split()]
            child = subprocess.Popen(command, pass_fds=watch.passed)
            watch.watch(child.pid)
            children.append(child)
            found.append(watch)
        return found

    yield starts
    for child in children:
        child.kill()
        child.wait()


def verdict(watches: list[Watchdog], seconds: float = 20.0) -> tuple[int, RankError]:
    """Looks, as the supervisors do, until one of them has found that the run is stuck."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for rank, watch in enumerate(watches):
            if error := watch.look():
                return rank, error
        time.sleep(0.02)
    raise AssertionError("nobody found anything")


def quiet(watches: list[Watchdog], seconds: float) -> None:
    """Looks for a while, and finds nothing."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert [watch.look() for watch in watches] == [None] * len(watches)
        time.sleep(0.02)


def pid_of(watch: Watchdog) -> int:
    return watch._pid


def test_the_rank_that_is_behind_is_named_and_all_stacks_are_there(
    start: Start, paths: RunPaths
) -> None:
    watches = start("steps:20 hangs", "steps:9 hangs", "steps:20 hangs")
    asked, error = verdict(watches)
    assert (error.rank, error.node, error.failure, error.job_id) == (1, "n1", "stuck", "77")
    assert error.message.startswith("no step for ")
    assert error.message.endswith(" s after step 9 (steps took 0.0 s)")
    (folder,) = paths.stacks.iterdir()
    assert str(folder) in error.next_step
    assert read_record(folder / "request.json", hang_diagnosis.StackRequest).rank == asked
    assert sorted(file.name for file in folder.glob("?.*")) == [
        "0.json", "0.txt", "1.json", "1.txt", "2.json", "2.txt"
    ]  # fmt: skip
    text = (folder / "2.txt").read_text()
    assert text.startswith("rank 2 on n2: no step for ")
    assert "in hangs" in text
    assert [os.kill(pid_of(watch), 0) for watch in watches] == [None] * 3, "asking ended none"


def test_a_stopped_rank_is_found_at_once(start: Start, paths: RunPaths) -> None:
    watches = start("asks", "asks")
    quiet(watches, 0.5)
    os.kill(pid_of(watches[1]), signal.SIGSTOP)
    begun = time.monotonic()
    asked, error = verdict(watches)
    assert time.monotonic() - begun < 3.0, "it need not be quiet for long"
    assert (asked, error.rank, error.failure) == (1, 1, "stuck")
    assert error.message.startswith("is stopped (SIGSTOP), no sign of life for ")
    (folder,) = paths.stacks.iterdir()
    assert "Current thread" in (folder / "0.txt").read_text()
    assert "Thread" not in (folder / "1.txt").read_text()


def test_a_slow_rank_is_not_stuck(start: Start) -> None:
    """Its steps take long, so they may take longer; a rank that computes alone is at work."""
    quiet(start("slow:100", "computes"), 5 * LEAST_S)


def test_a_rank_that_waits_for_a_slow_one_is_not_stuck(start: Start, paths: RunPaths) -> None:
    """As where ranks have unequal shares; it asks, and learns that another comes further."""
    watches = start("evaluation hangs", "asks")
    quiet(watches, 5.5 * LEAST_S)
    (folder,) = paths.stacks.iterdir()
    first, second = hang_diagnosis.answers(folder)
    assert first.quiet_s > 4 * LEAST_S
    assert second.moves
    os.kill(pid_of(watches[1]), signal.SIGSTOP)
    _, error = verdict(watches)
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
        (["hpcft/train/start.py\", line 200 in _wait_for"], True),
    ],
)  # fmt: skip
def test_who_waits_is_told_by_the_main_threads_stack(frames: list[str], waits: bool) -> None:
    stack = [*frames, 'train/loop.py", line 9 in run']
    lines = "\n".join(f'  File "/x/{frame}' for frame in stack)
    other = '  File "/x/torch/distributed/elastic/timer.py", line 1 in wait'
    text = (f"Thread 0x1 (most recent call first):\n{other}\n\n"
            f"Current thread 0x2 (most recent call first):\n{lines}\n")  # fmt: skip
    assert hang_diagnosis.waits_for_others(text) == waits


@pytest.mark.slow  # torch is loaded
def test_the_rank_in_a_collective_is_not_the_culprit(start: Start, paths: RunPaths) -> None:
    """Both are in the same step, and only their stacks tell them apart."""
    watches = start(f"joins:{paths.folder / 'store'}", "steps:1 hangs")
    _, error = verdict(watches)
    assert (error.rank, error.phase) == (1, "training")
    answered = hang_diagnosis.answers(next(paths.stacks.iterdir()))
    assert [answer.waits for answer in answered] == [True, False]


def test_a_rank_whose_supervisor_is_silent_is_the_suspect(start: Start) -> None:
    watches = start("steps:9 hangs", "steps:9 hangs")
    _, error = verdict(watches[:1])
    assert (error.rank, error.node) == (1, "unknown")
    assert error.message.startswith("its supervisor does not answer; rank 0 on n0: no step for ")


def test_a_job_that_was_suspended_is_not_stuck(start: Start) -> None:
    """Then the supervisor was not awake either: for that time it cannot blame its rank."""
    watches = start("data hangs")
    quiet(watches, 0.5)
    watches[0]._pulse._looked_at -= 3600
    quiet(watches, 0.1)


def test_a_process_that_is_done_and_does_not_end(start: Start) -> None:
    (watch,) = start("steps:3 done hangs")
    deadline = time.monotonic() + 20
    while not watch.hangs_at_exit:
        assert watch.look() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    quiet([watch], 1.5 * LEAST_S)


def test_a_folder_that_is_away_is_asked_in_again(start: Start, paths: RunPaths) -> None:
    paths.stacks.write_text("in the way")
    watches = start("steps:5 hangs")
    quiet(watches, 3 * LEAST_S)
    paths.stacks.unlink()
    assert verdict(watches)[1].failure == "stuck"


def test_beats_never_wait(short: None) -> None:
    out, into = os.pipe2(os.O_NONBLOCK)
    told = HeartbeatSender(into)
    begun = time.perf_counter()
    for step in range(10_000):  # more than a pipe holds
        told.beat("training", step)
    assert time.perf_counter() - begun < 1.0
    os.close(out)
    told.beat("training", 0)  # nobody reads it any more
    os.close(into)


def answer(rank: int, **fields: object) -> StackReport:
    made = {
        "rank": rank,
        "node": "n",
        "phase": "training",
        "step": 5,
        "phases": 4,
        "beats": 12,
        "quiet_s": 500.0,
        "limit_s": 480.0,
        "step_s": None,
        "stopped": False,
        "waits": False,
    }
    return StackReport.model_validate(made | fields)  # fmt: skip


@pytest.mark.parametrize(
    ("answers", "late"),
    [
        ([answer(0), answer(1)], [0, 1]),
        ([answer(0), answer(1, beats=11), answer(2)], [1]),
        ([answer(0, phases=3, beats=40), answer(1)], [0]),
        ([answer(0, waits=True), answer(1), answer(2, waits=True)], [1]),
        ([answer(0, waits=True, beats=11), answer(1)], [1]),
        ([answer(0, waits=True), answer(1, waits=True)], [0, 1]),
        ([answer(0, beats=1), answer(1, stopped=True, waits=True)], [1]),
    ],
)
def test_whom_the_others_wait_for(answers: list[StackReport], late: list[int]) -> None:
    assert [found.rank for found in hang_diagnosis.late(answers)] == late


def test_many_ranks_are_told_in_few_words(tmp_path: Path) -> None:
    answers = [answer(rank, waits=rank < 40) for rank in range(60)]
    error = hang_diagnosis.judge(tmp_path, answers, 60, "1")
    assert error is not None
    assert error.message == (
        "no step for 500 s after step 5; so ranks 40, 41, 42, 43, 44, 45, 46, 47, "
        "48, 49, 50, 51, 52, 53, 54, 55 and 4 more of 60"
    )
    assert hang_diagnosis.judge(tmp_path, [*answers, answer(60, quiet_s=3.0)], 61, "1") is None
    all_alike = hang_diagnosis.judge(tmp_path, answers[:40], 40, "1")
    assert all_alike is not None
    assert all_alike.message.endswith("; so all ranks")


@pytest.mark.slow
def test_a_run_goes_on_after_one_of_its_ranks_was_stopped(tiny: Path, cli: Cli) -> None:
    """All ranks start again from the last checkpoint; what they were doing is in the run folder."""
    said = cli("submit", tiny, "-c", "local", "-o", "resources.gpus_per_node=2",
               "-o", "train.max_steps=300", "-o", "train.save_strategy=steps",
               "-o", "train.save_steps=20", "--json")  # fmt: skip
    folder = Path(said.json[0]["folder"])
    until(lambda: log.saved_step(RunPaths(folder)) > 0)
    stopped = children(folder)[0]
    os.kill(stopped, signal.SIGSTOP)
    until(lambda: gone(folder))
    (view,) = cli("status", "--json").json
    assert view["state"] == "COMPLETED", view["note"]
    (recovery,) = log.read_recoveries(RunPaths(folder))
    assert (recovery.cause, recovery.action) == ("stuck", "restart")
    assert recovery.step >= 20
    assert "is stopped (SIGSTOP), no step for " in recovery.evidence
    assert recovery.node == os.uname().nodename
    (asked,) = (folder / "stacks").iterdir()
    answered = hang_diagnosis.answers(asked)
    assert [answer.stopped for answer in answered] == [
        answer.rank == recovery.rank for answer in answered
    ]
    assert answered[1 - recovery.rank].waits
    assert "/loop.py" in (asked / f"{1 - recovery.rank}.txt").read_text()
