"""Tests of the state of a run while the scheduler, accounting or a clock is in trouble."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from on_slurm import (
    campus,
    closed,
    hpcft,
    impatient,
    job_ids,
    jobs,
    live_jobs,
    nothing_left,
    out_of,
    slurm,
    submit,
    view,
)

from builders import ROOT, Cli
from hpcft.jobs import status
from hpcft.scheduler import slurm_commands
from hpcft.scheduler.job_state import PENDING
from hpcft.scheduler.pending_reasons import explain_reason
from real_runs import current_step, folder_of, is_gone, supervisor_pids, until, worker_pids

pytestmark = pytest.mark.slurm

LONG = ("-o", "train.max_steps=100000", "-o", "train.logging_steps=100")


@pytest.fixture(scope="module")
def place(testbed: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's folder for all tests of this module."""
    with campus(tmp_path_factory.mktemp("scheduler")) as folder:
        yield folder
        subprocess.run(["scancel", "--user=root", "--quiet"], check=False)


def cancelled(cli: Cli, name: str) -> None:
    """Cancels a run, and waits until none of its processes is left."""
    cli("cancel", name)
    until(lambda: view(cli, name)["state"] == "CANCELLED", 30, name)
    assert nothing_left(folder_of(name))


def submit_forgotten(cli: Cli, name: str, job_id: str) -> None:
    """Submits a run, and replaces its job id by one that squeue does not know."""
    folder = submit(cli, name)
    (own,) = jobs(name)
    slurm("scancel", own)
    file = folder / "job.json"
    file.write_text(file.read_text().replace(f'"{own}"', f'"{job_id}"'))


def answering(folder: Path, command: str, answer: str) -> str:
    """Returns a PATH on which a scheduler command runs this shell line."""
    folder.mkdir()
    file = folder / command
    file.write_text(f"#!/bin/sh\n{answer}\n")
    file.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


# ---------------------------------------------------------------- the controller


@pytest.mark.slow
def test_status_watches_a_run_while_the_controller_is_away(
    place: Path, cli: Cli, testbed: Any, tmp_path: Path
) -> None:
    folder = submit(cli, "watched", "-o", "train.max_steps=500")
    until(lambda: current_step(folder) > 0)
    with impatient(tmp_path), hpcft("status", "watched", "--watch") as watching:
        testbed.stop_controller()
        try:
            seen = view(cli, "watched")
            assert (seen["state"], seen["job_id"]) == ("RUNNING", *recorded_jobs("watched"))
            assert cli("cancel", "watched").code == 3
        finally:
            testbed.start_controller()
        out_of(watching)
    assert watching.returncode == 0
    assert view(cli, "watched")["state"] == "COMPLETED"
    assert len(jobs("watched")) == 1
    assert nothing_left(folder)


def recorded_jobs(name: str) -> list[str]:
    return [str(job_id) for job_id in job_ids(name)]


# ---------------------------------------------------------------- accounting


