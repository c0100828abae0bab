"""Ranks that fail, hang, hoard memory or learn nothing, on a real Slurm: what is made of each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from interrupting import job, met
from misbehaving import profile
from on_slurm import campus, hpcft, jobs, nothing_left, out_of

from hpcft import store
from hpcft.records import RunRecord
from real_runs import folder_of

pytestmark = pytest.mark.slurm

COMMON = ["-o", "train.max_steps=40", "-o", "train.logging_steps=10"]
GPU = "CUDA out of memory. Tried to allocate {wanted}. GPU 0 has a total capacity of 39.38 GiB of "
OWN = (
    "which 1.20 GiB is free. Including non-PyTorch memory, this process has {own} memory in use. "
    "Of the allocated memory {allocated} is allocated by PyTorch, and {unused} is reserved by "
    "PyTorch but unallocated."
)
OUT_OF_MEMORY = GPU.format(wanted="2.00 GiB") + OWN.format(
    own="38.10 GiB", allocated="37.00 GiB", unused="210.00 MiB"
)
IN_PIECES = GPU.format(wanted="2.00 GiB") + OWN.format(
    own="38.10 GiB", allocated="30.00 GiB", unused="7.21 GiB"
)
FOREIGN = (
    GPU.format(wanted="2.00 GiB")
    + "which 1.20 GiB is free. Process 4711 has 30.00 GiB memory in use. "
    + OWN.format(own="8.10 GiB", allocated="7.00 GiB", unused="210.00 MiB").partition("free. ")[2]
)
EXPANDS = '"expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")'


def raises(when: str, text: str) -> str:
    """Lines that fail as a GPU without memory does."""
    return f"if {when}:\n import torch\n raise torch.OutOfMemoryError({text!r})"


@dataclass(frozen=True)
class Row:
    """A fault, and what has to come of it."""

    lines: str
    """What ranks do."""
    recoveries: tuple[tuple[str, str], ...] = ()
    """Cause, and how the run goes on."""
    failure: str = ""
    """Class of its end; empty where it completes."""
    evidence: str = ""
    """Part of the sentence, or of the evidence of the recovery."""
    rank: int | None = 0
    """Rank that it happened to."""
    options: tuple[str, ...] = ()
    """Changes of the recipe."""
    jobs: int = 1
    """Jobs that it takes."""


ROWS = {
    "raises": Row(
        'if step == 3 and rank == 1: raise ValueError("a label that nobody knows")',
        failure="user", evidence="ValueError: a label that nobody knows", rank=1,
        options=("resources.gpus_per_node=2",),
    ),
    "stopped": Row(
        "if step == 20 and rank == 1 and start == 0: os.kill(os.getpid(), 19)",
        (("stuck", "restarted"),), evidence="is stopped (SIGSTOP)", rank=1,
        options=("resources.gpus_per_node=2",),
    ),
    "lingers": Row(
        "import threading, time\nif step == 1: threading.Thread(target=time.sleep, "
        "args=[10_000]).start()",
    ),
    "hoards": Row(
        "import time\nif step == 3: hoard = b'x' * (int(os.environ['SLURM_MEM_PER_NODE']) << 20)\n"
        "if step == 3: time.sleep(1000)",
        failure="host_oom", evidence="memory", rank=None,
    ),
    "gpu": Row(
        raises("step == 3 and start == 0", OUT_OF_MEMORY),
        (("out_of_memory", "restarted"),), evidence="CUDA out of memory",
    ),
    "pieces": Row(
        raises(f"step == 3 and not {EXPANDS}", IN_PIECES),
        (("fragmentation", "restarted"),), evidence="7.21 GiB is reserved by PyTorch but unalloc",
    ),
    "foreign": Row(
        raises('step == 3 and start == 0', FOREIGN),
        (("foreign_memory", "queued anew"),), evidence="process 4711 30.0 GiB", jobs=2,
    ),
    "ecc": Row(
        'if step == 3 and start < 2: raise RuntimeError('
        '"CUDA error: uncorrectable ECC error encountered")',
        (("bad_node", "queued anew"),) * 2, evidence="uncorrectable ECC error", jobs=3,
    ),
    "nan": Row(
        "", failure="nan", evidence="the loss is nan",
        options=("train.learning_rate=1e30", "train.save_strategy=steps", "train.save_steps=1"),
    ),
    "limit": Row(
        "import time; time.sleep(2)", (("timeout", "requeued"),),
        evidence="the time limit is near", options=("resources.time_min=1",),
    ),
    "hangs": Row(
        "import time; time.sleep(10_000)", failure="stuck",
        evidence="the time limit was reached before step 1 ", rank=None,
        options=("resources.time_min=1",),
    ),
}  # fmt: skip
QUICK = ("raises", "ecc")
EVERY = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ROWS]


@pytest.fixture(scope="module")
def site(
    request: pytest.FixtureRequest, testbed: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """A folder with a run for each row, all of them at once and left to themselves."""
    chosen = [item.callspec.params["name"] for item in request.session.items
              if item.path == request.path and hasattr(item, "callspec")]  # fmt: skip
    with campus(tmp_path_factory.mktemp("training")):
        for name, row in {"calm": Row(""), **{name: ROWS[name] for name in chosen}}.items():
            options = [word for option in row.options for word in ("-o", option)]
            file = profile(f"p-{name}", row.lines)
            with hpcft("submit", "tiny.yaml", "-c", file, *COMMON, "-o", f"name={name}",
                       *options) as command:  # fmt: skip
                said = command.communicate(timeout=120)
                assert command.returncode == 0, said
        with hpcft("status", "--watch") as command:
            command.communicate(timeout=600)
        yield


def explained(name: str) -> dict[str, Any]:
    """What `hpcft explain` says of a recipe's only run."""
    with hpcft("explain", name, "--json") as command:
        (found,) = json.loads(out_of(command))
    return dict(found)


@pytest.mark.parametrize("name", EVERY)
def test_what_becomes_of_it(site: None, name: str) -> None:
    row, folder = ROWS[name], folder_of(name)
    taken = met(name)
    assert [(recovery.cause, recovery.how) for recovery in taken] == [*row.recoveries]
    with hpcft("status", name, "--json") as command:
        (shown,) = json.loads(out_of(command))
    with hpcft("collect", name, "--json") as command:
        (line,) = json.loads(out_of(command))
    if row.failure:
        assert shown["state"] == "FAILED"
        told = explained(name)["failure"]
        assert (told["class"], told["rank"]) == (row.failure, row.rank)
        assert row.evidence in told["sentence"]
        assert told["node"] in ("n1", "n2", "n3", "n4")
        assert shown["failure"] == told
        assert line["state"] == "FAILED"
        assert not (folder / "result.json").exists()
    else:
        assert shown["state"] == "COMPLETED", shown["note"]
        assert all(row.evidence in recovery.evidence for recovery in taken)
        assert {recovery.rank for recovery in taken} <= {row.rank}
        ours, calm = (store.read(f / "result.json", RunRecord) for f in (folder, folder_of("calm")))
        assert ours.recoveries == taken
        assert line["state"] == "COMPLETED"
    assert len(job(name).attempts) == row.jobs
    assert sorted(jobs(name)) == sorted(attempt.job_id or "" for attempt in job(name).attempts)
    assert nothing_left(folder)
