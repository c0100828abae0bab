"""What came out of a run: its record, which rank 0 writes last."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.files import write_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Cluster, Measurement, ParameterCount, Plan, Prediction, RunRecord
from hpcft.metrics import Scores, metric_values
from hpcft.planning import hardware, step_time
from hpcft.planning.memory.model_states import COMMUNICATOR, tensor_bytes
from hpcft.recovery.log import read_recoveries
from hpcft.training.data.prepare import DataSummary
from hpcft.training.distributed.collectives import gather_objects
from hpcft.training.telemetry.memory_peaks import most_bytes, of_all_ranks
from hpcft.training.telemetry.progress import ProgressReporter

VERSIONS = ("hpcft", "torch", "transformers", "deepspeed", "peft", "bitsandbytes", "accelerate")


def write_result(
    paths: RunPaths,
    recipe: FullRecipe,
    cluster: Cluster,
    plan: Plan,
    heartbeat: ProgressReporter,
    summary: DataSummary,
    parameters: ParameterCount,
    *,
    metrics: Scores,
    before: Scores | None = None,
    train_s: float | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Gathers what all ranks measured; rank 0 writes it with the metrics.

    Args:
        paths: the run.
        recipe: its recipe.
        cluster: its profile.
        plan: what ran last.
        heartbeat: of this rank.
        summary: of the data.
        parameters: counted on the model.
        metrics: of the finished model.
        before: of the model before training, if it was scored.
        train_s: how long training took; None where nothing was trained.
        notes: what the reader should know of the starts that it took.
    """
    me = heartbeat.me
    heartbeat.peaks.end("saving")
    found = gather_objects((me.node, heartbeat.peaks.phases))
    if not me.is_first:
        return
    phases = of_all_ranks(found, plan.other_processes_bytes)
    progress = heartbeat.progress.model_copy(update={"updated_at": time.time()})
    wall_s, rank_s = progress.ran_s()
    write_record(
        paths.result,
        RunRecord(
            run_id=paths.folder.name,
            recipe=recipe.name,
            cluster=cluster.name,
            finished_at=time.time(),
            job_id=me.job_id,
            split=recipe.evaluation.split,
            metrics=metric_values(metrics),
            intervals=metrics.get("intervals", {}),
            confusion=metrics.get("confusion"),
            metrics_before=metric_values(before or {}),
            examples=summary.examples,
            notes=[*summary.notes, *plan.warnings, *notes],
            parameters=parameters,
            predicted_memory_bytes=plan.gpu_peak_bytes,
            # What a plan says of a run that only scores is a bound, of which nothing is learnt.
            predicted=_predicted(recipe, cluster, plan) if recipe.method.trains else None,
            measured=Measurement(
                wall_s=wall_s,
                train_s=train_s,
                gpu_hours=rank_s / 3600,
                peak_memory_bytes=most_bytes(list(phases.values())),
                peak_host_bytes=max(peaks.host_bytes for peaks in phases.values()),
                tokens_per_s=progress.tokens_per_s,
                phases=phases,
                step_s=heartbeat.times.median_s,
                timed_steps=heartbeat.times.count,
                tokens_per_step=heartbeat.tokens_per_step,
            ),
            recoveries=read_recoveries(paths),
            versions={name: importlib.metadata.version(name) for name in VERSIONS},
        ),
    )


def _predicted(recipe: FullRecipe, cluster: Cluster, plan: Plan) -> Prediction | None:
    """What the plan says of what is measured; a lowered plan still says what it did before."""
    if plan.time is None:
        return None
    step = plan.time.step
    return Prediction(
        tensor_bytes=tensor_bytes(plan),
        communicator_bytes=sum(i.bytes for i in plan.gpu_memory if i.name == COMMUNICATOR),
        step_s=step.total_s,
        flops_s=step.compute_s - step_time.overhead_s(plan.facts, plan.layout),
        efficiency=hardware.training_efficiency(cluster),
        tokens_per_step=recipe.train.global_batch_size * recipe.task.max_length,
    )
