"""Tests of the decision after srun: requeue the job, resubmit the run, or stop."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from builders import cluster, facts, plan_of, recipe, submitted_run
from hpcft.core.errors import ClusterError
from hpcft.core.files import write_record
from hpcft.core.rank_errors import read_rank_errors, write_rank_error
from hpcft.core.records import Attempt, Job, RankError, Recovery
from hpcft.recovery import retry
from hpcft.recovery.diagnosis import explain_failure
from hpcft.recovery.log import append_recovery
from hpcft.recovery.run import Run
from hpcft.scheduler.job_state import UNKNOWN, JobState
from hpcft.training import requeue
from hpcft.training.requeue import decide_requeue

AWAY = "squeue failed (1): slurm_load_jobs error: Unable to contact slurm controller"


class Site:
    """A Slurm that runs job 77; notes what is asked of it."""

    def __init__(self) -> None:
        self.state = JobState("RUNNING")
        self.requeued: list[str] = []
        self.resubmitted: list[tuple[int, list[str]]] = []
        self.refuses_requeue = self.refuses_resubmit = False
        self.away = 0
        """Number of further calls that the controller does not answer."""

    def states(self, job_ids: list[str]) -> dict[str, JobState]:
        with contextlib.suppress(ClusterError):
            self.answer()
            return dict.fromkeys(job_ids, self.state)
        return dict.fromkeys(job_ids, JobState(UNKNOWN, AWAY))

    def answer(self) -> None:
        if self.away:
            self.away -= 1
            raise ClusterError(AWAY)

    def requeue(self, job_id: str) -> None:
        self.answer()
        if self.refuses_requeue:
            raise ClusterError("scontrol: error: requeue is disabled")
        self.requeued.append(job_id)

    def resubmit(self, run: Run, plan: Any, job_id: str) -> str:
        self.answer()
        if self.refuses_resubmit:
            raise ClusterError("sbatch is not on PATH")
        self.resubmitted.append((plan.mem_mib, run.read_recoveries()[-1].excluded))
        return "78"


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site()
    monkeypatch.setattr(retry, "PAUSE_S", 0.0)
    monkeypatch.setattr(requeue.slurm_commands, "job_states", made.states)
    monkeypatch.setattr(requeue.slurm_job, "requeue", made.requeue)
    monkeypatch.setattr(requeue.resubmit, "resubmit", made.resubmit)
    return made


@pytest.fixture
def run(workplace: Path, site: Site) -> Run:
    """A run whose job 77 has ended too early."""
    made, profile = recipe(), cluster("a100-80")
    run = submitted_run(workplace, made, profile, plan_of(made, profile, facts(100_000_000)))
    attempt = Attempt(job_id="77", token="t", submitted_at=1.0, logs=str(run.paths.logs), host="h")
    write_record(run.paths.job, Job(run_id="a" * 12, recipe="made", cluster="a100-80",
                                    scheduler="slurm", attempts=[attempt]))  # fmt: skip
    return run


def fail(run: Run, kind: str, message: str, failure: str = "") -> None:
    """A rank has written this error."""
    error = RankError.now(3, kind, message, node="n2", job_id="77", failure=failure)
    write_rank_error(run.paths, error)


def write_answers(run: Run, count: int) -> None:
    """The run has answered so many examples."""
    run.paths.answers.mkdir(exist_ok=True)
    (run.paths.answers / "0.jsonl").write_text('[1, "a"]\n' * count)


def last_recovery(run: Run) -> Recovery:
    return run.read_recoveries()[-1]


def test_decide_requeue_of_a_complete_run_does_nothing(run: Run, site: Site) -> None:
    run.paths.result.write_text("{}")
    assert decide_requeue(run, "77", 0) == "the run is complete"
    assert (site.requeued, site.resubmitted) == ([], [])


def test_decide_requeue_of_a_run_with_another_job_does_nothing(run: Run) -> None:
    assert decide_requeue(run, "76", 0) == "the run continues as job 77"


def test_decide_requeue_of_a_job_that_has_ended_does_nothing(run: Run, site: Site) -> None:
    site.state = JobState("CANCELLED")
    assert decide_requeue(run, "77", 0) == "the job is over: CANCELLED"


def test_decide_requeue_of_a_job_that_slurm_has_restarted_does_nothing(run: Run) -> None:
    plan = run.read_plan()
    error = RankError.now(0, "Interrupted", "restarted", job_id="77")
    append_recovery(run.paths, plan, plan, number=1, action="requeue", error=error,
                    cause="interrupted", restart=1)  # fmt: skip
    assert decide_requeue(run, "77", 0) == "Slurm has restarted the job already"


def test_decide_requeue_of_a_user_error_stops(run: Run, site: Site) -> None:
    fail(run, "KeyError", "'x'")
    said = decide_requeue(run, "77", 0)
    assert said.startswith("not restarted: user: rank 3 on n2: KeyError: 'x'; see hpcft logs RUN")
    assert (site.requeued, run.read_recoveries()) == ([], [])


def test_decide_requeue_of_a_rank_that_died_requeues_the_job(run: Run, site: Site) -> None:
    fail(run, "Died", "the training process was ended by SIGKILL")
    said = decide_requeue(run, "77", 1)
    assert (
        said == "requeued at step 0: rank 3 on n2: Died: the training process was ended by SIGKILL"
    )
    assert site.requeued == ["77"]
    recovery = last_recovery(run)
    assert (recovery.action, recovery.cause, recovery.restart) == ("requeue", "rank_died", 2)
    assert (recovery.rank, recovery.node) == (3, "n2")


def test_decide_requeue_resubmits_if_slurm_refuses_to_requeue(run: Run, site: Site) -> None:
    site.refuses_requeue = True
    fail(run, "Died", "the training process was ended by SIGKILL")
    assert decide_requeue(run, "77", 0).startswith("resubmitted as job 78, at step 0: rank 3")
    (recovery,) = run.read_recoveries()
    assert (recovery.number, recovery.action, recovery.excluded) == (1, "resubmit", [])


def test_decide_requeue_without_any_way_to_restart_leaves_no_recovery(run: Run, site: Site) -> None:
    site.refuses_requeue = site.refuses_resubmit = True
    before = run.read_plan()
    fail(run, "Died", "the training process was ended by SIGKILL")
    said = decide_requeue(run, "77", 0)
    assert said.startswith("not restarted: rank_died: rank 3 on n2: ")
    assert said.endswith("(sbatch is not on PATH)")
    assert (run.read_recoveries(), run.read_plan()) == ([], before)


@pytest.mark.parametrize("away", [1, 2, 9])
def test_decide_requeue_while_the_controller_is_away_waits_for_it(
    run: Run, site: Site, away: int
) -> None:
    site.away = away
    fail(run, "Died", "the training process was ended by SIGKILL")
    assert decide_requeue(run, "77", 0).startswith("requeued at step 0: rank 3")
    assert site.requeued == ["77"]
    assert len(run.read_recoveries()) == 1


def test_decide_requeue_with_a_controller_that_stays_away_is_explained(
    run: Run, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "RETRY_S", 0.1)
    site.away = 10**9
    fail(run, "Ended", "the scheduler stopped the rank (SIGTERM)", "preempted")
    said = decide_requeue(run, "77", 0)
    assert said.startswith("not restarted: preempted: ")
    attempt = run.read_job().attempts[-1]
    # Slurm's state tells less than the job itself did.
    for state in ("PREEMPTED", "FAILED", "TIMEOUT"):
        failure = explain_failure(run.paths, attempt, JobState(state), run.read_recoveries())
        assert failure.name == "not_requeued"
        assert "the scheduler stopped the rank (SIGTERM); the run could not be requeued (" in (
            failure.sentence
        )
        assert failure.sentence.count("Unable to contact slurm controller") == 2
        assert failure.next_step.startswith("hpcft resume RUN")


def test_decide_requeue_of_broken_hardware_excludes_the_node(run: Run, site: Site) -> None:
    fail(run, "RuntimeError", "CUDA error: uncorrectable ECC error encountered")
    assert decide_requeue(run, "77", 0).startswith("resubmitted as job 78 without n2, at step 0: ")
    assert site.resubmitted == [(run.read_plan().mem_mib, ["n2"])]


def test_decide_requeue_of_too_little_host_memory_doubles_it(run: Run, site: Site) -> None:
    before = run.read_plan().mem_mib
    fail(run, "Killed", "the kernel killed the training for lack of memory (oom_kill)")
    said = decide_requeue(run, "77", 0)
    assert said.startswith("resubmitted as job 78 with host memory ")
    assert site.resubmitted == [(2 * before, [])]
    assert run.read_plan().mem_mib == 2 * before


def test_decide_requeue_without_progress_stops_with_a_reason(run: Run, site: Site) -> None:
    write_answers(run, 40)
    for restart in range(2):
        fail(run, "Died", "the training process was ended by SIGKILL")
        assert decide_requeue(run, "77", restart).startswith("requeued at step 40: ")
    fail(run, "Died", "the training process was ended by SIGKILL")
    said = decide_requeue(run, "77", 2)
    assert said.startswith("not restarted: rank 3 on n2: Died: ")
    assert said.endswith("; no progress past step 40 after 2 restarts")
    (error,) = read_rank_errors(run.paths)
    assert (error.failure, error.rank) == ("stuck", 3)
    again = decide_requeue(run, "77", 2)
    assert again.startswith("not restarted: stuck: rank 3 on n2: ")
    assert again.count("no progress past step 40") == 1, "the reason is not repeated"
    assert len(site.requeued) == 2


def test_main_with_an_unreadable_recovery_does_not_restart_the_run(
    run: Run, site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fail(run, "Died", "the training process was ended by SIGKILL")
    run.paths.recoveries.mkdir()
    (run.paths.recoveries / "1.json").write_text("{")
    runs_file = run.paths.folder / "runs.json"
    runs_file.write_text(json.dumps([str(run.paths.folder)]))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    requeue.main(str(runs_file))
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.getMessage().startswith("not restarted: ")
    assert "recoveries/1.json: is damaged" in record.getMessage()
    assert (site.requeued, site.resubmitted) == ([], [])
