"""Which of all that was said about the end of a run is why it ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpcft.core.paths import RunPaths
from hpcft.core.rank_errors import rank_errors
from hpcft.core.records import Attempt, RankError, Recovery
from hpcft.recovery.diagnosis.classes import (
    BY_STATE,
    CAUSES,
    CONSEQUENCES,
    FROM_OUTSIDE,
    LAST_WORDS,
)
from hpcft.recovery.diagnosis.evidence import log_ends, said
from hpcft.recovery.diagnosis.failure import Failure, of_class
from hpcft.recovery.diagnosis.from_logs import first, of_judged, of_user, with_room
from hpcft.recovery.diagnosis.from_scheduler import (
    exit_in_words,
    of_setup,
    of_state,
    of_time,
    where,
)
from hpcft.scheduler.job_state import JobState

# What ends a rank from outside, and what one says when nothing has helped.
_TOLD = ("interrupted", *(row.name for row in FROM_OUTSIDE))
_IN_VAIN = ("stuck", "out_of_memory")


def explain(
    paths: RunPaths,
    attempt: Attempt | None,
    state: JobState,
    taken: Sequence[Recovery] = (),
) -> Failure:
    """Why a run that ended has no result.

    What a rank knew itself comes before what texts tell, a cause before what follows from it.

    Args:
        paths: the run.
        attempt: the latest.
        state: what the scheduler says of it; of a job that still lives, nothing of use.
        taken: how the run went on after earlier failures: what led to those is dealt with.
    """
    job_id = (attempt.job_id if attempt else None) or ""
    errors = [error for error in rank_errors(paths) if _is_new(error, job_id, taken)]
    if word := _own_word(errors):
        return of_judged(word, paths)
    texts = [said(error, paths) for error in errors if not error.failure]
    if attempt and job_id:
        nodes = {error.rank: error.node for error in errors}
        texts += log_ends(Path(attempt.logs), job_id, nodes)
    failed = next((text for text in texts if text.setup_failed), None)
    if failed and state.state not in BY_STATE:
        return where(of_setup(failed, paths, state), state)
    if cause := first(CAUSES, texts):
        return with_room(cause, paths) if cause.name == "disk" else where(cause, state)
    if own := next((error for error in errors if not only_followed(error)), None):
        return of_user(own, paths)
    if state.state in BY_STATE:
        return of_state(state, paths, taken)
    if ended := first(FROM_OUTSIDE, texts):
        ended = of_time(ended, paths, taken) if ended.name == "timeout" else ended
        return where(ended, state)
    for error in errors:  # the earliest word, be it that a rank was told to end or lost a peer
        if told := of_judged(error, paths) if error.failure else _followed(error, paths):
            return told
    if follows := first(CONSEQUENCES, texts) or first(LAST_WORDS, texts):
        return where(follows, state)
    if state.reason:
        return of_class("unknown" if job_id else "not_submitted", state.reason)
    died = of_class("rank_died", f"a rank ended without a word{exit_in_words(state)}")
    return where(died, state)


def judged(error: RankError) -> Failure | None:
    """The class of what one rank said about its end; None where it tells of none."""
    if error.failure:
        return of_judged(error)
    return first((*CAUSES, *FROM_OUTSIDE, *CONSEQUENCES), [said(error)])


def only_followed(error: RankError) -> bool:
    """Whether a rank's error is just what one says whose peer is gone, or that was told to end."""
    if error.failure:
        return error.failure in _TOLD
    return first(CAUSES, [said(error)]) is None and _followed(error) is not None


def _followed(error: RankError, paths: RunPaths | None = None) -> Failure | None:
    return first(CONSEQUENCES, [said(error, paths)])


def _own_word(errors: Sequence[RankError]) -> RankError | None:
    """The error that was judged where it happened, with more at hand than its text; None if none.

    The last word on what was tried in vain comes before all. That a rank was told to end does not
    count here: srun tells all of them so when one has ended with an error of its own.
    """
    final = [error for error in errors if error.failure in _IN_VAIN]
    own = [error for error in errors if error.failure and error.failure not in _TOLD]
    return final[-1] if final else own[0] if own else None


def _is_new(error: RankError, job_id: str, taken: Sequence[Recovery]) -> bool:
    """Whether an error belongs to the latest start of the latest attempt."""
    of_another = error.job_id and job_id and error.job_id != job_id
    return not of_another and not (taken and error.at <= taken[-1].at)
