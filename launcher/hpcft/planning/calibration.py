"""What runs of a cluster teach its planner: values fitted from their records, and in words.

A calibration replaces a stated constant of the same name, and only within bounds: what lies beyond
them is noted and the bound taken. Runs that came down the ladder count for what they came down to,
not for values: their predictions are of another layout.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import CALIBRATION_BOUNDS, Calibration, Cluster, RunRecord
from hpcft.core.units import GIB, format_bytes, format_number
from hpcft.planning.caps import HasFallbacks, caps_from_runs

# Software and drivers change: older runs no longer count.
MOST_RUNS = 50
LEAST_TIMED_RUNS = 3
LEAST_STEPS = 20
# The allocator's segments, of 20 MiB, are 2 % of this; below, they and not tensors decide.
LEAST_TENSOR_BYTES = GIB

_SHOWN: dict[str, Callable[[float], str]] = {
    "context_bytes": format_bytes,
    "process_bytes": format_bytes,
    "fragmentation": lambda share: f"{share:.1%}",
    "efficiency": format_number,
}


def fit_calibration(
    records: Iterable[RunRecord], cluster: str, unfinished: Iterable[HasFallbacks] = ()
) -> Calibration:
    """What the latest runs of a cluster have measured.

    Of memory the largest value that was seen counts, from one run on; of efficiency the median,
    from three runs on.

    Args:
        records: of finished runs, in any order.
        cluster: name of the profile; runs of others are left out.
        unfinished: runs without a record, which count for what they came down to.
    """
    of_cluster = [record for record in records if record.cluster == cluster]
    latest = sorted(of_cluster, key=lambda record: record.finished_at)[-MOST_RUNS:]
    as_planned = [record for record in latest if not record.fallbacks]
    seen = {
        "context_bytes": _max([_context_bytes(record) for record in as_planned]),
        "process_bytes": _max([_process_bytes(record) for record in as_planned]),
        "fragmentation": _max([_fragmentation(record) for record in as_planned]),
        "efficiency": _median([_efficiency(record) for record in as_planned]),
    }
    runs = [*latest, *unfinished]
    caps = {name: caps_from_runs(runs, name, cluster) for name in {run.recipe for run in runs}}
    taken: dict[str, float] = {}
    notes = []
    for name, value in seen.items():
        if value is None:
            continue
        least, most = CALIBRATION_BOUNDS[name]
        taken[name] = type(least)(min(max(value, least), most))
        if taken[name] != value:
            shown = _SHOWN[name]
            bound = f"{shown(taken[name])}, the {'most' if value > most else 'least'} that is taken"
            notes.append(f"{_words(name)} measured as {shown(value)}: set to {bound}")
    told = [r for r in as_planned if any(m(r) is not None for m in _MEASURES)] if taken else []
    return Calibration.model_validate(
        {
            **taken,
            "runs": len(told),
            "notes": notes,
            "oom_caps": {name: cap for name, cap in sorted(caps.items()) if cap},
        }
    )


def override(stated: Calibration, fitted: Calibration) -> Calibration:
    """A profile's own calibration with what runs have measured in the place of what it states."""
    values = {name: getattr(fitted, name) for name in Calibration.model_fields}
    return stated.model_copy(update={k: v for k, v in values.items() if v is not None})


def describe_calibration(known: Calibration) -> str:
    """`context 466 MiB, fragmentation 4.2%, efficiency 0.41`; empty where nothing is known."""
    values = {name: getattr(known, name) for name in _SHOWN}
    told = [f"{_words(name)} {_SHOWN[name](value)}" for name, value in values.items() if value]
    return "; ".join([", ".join(told), *known.notes]) if told else ""


def calibration_reasons(recipe: FullRecipe, cluster: Cluster) -> list[str]:
    """What earlier runs have to do with the plan of a run."""
    known = cluster.calibration
    found = []
    if describe_calibration(known):
        by = f"{known.runs} run{'s' * (known.runs > 1)}" if known.runs else "its profile"
        found.append(f"calibrated by {by}: {describe_calibration(known)}")
    cap = known.oom_caps.get(recipe.name)
    if cap:
        parts = []
        if recipe.train.per_device_train_batch_size == "auto":
            parts.append(f"micro-batch at most {cap.per_device_train_batch_size}")
        if cap.gradient_checkpointing and recipe.train.gradient_checkpointing == "auto":
            parts.append("checkpointing")
        if cap.loss_chunks > 1:
            parts.append(f"loss in {cap.loss_chunks} parts")
        if cap.nodes > 1 and recipe.resources.nodes == "auto":
            parts.append(f"at least {cap.nodes} nodes")
        if parts:
            came_down = f"earlier runs of {recipe.name} were out of memory and came down to it"
            found.append(f"{', '.join(parts)}: {came_down}")
    return found


def _context_bytes(record: RunRecord) -> float | None:
    """Device memory in use that neither the allocator nor a communicator holds."""
    if record.measured is None or record.predicted is None:
        return None
    beside = [
        peaks.device_bytes - (peaks.reserved_bytes or 0)
        for peaks in record.measured.phases.values()
        if peaks.device_bytes
    ]
    return max(beside) - record.predicted.communicator_bytes if beside else None


def _process_bytes(record: RunRecord) -> float | None:
    """Resident set of a rank on a CPU beyond its predicted tensors."""
    if record.measured is None or record.predicted is None:
        return None
    phases = record.measured.phases.values()
    if not phases or any(peaks.reserved_bytes is not None for peaks in phases):
        return None
    return max(peaks.resident_bytes for peaks in phases) - record.predicted.tensor_bytes


def _fragmentation(record: RunRecord) -> float | None:
    """Reserved device memory over predicted tensors, as the share that is added to them."""
    if record.measured is None or record.predicted is None:
        return None
    reserved = max((p.reserved_bytes or 0 for p in record.measured.phases.values()), default=0)
    tensors = record.predicted.tensor_bytes
    return reserved / tensors - 1 if reserved and tensors >= LEAST_TENSOR_BYTES else None


def _efficiency(record: RunRecord) -> float | None:
    """The efficiency that would have predicted the measured step, for the tokens that it had.

    A predicted step is the time of FLOPs, which efficiency divides, and a rest, which it does not:
    a run of which the rest is the larger part tells nothing. Padding counts as lost time.
    """
    measured, predicted = record.measured, record.predicted
    if measured is None or predicted is None or measured.step_s is None:
        return None
    rest_s = predicted.step_s - predicted.flops_s
    if measured.timed_steps < LEAST_STEPS or 2 * rest_s > measured.step_s:
        return None
    tokens = (measured.tokens_per_step or 0.0) / predicted.tokens_per_step
    flops_s = predicted.flops_s * min(1.0, tokens)
    return predicted.efficiency * flops_s / (measured.step_s - rest_s)


_MEASURES = (_context_bytes, _process_bytes, _fragmentation, _efficiency)


def _max(values: list[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if len(known) >= LEAST_TIMED_RUNS else None


def _words(name: str) -> str:
    return name.removesuffix("_bytes")
