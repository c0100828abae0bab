"""What DeepSpeed adds to a step: gradients that are reduced, and the order of gathers.

It follows DeepSpeed 0.19 (runtime/zero/stage_1_and_2.py, stage3.py, parameter_offload.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

from hpcft.core.records import ZeroSizes
from hpcft.planning.memory.tracing.storage_tracker import SHARDED, StorageTracker
from hpcft.planning.memory.zero3_schedule import FETCH, RELEASE, ModuleSchedule


class Reducer:
    """Gradients on their way into a bucket, from which they are reduced."""

    def __init__(
        self, tracker: StorageTracker, model: Any, stage: int, sizes: ZeroSizes, *, on_cpu: bool
    ) -> None:
        self.tracker = tracker
        self.stage = stage
        self.most = sizes.reduce_bucket_elements
        self.on_cpu = on_cpu
        trained = [p for p in model.parameters() if p.requires_grad]
        self.width = trained[0].element_size()
        self.trained_bytes = self.width * sum(p.numel() for p in trained)
        self.elements = self.tensors = self.kept_bytes = 0
        self.waiting: list[Any] = []
        self.kept: list[Any] = []
        self.begun = self.reduced = False

    def ready(self, parameter: Any) -> None:
        """A gradient was accumulated: it is copied into the bucket, or waits if larger than it."""
        if not self.begun and self.stage < 3:
            self.tracker.hold(2 * self.width * self.most)  # one is filled while one is reduced
        self.begun = True
        numel = parameter.numel()
        if self.elements and self.elements + numel > self.most:
            self.flush()
        if numel > self.most:
            self.waiting.append(parameter)
        else:
            parameter.grad = None
        self.elements += numel
        self.tensors += 1

    def flush(self) -> None:
        """The bucket is reduced, and its gradients end."""
        if self.stage == 3:
            # Interleaved by rank in a copy, which gloo copies once more.
            copies = (self.tensors > 1) + self.on_cpu
            self.tracker.hold(copies * self.elements * self.width)
            self.tracker.hold(-copies * self.elements * self.width)
        elif not self.reduced:
            self.tracker.hold(self.trained_bytes, SHARDED)
        self.reduced = True
        for parameter in self.waiting:
            if self.stage == 1:
                # ZeRO-1 lets go of it at the end only, but for the share that is its own.
                self.kept.append(parameter)
                self.kept_bytes += parameter.numel() * self.width
                self.tracker.hold(-parameter.numel() * self.width, SHARDED)
            else:
                parameter.grad = None
        self.waiting, self.elements, self.tensors = [], 0, 0

    def end(self) -> None:
        """The backward pass is over: what is left is reduced, and the buckets go."""
        self.flush()
        for parameter in self.kept:
            parameter.grad = None
        self.tracker.hold(self.kept_bytes, SHARDED)
        if self.stage < 3:
            self.tracker.hold(-2 * self.width * self.most)
        self.kept, self.kept_bytes = [], 0
        self.begun = self.reduced = False

    def step(self) -> None:
        """The optimizer takes the gradients; `memory.zero` counts them from here on."""
        if self.stage < 3:
            self.tracker.live[SHARDED] = 0


class Recorder:
    """The order in which ZeRO-3 fetches and releases modules, by part of the step.

    Each event leaves two moments: one while it happens, and what follows it.
    """

    def __init__(self, tracker: StorageTracker, model: Any, layers: list[Any]) -> None:
        self.tracker = tracker
        self.names = {module: name for name, module in model.named_modules()}
        first = {id(p): name for name, p in reversed(list(model.named_parameters()))}
        self.owned = {
            name: {first[id(p)]: p.numel() for p in module.parameters(recurse=False)}
            for module, name in self.names.items()
        }
        self.layers = self.names[layers[0]].rpartition(".")[0]
        self.parts: dict[str, list[tuple[str, str]]] = {}
        self.hooks: list[Any] = []
        for module in self.names:
            self.hooks += [
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after),
            ]

    def order(self) -> ModuleSchedule:
        """What was recorded."""
        return ModuleSchedule(self.parts, self.owned, self.layers)

    def _event(self, what: str, module: Any) -> None:
        if self.tracker.recording:
            self.parts.setdefault(self.tracker.part, []).append((what, self.names[module]))
            self.tracker.event()

    def _before(self, module: Any, args: Any, kwargs: Any) -> Any:
        self._event(FETCH, module)
        ended = _end_of_backward(lambda: self._event(RELEASE, module))
        return tree_map(ended, args), tree_map(ended, kwargs)

    def _after(self, module: Any, _: Any, output: Any) -> Any:
        self._event(RELEASE, module)
        return tree_map(_start_of_backward(lambda: self._event(FETCH, module)), output)


def _start_of_backward(action: Any) -> Any:
    class Start(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            return value.detach()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            action()
            return gradients

    return _on_gradients(Start)


def _end_of_backward(action: Any) -> Any:
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

    return _on_gradients(End)


def _on_gradients(function: Any) -> Any:
    """The function for tensors that need a gradient; the rest stays as it is."""
    return lambda v: function.apply(v) if isinstance(v, torch.Tensor) and v.requires_grad else v
