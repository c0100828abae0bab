"""What a Slurm job asks about itself."""

from __future__ import annotations

import pytest

from fake_slurm import AWAY, fake_commands
from hpcft.core.errors import ClusterError
from hpcft.scheduler import slurm_job


def test_current_job_id_of_an_array_names_the_element(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "14")
    assert slurm_job.current_job_id() == "14"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert slurm_job.current_job_id() == "12_3"


def test_restart_count_without_slurm_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert slurm_job.restart_count() == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert slurm_job.restart_count() == 2


def test_time_limit_at_asks_squeue_where_the_variable_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    fake_commands(monkeypatch, squeue="1795266854\n")
    assert slurm_job.time_limit_at("14") == 1795266854.0
    fake_commands(monkeypatch, squeue=AWAY)
    assert slurm_job.time_limit_at("14") is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1795266900")
    assert slurm_job.time_limit_at("14") == 1795266900.0
    fake_commands(monkeypatch, squeue="1795270000\n")  # An administrator has raised the limit.
    assert slurm_job.current_time_limit_at("14") == 1795270000.0


def test_node_address_is_in_slurms_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.7 NodeHostName=n1 Port=0\n"
    fake_commands(monkeypatch, scontrol=text)
    assert slurm_job.node_address("n1") == "10.0.0.7"
    fake_commands(monkeypatch, scontrol="NodeName=n1\n")
    with pytest.raises(ClusterError, match="no NodeAddr of node n1"):
        slurm_job.node_address("n1")
