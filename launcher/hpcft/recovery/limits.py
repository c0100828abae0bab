"""Limits how often a run may restart."""

from __future__ import annotations

from hpcft.core.records import Recovery

# In a row from the same step: a run that is only unlucky comes further in between.
MAX_WITHOUT_PROGRESS = 2


# Of a whole time limit one without progress tells enough.
_AT_ONCE = ("timeout",)


# Of one class in all, with progress in between. A long run may well meet its time limit often, and
# a site may preempt as it likes.
MAX_OF_A_CLASS = 20


_AT_WILL = ("timeout", "preempted")


def restart_limit_reason(recoveries: list[Recovery], cause: str, step: int) -> str:
    """Why a run must not go on once more; empty where it may.

    Args:
        recoveries: of the run so far; what came before a person had it go on does not count.
        cause: class of what it met now.
        step: that it would go on from.
    """
    by_hand = [i for i, recovery in enumerate(recoveries) if recovery.action == "resume"]
    since = recoveries[by_hand[-1] if by_hand else 0 :]
    own = [recovery for recovery in since if not recovery.change]
    begun = own[-1].step if own else 0
    if cause in _AT_ONCE and step <= begun:
        return f"it came no further than step {step}"
    here = 0
    for recovery in reversed(own):
        if recovery.step != step or recovery.action == "resume":
            break
        here += 1
    if here >= MAX_WITHOUT_PROGRESS:
        return f"it has started again {here} times from step {step} and came no further"
    alike = sum(recovery.cause == cause for recovery in own)
    if cause not in _AT_WILL and alike >= MAX_OF_A_CLASS:
        return f"it has met this {alike} times"
    return ""
