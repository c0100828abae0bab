"""Slurm's commands: how they are called, and what their answers together say of jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from fake_slurm import AWAY, NO_ACCOUNTS, SACCT, SQUEUE, fake_commands
from hpcft.core.errors import ClusterError
from hpcft.scheduler import slurm_commands
from hpcft.scheduler.job_state import JobState

# ---------------------------------------------------------------- running a command


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the head of the search path."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path


def write_squeue(programs: Path, body: str) -> None:
    """Writes a program that is called squeue."""
    (programs / "squeue").write_text(f"#!/bin/sh\n{body}\n")
    (programs / "squeue").chmod(0o755)


@pytest.mark.parametrize(
    ("body", "message"),
    [("exit 3", r"failed \(3\)"), ("echo no luck >&2; exit 1", "no luck"),
     ("echo only out; exit 1", "only out"), ("exec sleep 30", "did not answer within 1 s")],
)  # fmt: skip
def test_run_command_that_fails_raises_with_its_output(
    body: str, message: str, programs: Path
) -> None:
    write_squeue(programs, body)
    with pytest.raises(ClusterError, match=f"squeue .*{message}"):
        slurm_commands.run_command("squeue", timeout_s=1)


def test_run_command_hides_variables_that_hide_jobs(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_squeue(programs, "env")
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    lines = slurm_commands.run_command("squeue").splitlines()
    assert "SLURM_TIME_FORMAT=%s" in lines
    assert not [line for line in lines if line.startswith("SQUEUE_")]


def test_run_command_that_is_missing_asks_for_a_login_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ClusterError, match="squeue is not on PATH: is this a Slurm login node"):
        slurm_commands.ids_by_token()


# ---------------------------------------------------------------- the cluster


@pytest.mark.parametrize(
    ("config", "name"),
    [("Configuration data\nClusterName             = campus\nX = y\n", "campus"), ("Nothing", None),
     (ClusterError("scontrol failed (1): Could not establish a configuration source"), None)],
)  # fmt: skip
def test_cluster_name_is_none_without_a_configuration(
    config: str | Exception, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda command: f"/usr/bin/{command}")
    fake_commands(monkeypatch, scontrol=config)
    assert slurm_commands.cluster_name() == name


def test_cluster_name_without_programs_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda command: None)
    assert slurm_commands.cluster_name() is None


def test_cluster_name_with_the_controller_away_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda command: f"/usr/bin/{command}")
    fake_commands(monkeypatch, scontrol=AWAY)
    with pytest.raises(ClusterError, match="Unable to contact"):
        slurm_commands.cluster_name()


# ---------------------------------------------------------------- jobs


def test_job_states_calls_each_command_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_commands(monkeypatch, squeue=SQUEUE, sacct=SACCT)
    states = slurm_commands.job_states(["101", "104_1", "201", "207_0", "207_1"])
    assert [state.state for state in states.values()] == [
        "RUNNING", "PENDING", "COMPLETED", "FAILED", "COMPLETED",
    ]  # fmt: skip
    assert len(calls) == 2
    assert "-j 201,207 " in calls[1]
    assert slurm_commands.job_states([]) == {}
    assert len(calls) == 2


def test_job_states_without_the_controller_trusts_final_states_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What accounting calls the end of a job may be that of an earlier start."""
    fake_commands(monkeypatch, squeue=AWAY, sacct=SACCT)
    states = slurm_commands.job_states(["101", "201", "204", "205", "206", "208", "209"])
    assert {name: state.state for name, state in states.items()} == {
        "101": "UNKNOWN", "201": "COMPLETED", "204": "UNKNOWN", "205": "OUT_OF_MEMORY",
        "206": "UNKNOWN", "208": "UNKNOWN", "209": "RUNNING",
    }  # fmt: skip
    assert states["101"] == JobState("UNKNOWN", str(AWAY))
    assert states["208"].reason == (
        f"{AWAY}; accounting has it PREEMPTED, but it may be queued again"
    )


OTHERS = "41|RUNNING|0:09|n1|N/A|{comment}|{script}|None\n"


