"""Limits on restarts: how often a run may restart after a failure."""

from __future__ import annotations

from hpcft.core.records import Recovery

# Restarts in a row from the same step. A run that is only unlucky makes progress in between.
MAX_WITHOUT_PROGRESS = 2
# The same after interruptions, of which the run is innocent: a site may preempt it several times
# before its first checkpoint.
MAX_INTERRUPTED = 20
# A run that makes no progress within one whole time limit would make none in the next one.
_NO_SECOND_TRY = ("timeout",)
# Failures of one class in all, with progress in between.
MAX_OF_A_CLASS = 20
INTERRUPTIONS = ("preempted", "interrupted", "node_failed")
"""Classes of failures in which a run loses its nodes, with or without notice."""
# A long run may reach many time limits, and a site may preempt as often as it likes.
_UNLIMITED = ("timeout", *INTERRUPTIONS)

INTERRUPTED_ADVICE = (
    "it is interrupted before each checkpoint: lower resources.checkpoint_min, or use a partition "
    "or QOS that is not preempted; then hpcft resume RUN"
)
"""Advice for a run that makes no progress because of interruptions."""


def restart_limit_reason(recoveries: list[Recovery], cause: str, step: int) -> str:
    """Returns why a run must not restart once more; empty if it may.

    Args:
        recoveries: of the run so far; those from before a person resumed it do not count.
        cause: class of the failure that ended it now.
        step: step that it would resume from.
    """
    resumes = [i for i, recovery in enumerate(recoveries) if recovery.action == "resume"]
    since_resume = recoveries[resumes[-1] if resumes else 0 :]
    restarts = [recovery for recovery in since_resume if not recovery.change]
    start_step = restarts[-1].step if restarts else 0
    if cause in _NO_SECOND_TRY and step <= start_step:
        return f"no progress past step {step}"
    is_interrupted = cause in INTERRUPTIONS
    alike = 0  # Interruptions, or failures of the run itself.
    for recovery in reversed(restarts):
        if recovery.step != step or recovery.action == "resume":
            break
        alike += (recovery.cause in INTERRUPTIONS) == is_interrupted
    if alike >= (MAX_INTERRUPTED if is_interrupted else MAX_WITHOUT_PROGRESS):
        return f"no progress past step {step} after {alike} restarts"
    of_this_class = sum(recovery.cause == cause for recovery in restarts)
    if cause not in _UNLIMITED and of_this_class >= MAX_OF_A_CLASS:
        return f"the run has restarted {of_this_class} times after failures of this class"
    return ""
