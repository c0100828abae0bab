"""Fits cluster constants (context, fragmentation, efficiency) from finished runs.

A calibration replaces a stated constant of the same name, and only within bounds: a value beyond
them is noted and the bound taken. A run that fell back to a smaller layout sets caps, but no
values: its predictions are of another layout.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import CALIBRATION_BOUNDS, Calibration, Cluster, RunRecord
from hpcft.core.units import GIB, format_bytes, format_number
from hpcft.planning.caps import HasFallbacks, caps_from_runs

# Software and drivers change: older runs no longer count.
MAX_RUNS = 50
MIN_TIMED_RUNS = 3
MIN_STEPS = 20
# The allocator's segments, of 20 MiB, are 2 % of this; below, they and not tensors decide.
MIN_TENSOR_BYTES = GIB

_SHOWN: dict[str, Callable[[float], str]] = {
    "context_bytes": format_bytes,
    "process_bytes": format_bytes,
    "fragmentation": lambda share: f"{share:.1%}",
    "efficiency": format_number,
}


def fit_calibration(
    records: Iterable[RunRecord], cluster: str, unfinished: Iterable[HasFallbacks] = ()
) -> Calibration:
    """Returns the calibration of a cluster from its latest runs.

    Of memory the largest value that was seen counts, from one run on; of efficiency the median,
    from three runs on.

    Args:
        records: finished runs, in any order.
        cluster: name of the profile; runs of others are left out.
        unfinished: runs without a record, of which only the fallbacks count.
    """
    of_cluster = [record for record in records if record.cluster == cluster]
    latest = sorted(of_cluster, key=lambda record: record.finished_at)[-MAX_RUNS:]
    as_planned = [record for record in latest if not record.fallbacks]
    values, notes = _within_bounds(_measured_values(as_planned))
    runs = [*latest, *unfinished]
    caps = {name: caps_from_runs(runs, name, cluster) for name in {run.recipe for run in runs}}
    return Calibration.model_validate(
        {
            **values,
            "runs": sum(map(_has_measurement, as_planned)) if values else 0,
            "notes": notes,
            "oom_caps": {name: cap for name, cap in sorted(caps.items()) if cap},
        }
    )


def _measured_values(records: list[RunRecord]) -> dict[str, float | None]:
    return {
        "context_bytes": _max([_context_bytes(record) for record in records]),
        "process_bytes": _max([_process_bytes(record) for record in records]),
        "fragmentation": _max([_fragmentation(record) for record in records]),
        "efficiency": _median([_efficiency(record) for record in records]),
    }


def _within_bounds(measured: dict[str, float | None]) -> tuple[dict[str, float], list[str]]:
    """Returns the values moved into their bounds, and a note on each that was beyond."""
    values: dict[str, float] = {}
    notes = []
    for name, value in measured.items():
        if value is None:
            continue
        lowest, highest = CALIBRATION_BOUNDS[name]
        values[name] = type(lowest)(min(max(value, lowest), highest))
        if values[name] != value:
            shown, which = _SHOWN[name], "highest" if value > highest else "lowest"
            notes.append(
                f"{_label(name)} measured as {shown(value)}: set to {shown(values[name])}, "
                f"the {which} value that is accepted"
            )
    return values, notes


def override(stated: Calibration, fitted: Calibration) -> Calibration:
    """Returns a profile's calibration with the values that runs have measured in its place."""
    values = {name: getattr(fitted, name) for name in Calibration.model_fields}
    return stated.model_copy(update={k: v for k, v in values.items() if v is not None})


def describe_calibration(calibration: Calibration) -> str:
    """Returns the values in words: `context 466 MiB, efficiency 0.41`; empty if there are none."""
    values = {name: getattr(calibration, name) for name in _SHOWN}
    parts = [f"{_label(name)} {_SHOWN[name](value)}" for name, value in values.items() if value]
    return "; ".join([", ".join(parts), *calibration.notes]) if parts else ""


def calibration_reasons(recipe: FullRecipe, cluster: Cluster) -> list[str]:
    """Returns how earlier runs have changed the plan of a run, in sentences."""
    calibration = cluster.calibration
    reasons = []
    if describe_calibration(calibration):
        source = f"{calibration.runs} run{'s' * (calibration.runs > 1)}"
        source = source if calibration.runs else "its profile"
        reasons.append(f"calibrated by {source}: {describe_calibration(calibration)}")
    caps = calibration.oom_caps.get(recipe.name)
    if caps is None:
        return reasons
    parts = []
    if recipe.train.per_device_train_batch_size == "auto":
        parts.append(f"micro-batch at most {caps.per_device_train_batch_size}")
    if caps.gradient_checkpointing and recipe.train.gradient_checkpointing == "auto":
        parts.append("checkpointing")
    if caps.loss_chunks > 1:
        parts.append(f"loss in {caps.loss_chunks} parts")
    if caps.nodes > 1 and recipe.resources.nodes == "auto":
        parts.append(f"at least {caps.nodes} nodes")
    if parts:
        why = f"earlier runs of {recipe.name} ran out of memory and fell back to it"
        reasons.append(f"{', '.join(parts)}: {why}")
    return reasons


def _context_bytes(record: RunRecord) -> float | None:
    """Returns the device memory in use that neither allocator nor communicator holds."""
    if record.measured is None or record.predicted is None:
        return None
    unreserved = [
        peaks.device_bytes - (peaks.reserved_bytes or 0)
        for peaks in record.measured.phases.values()
        if peaks.device_bytes
    ]
    return max(unreserved) - record.predicted.communicator_bytes if unreserved else None


def _process_bytes(record: RunRecord) -> float | None:
    """Returns the resident set of a rank on a CPU beyond its predicted tensors."""
    if record.measured is None or record.predicted is None:
        return None
    phases = record.measured.phases.values()
    if not phases or any(peaks.reserved_bytes is not None for peaks in phases):
        return None
    return max(peaks.resident_bytes for peaks in phases) - record.predicted.tensor_bytes


def _fragmentation(record: RunRecord) -> float | None:
    """Returns reserved device memory beyond predicted tensors, as a share of the tensors."""
    if record.measured is None or record.predicted is None:
        return None
    reserved = max((p.reserved_bytes or 0 for p in record.measured.phases.values()), default=0)
    tensors = record.predicted.tensor_bytes
    return reserved / tensors - 1 if reserved and tensors >= MIN_TENSOR_BYTES else None


def _efficiency(record: RunRecord) -> float | None:
    """Returns the efficiency that would have predicted the measured step, for its tokens.

    A predicted step is the time of FLOPs, which efficiency divides, and a rest, which it does not.
    A run in which the rest is the larger part gives no value. Padding counts as lost time.
    """
    measured, predicted = record.measured, record.predicted
    if measured is None or predicted is None or measured.step_s is None:
        return None
    rest_s = predicted.step_s - predicted.flops_s
    if measured.timed_steps < MIN_STEPS or 2 * rest_s > measured.step_s:
        return None
    tokens = (measured.tokens_per_step or 0.0) / predicted.tokens_per_step
    flops_s = predicted.flops_s * min(1.0, tokens)
    return predicted.efficiency * flops_s / (measured.step_s - rest_s)


def _has_measurement(record: RunRecord) -> bool:
    measures = (_context_bytes, _process_bytes, _fragmentation, _efficiency)
    return any(measure(record) is not None for measure in measures)


def _max(values: list[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if len(known) >= MIN_TIMED_RUNS else None


def _label(name: str) -> str:
    return name.removesuffix("_bytes")
