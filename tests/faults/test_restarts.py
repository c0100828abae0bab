"""Tests of interrupted runs on a real Slurm: they end with the digits of an undisturbed run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from interrupting import FAULTS, job, killed_supervisor, recoveries_of
from on_slurm import campus, hpcft, out_of, slurm, submit
from safetensors.numpy import load_file
from submitit.core.utils import DelayedSubmission

from builders import Cli
from hpcft.cluster import rank_entry
from hpcft.core import files
from hpcft.core.records import RunRecord
from hpcft.scheduler import slurm as hpcft_slurm
from hpcft.training import entry
from real_runs import current_step, folder_of, is_gone, losses, until

pytestmark = pytest.mark.slurm

COMMON = ["-c", "testbed", "-o", "train.max_steps=600", "-o", "train.logging_steps=20",
          "-o", "train.learning_rate=1e-3"]  # fmt: skip
# Cause and action of the recovery, by fault.
EXPECTED = {
    "notice": ("preempted", "requeue"),
    "by_hand": ("interrupted", "requeue"),
    "killed_worker": ("rank_died", "restart"),
    "killed_supervisor": ("rank_died", "requeue"),
    "preempted": ("interrupted", "requeue"),
    "node_down": ("interrupted", "requeue"),
}
EVERY = [
    pytest.param(name, marks=[] if name in ("notice", "killed_supervisor") else pytest.mark.slow)
    for name in FAULTS
]


def said(*arguments: object) -> str:
    """Runs a command of hpcft; returns its output."""
    with hpcft(*arguments) as command:
        return out_of(command)


@pytest.fixture(scope="module")
def site(
    request: pytest.FixtureRequest, testbed: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Submits a run per fault, interrupts each, and waits until all have ended."""
    chosen = {item.callspec.params.get("name") for item in request.session.items
              if item.path == request.path and hasattr(item, "callspec")}  # fmt: skip
    faults = {name: fault for name, fault in FAULTS.items() if name in chosen}
    with campus(tmp_path_factory.mktemp("faults")):
        for name in ("calm", *faults):
            said("submit", "tiny.yaml", *COMMON, "-o", f"name={name}")
        for name, inject in faults.items():
            until(lambda name=name: current_step(folder_of(name)) > 5, 120.0, name)
            inject(name, testbed)
        said("status", "--watch")
        yield


@pytest.mark.parametrize("name", EVERY)
def test_an_interrupted_run_ends_like_an_undisturbed_one(site: None, name: str) -> None:
    folder, calm = folder_of(name), folder_of("calm")
    assert (folder / "result.json").exists(), said("status", name)
    ours, theirs = (files.read_record(f / "result.json", RunRecord) for f in (folder, calm))
    assert ours.metrics == theirs.metrics
    assert losses(folder) == losses(calm), "the digits differ"
    weights = [load_file(f / "model/model.safetensors") for f in (folder, calm)]
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[1])
    steps = [r.step for r in recoveries_of(name) if (r.cause, r.action) == EXPECTED[name]]
    assert steps
    assert max(steps) > 5 or name.startswith("killed"), "saved steps are not repeated"
    assert ours.recoveries == recoveries_of(name)


@pytest.mark.parametrize("name", EVERY)
def test_an_interrupted_run_leaves_no_process_and_has_one_job(site: None, name: str) -> None:
    until(lambda: is_gone(folder_of(name)), 20.0)
    (attempt,) = job(name).attempts
    known = slurm("squeue", "-h", "-t", "all", "-o", "%i %j").splitlines()
    assert [line for line in known if line.endswith(f" {name}")] == [f"{attempt.job_id} {name}"]
    (row,) = json.loads(said("status", name, "--json"))
    assert row["state"] == "COMPLETED"
    causes = [r["cause"] for r in row["recoveries"]]
    # The run may share the node that another of these runs loses.
    assert EXPECTED[name][0] in causes
    assert {*causes} <= {EXPECTED[name][0], "interrupted"}


def test_a_job_that_names_modules_of_0_1_starts_and_is_requeued(
    site: None, testbed: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs that hpcft 0.1 queued name these modules in their pickle and their batch script."""
    assert rank_entry.start is entry.start  # Pickled by the name of its module, which is loaded.
    monkeypatch.setattr(entry.start, "__module__", rank_entry.__name__)
    today = hpcft_slurm.sbatch_script

    def of_0_1(request: Any) -> str:
        """Has submitit load a pickle, which the job finds by its id."""
        if request.logs.exists():
            call = DelayedSubmission(entry.start, str(request.runs[0]))
            call.set_timeout(request.plan.time_min, 3)
            call.dump(request.logs / f"{request.token}.pkl")
        script = re.sub(r"hpcft\.training\.start_rank (\S+) .*", r"submitit.core._submit \1",
                        today(request))  # fmt: skip
        script = re.sub(r"hpcft\.training\.requeue (\S+) \w+", r"hpcft.train.requeue \1", script)
        link = f"ln -s {request.token}.pkl {request.logs}/${{SLURM_JOB_ID}}_submitted.pkl"
        return script.replace("# command\n", f"{link} 2>/dev/null || true\n\n# command\n")

    monkeypatch.setattr(hpcft_slurm, "sbatch_script", of_0_1)
    folder = submit(cli, "old_names", *COMMON[2:])
    scripts = [path.read_text() for path in folder.glob("logs/*.sh")]
    assert scripts
    assert all("-m hpcft.train.requeue" in script for script in scripts)
    assert all("-m submitit.core._submit" in script for script in scripts)
    pickles = [path.read_bytes() for path in folder.glob("logs/*.pkl")]
    assert pickles
    assert all(b"hpcft.cluster.rank_entry" in pickle for pickle in pickles)
    assert not any(b"hpcft.training.entry" in pickle for pickle in pickles)
    until(lambda: current_step(folder) > 5, 120.0)
    killed_supervisor("old_names", testbed)
    until(lambda: (folder / "result.json").exists(), 240.0)
    assert ("rank_died", "requeue") in [(r.cause, r.action) for r in recoveries_of("old_names")]
