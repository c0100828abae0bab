"""Fits the constants of a cluster (context, process, efficiency) from finished runs.

Values are kept by GPU, kind of layout and size class, each the median of at least three runs that
can tell. Fragmentation is not fitted: PyTorch's allocator keeps what it has reserved while there is
room, so that a run that fitted shows no need. A run that fell back to a smaller layout sets caps,
but no values: its predictions are of another layout.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import (
    CALIBRATION_BOUNDS,
    Calibration,
    Cluster,
    Layout,
    LearnedValue,
    RunRecord,
)
from hpcft.core.units import GIB, format_bytes, format_number
from hpcft.planning.caps import HasFallbacks, caps_from_runs
from hpcft.planning.inputs import PlanInputs
from hpcft.planning.learned_values import learned_bytes, learned_efficiency
from hpcft.planning.memory.model_states import heap_bytes

# Software and drivers change: older runs no longer count.
MAX_RUNS = 50
# A median of fewer could be one that stood in another user's way.
MIN_RUNS = 3
MIN_STEPS = 20
# A step with less time in FLOPs is decided by Python and by the start of kernels.
MIN_FLOPS_S = 0.05
# Shares of the predicted tokens: with fewer the run shows what other lengths do than the predicted.
MIN_TOKENS_OF_TIME = 0.5
MIN_TOKENS_OF_MEMORY = 0.9
# Beside larger tensors an error in their prediction would count as the process.
MAX_TENSOR_BYTES = GIB
# Below this share of the peak a step waits for something else than arithmetic.
MIN_EFFICIENCY = 0.05


class _Measured(NamedTuple):
    """A value of one run, with the kind of run that it holds for."""

    field: str
    device: str
    precision: str
    layout: str
    size: str
    value: float
    run: str


def fit_calibration(
    records: Iterable[RunRecord], cluster: str, unfinished: Iterable[HasFallbacks] = ()
) -> Calibration:
    """Returns the calibration of a cluster from its latest runs.

    Args:
        records: finished runs, in any order.
        cluster: name of the profile; runs of others are left out.
        unfinished: runs without a record, of which only the fallbacks count.
    """
    of_cluster = [record for record in records if record.cluster == cluster]
    latest = sorted(of_cluster, key=lambda record: record.finished_at)[-MAX_RUNS:]
    measured = [x for run in latest if not run.fallbacks for x in _measured_values(run)]
    learned = list(_medians([x for x in measured if _is_within_bounds(x)]))
    runs = [*latest, *unfinished]
    caps = {name: caps_from_runs(runs, name, cluster) for name in {run.recipe for run in runs}}
    return Calibration(
        learned=learned,
        runs=len({run for value in learned for run in value.runs}),
        notes=_left_out([x for x in measured if not _is_within_bounds(x)]),
        oom_caps={name: cap for name, cap in sorted(caps.items()) if cap},
    )


def _medians(measured: list[_Measured]) -> Iterator[LearnedValue]:
    """Yields the median of each kind of which enough runs have measured something."""
    by_kind: dict[tuple[str, ...], list[_Measured]] = {}
    for x in measured:
        by_kind.setdefault((x.field, x.device, x.precision, x.layout, x.size), []).append(x)
    for _, alike in sorted(by_kind.items()):
        if len(alike) >= MIN_RUNS:
            kind = {name: getattr(alike[0], name) for name in LearnedValue.model_fields
                    if name not in ("value", "runs")}  # fmt: skip
            median = statistics.median(x.value for x in alike)
            runs = [x.run for x in alike]
            yield LearnedValue.model_validate({**kind, "value": median, "runs": runs})


def _bounds(field: str) -> tuple[float, float]:
    lowest, highest = CALIBRATION_BOUNDS[field]
    return (MIN_EFFICIENCY if field == "efficiency" else lowest), highest


def _is_within_bounds(measured: _Measured) -> bool:
    lowest, highest = _bounds(measured.field)
    return lowest <= measured.value <= highest


def _left_out(measured: list[_Measured]) -> list[str]:
    """Returns a note on each field of which runs have measured what cannot be its value."""
    notes = []
    for field in sorted({x.field for x in measured}):
        runs = ", ".join(
            f"{x.run} ({_shown(field, x.value)})" for x in measured if x.field == field
        )
        lowest, highest = (_shown(field, bound) for bound in _bounds(field))
        notes.append(f"{_label(field)} outside {lowest} to {highest} is left out: {runs}")
    return notes


# ---------------------------------------------------------------- use and description


def override(stated: Calibration, fitted: Calibration) -> Calibration:
    """Returns a profile's calibration with what runs have measured in its place."""
    names = ("learned", "runs", "notes", "oom_caps")
    fields = {name: getattr(fitted, name) for name in names}
    return stated.model_copy(update={name: value for name, value in fields.items() if value})


def describe_learned(learned: LearnedValue) -> str:
    """Returns a value with where it holds and the runs that have measured it."""
    size = f"{learned.size} parameters" if learned.size else ""
    where = ", ".join(filter(None, (learned.device, learned.precision, learned.layout, size)))
    shown = _shown(learned.field, learned.value)
    return f"{_label(learned.field)} {shown} for {where}: {_describe_source(learned)}"


def _describe_source(learned: LearnedValue) -> str:
    return f"median of {len(learned.runs)} runs ({', '.join(learned.runs)})"


