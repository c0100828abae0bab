"""The status of a run: from its folder and the scheduler's answer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from builders import AWAY, Runs, run_plan, run_progress, run_record, write_recovery
from hpcft.cli import status_table
from hpcft.core import run_index
from hpcft.core.files import lock_folder, write_record
from hpcft.jobs import status
from hpcft.recovery.diagnosis.classes import KNOWN
from hpcft.scheduler.job_state import JobState

# ---------------------------------------------------------------- what the scheduler says


@pytest.mark.parametrize(
    ("job", "state", "note"),
    [
        (JobState("PENDING", "waiting for nodes"), "PENDING", "waiting for nodes"),
        (JobState("REQUEUE_HOLD", "held"), "PENDING",
         f"requeue_held: held; {KNOWN['requeue_held'].next_step}"),
        (JobState("RUNNING", nodes="n1", elapsed_s=5.0), "RUNNING", ""),
        (JobState("SUSPENDED"), "RUNNING", "suspended"),
        (JobState("COMPLETING"), "RUNNING", "completing"),
        (JobState("TIMEOUT"), "TIMEOUT",
         f"timeout: the time limit was reached at step 30 of 120; {KNOWN['timeout'].next_step}"),
        (JobState("CANCELLED", "by anna"), "CANCELLED",
         f"cancelled: the job was cancelled by anna; {KNOWN['cancelled'].next_step}"),
        (JobState("OUT_OF_MEMORY"), "OUT_OF_MEMORY",
         "host_oom: Slurm ended the job because it used more host memory than --mem; "
         f"{KNOWN['host_oom'].next_step}"),
        (JobState("NODE_FAIL"), "NODE_FAIL",
         f"node_failed: a node failed; {KNOWN['node_failed'].next_step}"),
        (JobState("FAILED", exit_code="1:0"), "FAILED",
         "rank_died: a rank ended without an error message (exit code 1:0); "
         f"{KNOWN['rank_died'].next_step}"),
        (JobState("COMPLETED", exit_code="0:0"), "FAILED",
         "rank_died: a rank ended without an error message (exit code 0:0); "
         f"{KNOWN['rank_died'].next_step}"),
        (JobState("UNKNOWN", "who knows"), "UNKNOWN", "who knows"),
    ],
)  # fmt: skip
def test_run_status_without_a_result_follows_the_job(
    job: JobState, state: str, note: str, runs: Runs
) -> None:
    runs.add("aaaa0000", parts=(run_progress(age_s=3600),))
    runs.states = {"11": job}
    run = runs.status_of("aaaa0000")
    assert (run.state, run.note, run.job_id) == (state, note, "11")
    assert run.is_live == (state in ("PENDING", "RUNNING"))
    assert run.may_be_live == (state in ("PENDING", "RUNNING", "UNKNOWN"))


@pytest.mark.parametrize("job", ["RUNNING", "FAILED", "TIMEOUT", "UNKNOWN"])
def test_run_status_with_a_result_is_completed_without_asking_slurm(job: str, runs: Runs) -> None:
    runs.add("aaaa0000", parts=(run_record("aaaa0000", accuracy=0.9), run_progress(age_s=9000)))
    runs.states = {"11": JobState(job)}
    run = runs.status_of("aaaa0000")
    assert (run.state, run.note, run.elapsed_s) == ("COMPLETED", "", 3600.0)
    assert runs.asked == []
    assert status_table.done_share(run) == 1.0


@pytest.mark.parametrize(
    ("age_s", "state", "note"),
    [(5.0, "RUNNING", f"the heartbeat is fresh; {AWAY}"), (600.0, "UNKNOWN", str(AWAY))],
)
def test_run_status_without_the_scheduler_follows_the_heartbeat(
    age_s: float, state: str, note: str, runs: Runs
) -> None:
    runs.add("aaaa0000", parts=(run_progress(age_s=age_s),))
    runs.away = AWAY
    run = runs.status_of("aaaa0000")
    assert (run.state, run.note, run.nodes) == (state, note, "n7")


def test_run_statuses_of_many_runs_is_one_question(runs: Runs) -> None:
    for index in range(5):
        runs.add(f"aaaa000{index}", job_id=f"12_{index}")
        runs.states[f"12_{index}"] = JobState("RUNNING", nodes=f"n{index}")
    assert [run.nodes for run in runs.statuses()] == ["n0", "n1", "n2", "n3", "n4"]
    assert runs.asked == sorted(runs.states)


def test_run_status_of_a_local_run_whose_process_is_gone_is_failed(runs: Runs) -> None:
    runs.add("aaaa0000", job_id="999999999", scheduler="local", errors=(("ValueError", "no"),))
    run = runs.status_of("aaaa0000")
    assert run.state == "FAILED"
    assert run.note.startswith("user: rank 0 on n0: ValueError: no; ")


# ---------------------------------------------------------------- job ids that were not recorded


def test_run_status_finds_a_job_by_its_token(runs: Runs) -> None:
    runs.add("aaaa0000", job_id=None)
    runs.tokens, runs.states = {"token-aaaa0000": "77"}, {"77": JobState("RUNNING")}
    run = runs.status_of("aaaa0000")
    assert (run.state, run.job_id) == ("RUNNING", "77")
    assert run.attempt.job_id == "77"


def test_run_status_finds_a_job_that_wrote_a_heartbeat(runs: Runs) -> None:
    runs.add("aaaa0000", job_id=None, parts=(run_progress(age_s=3600, job_id="78"),))
    runs.states = {"78": JobState("RUNNING")}
    assert (runs.status_of("aaaa0000").state, runs.status_of("aaaa0000").job_id) == (
        "RUNNING", "78",
    )  # fmt: skip


@pytest.mark.parametrize("job_id", ["--me", "../../x", "78;reboot", ""])
def test_run_status_takes_no_hostile_text_for_a_job_id(job_id: str, runs: Runs) -> None:
    runs.add("aaaa0000", job_id=None, parts=(run_progress(age_s=3600, job_id=job_id),))
    assert runs.status_of("aaaa0000").job_id == ""
    assert set(runs.asked) == {"tokens"}


def test_run_status_finds_the_job_that_resubmits_the_run(runs: Runs) -> None:
    paths = runs.add("aaaa0000", job_id=None, parts=(run_progress(age_s=3600, job_id="12"),))
    write_recovery(paths, step=0, action="resubmit", job_id="11")
    runs.states = {"11": JobState("RUNNING")}
    assert (runs.status_of("aaaa0000").state, runs.status_of("aaaa0000").job_id) == (
        "RUNNING", "11",
    )  # fmt: skip


def test_run_status_of_a_job_that_slurm_never_had_is_not_submitted(runs: Runs) -> None:
    runs.add("aaaa0000", job_id=None)
    run = runs.status_of("aaaa0000")
    assert (run.state, run.job_id) == ("FAILED", "")
    assert run.note.startswith(
        "not_submitted: was not queued: the submitting command was interrupted"
    )


def test_run_status_while_a_command_holds_the_lock_is_being_submitted(runs: Runs) -> None:
    runs.add("aaaa0000", job_id=None)
    runs.add("aaaa0001", job_id=None, scheduler="local")
    with lock_folder(runs.root):
        states = {(run.state, run.note) for run in runs.statuses()}
    assert states == {("PENDING", "is being submitted")}


def test_run_statuses_without_the_scheduler_asks_it_once_about_tokens(runs: Runs) -> None:
    for index in range(3):
        runs.add(f"aaaa000{index}", job_id=None, array_index=index)
    runs.away = AWAY
    assert {(run.state, run.note) for run in runs.statuses()} == {("UNKNOWN", str(AWAY))}
    assert len(runs.asked) == 1, "each question to an absent controller takes half a minute"


def test_run_status_without_an_attempt_was_never_submitted(runs: Runs) -> None:
    runs.add("aaaa0000", attempts=[])
    assert runs.status_of("aaaa0000").note.startswith("not_submitted: was never submitted")


# ---------------------------------------------------------------- the plan


def test_run_status_plan_is_the_current_one(runs: Runs) -> None:
    paths = runs.add("aaaa0000", parts=(run_plan(),))
    runs.states = {"11": JobState("RUNNING")}
    assert runs.status_of("aaaa0000").plan == run_plan()
    write_record(paths.current_plan, run_plan(recovery_number=2, gpu_memory=[]))
    plan = runs.status_of("aaaa0000").plan
    assert plan is not None
    assert (plan.recovery_number, plan.gpu_peak_bytes) == (2, None)


def test_run_status_plan_of_0_1_has_no_prediction_of_another_layout(runs: Runs) -> None:
    """hpcft 0.1 wrote no current_plan.json, and its plan.json is from before the fallback."""
    paths = runs.add("aaaa0000", parts=(run_plan(),))
    smaller = run_plan().layout.model_copy(update={"gradient_accumulation_steps": 2})
    write_recovery(paths, step=3, change="micro-batch 2 → 1", layout=smaller)
    plan = runs.status_of("aaaa0000").plan
    assert plan is not None
    assert (plan.layout, plan.gpu_peak_bytes, plan.time) == (smaller, None, None)


# ---------------------------------------------------------------- damaged files

NEWER = '{"schema_version": 99}'
"""A record in a format that only a newer hpcft can read."""


@pytest.mark.parametrize("text", ['{"of": "another version"}', NEWER, ""])
@pytest.mark.parametrize("name", ["progress.json", "plan.json", "current_plan.json",
                                  "recoveries/1.json"])  # fmt: skip
def test_run_status_with_a_damaged_record_follows_the_job(name: str, text: str, runs: Runs) -> None:
    paths = runs.add("aaaa0000")
    paths.recoveries.mkdir()
    (paths.folder / name).write_text(text)
    for job, state in (("RUNNING", "RUNNING"), ("PENDING", "PENDING"), ("TIMEOUT", "TIMEOUT")):
        runs.states = {"11": JobState(job)}
        run = runs.status_of("aaaa0000")
        assert (run.state, run.damage) == (state, "")
        assert f"{name}: " in run.note
        assert ("newer hpcft" if text == NEWER else "is damaged") in run.note
    write_record(paths.result, run_record("aaaa0000", accuracy=0.9))
    assert runs.status_of("aaaa0000").state == "COMPLETED"
    assert f"{name}: " in runs.status_of("aaaa0000").note


@pytest.mark.parametrize("text", ['{"run_id": "aaaa0000", "metr', NEWER])
def test_run_status_with_a_damaged_result_is_unknown(text: str, runs: Runs) -> None:
    paths = runs.add("aaaa0000")
    paths.result.write_text(text)
    for job, may_be_live in (("COMPLETED", False), ("FAILED", False), ("UNKNOWN", True)):
        runs.states = {"11": JobState(job)}
        run = runs.status_of("aaaa0000")
        assert (run.state, run.record, run.may_be_live) == ("UNKNOWN", None, may_be_live)
        assert "result.json: " in run.note
        assert run.damage == run.note
    runs.states = {"11": JobState("RUNNING")}
    assert runs.status_of("aaaa0000").state == "RUNNING", "the scheduler knows that it is alive"
    runs.away = AWAY
    run = runs.status_of("aaaa0000")
    assert (run.state, run.note) == ("UNKNOWN", f"{run.damage}; {AWAY}")


def test_run_status_with_the_result_of_another_run_is_unknown(runs: Runs) -> None:
    runs.add("aaaa0000", parts=(run_record("bbbb0000", accuracy=0.9),))
    runs.states = {"11": JobState("COMPLETED")}
    run = runs.status_of("aaaa0000")
    assert (run.state, run.record) == ("UNKNOWN", None)
    assert run.note.endswith("result.json: belongs to the run bbbb0000")


@pytest.mark.parametrize("text", ["{", NEWER, None])
def test_run_status_without_a_readable_job_is_unknown(text: str | None, runs: Runs) -> None:
    paths = runs.add("aaaa0000", parts=(run_record("aaaa0000", accuracy=0.9),))
    if text is None:
        paths.job.unlink()
    else:
        paths.job.write_text(text)
    run = runs.status_of("aaaa0000")
    assert (run.state, run.job.recipe, run.job.run_id) == ("UNKNOWN", "made", "aaaa0000")
    assert "job.json: " in run.note
    assert run.may_be_live
    assert runs.asked == []
    assert runs.status_of("made/aaaa0000") == run


def test_list_runs_lists_damaged_runs_last_and_no_other_folders(runs: Runs) -> None:
    runs.add("bbbb0000")
    runs.add("aaaa0000").job.write_text("")
    (runs.root / "made" / "sweep-11112222").mkdir()
    (runs.root / "calibration").mkdir()
    listed = [(run.job.run_id, bool(run.damage)) for run in run_index.list_runs(runs.root)]
    assert listed == [("bbbb0000", False), ("aaaa0000", True)]


def test_list_runs_reports_a_folder_that_cannot_be_listed(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.scandir

    def scandir(folder: Path) -> Any:
        if Path(folder).name == "made":
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    reported: list[str] = []
    assert list(run_index.list_runs(runs.root, reported.append)) == []
    assert reported == [f"{runs.root / 'made'}: cannot be listed: Permission denied"]


def test_has_fresh_heartbeat_of_a_missing_file_is_false(runs: Runs) -> None:
    paths = runs.add("aaaa0000")
    assert not status.has_fresh_heartbeat(paths)
    write_record(paths.progress, run_progress())
    assert status.has_fresh_heartbeat(paths)
