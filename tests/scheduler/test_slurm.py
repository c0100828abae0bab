"""Slurm as a scheduler: its checks before a submission, and one call for many runs."""

from __future__ import annotations

import pytest

from builders import ROOT
from fake_slurm import SACCT, fake_commands
from hpcft.core.errors import ClusterError
from hpcft.core.records import Attempt
from hpcft.scheduler import scheduler_named
from hpcft.scheduler.protocol import Refused, TooManyJobs
from hpcft.scheduler.slurm import Slurm, check_script

SCRIPT = (ROOT / "tests/golden/sbatch-single.sh").read_text()
PARTITIONS = "PartitionName=gpu Default=NO MaxTime=01:00:00\nPartitionName=other MaxTime=1:00\n"


def attempt(job_id: str | None, token: str = "t", array_index: int | None = None) -> Attempt:
    """Returns an attempt at a run."""
    return Attempt(job_id=job_id, token=token, array_index=array_index, submitted_at=1.0,
                   logs="/logs", host="login")  # fmt: skip


def test_check_script_refusal_shows_what_was_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ClusterError("sbatch failed (1): allocation failure: Invalid account")
    fake_commands(monkeypatch, sbatch=error, sinfo="")
    with pytest.raises(Refused) as refused:
        check_script(SCRIPT)
    assert refused.value.reason.startswith("Invalid account; it requested --cpus-per-task=12 ")
    assert "--partition=gpu" in refused.value.reason


def test_check_script_raises_too_many_jobs_at_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ClusterError("AssocMaxSubmitJobLimit\nallocation failure: Job violates policy")
    fake_commands(monkeypatch, sbatch=error)
    with pytest.raises(TooManyJobs, match=r"^AssocMaxSubmitJobLimit$"):
        check_script("#!/bin/sh\n")


def test_check_script_with_the_controller_away_is_no_refusal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = ClusterError("sbatch failed (1): allocation failure: Unable to contact controller")
    fake_commands(monkeypatch, sbatch=error)
    with pytest.raises(ClusterError, match="Unable to contact"):
        check_script("#!/bin/sh\n")


@pytest.mark.parametrize(("absent", "is_refused"), [("n4\n", False), ("", True)])
def test_check_script_accepts_a_node_refusal_while_nodes_are_down(
    absent: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ClusterError("allocation failure: Requested node configuration is not available")
    fake_commands(monkeypatch, sbatch=error, sinfo=absent, scontrol="")
    if is_refused:
        with pytest.raises(Refused, match="Requested node configuration"):
            check_script(SCRIPT)
    else:
        check_script(SCRIPT)


def test_check_script_refuses_more_time_than_the_partition_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_commands(monkeypatch, sbatch="", scontrol=PARTITIONS)
    with pytest.raises(Refused, match="gpu allows 60 minutes") as refused:
        check_script(SCRIPT)  # It requests 90 minutes.
    assert refused.value.key == "time_limit_min"
    check_script(SCRIPT.replace("--time=90", "--time=60"))


def test_states_of_many_attempts_are_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_commands(monkeypatch, squeue="", sacct=SACCT)
    states = Slurm().states([attempt("201"), attempt(None), attempt("207_0"), attempt("201")])
    assert [state.state for state in states] == ["COMPLETED", "FAILED", "FAILED", "COMPLETED"]
    assert states[1].reason == "was not queued: the submitting command was interrupted"
    assert len(calls) == 2


def test_find_jobs_of_many_attempts_is_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_commands(monkeypatch, squeue="5|hpcft-a\n6_1|hpcft-b\n")
    wanted = [attempt(None, "hpcft-a"), attempt(None, "hpcft-b", 1), attempt(None, "hpcft-c")]
    assert Slurm().find_jobs(wanted) == ["5", "6_1", None]
    assert Slurm().find_jobs([]) == []
    assert len(calls) == 1


def test_cancel_calls_scancel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_commands(monkeypatch, scancel="")
    assert scheduler_named("slurm").cancel(attempt("6_1"))
    assert calls == ["scancel 6_1"]
