"""Which of all that was said about the end of a run is why it ended."""

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
    LAST_WORDS,
)
from hpcft.recovery.diagnosis.evidence import as_text, log_ends
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

# What ends a rank from outside, and what one says when nothing has helped.
_TOLD = ("interrupted", *(row.name for row in FROM_OUTSIDE))
_IN_VAIN = ("stuck", "out_of_memory")


def explain_failure(
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
    errors = [error for error in read_rank_errors(paths) if _is_new(error, job_id, taken)]
    if word := _own_word(errors):
        return from_rank(word, paths)
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
        return from_state(state, paths, taken)
    if ended := first_match(FROM_OUTSIDE, texts):
        ended = from_time_limit(ended, paths, taken) if ended.name == "timeout" else ended
        return with_node(ended, state)
    for error in errors:  # the earliest word, be it that a rank was told to end or lost a peer
        if told := from_rank(error, paths) if error.failure else _followed(error, paths):
            return told
    if follows := first_match(CONSEQUENCES, texts) or first_match(LAST_WORDS, texts):
        return with_node(follows, state)
    if state.reason:
        return from_class("unknown" if job_id else "not_submitted", state.reason)
    died = from_class("rank_died", f"a rank ended without a word{describe_exit(state)}")
    return with_node(died, state)


def classify(error: RankError) -> Failure | None:
    """The class of what one rank said about its end; None where it tells of none."""
    if error.failure:
        return from_rank(error)
    return first_match((*CAUSES, *FROM_OUTSIDE, *CONSEQUENCES), [as_text(error)])


def is_secondary(error: RankError) -> bool:
    """Whether a rank's error is just what one says whose peer is gone, or that was told to end."""
    if error.failure:
        return error.failure in _TOLD
    return first_match(CAUSES, [as_text(error)]) is None and _followed(error) is not None


def _followed(error: RankError, paths: RunPaths | None = None) -> Failure | None:
    return first_match(CONSEQUENCES, [as_text(error, paths)])


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
