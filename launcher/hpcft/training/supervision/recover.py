"""Decides how all ranks continue after one of them has failed: restart, fall back, or give up."""

from __future__ import annotations

from hpcft.core.rank_errors import write_rank_error
from hpcft.core.records import Plan, RankError
from hpcft.core.records.recovery import Action
from hpcft.planning import oom_fallback
from hpcft.planning.oom_fallback import Stage
from hpcft.recovery import limits, replan
from hpcft.recovery.diagnosis import classify
from hpcft.recovery.log import FRAGMENTATION, append_recovery, describe_fallbacks
from hpcft.recovery.run import Run
from hpcft.scheduler import slurm

# Failures after which all ranks restart within their allocation: nothing is wrong with the nodes.
RESTART_IN_PLACE = ("rank_died", "nccl", "port", "stuck", FRAGMENTATION)

# What memory ran out for, by what the rank was doing. While data are prepared no fallback helps.
_STAGES: dict[str, Stage] = {
    "starting": "states",
    "model": "states",
    "training": "step",
    "evaluation": "evaluation",
    "saving": "states",
}


def restart_all_ranks(run: Run, error: RankError, number: int) -> bool:
    """Has all ranks restart within the allocation; returns False where that would not help.

    Args:
        run: the run.
        error: what this rank met.
        number: of the recovery that this would be.
    """
    failure = classify(error)
    if failure is None or failure.name not in RESTART_IN_PLACE:
        return False
    if run.has_recovery(number):
        return True
    step = run.saved_step()
    reason = limits.restart_limit_reason(run.read_recoveries(), failure.name, step)
    if reason:
        update = {"failure": "stuck", "message": f"{failure.sentence}; {reason}"}
        write_rank_error(run.paths, error.model_copy(update=update))
        return False
    plan = run.read_plan()
    append_recovery(
        run.paths,
        plan,
        plan,
        number=number,
        action="restart",
        error=error,
        cause=failure.name,
        step=step,
        restart=slurm.restart_count(),
    )
    return True


def fall_back(run: Run, error: RankError, number: int) -> bool:
    """Applies the next out-of-memory fallback; returns False where none is left.

    Args:
        run: the run.
        error: what this rank met.
        number: of the recovery that this would be; another rank may have written it.
    """
    if run.has_recovery(number):
        return True
    before = run.read_plan()
    stage = _STAGES.get(error.phase)
    action: Action = "restart"
    after = stage and oom_fallback.next_fallback(before, run.recipe, run.cluster, stage)
    if stage and not after:
        action = "resubmit"
        after = replan.plan_on_more_nodes(before, run.recipe, run.cluster)
    if not after:
        write_rank_error(run.paths, exhausted(run, error, before))
        return False
    append_recovery(
        run.paths,
        before,
        after,
        number=number,
        action=action,
        error=error,
        step=run.saved_step(),
        restart=slurm.restart_count(),
    )
    return True


def exhausted(run: Run, error: RankError, plan: Plan, reason: str = "") -> RankError:
    """Returns the error of a run that no fallback can help: what was tried, what may help.

    Args:
        run: the run.
        error: what the rank met.
        plan: what ran.
        reason: why the run could not be resubmitted on more nodes.
    """
    tried = describe_fallbacks(run.read_recoveries())
    more = oom_fallback.next_node_count(plan.layout, run.recipe, run.cluster)
    if error.phase not in _STAGES:
        advice = "preparing the data takes more memory than a node has: limit task.data"
    elif more and (reason or run.recipe.resources.nodes != "auto"):
        advice = f"set resources.nodes: {more} and submit it again"
        advice += f" (it could not do so itself: {reason})" if reason else ""
    else:
        unit = "GPUs" if plan.accelerator == "cuda" else "nodes"
        advice = (
            f"take {unit} with more memory, a smaller task.max_length, or a method that "
            "trains less (lora, qlora)"
        )
    what = f"rank {error.rank} on {error.node} was out of memory ({error.phase}): {error.message}"
    tried_or_not = f"tried before: {tried}" if tried else "no fallback is left"
    return error.model_copy(
        update={
            "failure": "out_of_memory",
            "message": f"{what}; {tried_or_not}",
            "next_step": advice,
        }
    )
