"""Slurm as a scheduler: its checks before a submission, and one call for many runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from builders import ROOT, job_request
from fake_slurm import AWAY, SACCT, fake_commands
from hpcft.core.errors import ClusterError
from hpcft.core.records import Attempt, Cluster
from hpcft.scheduler import scheduler_named
from hpcft.scheduler.protocol import JobRequest, Refused, TooManyJobs
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


QUEUE = """\
6_0|RUNNING|0:09|n1|N/A|t|/logs/t_submission.sh|None
6_1|PENDING|0:00||N/A|t|/logs/t_submission.sh|Resources
7|RUNNING|0:09|n1|N/A|mine|/sleep.sh|None
8|COMPLETED|0:09|n1|1|t|/logs/t_submission.sh|None
"""


def test_cancel_of_many_is_one_scancel_of_own_live_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_commands(monkeypatch, squeue=QUEUE, scancel="")
    wanted = [attempt(job_id) for job_id in ("6_0", "7", "6_1", "8")]
    assert scheduler_named("slurm").cancel(wanted) == [True, False, True, False]
    assert calls[1:] == ["scancel 6_0 6_1"]


def test_cancel_with_the_controller_away_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_commands(monkeypatch, squeue=AWAY, sacct=AWAY)
    (error,) = Slurm().cancel([attempt("6_1")])
    assert isinstance(error, ClusterError)
    assert "job 6_1 was not cancelled: squeue failed" in str(error)
    assert not [call for call in calls if call.startswith("scancel")]


CONFIG = "ClusterName             = west\nMaxArraySize            = 1001\n"


def test_states_of_a_job_of_another_cluster_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clusters that share a runs folder may both have a job 6."""
    monkeypatch.delenv("SLURM_CLUSTER_NAME", raising=False)
    calls = fake_commands(monkeypatch, squeue=QUEUE, sacct=SACCT, scontrol=CONFIG)
    there = {"slurm_cluster": "east"}
    jobs = [attempt("201"), attempt(None)]
    states = Slurm().states([job.model_copy(update=there) for job in jobs])
    for state in states:
        assert (state.state, state.unknown_to_slurm, state.is_over) == ("UNKNOWN", False, False)
        assert state.reason == "was submitted to the cluster east: look there"
    (error,) = Slurm().cancel([jobs[0].model_copy(update=there)])
    assert "look there" in str(error)
    here = [job.model_copy(update={"slurm_cluster": "west"}) for job in jobs]
    assert [state.state for state in Slurm().states(here)] == ["COMPLETED", "FAILED"]
    calls.clear()
    live = attempt("6_0").model_copy(update=there)
    assert Slurm().states([live])[0].state == "RUNNING", "it has the token, so it is here"
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("config", "size"),
    [(CONFIG, 1001), ("MaxArraySize = 0\n", 1), ("x", None), (AWAY, None)],
)
def test_max_array_size_is_none_if_slurm_does_not_say(
    config: str | Exception, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_commands(monkeypatch, scontrol=config)
    assert Slurm().max_array_size() == size


# ---------------------------------------------------------------- submissions


@pytest.fixture
def request_here(tmp_path: Path) -> JobRequest:
    """A job whose logs folder exists."""
    logs = tmp_path / "日本" / "logs"
    logs.mkdir(parents=True)
    cluster = Cluster(name="site", scheduler="slurm", accelerator="cpu", max_nodes=2,
                      cores_per_node=48, host_memory_gib=480.0)  # fmt: skip
    return job_request(cluster, logs, [logs.parent, logs.parent])


def test_submit_runs_sbatch_without_the_variables_of_the_session(
    request_here: JobRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "sbatch"
    program.write_text(f'#!/bin/sh\nenv > {tmp_path}/env\necho "{{ welcome"\n'
                       f'cp "$1" {tmp_path}/script\necho Submitted batch job 12\n')  # fmt: skip
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "100")
    monkeypatch.setenv("SLURM_CPU_BIND", "quiet")
    assert [made.job_id for made in Slurm().submit(request_here)] == ["12_0", "12_1"]
    assert not re.search("^SLURM_(MEM|CPU)", (tmp_path / "env").read_text("utf-8"), re.MULTILINE)
    script = (tmp_path / "script").read_text(encoding="utf-8")
    assert script == Slurm().script(request_here)
    assert "日本" in script


@pytest.mark.parametrize(
    ("line", "kind", "words"),
    [
        ("echo 'sbatch: error: ask help@site' >&2; "
         "echo 'sbatch: error: Batch job submission failed: Unspecified error' >&2; exit 1",
         Refused, "ask help@site; Unspecified error"),
        ("echo 'sbatch: error: Batch job submission failed: Unable to contact slurm' >&2; exit 1",
         ClusterError, "may have queued the job or not"),
        ("echo welcome", ClusterError, "may have queued the job or not .*: it names no job"),
    ],
)  # fmt: skip
def test_submit_that_fails_tells_what_sbatch_said(
    line: str, kind: type[Exception], words: str, request_here: JobRequest, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\n{line}\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(kind, match=words):
        Slurm().submit(request_here)
