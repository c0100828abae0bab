"""Result of a run: rank 0 writes result.json last, from what all ranks measured."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.files import write_record
from hpcft.core.records import Cluster, Measurement, ParameterCount, Plan, Prediction, RunRecord
from hpcft.metrics import metric_values
from hpcft.metrics.base import Scores
from hpcft.metrics.doubts import find_doubts
from hpcft.planning.inputs import PlanInputs
from hpcft.planning.memory.model_states import COMMUNICATOR_ITEM, tensor_bytes
from hpcft.recovery.log import read_recoveries
from hpcft.training.context import WorkerContext
from hpcft.training.data.prepare import DataSummary
from hpcft.training.distributed.collectives import gather_objects
from hpcft.training.telemetry.memory_peaks import largest_peak_bytes, merge_ranks

VERSIONS = ("hpcft", "torch", "transformers", "deepspeed", "peft", "bitsandbytes", "accelerate")


@dataclass(frozen=True)
class ModeResult:
    """Output of a mode, for `write_result`."""

    summary: DataSummary
    """Examples, tokens and notes of the prepared data."""
    parameters: ParameterCount
    """Number of parameters, counted on the model."""
    metrics: Scores
    """Metrics of the finished model."""
    before: Scores = field(default_factory=dict)
    """Metrics of the model before training; empty if it was not scored then."""
    train_s: float | None = None
    """Seconds of training; None if nothing was trained."""
    notes: Sequence[str] = ()
    """Sentences on this start and earlier ones, for the reader of the result."""


def write_result(context: WorkerContext, result: ModeResult) -> None:
    """Gathers the measurements of all ranks; rank 0 writes them with the metrics."""
    recipe, plan, reporter = context.recipe, context.plan, context.reporter
    paths, cluster = context.paths, context.run.cluster
    rank = context.rank
    reporter.peaks.end_phase("saving")
    phases_by_rank = gather_objects((rank.node, reporter.peaks.phases))
    if not rank.is_first:
        return
    phases = merge_ranks(phases_by_rank, plan.other_processes_bytes)
    progress = reporter.progress.model_copy(update={"updated_at": time.time()})
    wall_s, rank_s = progress.ran_s()
    metrics = metric_values(result.metrics)
    scored = result.summary.examples.get(recipe.evaluation.split, 0)
    doubts = find_doubts(reporter.logged_losses(), metrics, scored)
    write_record(
        paths.result,
        RunRecord(
            run_id=paths.folder.name,
            recipe=recipe.name,
            cluster=cluster.name,
            finished_at=time.time(),
            job_id=rank.job_id,
            split=recipe.evaluation.split,
            metrics=metrics,
            intervals=result.metrics.get("intervals", {}),
            confusion=result.metrics.get("confusion"),
            metrics_before=metric_values(result.before),
            examples=result.summary.examples,
            notes=list(
                dict.fromkeys([*doubts, *result.summary.notes, *plan.warnings, *result.notes])
            ),
            doubts=doubts,
            parameters=result.parameters,
            predicted_memory_bytes=plan.gpu_peak_bytes,
            # For a run that only scores the plan predicts a bound, which calibrates nothing.
            predicted=_predicted(recipe, cluster, plan) if recipe.method.trains else None,
            measured=Measurement(
                wall_s=wall_s,
                train_s=result.train_s,
                gpu_hours=rank_s / 3600,
                peak_memory_bytes=largest_peak_bytes(list(phases.values())),
                peak_host_bytes=max(peaks.host_bytes for peaks in phases.values()),
                tokens_per_s=progress.tokens_per_s,
                phases=phases,
                step_s=reporter.step_timer.median_s,
                timed_steps=reporter.step_timer.count,
                tokens_per_step=reporter.tokens_per_step,
            ),
            recoveries=read_recoveries(paths),
            versions={name: importlib.metadata.version(name) for name in VERSIONS},
        ),
    )


def _predicted(recipe: FullRecipe, cluster: Cluster, plan: Plan) -> Prediction | None:
    """Returns the plan's prediction of the measured values; None for a fallback."""
    if plan.time is None or plan.efficiency is None:
        return None
    inputs = PlanInputs.of_plan(recipe, cluster, plan)
    step, kind = plan.time.step, inputs.kind(plan.layout)
    return Prediction(
        tensor_bytes=tensor_bytes(plan),
        communicator_bytes=sum(i.bytes for i in plan.gpu_memory if i.name == COMMUNICATOR_ITEM),
        step_s=step.total_s,
        flops_s=step.compute_s - plan.overhead_s,
        efficiency=plan.efficiency,
        tokens_per_step=plan.tokens_per_step,
        device=kind.device,
        precision=kind.precision,
        layout=kind.layout,
        size=kind.size,
    )