@pytest.mark.parametrize(
    ("answer", "note"),
    [
        ("echo '{id}|RUNNING|0:0|00:01:00|n1'", "accounting still has it RUNNING"),
        ("echo 'slurmdbd: Connection refused' >&2; exit 1", "Connection refused"),
        ("exit 0", "neither squeue nor sacct knows the job"),
    ],
    ids=["lags", "fails", "forgot"],
)
def test_a_job_that_slurm_does_not_know_is_unknown_and_not_failed(
    answer: str, note: str, place: Path, cli: Cli, testbed: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Such a job cannot be alive, so that the run can be submitted again."""
    with closed(testbed):
        name = f"forgotten-{len(list(Path('runs').glob('forgotten*')))}"
        submit_forgotten(cli, name, "4000000")
        monkeypatch.setenv("PATH", answering(tmp_path / "b", "sacct", answer.format(id="4000000")))
        seen = view(cli, name)
        assert seen["state"] == "UNKNOWN"
        assert note in seen["note"]
        submit(cli, name)
        assert recorded_jobs(name) == live_jobs(name)
        cli("cancel", name)


def test_status_soon_gives_up_an_accounting_that_hangs(
    place: Path, cli: Cli, testbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """slurmdbd accepts connections and does not respond."""
    with closed(testbed):
        submit_forgotten(cli, "frozen", "4000001")
        monkeypatch.setattr(slurm_commands, "TIMEOUT_S", 2)
        testbed.pause("slurmdbd")
        try:
            seen = view(cli, "frozen")
        finally:
            testbed.resume("slurmdbd")
    assert seen["state"] == "UNKNOWN"
    assert "sacct did not answer within 2 s" in seen["note"]


def test_an_earlier_start_in_the_accounts_is_not_the_end_of_the_job(
    place: Path, cli: Cli, testbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closed(testbed), impatient(tmp_path):
        submit(cli, "again")
        (job_id,) = jobs("again")
        old = f"echo '{job_id}|PREEMPTED|0:15|00:09:00|n1'"
        monkeypatch.setenv("PATH", answering(tmp_path / "bin", "sacct", old))
        assert view(cli, "again")["state"] == "PENDING"
        testbed.pause("slurmctld")
        try:
            seen = view(cli, "again")
        finally:
            testbed.resume("slurmctld")
        assert seen["state"] == "UNKNOWN"
        assert "PREEMPTED, but it may be queued again" in seen["note"]
        cli("cancel", "again")


# ---------------------------------------------------------------- states


def batch(*options: str, command: str = "sleep 300") -> str:
    """Submits a job; returns its id."""
    return slurm("sbatch", "--parsable", "-o", "/dev/null", *options, "--wrap", command).strip()


def test_explain_reason_knows_every_reason_of_this_slurm(testbed: Any) -> None:
    """The reasons are read from Slurm's library."""
    squeue = shutil.which("squeue")
    linked = subprocess.run(["ldd", str(squeue)], capture_output=True, text=True, check=True).stdout
    found = re.search(r"libslurmfull\S* => (\S+)", linked)
    if not found:
        pytest.skip("this Slurm's clients do not share a library")
    held = Path(found[1]).read_bytes()
    first, last = held.index(b"PartitionNodeLimit\0"), held.index(b"QOSMinBilling\0")
    words = [word.decode() for word in held[first : last + 13].split(b"\0") if word]
    assert len(words) > 150
    assert [word for word in words if explain_reason(word) == word] == []


def test_job_states_have_the_reasons_of_waiting_jobs(place: Path, testbed: Any) -> None:
    slurm("scancel", "--user=root")
    until(lambda: not slurm("squeue", "-h"), 30)
    failed = batch(command="false")
    full = batch("-N4", "--exclusive", "--mem=0")
    try:
        until(lambda: slurm_commands.job_states([full])[full].state == "RUNNING", 20)
        slurm("scontrol", "update", "partitionname=high", "state=DOWN")
        testbed.set_node("n4", "drain", "a test")
        held = batch("--hold")
        wanted = {
            held: "JobHeldUser",
            batch("--begin=now+1hour"): "BeginTime",
            batch(f"--dependency=afterok:{held}"): "Dependency",
            batch(f"--dependency=afterok:{failed}"): "DependencyNeverSatisfied",
            batch("-p", "high"): "PartitionDown",
            batch("-w", "n4"): "ReqNodeNotAvail",
            batch("-N3", "--exclusive"): "Resources",
            batch("-N2", "--exclusive"): "Priority",
        }
        slurm("scontrol", "hold", admin := batch("--hold"))
        wanted[admin] = "JobHeldAdmin"
        slurm("sacctmgr", "-i", "add", "account", "poor", "GrpTRES=cpu=1")
        slurm("sacctmgr", "-i", "add", "user", "root", "account=poor")
        wanted[batch("--account=poor", "-n", "4")] = "AssocGrpCpuLimit"

        def shown() -> dict[str, str]:
            states = slurm_commands.job_states(list(wanted))
            assert {state.state for state in states.values()} == {"PENDING"}
            words = [re.search(r"\((\w+)[^()]*(\(.*\))?\)$", s.reason) for s in states.values()]
            return {
                job_id: word[1] if word else "" for job_id, word in zip(states, words, strict=True)
            }

        until(lambda: shown() == wanted, 20, "the reasons")
    finally:
        slurm("scontrol", "update", "partitionname=high", "state=UP")
        slurm("scancel", "--user=root")
        until(lambda: testbed.node_states()["n4"] == "drained", 20)
        testbed.set_node("n4", "resume", "")


def test_a_suspended_or_held_job_is_live(place: Path, testbed: Any) -> None:
    job_id = batch("--requeue")

    def state() -> Any:
        return slurm_commands.job_states([job_id])[job_id]

    try:
        until(lambda: state().state == "RUNNING", 20)
        slurm("scontrol", "suspend", job_id)
        assert (state().state, state().is_live) == ("SUSPENDED", True)
        slurm("scontrol", "resume", job_id)
        slurm("scontrol", "requeuehold", "State=SpecialExit", job_id)
        until(lambda: state().state in PENDING, 20)
        until(lambda: state().state == "SPECIAL_EXIT", 20)
        assert state().is_live
        assert not state().is_over
    finally:
        slurm("scancel", job_id)


def test_a_job_cancelled_while_pending_or_running_is_cancelled(
    place: Path, cli: Cli, testbed: Any
) -> None:
    with closed(testbed):
        submit(cli, "waits")
        assert view(cli, "waits")["state"] == "PENDING"
        slurm("scancel", *jobs("waits"))
        assert view(cli, "waits")["state"] == "CANCELLED"
    folder = submit(cli, "runs", *LONG)
    until(lambda: current_step(folder) > 0)
    slurm("scancel", *jobs("runs"))
    until(lambda: view(cli, "runs")["state"] == "CANCELLED", 30)
    for name in ("waits", "runs"):
        assert view(cli, name)["failure"]["class"] == "cancelled"
        assert len(jobs(name)) == 1
        assert nothing_left(folder_of(name))


def test_a_failed_setup_line_of_the_profile_fails_the_run(place: Path, cli: Cli) -> None:
    text = (ROOT / "slurm/testbed.yaml").read_text()
    Path("modules.yaml").write_text(f"{text}setup: [module load nosuch]\n")
    submit(cli, "module", cluster="modules.yaml")
    until(lambda: view(cli, "module")["state"] == "FAILED", 30)
    seen = view(cli, "module")
    assert seen["failure"]["class"] == "module"
    assert "module" in seen["note"]
    assert len(jobs("module")) == 1
    assert is_gone(folder_of("module"))


# ---------------------------------------------------------------- clocks


SKEWED = """\
import time
real = time.time
time.time = lambda: real() + {seconds}
"""


@pytest.mark.slow
def test_status_works_with_wrong_clocks_of_nodes(
    place: Path, cli: Cli, testbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The age of a heartbeat is that of its file, not of the time in it."""
    text = (ROOT / "slurm/testbed.yaml").read_text()
    skews = {"early": -3600, "ahead": 3600}
    for name, seconds in skews.items():
        where = tmp_path / name
        where.mkdir()
        (where / "sitecustomize.py").write_text(SKEWED.format(seconds=seconds))
        lines = text.replace("environment:\n", f"environment:\n  PYTHONPATH: '{where}'\n")
        (place / f"{name}.yaml").write_text(lines)
        submit(cli, name, *LONG, cluster=place / f"{name}.yaml")
    for name in skews:
        until(lambda name=name: current_step(folder_of(name)) > 0)
    monkeypatch.setenv("PATH", answering(tmp_path / "bin", "sacct", "exit 1"))
    with impatient(tmp_path):
        testbed.pause("slurmctld")
        try:
            for name, seconds in skews.items():
                updated_at = json.loads((folder_of(name) / "progress.json").read_text())[
                    "updated_at"
                ]
                file_s = (folder_of(name) / "progress.json").stat().st_mtime
                assert updated_at - file_s == pytest.approx(seconds, abs=60)
            seen = {view["recipe"]: view for view in cli("status", *skews, "--json").json}
            assert {view["state"] for view in seen.values()} == {"RUNNING"}
            for name in skews:
                folder = folder_of(name)
                for pid in (*supervisor_pids(folder).values(), *worker_pids(folder)):
                    psutil.Process(pid).kill()
                until(lambda folder=folder: is_gone(folder), 10)
                file = folder / "progress.json"
                long_ago = file.stat().st_mtime - 2 * status.HEARTBEAT_FRESH_S
                os.utime(file, (long_ago, long_ago))
            seen = {view["recipe"]: view for view in cli("status", *skews, "--json").json}
            assert {view["state"] for view in seen.values()} == {"UNKNOWN"}
        finally:
            testbed.resume("slurmctld")
    for name in skews:
        cancelled(cli, name)
