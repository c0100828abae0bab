"""Runs that are interrupted while they save, or by a Slurm that does not start them again."""

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
from interrupting import job, job_id, met
from misbehaving import profile
from on_slurm import campus, hpcft, job_ids, jobs, nothing_left, out_of, slurm
from safetensors.numpy import load_file

from hpcft.core import files
from hpcft.core.records import Job, RunRecord
from real_runs import current_step, folder_of, losses, supervisor_pids, until, worker_pids

pytestmark = pytest.mark.slurm

COMMON = ["-o", "train.max_steps=100", "-o", "train.logging_steps=10",
          "-o", "train.save_strategy=steps", "-o", "train.save_steps=20"]  # fmt: skip
# Steps that can be met, and a disk on which a save takes seconds.
SLOW = """\
import time
time.sleep(0.05)
if step == 1: os.fsync = lambda _: time.sleep(0.3)
"""


def running(name: str) -> bool:
    """It has saved, and gone on."""
    return current_step(folder_of(name)) > 25


def saving(name: str) -> bool:
    """It writes a checkpoint, and has another one."""
    folder = folder_of(name) / "checkpoints"
    return any(folder.glob("checkpoint-*")) and any(folder.glob(".checkpoint-*.part/*/*"))


def told(name: str) -> None:
    slurm("scancel", "--signal=USR2", job_id(name))


def killed(name: str) -> None:
    (child,) = worker_pids(folder_of(name))
    os.kill(child, signal.SIGKILL)


def cancelled(name: str) -> None:
    slurm("scancel", job_id(name))


def pushed_out(name: str) -> None:
    """A job of higher priority takes its node."""
    (node,) = slurm("squeue", "-h", "-j", job_id(name), "-o", "%N").split()
    slurm("sbatch", "-p", "high", "-w", node, "--exclusive", "-o", "/dev/null",
          "--wrap", "sleep 1")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A fault, and what has to come of it."""

    when: Callable[[str], bool]
    """When to do it."""
    inject: Callable[[str], None]
    """What to do."""
    recoveries: tuple[tuple[str, str], ...] = ()
    """Cause, and how the run goes on."""
    failure: str = ""
    """Class of its end, before a person has it go on; empty where it completes by itself."""
    state: str = ""
    """State of that end."""
    partition: str = "main"
    """Where it runs."""


ROWS = {
    "told": Row(saving, told, (("preempted", "requeue"),)),
    "killed": Row(saving, killed, (("rank_died", "restart"),)),
    "cancelled": Row(saving, cancelled, (("resumed", "resume"),), "cancelled", "CANCELLED"),
    "pushed": Row(running, pushed_out, (("resumed", "resume"),), "preempted", "PREEMPTED", "low"),
    "warned": Row(running, pushed_out, (("preempted", "requeue"),), partition="warned"),
}
QUICK: tuple[str, ...] = ()
EVERY = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ROWS]


@pytest.fixture(scope="module")
def place(testbed: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's folder, a slow profile, and partitions whose jobs are cancelled for others.

    In one of them that happens without a word, in the other one with a notice before.
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
    """A run for each row, all of them interrupted and then left to themselves."""
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
    """What `hpcft status` says of a recipe's only run."""
    with hpcft("status", name, "--json") as command:
        (found,) = json.loads(out_of(command))
    return dict(found)


@pytest.mark.parametrize("name", EVERY)
def test_it_ends_as_if_nothing_had_happened(site: None, name: str) -> None:
    row, folder, calm = ROWS[name], folder_of(name), folder_of("calm")
    if row.failure:
        ended = shown(name)
        assert (ended["state"], ended["failure"]["class"]) == (row.state, row.failure)
        assert met(name) == []
        assert len(jobs(name)) == 1
        assert nothing_left(folder)
        with hpcft("resume", name, "--watch") as command:
            said = command.communicate(timeout=300)
            assert command.returncode == 0, said
    assert shown(name)["state"] == "COMPLETED"
    ours, theirs = (files.read_record(f / "result.json", RunRecord) for f in (folder, calm))
    assert ours.metrics == theirs.metrics
    assert losses(folder) == losses(calm), "not the same digits"
    weights = [load_file(f / "model/model.safetensors") for f in (folder, calm)]
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[1])
    taken = met(name)
    assert [(recovery.cause, recovery.action) for recovery in taken] == [*row.recoveries]
    assert all(recovery.step >= 20 for recovery in taken), "what was saved is not done again"
    assert ours.recoveries == taken
    left = [file.name for file in (folder / "checkpoints").iterdir()]
    assert not [name for name in left if name.startswith(".")], "what was half written is gone"
    assert sorted(jobs(name)) == sorted(attempt.job_id or "" for attempt in job(name).attempts)
    assert nothing_left(folder)


# ---------------------------------------------------------------- alone, because of its neighbours


def submitted(name: str, *options: str) -> list[Path]:
    """The folders of the runs of a recipe that was submitted."""
    with hpcft("submit", "tiny.yaml", "-c", "slow.yaml", *COMMON, "-o", f"name={name}",
               *options) as command:  # fmt: skip
        said = command.communicate(timeout=120)
        assert command.returncode == 0, said
    return folders(name)


def folders(name: str) -> list[Path]:
    """The run folders of a recipe; a sweep has its logs beside them."""
    return [file.parent for file in sorted(Path("runs", name).absolute().glob("*/job.json"))]


def ended(name: str) -> list[RunRecord]:
    """The results of a recipe's runs, once all have ended."""
    with hpcft("status", name, "--watch") as command:
        said = command.communicate(timeout=300)
        assert command.returncode == 0, said
    return [files.read_record(folder / "result.json", RunRecord) for folder in folders(name)]


@pytest.mark.slow
def test_one_element_of_an_array_starts_again_alone(place: Path) -> None:
    first, other = submitted("elements", "-o", "sweep={grid: {train.seed: [1, 2]}}")
    until(lambda: current_step(first) > 25)
    element = files.read_record(first / "job.json", Job).attempts[-1].job_id
    assert element
    slurm("scontrol", "requeue", element)
    again, calm = ended("elements")
    assert [(met.cause, met.action) for met in again.recoveries] == [("interrupted", "requeue")]
    assert again.recoveries[0].step >= 20
    assert calm.recoveries == []
    assert sorted(jobs("elements")) == sorted(filter(None, job_ids("elements")))
    assert all(nothing_left(folder) for folder in (first, other))


@pytest.mark.slow
def test_of_a_node_that_slurm_lost_the_run_goes_on_elsewhere(place: Path, testbed: Any) -> None:
    """What still runs there ends as soon as it sees that it has a successor."""
    (folder,) = submitted("lost", "-o", "train.max_steps=600")
    until(lambda: current_step(folder) > 25)
    before = supervisor_pids(folder)[0]
    (node,) = slurm("squeue", "-h", "-j", job_id("lost"), "-o", "%N").split()
    testbed.pause(f"slurmd-{node}")
    try:
        until(lambda: met("lost"), 180.0, "another start")
        until(lambda: before not in supervisor_pids(folder).values(), 20.0, "the end of the first one")
        (result,) = ended("lost")
    finally:
        testbed.resume(f"slurmd-{node}")
    (recovery,) = result.recoveries
    assert (recovery.cause, recovery.action) == ("interrupted", "requeue")
    assert recovery.node != node
    assert jobs("lost") == job_ids("lost")
    assert nothing_left(folder)
