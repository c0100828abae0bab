"""Converts a checkpoint for another layout: other ranks, ZeRO stage or offloading.

Without DeepSpeed every rank holds the whole state, and a checkpoint loads on any number of ranks.
With DeepSpeed each rank saves its shard. DeepSpeed's universal format joins the shards, parameter
by parameter; by way of it a run also resumes with DeepSpeed that had started without, and the
other way round.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import OPTIMIZER_NAME

from hpcft.core import checkpoints
from hpcft.core.checkpoints import CompleteCheckpoint
from hpcft.core.paths import RunPaths
from hpcft.core.records import Layout, Plan
from hpcft.planning import oom_fallback
from hpcft.training.checkpointing import retention, universal_format
from hpcft.training.checkpointing.universal_format import (
    MODEL_STATE_FILES,
    MOMENTS,
    load_trusted,
)

log = logging.getLogger(__name__)

CONVERTIBLE_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
"""Optimizers whose state DeepSpeed's converter knows: two moments in fp32."""


def find_resume_checkpoint(
    paths: RunPaths, plan: Plan
) -> tuple[CompleteCheckpoint | None, list[str]]:
    """Returns the newest loadable checkpoint, converted if needed, and notes on skipped ones.

    Rank 0 calls it before the other ranks join. It removes what an interrupted save left behind,
    and cuts metrics.jsonl to the lines up to the checkpoint.
    """
    retention.remove_unfinished(paths)
    checkpoint, notes = checkpoints.latest_checkpoint(paths, verifies=True)
    if checkpoint and (reason := reshard_blocker(checkpoint, plan)):
        name = checkpoint.folder.name
        notes.append(f"{name} cannot be resumed from ({reason}): training started from step 0")
        checkpoint = None
    for note in notes:
        log.warning(note)
    retention.cut_metrics(paths, checkpoint.record.metrics_bytes if checkpoint else 0)
    if checkpoint is None:
        return None, notes
    log.info("resumes from step %d (%s)", checkpoint.record.step, checkpoint.folder.name)
    return resharded(checkpoint, plan.layout), notes


def resharded(checkpoint: CompleteCheckpoint, layout: Layout) -> CompleteCheckpoint:
    """Returns the checkpoint in a form that a layout loads: as it is, or converted."""
    folder = resharded_folder(checkpoint, layout)
    if folder != checkpoint.folder:
        shutil.rmtree(folder, ignore_errors=True)
        convert(checkpoint, folder)
    return CompleteCheckpoint(folder, checkpoint.record)


def resharded_folder(checkpoint: CompleteCheckpoint, layout: Layout) -> Path:
    """Returns the folder in which a layout finds the checkpoint after `resharded`."""
    if not needs_conversion(checkpoint.record.layout, layout):
        return checkpoint.folder
    return checkpoint.folder.with_name(f".universal-{checkpoint.record.step}")


def reshard_blocker(checkpoint: CompleteCheckpoint, plan: Plan) -> str:
    """Returns why a plan cannot resume from a checkpoint; empty if it can."""
    saved, planned = checkpoint.record.layout, plan.layout
    if saved.offload_optimizer == "nvme":
        # DeepSpeed copies the files back, but begins with new moments and counts steps from 0.
        return "optimizer states on a node's disk are not restored by DeepSpeed"
    if not needs_conversion(saved, planned):
        return ""
    if "nvme" in (saved.offload_optimizer, saved.offload_param,
                  planned.offload_optimizer, planned.offload_param):  # fmt: skip
        return "state that is offloaded to a node's disk cannot be resharded"
    if plan.optim not in CONVERTIBLE_OPTIMIZERS:
        return f"the state of {plan.optim} cannot be resharded"
    if not saved.zero_stage and not universal_format.has_optimizer_order(checkpoint.folder):
        return "it does not record which optimizer state belongs to which weight"
    return ""


def needs_conversion(saved: Layout, planned: Layout) -> bool:
    """Returns whether a checkpoint of one layout has to be converted for another."""
    uses_deepspeed = bool(saved.zero_stage or planned.zero_stage)
    return uses_deepspeed and not oom_fallback.same_sharding(saved, planned)


def convert(checkpoint: CompleteCheckpoint, target: Path) -> None:
    """Writes a checkpoint in DeepSpeed's universal format.

    Args:
        checkpoint: the checkpoint to convert.
        target: folder to write to.
    """
    if checkpoint.record.layout.zero_stage:
        _merge_shards(checkpoint, target)
    else:
        universal_format.write_universal(checkpoint.folder, target, checkpoint.record.step)
    for file in checkpoint.folder.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != OPTIMIZER_NAME:
            shutil.copy2(file, target / file.name)


def _merge_shards(checkpoint: CompleteCheckpoint, target: Path) -> None:
    """Joins the shards of all ranks, with one of them in memory at a time."""
    # Imported here, because importing DeepSpeed takes seconds, and most runs do without it.
    from deepspeed.checkpoint import ds_to_universal

    tag = checkpoint.record.tag
    states = target / f"{tag}_universal"
    states.mkdir(mode=0o700, parents=True)
    options = argparse.Namespace(
        input_folder=str(checkpoint.folder / tag),
        output_folder=str(states),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        ds_to_universal.main(options)
    _make_loadable_by_all_stages(states)


def _make_loadable_by_all_stages(states: Path) -> None:
    """Adds the files that a reader of another ZeRO stage looks for.

    Stages 1 and 2 look for the optimizer's step and the shape in each parameter's folder, stage 3
    for the step in one place. Stage 3 would also give all parameters the weight decay of the first
    group: without saved options, the groups keep those of the recipe.
    """
    import deepspeed  # imported here, as in `_merge_shards`

    file = states / "zero/optimizer_state.pt"
    optimizer: dict[str, Any] = load_trusted(file)
    first = min(states.glob("*model_states.pt"))
    inner = optimizer.get("optimizer_state_dict")
    if inner:  # Stage 3 wrote it.
        step = inner["state"][0]["step"]
        for group in load_trusted(first)["param_shapes"]:
            for name, shape in group.items():
                _restore_shape(states / "zero" / name, shape)
                torch.save(step, states / "zero" / name / "step.pt")
    else:
        step = load_trusted(next((states / "zero").rglob("step.pt")))
    optimizer["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": [{}]}
    optimizer["param_groups"] = [{} for _ in optimizer["param_groups"]]
    optimizer["ds_version"] = deepspeed.__version__
    torch.save(optimizer, file)
    for name in MODEL_STATE_FILES:
        if not (states / name).exists():
            shutil.copy2(first, states / name)


def _restore_shape(parameter: Path, shape: Any) -> None:
    """Gives a parameter's weight and moments their shape back, which stage 3 has flattened."""
    for key in ("fp32", *MOMENTS):
        file = parameter / f"{key}.pt"
        torch.save({"param": load_trusted(file).view(shape)}, file)
