"""Updates a cluster's calibration from finished runs."""

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
    """A run without a result that was out of memory, as `hpcft.planning.oom_fallback` knows it."""

    recipe: str
    """Name of the recipe."""
    cluster: str
    """Name of the profile."""
    fallbacks: Sequence[Recovery]
    """What it came down to so far."""


def update_calibration(views: Sequence[RunStatus], root: Path) -> list[str]:
    """Keeps what the runs have measured of their clusters; what is new, in a line for each.

    Args:
        views: all runs of the runs folder: what others measured would be forgotten.
        root: the runs folder.

    Raises:
        OSError: it cannot be written to.
        StoreError: likewise, or others may write to it.
    """
    records = [view.record for view in views if view.record is not None]
    unfinished = [
        UnfinishedRun(view.job.recipe, view.job.cluster, view.fallbacks)
        for view in views
        if view.record is None and view.fallbacks
    ]
    told = []
    clusters = {record.cluster for record in records} | {run.cluster for run in unfinished}
    for cluster in sorted(clusters - {""}):
        fitted = calibration.fit_calibration(records, cluster, unfinished)
        file = calibration_file(root, cluster)
        try:
            earlier = read_record_if_exists(file, Calibration) or Calibration()
        except StoreError:
            earlier = None  # damaged: written anew
        if fitted == earlier:
            continue
        create_folder(file.parent)
        write_record(file, fitted)
        parts = (
            [calibration.describe_calibration(fitted)]
            if calibration.describe_calibration(fitted)
            else []
        )
        parts += [f"{name} came down to {_cap(cap)}" for name, cap in fitted.oom_caps.items()]
        by = f"{fitted.runs} run{'s' * (fitted.runs != 1)}"
        told.append(f"calibration of {cluster} by {by}: {'; '.join(parts) or 'none'}")
    return told


def _cap(cap: OomCaps) -> str:
    parts = [f"micro-batch {cap.per_device_train_batch_size}"]
    parts += ["checkpointing"] * cap.gradient_checkpointing
    parts += [f"loss in {cap.loss_chunks} parts"] * (cap.loss_chunks > 1)
    parts += [f"{cap.nodes} nodes"] * (cap.nodes > 1)
    return ", ".join(parts)
