"""Updates the calibration of clusters from finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hpcft.core.errors import StoreError
from hpcft.core.files import create_folder, read_record_if_exists, write_record
from hpcft.core.paths import calibration_file
from hpcft.core.records import Calibration, OomCaps, Recovery
from hpcft.jobs.status import RunStatus
from hpcft.planning import calibration


class UnfinishedRun(NamedTuple):
    """A run without a result that ran out of memory, as `planning.caps.HasFallbacks`."""

    recipe: str
    """Name of the recipe."""
    cluster: str
    """Name of the profile."""
    fallbacks: Sequence[Recovery]
    """Fallbacks so far, the first one first."""


def update_calibration(runs: Sequence[RunStatus], root: Path) -> list[str]:
    """Writes what the runs of each cluster have measured; returns a sentence for each value.

    Args:
        runs: all runs of the runs folder: a calibration holds only what these have measured.
        root: the runs folder.

    Raises:
        OSError: the runs folder cannot be written to.
        StoreError: the runs folder cannot be written to, or others may write to it.
    """
    records = [run.record for run in runs if run.record is not None]
    unfinished = [
        UnfinishedRun(run.job.recipe, run.job.cluster, run.fallbacks)
        for run in runs
        if run.record is None and run.fallbacks
    ]
    changes = []
    clusters = {record.cluster for record in records} | {run.cluster for run in unfinished}
    for cluster in sorted(clusters - {""}):
        fitted = calibration.fit_calibration(records, cluster, unfinished)
        file = calibration_file(root, cluster)
        try:
            before = read_record_if_exists(file, Calibration) or Calibration()
        except StoreError:
            before = None  # A damaged file is replaced.
        if fitted != before:
            create_folder(file.parent)
            write_record(file, fitted)
        changes += [f"{cluster}: {line}" for line in _describe(fitted)]
    return changes


def _describe(fitted: Calibration) -> list[str]:
    lines = [calibration.describe_learned(value) for value in fitted.learned]
    lines += [f"plans of {name} use {_describe_cap(cap)}" for name, cap in fitted.oom_caps.items()]
    least = calibration.MIN_RUNS
    nothing = f"nothing is learned yet: no {least} runs of one kind have measured the same value"
    return [*(lines or [nothing]), *fitted.notes]


def _describe_cap(cap: OomCaps) -> str:
    parts = [f"micro-batch at most {cap.per_device_train_batch_size}"]
    parts += ["checkpointing"] * cap.gradient_checkpointing
    parts += [f"loss in {cap.loss_chunks} parts"] * (cap.loss_chunks > 1)
    parts += [f"{cap.nodes} nodes"] * (cap.nodes > 1)
    return ", ".join(parts)
