"""Imitates what DeepSpeed's ZeRO adds to a step: gradient buckets, and the module schedule.

It follows DeepSpeed 0.19 (runtime/zero/stage_1_and_2.py, stage3.py, parameter_offload.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

from hpcft.core.records import ZeroSizes
from hpcft.planning.memory.tracing.storage_tracker import SHARDED, StorageTracker
from hpcft.planning.memory.zero3_schedule import FETCH, RELEASE, Event, ModuleSchedule


class GradientReducer:
    """Moves gradients into a bucket and reduces it when it is full, as DeepSpeed does.

    Args:
        tracker: counts the buckets and the shards.
        model: the traced model.
        stage: ZeRO stage.
        sizes: sizes given to DeepSpeed.
        on_cpu: whether gloo reduces, which needs a copy.
    """

    def __init__(
        self, tracker: StorageTracker, model: Any, stage: int, sizes: ZeroSizes, *, on_cpu: bool
    ) -> None:
        self.tracker = tracker
        self.stage = stage
        self.bucket_elements = sizes.reduce_bucket_elements
        self.on_cpu = on_cpu
        trained = [p for p in model.parameters() if p.requires_grad]
        self.width = trained[0].element_size()
        self.trained_bytes = self.width * sum(p.numel() for p in trained)
        self.elements = self.tensors = self.kept_bytes = 0
        self.oversized: list[Any] = []
        self.kept: list[Any] = []
        self.has_begun = self.has_reduced = False

    def add_gradient(self, parameter: Any) -> None:
        """Copies an accumulated gradient into the bucket; one larger than the bucket stays."""
        if not self.has_begun and self.stage < 3:
            # One bucket is filled while the other is reduced.
            self.tracker.hold(2 * self.width * self.bucket_elements)
        self.has_begun = True
        numel = parameter.numel()
        if self.elements and self.elements + numel > self.bucket_elements:
            self.flush()
        if numel > self.bucket_elements:
            self.oversized.append(parameter)
        else:
            parameter.grad = None
        self.elements += numel
        self.tensors += 1

    def flush(self) -> None:
        """Reduces the bucket and frees its gradients."""
        if self.stage == 3:
            # DeepSpeed interleaves several gradients by rank in a copy; gloo makes another copy.
            copies = (self.tensors > 1) + self.on_cpu
            self.tracker.hold(copies * self.elements * self.width)
            self.tracker.hold(-copies * self.elements * self.width)
        elif not self.has_reduced:
            self.tracker.hold(self.trained_bytes, SHARDED)
        self.has_reduced = True
        for parameter in self.oversized:
            if self.stage == 1:
                # ZeRO-1 frees it only after the backward pass, except for the rank's own share.
                self.kept.append(parameter)
                self.kept_bytes += parameter.numel() * self.width
                self.tracker.hold(-parameter.numel() * self.width, SHARDED)
            else:
                parameter.grad = None
        self.oversized, self.elements, self.tensors = [], 0, 0

    def end_backward(self) -> None:
        """Reduces the rest and frees the buckets."""
        self.flush()
        for parameter in self.kept:
            parameter.grad = None
        self.tracker.hold(self.kept_bytes, SHARDED)
        if self.stage < 3:
            self.tracker.hold(-2 * self.width * self.bucket_elements)
        self.kept, self.kept_bytes = [], 0
        self.has_begun = self.has_reduced = False

    def begin_optimizer(self) -> None:
        """Hands the gradients to the optimizer; `zero_memory` counts them from here on."""
        if self.stage < 3:
            self.tracker.live[SHARDED] = 0


class ScheduleRecorder:
    """Records the order in which ZeRO-3 fetches and releases modules, by segment of the step.

    Args:
        tracker: takes samples during and after each event.
        model: the traced model.
        layers: the model's layers.
    """

    def __init__(self, tracker: StorageTracker, model: Any, layers: list[Any]) -> None:
        self.tracker = tracker
        self.names = {module: name for name, module in model.named_modules()}
        # A tied parameter has the name of its first owner everywhere.
        first_name = {id(p): name for name, p in reversed(list(model.named_parameters()))}
        self.owned = {
            name: {first_name[id(p)]: p.numel() for p in module.parameters(recurse=False)}
            for module, name in self.names.items()
        }
        self.layer_list = self.names[layers[0]].rpartition(".")[0]
        self.events: dict[str, list[Event]] = {}
        self.hooks: list[Any] = []
        for module in self.names:
            self.hooks += [
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after),
            ]

    def schedule(self) -> ModuleSchedule:
        """Returns the recorded schedule."""
        return ModuleSchedule(self.events, self.owned, self.layer_list)

    def _record(self, kind: str, module: Any) -> None:
        if self.tracker.is_recording:
            events = self.events.setdefault(self.tracker.segment, [])
            events.append((kind, self.names[module]))
            self.tracker.zero3_event()

    def _before(self, module: Any, args: Any, kwargs: Any) -> Any:
        self._record(FETCH, module)
        on_end = _at_end_of_backward(lambda: self._record(RELEASE, module))
        return tree_map(on_end, args), tree_map(on_end, kwargs)

    def _after(self, module: Any, _: Any, output: Any) -> Any:
        self._record(RELEASE, module)
        return tree_map(_at_start_of_backward(lambda: self._record(FETCH, module)), output)


def _at_start_of_backward(action: Any) -> Any:
    """Returns a function for a module's outputs that runs the action before its backward pass."""

    class Start(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            return value.detach()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            action()
            return gradients

    return _if_differentiable(Start)


def _at_end_of_backward(action: Any) -> Any:
    """Returns a function for a module's inputs that runs the action after its backward pass."""
    remaining = [0]

    class End(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            remaining[0] += 1
            return value.detach()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            remaining[0] -= 1
            if not remaining[0]:
                action()
            return gradients

    return _if_differentiable(End)


def _if_differentiable(function: Any) -> Any:
    """Applies the function to tensors that require a gradient, and leaves other values alone."""
    return lambda v: function.apply(v) if isinstance(v, torch.Tensor) and v.requires_grad else v
