"""From a run's folder and what the scheduler says to its state; orphans and damage."""

from __future__ import annotations

import pytest

from builders import AWAY, Runs, run_progress, run_record
from hpcft.cli import status_table
from hpcft.core import files, run_index
from hpcft.jobs import status
from hpcft.recovery.diagnosis.classes import RESUME
from hpcft.scheduler.job_state import JobState

# ---------------------------------------------------------------- states


@pytest.mark.parametrize(
    ("said", "state", "note"),
    [
        (JobState("PENDING", "waiting for nodes"), "PENDING", "waiting for nodes"),
        (JobState("REQUEUE_HOLD", "held"), "PENDING",
         "requeue_held: held; scontrol release lets it start; if it is held again, ask the site"),
        (JobState("RUNNING", "", "n1", 5.0), "RUNNING", ""),
        (JobState("SUSPENDED"), "RUNNING", "suspended"),
        (JobState("COMPLETING"), "RUNNING", "completing"),
        (JobState("TIMEOUT"), "TIMEOUT", "timeout: the time limit was reached at step "
         f"30 of 120; raise resources.time_min, or {RESUME}"),
        (JobState("CANCELLED"), "CANCELLED", f"cancelled: it was cancelled; {RESUME} when wanted"),
        (JobState("OUT_OF_MEMORY"), "OUT_OF_MEMORY", "host_oom: Slurm ended it for using more "
         "host memory than --mem; lower the ranks per node or offload less"),
        (JobState("NODE_FAIL"), "NODE_FAIL", f"node_failed: a node failed; {RESUME}"),
        (JobState("FAILED", exit_code="1:0"), "FAILED",
         "rank_died: a rank ended without a word (exit code 1:0); see hpcft logs --stderr, or "
         f"{RESUME}"),
        (JobState("COMPLETED", exit_code="0:0"), "FAILED",
         "rank_died: a rank ended without a word (exit code 0:0); see hpcft logs --stderr, or "
         f"{RESUME}"),
        (JobState("UNKNOWN", "who knows"), "UNKNOWN", "who knows"),
    ],
)  # fmt: skip
def test_a_run_without_a_result_is_what_slurm_says(
    said: JobState, state: str, note: str, runs: Runs
) -> None:
    runs.add("aaaa0000", parts=(run_progress(age_s=3600),))
    runs.states = {"11": said}
    view = runs.view("aaaa0000")
    assert (view.state, view.note, view.job_id) == (state, note, "11")
    assert view.is_live == (state in ("PENDING", "RUNNING"))


@pytest.mark.parametrize("said", ["RUNNING", "FAILED", "TIMEOUT", "UNKNOWN"])
def test_a_result_means_completed_whatever_slurm_says(said: str, runs: Runs) -> None:
    runs.add("aaaa0000", parts=(run_record("aaaa0000", accuracy=0.9), run_progress(age_s=9000)))
    runs.states = {"11": JobState(said)}
    view = runs.view("aaaa0000")
    assert (view.state, view.note, view.elapsed_s) == ("COMPLETED", "", 3600.0)
    assert runs.asked == [], "nothing is asked of a run that is done"
    assert status_table.done_share(view) == 1.0


@pytest.mark.parametrize(
    ("age_s", "state", "note"),
    [(5.0, "RUNNING", f"heartbeat is fresh; {AWAY}"), (600.0, "UNKNOWN", str(AWAY))],
)
def test_with_the_scheduler_away_the_heartbeat_decides(
    age_s: float, state: str, note: str, runs: Runs
) -> None:
    runs.add("aaaa0000", parts=(run_progress(age_s=age_s),))
    runs.away = AWAY
    view = runs.view("aaaa0000")
    assert (view.state, view.note, view.nodes) == (state, note, "n7")


def test_many_runs_are_one_question(runs: Runs) -> None:
    for index in range(5):
        runs.add(f"aaaa000{index}", job_id=f"12_{index}")
        runs.states[f"12_{index}"] = JobState("RUNNING", nodes=f"n{index}")
    views = status.run_statuses(run_index.list_runs(runs.root))
    assert [view.nodes for view in views] == ["n0", "n1", "n2", "n3", "n4"]
    assert runs.asked == sorted(runs.states)


# ---------------------------------------------------------------- orphans


def test_a_job_whose_id_was_not_noted_is_adopted_by_its_token(runs: Runs) -> None:
    runs.add("aaaa0000", job_id=None)
    runs.tokens, runs.states = {"token-aaaa0000": "77"}, {"77": JobState("RUNNING")}
    view = runs.view("aaaa0000")
    assert (view.state, view.job_id) == ("RUNNING", "77")


def test_a_job_that_slurm_never_got_was_not_queued(runs: Runs) -> None:
    runs.add("aaaa0000", job_id=None)
    view = runs.view("aaaa0000")
    assert (view.state, view.job_id) == ("FAILED", "")
    assert view.note.startswith(
        "not_submitted: was not queued: the submitting command was interrupted"
    )


def test_an_orphan_is_unknown_while_the_scheduler_is_away(runs: Runs) -> None:
    for index in range(3):
        runs.add(f"aaaa000{index}", job_id=None, array_index=index)
    runs.away = AWAY
    views = status.run_statuses(run_index.list_runs(runs.root))
    assert {(view.state, view.note) for view in views} == {("UNKNOWN", str(AWAY))}
    assert len(runs.asked) == 1, "each question to an absent controller takes half a minute"


def test_a_folder_without_an_attempt_was_never_submitted(runs: Runs) -> None:
    runs.add("aaaa0000", attempts=[])
    assert runs.view("aaaa0000").note.startswith("not_submitted: was never submitted")


def test_a_local_run_whose_process_is_gone_has_failed(runs: Runs) -> None:
    runs.add("aaaa0000", job_id="999999999", scheduler="local", errors=(("ValueError", "no"),))
    view = runs.view("aaaa0000")
    assert (view.state, view.note) == (
        "FAILED",
        "user: rank 0 on n0: ValueError: no; see hpcft logs --stderr",
    )


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("name", ["progress.json", "plan.json"])
def test_a_damaged_record_does_not_change_what_slurm_says(name: str, runs: Runs) -> None:
    paths = runs.add("aaaa0000")
    (paths.folder / name).write_text('{"of": "another version"}')
    runs.states = {"11": JobState("RUNNING")}
    view = runs.view("aaaa0000")
    assert view.state == "RUNNING"
    assert f"{name}: is damaged" in view.note
    files.write_record(paths.result, run_record("aaaa0000", accuracy=0.9))
    assert runs.view("aaaa0000").state == "COMPLETED"


def test_a_damaged_result_is_no_result(runs: Runs) -> None:
    paths = runs.add("aaaa0000")
    paths.result.write_text('{"run_id": "aaaa0000", "metr')
    runs.states = {"11": JobState("COMPLETED")}
    view = runs.view("aaaa0000")
    assert view.state == "FAILED"
    assert "result.json: is damaged" in view.note
    runs.away = AWAY
    assert runs.view("aaaa0000").state == "UNKNOWN"
