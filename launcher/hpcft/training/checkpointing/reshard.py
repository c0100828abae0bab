"""A checkpoint of one layout for a run of another: other ranks, another ZeRO stage, offloading.

Without DeepSpeed every rank holds everything, and any number of ranks can go on. With it each rank
has its shard: DeepSpeed's universal format puts them together again, parameter by parameter. By way
of it a run also goes on with DeepSpeed that had begun without, and the other way round.
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
from hpcft.training.checkpointing.universal_format import MODEL_STATES, MOMENTS, load_trusted

log = logging.getLogger(__name__)

# The optimizers whose states the converter knows: two moments in fp32.
CONVERTIBLE = ("adamw_torch", "adamw_torch_fused")


def find_resume_checkpoint(
    paths: RunPaths, plan: Plan
) -> tuple[CompleteCheckpoint | None, list[str]]:
    """What a start goes on from, in a form that it can load, and what was passed over.

    Only rank 0 asks, before the others meet it. What an interrupted save left behind is removed,
    and metrics.jsonl is cut.
    """
    retention.remove_unfinished(paths)
    found, notes = checkpoints.latest_checkpoint(paths)
    if found and (why := reshard_blocker(found, plan)):
        notes.append(f"{found.folder.name} could not be gone on from ({why}): training began anew")
        found = None
    for note in notes:
        log.warning(note)
    retention.cut_metrics(paths, found.record.metrics_bytes if found else 0)
    if found is None:
        return None, notes
    log.info("goes on from step %d (%s)", found.record.step, found.folder.name)
    return resharded(found, plan.layout), notes


def resharded(found: CompleteCheckpoint, now: Layout) -> CompleteCheckpoint:
    """The checkpoint in a form that a layout loads: as it is, or converted."""
    to = resharded_folder(found, now)
    if to != found.folder:
        shutil.rmtree(to, ignore_errors=True)
        convert(found, to)
    return CompleteCheckpoint(to, found.record)


def resharded_folder(found: CompleteCheckpoint, now: Layout) -> Path:
    """Where `fitting` puts it."""
    if not needs_conversion(found.record.layout, now):
        return found.folder
    return found.folder.with_name(f".universal-{found.record.step}")


def reshard_blocker(found: CompleteCheckpoint, plan: Plan) -> str:
    """Why a run cannot go on from a checkpoint as it is planned now; empty where it can."""
    before, now = found.record.layout, plan.layout
    if not needs_conversion(before, now):
        return ""
    if "nvme" in (before.offload_optimizer, before.offload_param,
                  now.offload_optimizer, now.offload_param):  # fmt: skip
        return "states on a node's disk cannot be divided otherwise"
    if plan.optim not in CONVERTIBLE:
        return f"states of {plan.optim} cannot be divided otherwise"
    if not before.zero_stage and not universal_format.knows_its_order(found.folder):
        return "it does not say which state is of which weight"
    return ""


def needs_conversion(before: Layout, now: Layout) -> bool:
    """Whether what a layout has written has to be put together for another."""
    return bool(before.zero_stage or now.zero_stage) and not oom_fallback.same_sharding(before, now)


def convert(found: CompleteCheckpoint, to: Path) -> None:
    """Writes the checkpoint in DeepSpeed's universal format."""
    if found.record.layout.zero_stage:
        _put_together(found, to)
    else:
        universal_format.to_universal(found.folder, to, found.record.step)
    for file in found.folder.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != OPTIMIZER_NAME:
            shutil.copy2(file, to / file.name)


def _put_together(found: CompleteCheckpoint, to: Path) -> None:
    """Of the ranks' shards, one in memory at a time."""
    from deepspeed.checkpoint import ds_to_universal

    tag = found.record.tag
    states = to / f"{tag}_universal"
    states.mkdir(mode=0o700, parents=True)
    options = argparse.Namespace(
        input_folder=str(found.folder / tag),
        output_folder=str(states),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        ds_to_universal.main(options)
    _complete(states)


def _complete(states: Path) -> None:
    """Adds what a reader of another stage looks for.

    Stages 1 and 2 want the optimizer's step and the shape beside each parameter, stage 3 the step
    in one place. And stage 3 would give all parameters the weight decay of the first group: without
    their options, groups keep those of the recipe.
    """
    import deepspeed

    file = states / "zero/optimizer_state.pt"
    optimizer: dict[str, Any] = load_trusted(file)
    first = min(states.glob("*model_states.pt"))
    inner = optimizer.get("optimizer_state_dict")
    if inner:  # written by stage 3
        step = inner["state"][0]["step"]
        for group in load_trusted(first)["param_shapes"]:
            for name, shape in group.items():
                _shape(states / "zero" / name, shape)
                torch.save(step, states / "zero" / name / "step.pt")
    else:
        step = load_trusted(next((states / "zero").rglob("step.pt")))
    optimizer["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": [{}]}
    optimizer["param_groups"] = [{} for _ in optimizer["param_groups"]]
    optimizer["ds_version"] = deepspeed.__version__
    torch.save(optimizer, file)
    for name in MODEL_STATES:
        if not (states / name).exists():
            shutil.copy2(first, states / name)


def _shape(parameter: Path, shape: Any) -> None:
    """Gives the weight and the moments of a parameter their shape, which stage 3 has flattened."""
    for key in ("fp32", *MOMENTS):
        file = parameter / f"{key}.pt"
        torch.save({"param": load_trusted(file).view(shape)}, file)