def calibration_reasons(inputs: PlanInputs, layout: Layout) -> list[str]:
    """Returns what earlier runs or the profile have changed in a plan, in sentences."""
    cluster = inputs.cluster
    memory = "context_bytes" if inputs.on_gpu else "process_bytes"
    used = [learned_efficiency(cluster, inputs.kind(layout)), learned_bytes(cluster, memory)]
    known = {value.field: value for value in used if value}
    reasons = [f"calibrated: {describe_learned(value)}" for value in known.values()]
    names = ["efficiency", memory, *(["fragmentation"] if inputs.on_gpu else [])]
    stated = {name: getattr(cluster.calibration, name) for name in names if name not in known}
    values = [f"{_label(name)} {_shown(name, v)}" for name, v in stated.items() if v is not None]
    if values:
        reasons.append(f"stated by the profile: {', '.join(values)}")
    return reasons + _cap_reasons(inputs.recipe, cluster)


def _cap_reasons(recipe: FullRecipe, cluster: Cluster) -> list[str]:
    caps = cluster.calibration.oom_caps.get(recipe.name)
    if caps is None:
        return []
    parts = []
    if recipe.train.per_device_train_batch_size == "auto":
        parts.append(f"micro-batch at most {caps.per_device_train_batch_size}")
    if caps.gradient_checkpointing and recipe.train.gradient_checkpointing == "auto":
        parts.append("checkpointing")
    if caps.loss_chunks > 1:
        parts.append(f"loss in {caps.loss_chunks} parts")
    if caps.nodes > 1 and recipe.resources.nodes == "auto":
        parts.append(f"at least {caps.nodes} nodes")
    why = f"earlier runs of {recipe.name} ran out of memory and fell back to it"
    return [f"{', '.join(parts)}: {why}"] if parts else []


def _shown(field: str, value: float) -> str:
    if field.endswith("_bytes"):
        return format_bytes(value)
    return f"{value:.1%}" if field == "fragmentation" else format_number(value)


def _label(field: str) -> str:
    return field.removesuffix("_bytes")


# ---------------------------------------------------------------- what a run tells


def _measured_values(record: RunRecord) -> Iterator[_Measured]:
    """Yields what a run can tell; nothing where it does not know what it was planned for."""
    predicted = record.predicted
    if predicted is None or not predicted.device:
        return
    run = f"{record.recipe}/{record.run_id}"
    device = predicted.device
    for field, size in (("context_bytes", _context_bytes(record)),
                        ("process_bytes", _process_bytes(record))):  # fmt: skip
        if size is not None:
            yield _Measured(field, device, "", "", "", size, run)
    efficiency = _efficiency(record)
    if efficiency is not None:
        kind = predicted.precision, predicted.layout, predicted.size
        yield _Measured("efficiency", device, *kind, efficiency, run)


def _context_bytes(record: RunRecord) -> float | None:
    """Returns the GPU memory in use that PyTorch's allocator does not hold, of a single rank.

    With several ranks NCCL's buffers are in it, of which only a stated size is known.
    """
    if record.measured is None or record.predicted is None or record.predicted.communicator_bytes:
        return None
    unreserved = [
        peaks.device_bytes - (peaks.reserved_bytes or 0)
        for peaks in record.measured.phases.values()
        if peaks.device_bytes
    ]
    return max(unreserved, default=None)


def _process_bytes(record: RunRecord) -> float | None:
    """Returns the resident set of a rank on a CPU beyond its predicted tensors and heap.

    A run with rows much shorter than planned held less than the predicted tensors, and one with
    large tensors tells how well these were predicted.
    """
    measured, predicted = record.measured, record.predicted
    if measured is None or predicted is None:
        return None
    phases = measured.phases.values()
    if not phases or any(peaks.reserved_bytes is not None for peaks in phases):
        return None
    if predicted.tensor_bytes > MAX_TENSOR_BYTES or _token_share(record) < MIN_TOKENS_OF_MEMORY:
        return None
    beside = predicted.tensor_bytes + heap_bytes(predicted.tensor_bytes)
    return max(peaks.resident_bytes for peaks in phases) - beside


def _efficiency(record: RunRecord) -> float | None:
    """Returns the efficiency that would have predicted the measured step, for its tokens.

    A predicted step is the time of FLOPs, which efficiency divides, and a rest, which it does not.
    A run in which the rest is the larger part, as predicted or as measured, gives no value; nor
    does one whose FLOPs take no time to speak of. Padding counts as lost time.
    """
    measured, predicted = record.measured, record.predicted
    if measured is None or predicted is None or measured.step_s is None:
        return None
    rest_s = predicted.step_s - predicted.flops_s
    if measured.timed_steps < MIN_STEPS or 2 * rest_s > min(measured.step_s, predicted.step_s):
        return None
    tokens = _token_share(record)
    if tokens < MIN_TOKENS_OF_TIME or predicted.flops_s < MIN_FLOPS_S:
        return None
    flops_s = predicted.flops_s * min(1.0, tokens)
    return predicted.efficiency * flops_s / (measured.step_s - rest_s)


def _token_share(record: RunRecord) -> float:
    assert record.measured is not None
    assert record.predicted is not None
    return (record.measured.tokens_per_step or 0.0) / record.predicted.tokens_per_step
