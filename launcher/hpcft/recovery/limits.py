"""Limits on restarts: how often a run may restart after a failure."""

from __future__ import annotations

from hpcft.core.records import Recovery

# Restarts in a row from the same step. A run that is only unlucky makes progress in between.
MAX_WITHOUT_PROGRESS = 2
# A run that makes no progress within one whole time limit would make none in the next one.
_NO_SECOND_TRY = ("timeout",)
# Failures of one class in all, with progress in between.
MAX_OF_A_CLASS = 20
# A long run may reach many time limits, and a site may preempt as often as it likes.
_UNLIMITED = ("timeout", "preempted")


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
    from_this_step = 0
    for recovery in reversed(restarts):
        if recovery.step != step or recovery.action == "resume":
            break
        from_this_step += 1
    if from_this_step >= MAX_WITHOUT_PROGRESS:
        return f"no progress past step {step} after {from_this_step} restarts"
    of_this_class = sum(recovery.cause == cause for recovery in restarts)
    if cause not in _UNLIMITED and of_this_class >= MAX_OF_A_CLASS:
        return f"the run has restarted {of_this_class} times after failures of this class"
    return ""
