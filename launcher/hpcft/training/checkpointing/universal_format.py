"""Checkpoints of runs without DeepSpeed, and how they become those of runs with it, and back.

Both go by DeepSpeed's universal format: a folder for each weight that is trained, with the weight
and the moments of AdamW in fp32, whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

TRAINED = "trained.safetensors"
"""What is trained, without DeepSpeed: exact, and of every method (PEFT saves P-tuning's prompt, and
not the network that makes it)."""
MOMENTS = ("exp_avg", "exp_avg_sq")
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
"""What stages 1 and 2, and stage 3, look for beside the weights."""
UNIVERSAL = "global_step{}_universal"
"""Folder of a checkpoint of some step in DeepSpeed's universal format."""
_ORDER = "order"


def save(model: Module, optimizer: Optimizer, folder: Path) -> None:
    """Writes what is trained, and the order in which the optimizer counts it."""
    trained = {name: p.detach().cpu().contiguous() for name, p in _trained(model).items()}
    order = json.dumps(_order(model, optimizer))
    save_file(trained, folder / TRAINED, {_ORDER: order})


def load_weights(model: Module, folder: Path) -> None:
    """Gives what is trained its values; the rest is as it was loaded."""
    states = _states(folder)
    trained = {} if states else load_file(folder / TRAINED)
    for name, parameter in _trained(model).items():
        value = _one(states, name, "fp32") if states else trained[name]
        parameter.data.copy_(value.view(parameter.shape))


def load_states(model: Module, optimizer: Optimizer, scheduler: Any, folder: Path) -> bool:
    """Gives optimizer and scheduler what a run with DeepSpeed had; False where it had none."""
    states = _states(folder)
    if states is None:
        return False
    shapes = {name: parameter.shape for name, parameter in _trained(model).items()}
    found: dict[int, dict[str, Tensor]] = {}
    for index, name in enumerate(_order(model, optimizer)):
        found[index] = {key: _one(states, name, key).view(shapes[name]) for key in MOMENTS}
        step = torch.as_tensor(load_trusted(states / name / "step.pt"), dtype=torch.float32)
        found[index]["step"] = step.reshape(())
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": found, "param_groups": groups})
    scheduler.load_state_dict(load_trusted(folder / SCHEDULER_NAME))
    return True


def _trained(model: Module) -> dict[str, Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _order(model: Module, optimizer: Optimizer) -> list[str]:
    """Names of what is trained, in the order in which the optimizer counts them."""
    names = {id(p): name for name, p in _trained(model).items()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def knows_its_order(folder: Path) -> bool:
    """Whether a checkpoint without DeepSpeed says which state is of which weight."""
    with safe_open(folder / TRAINED, "pt") as trained:
        return _ORDER in (trained.metadata() or {})


def to_universal(folder: Path, to: Path, step: int) -> None:
    """Writes a checkpoint in DeepSpeed's universal format, one weight in memory at a time.

    Args:
        folder: the checkpoint of a run without DeepSpeed.
        to: folder to write to.
        step: steps done.
    """
    import deepspeed

    tag = UNIVERSAL.format(step)
    states = to / tag / "zero"
    states.mkdir(mode=0o700, parents=True)
    saved = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
    done = torch.tensor(float(step))
    with safe_open(folder / TRAINED, "pt") as trained:
        for index, name in enumerate(json.loads(trained.metadata()[_ORDER])):
            weight = trained.get_tensor(name).float()
            state = saved["state"].get(index) or dict.fromkeys(MOMENTS, torch.zeros_like(weight))
            one = states / name
            one.mkdir(mode=0o700)
            _write(one, {"fp32": weight, **{key: state[key].float() for key in MOMENTS}})
            torch.save(done, one / "step.pt")
    groups: list[dict[str, Any]] = [{} for _ in saved["param_groups"]]
    optimizer = {
        "optimizer_state_dict": {"state": {0: {"step": done}}, "param_groups": [{}]},
        "param_groups": groups,
        "ds_version": deepspeed.__version__,
    }
    torch.save(optimizer, states / "optimizer_state.pt")
    model = {
        "module": {},
        "lr_scheduler": load_trusted(folder / SCHEDULER_NAME),
        "dp_world_size": 1,
        "mp_world_size": 1,
        "global_steps": step,
        "skipped_steps": 0,
        "ds_version": deepspeed.__version__,
    }
    for name in MODEL_STATES:
        torch.save(model, to / tag / name)
    (to / "latest_universal").write_text(tag)


def _write(folder: Path, tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        torch.save({"param": tensor.clone()}, folder / f"{key}.pt")


def _states(folder: Path) -> Path | None:
    """Where the weights of a checkpoint in the universal format are; None of another."""
    return next(folder.glob(UNIVERSAL.format("*") + "/zero"), None)


def _one(states: Path, name: str, key: str) -> Tensor:
    value: Tensor = load_trusted(states / name / f"{key}.pt")["param"]
    return value


def load_trusted(file: Path) -> Any:
    """What a file holds that this run wrote itself, into a folder that others cannot write."""
    return torch.load(file, map_location="cpu", weights_only=False)
