"""sbatch scripts: compared with golden files, and their shell lines run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from builders import check_golden, job_request
from hpcft.core.log_markers import SETUP_BEGIN_LINE, SETUP_END_LINE
from hpcft.core.records import Cluster, Gpu
from hpcft.scheduler.sbatch import job_parameters, sbatch_script

PYTHON = "/opt/hpcft/bin/python"
LOGS = Path("/scratch/ünï 'x'/runs/made/0123456789ab/logs")

TYPED = Gpu(name="A100", type="a100", memory_gib=39.4, compute_capability=8.0)
SCRIPTS: dict[str, tuple[dict[str, Any], int]] = {
    "single": ({}, 1),
    "array": ({"account": "project_1", "qos": "long"}, 6),
    "gres": ({"gpu_request": "gres"}, 1),
    "typed-gpus": ({"gpu": TYPED}, 1),
    "typed-gres": ({"gpu": TYPED, "gpu_request": "gres"}, 1),
    "no-gpus": ({"gpu_request": "none", "constraint": "[rack1|rack2]"}, 1),
    "setup": (
        {"setup": ["module load cuda/13.0", "source '/shared/my venv/bin/activate'"],
         "environment": {"NCCL_SOCKET_IFNAME": "ib0", "ODD": "it's $HOME; `x`"}},
        1,
    ),
    "container": (
        {"python": "apptainer exec --nv /shared/hpcft.sif python",
         "srun_args": ["--container-image=/shared/a b.sqsh", "--cpu-bind=none"]},
        1,
    ),
}  # fmt: skip


def site(**changes: Any) -> Cluster:
    """Returns a cluster of nodes with four A100."""
    fields: dict[str, Any] = {
        "name": "site", "scheduler": "slurm", "accelerator": "cuda", "partition": "gpu",
        "max_nodes": 8, "gpus_per_node": 4, "cores_per_node": 48, "host_memory_gib": 480.0,
        "gpu": Gpu(name="A100", memory_gib=39.4, compute_capability=8.0),
    }  # fmt: skip
    return Cluster(**(fields | changes))


@pytest.mark.parametrize("name", SCRIPTS)
def test_sbatch_script_is_the_golden_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", PYTHON)
    changes, count = SCRIPTS[name]
    runs = [Path(f"/scratch/runs/{index}") for index in range(count)]
    text = sbatch_script(job_request(site(**changes), LOGS, runs))
    check_golden(f"sbatch-{name}.sh", text)
    checked = subprocess.run(
        ["bash", "-n"], input=text, text=True, capture_output=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


def test_job_parameters_excludes_nodes() -> None:
    request = job_request(site(), LOGS, [LOGS.parent], exclude=["n1", "n2"])
    assert job_parameters(request)["exclude"] == "n1,n2"
    assert "#SBATCH --exclude=n1,n2\n" in sbatch_script(request)


def run_setup(cluster: Cluster, *commands: str) -> subprocess.CompletedProcess[str]:
    """Runs the setup lines of a job, and commands after them."""
    lines = job_parameters(job_request(cluster, LOGS, [LOGS.parent]))["setup"]
    script = "\n".join([*lines, *commands])
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)


def test_job_parameters_setup_that_fails_stops_the_job() -> None:
    """A `module load` that fails must not go unnoticed."""
    failed = run_setup(site(setup=["false"]), "echo reached")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == f"{SETUP_BEGIN_LINE}\n", "the log says only that the setup began"


def test_job_parameters_setup_that_succeeds_tolerates_later_failures() -> None:
    cluster = site(setup=["true"], environment={"SPACED": "a 'b' $c"})
    passed = run_setup(cluster, "false", 'echo "$SPACED"')
    assert passed.stdout == "a 'b' $c\n"
    assert passed.stderr == f"{SETUP_BEGIN_LINE}\n{SETUP_END_LINE}\n"
