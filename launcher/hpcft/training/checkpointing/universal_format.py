"""Converts checkpoints without DeepSpeed to its universal format, and back.

The universal format has a folder for each trained weight, with the whole weight and both moments
of AdamW in fp32 (https://www.deepspeed.ai/tutorials/universal-checkpointing/).
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

TRAINED_FILE = "trained.safetensors"
"""Name of the file with the trained weights of a run without DeepSpeed. PEFT's own file would not
do: of P-tuning it holds the prompt, and not the network that computes it."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of AdamW's moments, in PyTorch as in the universal format."""
MODEL_STATE_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
"""Names of the file with the model's state as ZeRO stages 1 and 2, and stage 3, look for it."""
UNIVERSAL_FOLDER = "global_step{}_universal"
"""Name of the folder in DeepSpeed's universal format, by the step of the checkpoint."""
_ORDER_KEY = "order"


def save_trained_weights(model: Module, optimizer: Optimizer, folder: Path) -> None:
    """Writes the trained weights, with the order in which the optimizer numbers them."""
    weights = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in _trained_parameters(model).items()
    }
    order = json.dumps(_optimizer_order(model, optimizer))
    save_file(weights, folder / TRAINED_FILE, {_ORDER_KEY: order})


def load_trained_weights(model: Module, folder: Path) -> None:
    """Loads the trained weights from a checkpoint; all others stay as they are."""
    states = _find_universal_states(folder)
    weights = {} if states else load_file(folder / TRAINED_FILE)
    for name, parameter in _trained_parameters(model).items():
        value = _load_tensor(states, name, "fp32") if states else weights[name]
        parameter.data.copy_(value.view(parameter.shape))


def load_optimizer_states(
    model: Module, optimizer: Optimizer, scheduler: Any, folder: Path
) -> bool:
    """Loads optimizer and scheduler from a checkpoint in the universal format.

    Returns:
        False if the checkpoint is not in that format; then nothing is loaded.
    """
    states = _find_universal_states(folder)
    if states is None:
        return False
    shapes = {name: parameter.shape for name, parameter in _trained_parameters(model).items()}
    loaded: dict[int, dict[str, Tensor]] = {}
    for index, name in enumerate(_optimizer_order(model, optimizer)):
        loaded[index] = {key: _load_tensor(states, name, key).view(shapes[name]) for key in MOMENTS}
        step = torch.as_tensor(load_trusted(states / name / "step.pt"), dtype=torch.float32)
        loaded[index]["step"] = step.reshape(())
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": loaded, "param_groups": groups})
    scheduler.load_state_dict(load_trusted(folder / SCHEDULER_NAME))
    return True


def _trained_parameters(model: Module) -> dict[str, Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _optimizer_order(model: Module, optimizer: Optimizer) -> list[str]:
    """Returns the names of the trained weights in the order of the optimizer's numbers."""
    names = {id(p): name for name, p in _trained_parameters(model).items()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def has_optimizer_order(folder: Path) -> bool:
    """Returns whether a checkpoint without DeepSpeed names the weight of each optimizer state."""
    with safe_open(folder / TRAINED_FILE, "pt") as trained:
        return _ORDER_KEY in (trained.metadata() or {})


def write_universal(folder: Path, target: Path, step: int) -> None:
    """Writes a checkpoint in DeepSpeed's universal format, with one weight in memory at a time.

    Args:
        folder: the checkpoint of a run without DeepSpeed.
        target: folder to write to.
        step: optimizer steps done.
    """
    import deepspeed  # imported here, because it takes seconds, and most runs do without it

    tag = UNIVERSAL_FOLDER.format(step)
    states = target / tag / "zero"
    states.mkdir(mode=0o700, parents=True)
    saved = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
    steps_done = torch.tensor(float(step))
    with safe_open(folder / TRAINED_FILE, "pt") as trained:
        for index, name in enumerate(json.loads(trained.metadata()[_ORDER_KEY])):
            weight = trained.get_tensor(name).float()
            state = saved["state"].get(index) or dict.fromkeys(MOMENTS, torch.zeros_like(weight))
            parameter = states / name
            parameter.mkdir(mode=0o700)
            _save_tensor(parameter, "fp32", weight)
            for key in MOMENTS:
                _save_tensor(parameter, key, state[key].float())
            torch.save(steps_done, parameter / "step.pt")
    groups: list[dict[str, Any]] = [{} for _ in saved["param_groups"]]
    optimizer = {
        "optimizer_state_dict": {"state": {0: {"step": steps_done}}, "param_groups": [{}]},
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
    for name in MODEL_STATE_FILES:
        torch.save(model, target / tag / name)
    (target / "latest_universal").write_text(tag, encoding="utf-8")


def _find_universal_states(folder: Path) -> Path | None:
    """Returns the folder of the weights in the universal format; None in another format."""
    return next(folder.glob(UNIVERSAL_FOLDER.format("*") + "/zero"), None)


def _save_tensor(parameter: Path, key: str, tensor: Tensor) -> None:
    torch.save({"param": tensor.clone()}, parameter / f"{key}.pt")


def _load_tensor(states: Path, name: str, key: str) -> Tensor:
    tensor: Tensor = load_trusted(states / name / f"{key}.pt")["param"]
    return tensor


def load_trusted(file: Path) -> Any:
    """Loads a file, pickles included, that this run wrote into a folder private to its user."""
    return torch.load(file, map_location="cpu", weights_only=False)
