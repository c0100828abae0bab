"""Tests of runs that are interrupted while they save, or that Slurm does not restart."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from interrupting import job, job_id, recoveries_of
from misbehaving import profile
from on_slurm import campus, hpcft, job_ids, jobs, nothing_left, out_of, slurm
from safetensors.numpy import load_file

from hpcft.core import files
from hpcft.core.records import Job, RunRecord
from real_runs import current_step, folder_of, losses, supervisor_pids, until, worker_pids

pytestmark = pytest.mark.slurm

COMMON = ["-o", "train.max_steps=100", "-o", "train.logging_steps=10",
          "-o", "train.save_strategy=steps", "-o", "train.save_steps=20"]  # fmt: skip
# Slow steps, and a disk on which a save takes seconds.
SLOW = """\
import time
time.sleep(0.05)
if step == 1: os.fsync = lambda _: time.sleep(0.3)
"""


def running(name: str) -> bool:
    """Returns whether the run has saved and continued."""
    return current_step(folder_of(name)) > 25


def saving(name: str) -> bool:
    """Returns whether the run has a checkpoint and writes another one."""
    folder = folder_of(name) / "checkpoints"
    return any(folder.glob("checkpoint-*")) and any(folder.glob(".checkpoint-*.part/*/*"))


def signalled(name: str) -> None:
    slurm("scancel", "--signal=USR2", job_id(name))


def killed(name: str) -> None:
    (worker,) = worker_pids(folder_of(name))
    os.kill(worker, signal.SIGKILL)


def cancelled(name: str) -> None:
    slurm("scancel", job_id(name))


def preempted(name: str) -> None:
    """Submits a job of higher priority, which takes the run's node."""
    (node,) = slurm("squeue", "-h", "-j", job_id(name), "-o", "%N").split()
    slurm("sbatch", "-p", "high", "-w", node, "--exclusive", "-o", "/dev/null",
          "--wrap", "sleep 1")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A fault, and the expected recoveries or failure."""

    when: Callable[[str], bool]
    """Returns whether to inject the fault now."""
    inject: Callable[[str], None]
    """Injects the fault."""
    recoveries: tuple[tuple[str, str], ...] = ()
    """Cause and action of each recovery."""
    failure: str = ""
    """Failure class before a person resumes the run; empty if it completes by itself."""
    state: str = ""
    """State before a person resumes the run."""
    partition: str = "main"
    """Partition of the run."""


ROWS = {
    "signalled": Row(saving, signalled, (("preempted", "requeue"),)),
    "killed": Row(saving, killed, (("rank_died", "restart"),)),
    "cancelled": Row(saving, cancelled, (("resumed", "resume"),), "cancelled", "CANCELLED"),
    "preempted": Row(running, preempted, (("resumed", "resume"),), "preempted", "PREEMPTED", "low"),
    "warned": Row(running, preempted, (("preempted", "requeue"),), partition="warned"),
}
QUICK: tuple[str, ...] = ()
EVERY = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ROWS]


@pytest.fixture(scope="module")
def place(testbed: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's folder, a slow profile, and partitions whose jobs may be preempted.

    Jobs of the partition `low` are preempted without notice, those of `warned` with notice.
    """
    common = ("PriorityTier=5", "PreemptMode=CANCEL")
    slurm("scontrol", "create", "PartitionName=low", "Nodes=n3", *common)
    slurm("scontrol", "create", "PartitionName=warned", "Nodes=n4", "GraceTime=30", *common)
    with campus(tmp_path_factory.mktemp("interrupted")) as folder:
        file = profile("slow", SLOW)
        file.write_text(file.read_text().replace("[main, high]", "[main, high, low, warned]"))
        yield folder


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest, place: Path) -> None:
    """Submits a run per row, interrupts each, and waits until all have ended."""
    chosen = [item.callspec.params["name"] for item in request.session.items
              if item.path == request.path and hasattr(item, "callspec")]  # fmt: skip
    for name in ("calm", *chosen):
        where = ROWS[name].partition if name in ROWS else "main"
        submitted(name, "-o", f"resources.partition={where}")
    left = {name: ROWS[name] for name in chosen}
    deadline = time.monotonic() + 300
    while left:
        for name in [name for name, row in left.items() if row.when(name)]:
            left.pop(name).inject(name)
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    with hpcft("status", "--watch") as command:
        command.communicate(timeout=600)


