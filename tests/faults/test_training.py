"""Ranks that fail, hang, hoard memory or learn nothing, on a real Slurm: what is made of each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from interrupting import job, met
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
    """Lines that fail as a GPU without memory does."""
    return f"if {when}:\n import torch\n raise torch.OutOfMemoryError({text!r})"


def hoards(when: str) -> str:
    """Lines that take as much memory as the job has."""
    return (
        f"import time\nif step == 3 and {when}:\n"
        " hoard = b'x' * (int(os.environ['SLURM_MEM_PER_NODE']) << 20)\n time.sleep(1000)"
    )


@dataclass(frozen=True)
class Row:
    """A fault, and what has to come of it."""

    lines: str
    """What ranks do."""
    recoveries: tuple[tuple[str, str], ...] = ()
    """Cause, and how the run goes on."""
    failure: str = ""
    """Class of its end; empty where it completes."""
    state: str = "FAILED"
    """State of that end."""
    evidence: str = ""
    """Part of the sentence, or of the evidence of the recovery."""
    rank: int | None = 0
    """Rank that it happened to."""
    options: tuple[str, ...] = ()
    """Changes of the recipe."""
    jobs: int = 1
    """Jobs that it takes."""
    memory_gib: float | None = None
    """What a node has, other than most do."""


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
    """A user's folder, for all tests of this module."""
    with campus(tmp_path_factory.mktemp("training")) as folder:
        yield folder


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest, place: Path) -> None:
    """A run for each row, all of them at once and left to themselves."""
    chosen = [item.callspec.params["name"] for item in request.session.items
              if item.path == request.path and hasattr(item, "callspec")]  # fmt: skip
    for name in chosen:
        row = ROWS[name]
        submitted(name, row.lines, *row.options, memory_gib=row.memory_gib)
    with hpcft("status", "--watch") as command:
        command.communicate(timeout=600)


def submitted(name: str, lines: str, *options: str, memory_gib: float | None = None) -> Path:
    """The folder of a new run, whose ranks do something after each step."""
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
    """What `hpcft explain` says of a recipe's only run."""
    with hpcft("explain", name, "--json") as command:
        (found,) = json.loads(out_of(command))
    return dict(found)


@pytest.mark.parametrize("name", EVERY)
def test_what_becomes_of_it(site: None, name: str) -> None:
    row, folder = ROWS[name], folder_of(name)
    taken = met(name)
    assert [(recovery.cause, recovery.action) for recovery in taken] == [*row.recoveries]
    with hpcft("status", name, "--json") as command:
        (shown,) = json.loads(out_of(command))
    with hpcft("collect", name, "--json") as command:
        (line,) = json.loads(out_of(command))
    if row.failure:
        assert shown["state"] == row.state
        told = explained(name)["failure"]
        assert (told["class"], told["rank"]) == (row.failure, row.rank)
        assert row.evidence in told["sentence"]
        assert told["node"] in ("n1", "n2", "n3", "n4")
        assert shown["failure"] == told
        assert line["state"] == row.state
        assert not (folder / "result.json").exists()
    else:
        assert shown["state"] == "COMPLETED", shown["note"]
        assert all(row.evidence in recovery.evidence for recovery in taken)
        assert {recovery.rank for recovery in taken} <= {row.rank}
        assert files.read_record(folder / "result.json", RunRecord).recoveries == taken
        assert line["state"] == "COMPLETED"
    assert len(job(name).attempts) == row.jobs
    assert sorted(jobs(name)) == sorted(attempt.job_id or "" for attempt in job(name).attempts)
    assert nothing_left(folder)


@pytest.mark.slow
def test_through_many_short_time_limits_it_comes_to_its_end(place: Path) -> None:
    """Slurm tells of a limit of one minute at once, or a bit later; then the last step is saved."""
    few = ("train.max_steps=30", "train.logging_steps=1")
    folder = submitted("limit", "import time; time.sleep(2)", *few, "resources.time_min=1")
    calm = submitted("calm", "", *few)
    with hpcft("status", "--watch") as command:
        command.communicate(timeout=500)
    ours, theirs = (files.read_record(f / "result.json", RunRecord) for f in (folder, calm))
    assert {(met.cause, met.action) for met in ours.recoveries} == {("timeout", "requeue")}
    assert ours.recoveries[0].evidence == "the time limit is near"
    assert ours.metrics == theirs.metrics
    assert losses(folder) == losses(calm), "not the same digits"
    assert len(jobs("limit")) == 1
    assert nothing_left(folder)