@pytest.mark.parametrize(
    ("comment", "script", "state"),
    [
        ("hpcft-a", "/logs/hpcft-a_submission.sh", "RUNNING"),
        ("the site's own words", "/logs/hpcft-a_submission.sh", "RUNNING"),
        ("hpcft-a, and the site's own words", "(null)", "RUNNING"),
        ("(null)", "(null)", "UNKNOWN"),  # sbatch --wrap
        ("hpcft-b", "/elsewhere/hpcft-b_submission.sh", "UNKNOWN"),
        ("(null)", "/home/anna/other.sh", "UNKNOWN"),
    ],
)
def test_job_states_does_not_take_another_job_with_the_same_id(
    comment: str, script: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A controller that has lost its state counts from 1 again."""
    squeue = OTHERS.format(comment=comment, script=script)
    calls = fake_commands(monkeypatch, squeue=squeue, sacct="41|COMPLETED|0:0|00:00:10|n1\n")
    (seen,) = slurm_commands.job_states(["41"], {"41": ("hpcft-a", "/logs/")}).values()
    assert (seen.state, seen.unknown_to_slurm) == (state, state == "UNKNOWN")
    assert len(calls) == 1, "accounting has the latest job of that id only"
    if state == "UNKNOWN":
        assert "job 41 of this cluster is another one by now" in seen.reason


def test_job_states_does_not_take_the_end_of_another_job(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "41|COMPLETED|0:0|00:00:10|n1|{}|sbatch {}\n"
    own = line.format("hpcft-a", "/logs/hpcft-a_submission.sh")
    fake_commands(monkeypatch, squeue="", sacct=own)
    origins = {"41": ("hpcft-a", "/logs/")}
    assert slurm_commands.job_states(["41"], origins)["41"].state == "COMPLETED"
    fake_commands(monkeypatch, squeue="", sacct=line.format("", "other.sh"))
    seen = slurm_commands.job_states(["41"], origins)["41"]
    assert (seen.state, seen.unknown_to_slurm) == ("UNKNOWN", True)
    fake_commands(monkeypatch, squeue=AWAY, sacct=line.format("", "other.sh"))
    seen = slurm_commands.job_states(["41"], origins)["41"]
    assert (seen.state, seen.unknown_to_slurm) == ("UNKNOWN", False)


def test_job_states_of_a_sacct_without_submit_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Slurm 21.08 accounting did not record them."""
    calls = fake_commands(monkeypatch, squeue="")

    def sacct(*command: str, **_: object) -> str:
        calls.append(" ".join(command))
        if command[0] == "squeue":
            return ""
        if "SubmitLine" in command[-1]:
            raise ClusterError('sacct failed (1): sacct: fatal: Invalid field requested: "X"')
        return SACCT

    monkeypatch.setattr(slurm_commands, "run_command", sacct)
    assert slurm_commands.job_states(["201"], {"201": ("t",)})["201"].state == "COMPLETED"
    assert len(calls) == 3


def test_job_states_prefers_squeue_to_accounting(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_commands(monkeypatch, squeue="208|PENDING|0:00||N/A|||BeginTime\n", sacct=SACCT)
    assert slurm_commands.job_states(["208"])["208"].state == "PENDING"


def test_job_states_of_a_job_that_squeue_lacks_is_not_alive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Accounting lags behind, or has lost the end of the job."""
    fake_commands(monkeypatch, squeue="", sacct=SACCT)
    states = slurm_commands.job_states(["208", "209", "207_2"])
    assert (states["208"].state, states["208"].unknown_to_slurm) == ("PREEMPTED", False)
    for name in ("209", "207_2"):
        assert (states[name].state, states[name].unknown_to_slurm) == ("UNKNOWN", True)
    assert "accounting still has it RUNNING" in states["209"].reason


def test_job_states_without_accounting(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_commands(monkeypatch, squeue=SQUEUE, sacct=NO_ACCOUNTS)
    states = slurm_commands.job_states(["101", "204"])
    assert states["101"].state == "RUNNING"
    assert states["204"] == JobState("UNKNOWN", str(NO_ACCOUNTS), unknown_to_slurm=True)


def test_job_states_without_squeue_and_accounting_are_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_commands(monkeypatch, squeue=AWAY, sacct=NO_ACCOUNTS)
    states = slurm_commands.job_states(["101", "204"])
    assert {state.state for state in states.values()} == {"UNKNOWN"}
    assert {state.reason for state in states.values()} == {f"{AWAY}; {NO_ACCOUNTS}"}
    assert not any(state.is_over or state.is_live for state in states.values())


def test_job_states_of_a_job_that_neither_knows_is_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_commands(monkeypatch, squeue="", sacct="")
    (state,) = slurm_commands.job_states(["77"]).values()
    assert state == JobState(
        "UNKNOWN", "neither squeue nor sacct knows the job", unknown_to_slurm=True
    )


def test_ids_by_token_tells_elements_of_an_array_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "5|hpcft-a\n6_0|hpcft-b\n6_1|hpcft-b\n6_11|hpcft-b\n7|\n"
    fake_commands(monkeypatch, squeue=lines)
    ids = slurm_commands.ids_by_token()
    assert ids["hpcft-a", None] == "5"
    assert ids["hpcft-b", 1] == "6_1"
    assert ids["hpcft-b", 11] == "6_11"
    assert ("hpcft-c", None) not in ids
