"""Decides how all ranks continue after one has failed: with a restart, a fallback, or not."""

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
from hpcft.scheduler import slurm_job

# Failure classes after which all ranks restart within their allocation: the nodes are not at fault.
RESTART_CLASSES = ("rank_died", "nccl", "port", "stuck", FRAGMENTATION)

# Stage of a fallback by the phase of the rank. No fallback helps while rank 0 prepares the data.
_STAGES: dict[str, Stage] = {
    "starting": "states",
    "model": "states",
    "training": "step",
    "evaluation": "evaluation",
    "saving": "states",
}


def restart_all_ranks(run: Run, error: RankError, number: int) -> bool:
    """Restarts all ranks within the allocation; returns False if that would not help.

    Args:
        run: the run.
        error: error of this rank.
        number: number of the recovery to write; another rank may have written it.
    """
    failure = classify(error)
    if failure is None or failure.name not in RESTART_CLASSES:
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
        restart=slurm_job.restart_count(),
    )
    return True


def fall_back(run: Run, error: RankError, number: int) -> bool:
    """Applies the next out-of-memory fallback; returns False if none is left.

    Args:
        run: the run.
        error: error of this rank.
        number: number of the recovery to write; another rank may have written it.
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
        restart=slurm_job.restart_count(),
    )
    return True


def exhausted(run: Run, error: RankError, plan: Plan, reason: str = "") -> RankError:
    """Returns the error of a run without further fallbacks: what was tried, and what may help.

    Args:
        run: the run.
        error: error of the rank.
        plan: plan that ran out of memory.
        reason: why the run could not be resubmitted on more nodes; empty if that was not tried.
    """
    tried = describe_fallbacks(run.read_recoveries())
    more = oom_fallback.next_node_count(plan.layout, run.recipe, run.cluster)
    if error.phase not in _STAGES:
        advice = "preparing the data takes more memory than a node has: limit task.data"
    elif more and (reason or run.recipe.resources.nodes != "auto"):
        advice = f"set resources.nodes: {more} and submit the run again"
        advice += f" (hpcft could not resubmit it by itself: {reason})" if reason else ""
    else:
        unit = "GPUs" if plan.accelerator == "cuda" else "nodes"
        advice = (
            f"take {unit} with more memory, a smaller task.max_length, or a method that "
            "trains less (lora, qlora)"
        )
    place = f"rank {error.rank} on {error.node} ran out of memory ({error.phase})"
    end = f"no fallback is left after {tried}" if tried else "there is no fallback"
    return error.model_copy(
        update={
            "failure": "out_of_memory",
            "message": f"{place}: {error.message}; {end}",
            "next_step": advice,
        }
    )
