"""Counts trained, frozen and added parameters of each part of a model, without weights."""

from __future__ import annotations

from hpcft.core.records import ModelSpec, StoredPart
from hpcft.methods import AnyMethod
from hpcft.planning.memory.import_stubs import meta_imports
from hpcft.planning.memory.meta_model import apply_method, build_on_meta
from hpcft.tasks.base import TaskBase


class ModuleGroup(StoredPart):
    """Parameters of one part of a model; the layers of a stack are one part."""

    name: str
    """Module, with the number of layers of a stack (`bert.encoder.layer × 12`)."""
    total: int
    """Number of parameters; a tied weight counts once, where it comes first."""
    trainable: int
    """Number of parameters that the optimizer updates."""
    frozen: int
    """Number of parameters that stay as they are."""
    added: int
    """Number of parameters that the task's head and the method add to the pretrained model."""


def module_groups(model: ModelSpec, task: TaskBase, method: AnyMethod) -> list[ModuleGroup]:
    """Returns the parts of the model with the task's head and the method, in the model's order.

    Raises:
        DataError: the model does not exist, or the method cannot train it.
    """
    with meta_imports():
        return _groups(model, task, method)


def sum_groups(groups: list[ModuleGroup]) -> ModuleGroup:
    """Returns the sum of all parts."""
    sums = {
        field: sum(getattr(group, field) for group in groups)
        for field in ("total", "trainable", "frozen", "added")
    }
    return ModuleGroup(name="all", **sums)


def _groups(model: ModelSpec, task: TaskBase, method: AnyMethod) -> list[ModuleGroup]:
    bare = build_on_meta(model, task)
    prefix = bare.base_model_prefix + "."
    has_head = task.head().outputs is not None
    counts: dict[str, dict[str, int]] = {}
    stacked: dict[str, set[str]] = {}
    pretrained = {id(p) for p in bare.parameters()}
    wrapped = apply_method(bare, task, method)
    # Adapters are inside the model and keep its names; virtual tokens are a module of their own.
    used = {id(parameter): (name, parameter) for name, parameter in wrapped.named_parameters()}
    inside = {name: p for name, p in bare.named_parameters() if used.pop(id(p), None)}
    outside = dict(used.values())
    for name, parameter in [*inside.items(), *outside.items()]:
        group, index = _group_of(name) if name in inside else (name.partition(".")[0], "")
        stacked.setdefault(group, set()).update([index] if index else [])
        size, trained = parameter.numel(), parameter.requires_grad
        is_head = has_head and not name.startswith(prefix)
        is_new = id(parameter) not in pretrained if method.saves_adapter else is_head
        count = counts.setdefault(group, {"total": 0, "trainable": 0, "frozen": 0, "added": 0})
        count["total"] += size
        count["trainable" if trained else "frozen"] += size
        count["added"] += size if is_new else 0
    return [
        ModuleGroup(name=f"{group} × {len(layers)}" if layers else group, **counts[group])
        for group, layers in stacked.items()
    ]


def _group_of(name: str) -> tuple[str, str]:
    """Returns the part that a parameter belongs to, and its layer's number in a stack."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:position]), part
    return ".".join(parts[: min(2, len(parts) - 1)]), ""
