"""Decides which of the evidence is the reason why a run ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpcft.core.paths import RunPaths
from hpcft.core.rank_errors import read_rank_errors
from hpcft.core.records import Attempt, RankError, Recovery
from hpcft.recovery.diagnosis.classes import (
    BY_STATE,
    CAUSES,
    CONSEQUENCES,
    FROM_OUTSIDE,
    KNOWN,
    LAST_WORDS,
)
from hpcft.recovery.diagnosis.evidence import EvidenceText, as_text, log_ends
from hpcft.recovery.diagnosis.failure import Failure, from_class
from hpcft.recovery.diagnosis.from_logs import add_disk_hint, first_match, from_exception, from_rank
from hpcft.recovery.diagnosis.from_scheduler import (
    describe_exit,
    from_setup,
    from_state,
    from_time_limit,
    with_node,
)
from hpcft.scheduler.job_state import JobState

# Classes of an end from outside, and classes that a rank reports after all restarts have failed.
_EXTERNAL = ("interrupted", *(row.name for row in FROM_OUTSIDE))
_EXHAUSTED = ("stuck", "out_of_memory")


def explain_failure(
    paths: RunPaths,
    attempt: Attempt | None,
    state: JobState,
    recoveries: Sequence[Recovery] = (),
) -> Failure:
    """Diagnoses why a run that ended has no result.

    A class that a rank reported itself comes before what texts tell, and a cause before its
    consequences.

    Args:
        paths: the run's files.
        attempt: the latest attempt.
        state: the scheduler's state of its job; a live job's state is no evidence.
        recoveries: of the run so far; errors from before the last one are dealt with.
    """
    job_id = (attempt.job_id if attempt else None) or ""
    errors = [error for error in read_rank_errors(paths) if _is_new(error, job_id, recoveries)]
    if reported := _reported_by_rank(errors):
        return from_rank(reported, paths)
    texts = [as_text(error, paths) for error in errors if not error.failure]
    if attempt and job_id:
        nodes = {error.rank: error.node for error in errors}
        texts += log_ends(Path(attempt.logs), job_id, nodes)
    failed = next((text for text in texts if text.setup_failed), None)
    if failed and state.state not in BY_STATE:
        return with_node(from_setup(failed, paths, state), state)
    if cause := first_match(CAUSES, texts):
        return add_disk_hint(cause, paths) if cause.name == "disk" else with_node(cause, state)
    if own := next((error for error in errors if not is_secondary(error)), None):
        return from_exception(own, paths)
    if state.state in BY_STATE:
        return from_state(state, paths, recoveries)
    if ended := first_match(FROM_OUTSIDE, texts):
        ended = from_time_limit(ended, paths, recoveries) if ended.name == "timeout" else ended
        return with_node(ended, state)
    if killed := _killed_rank(errors, texts):
        return killed
    for error in errors:  # only stopped ranks and ranks that lost a peer are left: the earliest
        if failure := from_rank(error, paths) if error.failure else _consequence(error, paths):
            return failure
    if consequence := first_match(CONSEQUENCES, texts) or first_match(LAST_WORDS, texts):
        return with_node(consequence, state)
    if state.reason:
        return from_class("unknown" if job_id else "not_submitted", state.reason)
    text = f"a rank ended without an error message{describe_exit(state)}"
    return with_node(from_class("rank_died", text), state)


def classify(error: RankError) -> Failure | None:
    """Returns the failure that one rank's error is evidence of; None if it is of no known class."""
    if error.failure:
        return from_rank(error)
    return first_match((*CAUSES, *FROM_OUTSIDE, *CONSEQUENCES), [as_text(error)])


def is_secondary(error: RankError) -> bool:
    """Returns whether a rank's error only follows from a lost peer or from an external stop."""
    if error.failure:
        return error.failure in _EXTERNAL
    return first_match(CAUSES, [as_text(error)]) is None and _consequence(error) is not None


def _consequence(error: RankError, paths: RunPaths | None = None) -> Failure | None:
    return first_match(CONSEQUENCES, [as_text(error, paths)])


def _killed_rank(errors: Sequence[RankError], texts: Sequence[EvidenceText]) -> Failure | None:
    """Returns the failure of a rank that was killed with its supervisor, and wrote no error.

    srun stops the other ranks then, which cannot tell this from a stop by the scheduler. A rank
    that the scheduler kills because it has not ended in time has written before that it was
    stopped.
    """
    if not errors or any(error.failure != "preempted" for error in errors):
        return None  # At a time limit Slurm kills ranks, and a rank that lost a peer says so.
    killed = first_match([KNOWN["rank_died"]], texts)
    told = {None, *(error.rank for error in errors)}
    return killed if killed and killed.rank not in told else None


def _reported_by_rank(errors: Sequence[RankError]) -> RankError | None:
    """Returns the error whose class a rank determined itself; None if there is none.

    The last report that all restarts have failed comes first. A rank's external stop does not count
    here: when one rank fails, srun stops all others.
    """
    exhausted = [error for error in errors if error.failure in _EXHAUSTED]
    classified = [error for error in errors if error.failure and error.failure not in _EXTERNAL]
    return exhausted[-1] if exhausted else classified[0] if classified else None


def _is_new(error: RankError, job_id: str, recoveries: Sequence[Recovery]) -> bool:
    """Returns whether an error belongs to the latest start of the latest attempt."""
    of_another_job = error.job_id and job_id and error.job_id != job_id
    return not of_another_job and not (recoveries and error.at <= recoveries[-1].at)