def shown(name: str) -> dict[str, Any]:
    """Returns the status of a recipe's only run, as JSON."""
    with hpcft("status", name, "--json") as command:
        (row,) = json.loads(out_of(command))
    return dict(row)


@pytest.mark.parametrize("name", EVERY)
def test_an_interrupted_run_ends_like_an_undisturbed_one(site: None, name: str) -> None:
    row, folder, calm = ROWS[name], folder_of(name), folder_of("calm")
    if row.failure:
        ended = shown(name)
        assert (ended["state"], ended["failure"]["class"]) == (row.state, row.failure)
        assert recoveries_of(name) == []
        assert len(jobs(name)) == 1
        assert nothing_left(folder)
        with hpcft("resume", name, "--watch") as command:
            said = command.communicate(timeout=300)
            assert command.returncode == 0, said
    assert shown(name)["state"] == "COMPLETED"
    ours, theirs = (files.read_record(f / "result.json", RunRecord) for f in (folder, calm))
    assert ours.metrics == theirs.metrics
    assert losses(folder) == losses(calm), "the digits differ"
    weights = [load_file(f / "model/model.safetensors") for f in (folder, calm)]
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[1])
    recoveries = recoveries_of(name)
    assert [(recovery.cause, recovery.action) for recovery in recoveries] == [*row.recoveries]
    assert all(recovery.step >= 20 for recovery in recoveries), "saved steps are not repeated"
    assert ours.recoveries == recoveries
    names = [file.name for file in (folder / "checkpoints").iterdir()]
    assert not [name for name in names if name.startswith(".")], "unfinished checkpoints are gone"
    assert sorted(jobs(name)) == sorted(attempt.job_id or "" for attempt in job(name).attempts)
    assert nothing_left(folder)


# ---------------------------------------------------------------- runs that need the testbed alone


def submitted(name: str, *options: str) -> list[Path]:
    """Submits a recipe; returns the folders of its runs."""
    with hpcft("submit", "tiny.yaml", "-c", "slow.yaml", *COMMON, "-o", f"name={name}",
               *options) as command:  # fmt: skip
        said = command.communicate(timeout=120)
        assert command.returncode == 0, said
    return folders(name)


def folders(name: str) -> list[Path]:
    """Returns the run folders of a recipe, without the logs of a sweep."""
    return [file.parent for file in sorted(Path("runs", name).absolute().glob("*/job.json"))]


def ended(name: str) -> list[RunRecord]:
    """Waits until all runs of a recipe have ended; returns their results."""
    with hpcft("status", name, "--watch") as command:
        said = command.communicate(timeout=300)
        assert command.returncode == 0, said
    return [files.read_record(folder / "result.json", RunRecord) for folder in folders(name)]


@pytest.mark.slow
def test_requeueing_one_element_of_an_array_leaves_the_others_alone(place: Path) -> None:
    first, other = submitted("elements", "-o", "sweep={grid: {train.seed: [1, 2]}}")
    until(lambda: current_step(first) > 25)
    element = files.read_record(first / "job.json", Job).attempts[-1].job_id
    assert element
    slurm("scontrol", "requeue", element)
    again, calm = ended("elements")
    assert [(recovery.cause, recovery.action) for recovery in again.recoveries] == [
        ("interrupted", "requeue")
    ]
    assert again.recoveries[0].step >= 20
    assert calm.recoveries == []
    assert sorted(jobs("elements")) == sorted(filter(None, job_ids("elements")))
    assert all(nothing_left(folder) for folder in (first, other))


@pytest.mark.slow
def test_a_run_on_a_lost_node_continues_on_another_node(place: Path, testbed: Any) -> None:
    """The start on the lost node ends as soon as it sees that the job was restarted."""
    (folder,) = submitted("lost", "-o", "train.max_steps=600")
    until(lambda: current_step(folder) > 25)
    before = supervisor_pids(folder)[0]
    (node,) = slurm("squeue", "-h", "-j", job_id("lost"), "-o", "%N").split()
    testbed.pause(f"slurmd-{node}")
    try:
        until(lambda: recoveries_of("lost"), 180.0, "another start")
        until(
            lambda: before not in supervisor_pids(folder).values(), 20.0, "the end of the first one"
        )
        (result,) = ended("lost")
    finally:
        testbed.resume(f"slurmd-{node}")
    (recovery,) = result.recoveries
    assert (recovery.cause, recovery.action) == ("interrupted", "requeue")
    assert recovery.node != node
    assert jobs("lost") == job_ids("lost")
    assert nothing_left(folder)
