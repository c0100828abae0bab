"""Environments of new jobs: what they take from the submitting session, and what not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcft.scheduler.job_environment import submission_environment, without_session_job

OF_THE_SESSION = {
    "SLURM_MEM_PER_CPU": "100", "SLURM_MEM_PER_NODE": "900", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
    "SLURM_TRES_PER_TASK": "cpu=1", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2",
    "SLURM_RLIMIT_CPU": "5", "SLURM_UMASK": "0022", "SLURMD_NODENAME": "n9", "SRUN_DEBUG": "3",
    "SLURM_CPUS_PER_TASK": "1", "SRUN_CPUS_PER_TASK": "1", "SBATCH_TIMELIMIT": "1",
    "SBATCH_QOS": "long", "SUBMITIT_EXECUTOR": "local", "PMI_RANK": "0", "PMIX_RANK": "0",
    "OMPI_COMM_WORLD_RANK": "0", "RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "n9",
}  # fmt: skip
KEPT = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_JWT": "secret", "OWN": "mine"}
GPUS = {"CUDA_VISIBLE_DEVICES": "2,3", "ROCR_VISIBLE_DEVICES": "2"}


@pytest.fixture(autouse=True)
def session(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session inside an allocation."""
    for name, value in (OF_THE_SESSION | KEPT | GPUS).items():
        monkeypatch.setenv(name, value)


def test_submission_environment_leaves_out_the_job_of_the_session() -> None:
    made = submission_environment(["qos"])
    assert not (made.keys() & (OF_THE_SESSION.keys() | GPUS.keys()))
    assert KEPT.items() <= made.items()
    assert os.environ["SLURM_JOB_ID"] == "7", "this process's own environment stays"


def test_submission_environment_keeps_defaults_of_options_that_the_script_lacks() -> None:
    assert submission_environment(["partition"])["SBATCH_QOS"] == "long"


def test_without_session_job_keeps_the_gpus() -> None:
    """A local run uses those that its session may use."""
    assert GPUS.items() <= without_session_job().items()


@pytest.mark.parametrize(
    ("given", "made"),
    [(":/own", "/own"), ("/own:", "/own"), (".:/own::/other", "/own:/other"), ("", "")],
)
def test_without_session_job_has_no_current_folder_on_the_python_path(
    given: str, made: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", given)
    assert without_session_job()["PYTHONPATH"] == made


def test_without_session_job_makes_relative_folders_absolute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "lib")
    assert without_session_job()["PYTHONPATH"] == str(tmp_path / "lib")
