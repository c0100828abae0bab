"""Which tensors are alive after each operation: a dispatch mode that follows storages.

The rule is the allocator's own: a storage takes `nbytes()` from the operation that returns it until
nothing refers to it. Memory inside an operation does not show; `scratch` tells what is known of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from hpcft.planning.memory.trace_types import KINDS, Sample, Segments
from hpcft.planning.memory.tracing import shape_cache

(WEIGHTS, FOUR_BIT, ADAPTERS, GRADIENTS, STATES, ACTIVATIONS, DEQUANTISED, LOGITS, ZERO,
 SHARDED) = range(len(KINDS))  # fmt: skip


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows storages by their first operation and their end; `segments` has what was alive."""

    def __init__(self, scratch: Callable[[Any, Any, Any], int], labelled: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.labelled = labelled
        self.scratch = scratch
        self.live = [0] * len(KINDS)
        self.kind = ACTIVATIONS
        self.part = ""
        self.segments: Segments = {}
        self._events: dict[str, int] = {}
        self._points: list[Sample] = []
        self._known: dict[int, tuple[int, int, Any]] = {}
        self.recording = False

    def seed(self, tensors: Iterable[torch.Tensor], kind: int) -> None:
        """Counts tensors that are there before the step."""
        for tensor in tensors:
            self._add(tensor, kind)

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Counts tensors as nothing: under ZeRO-3 a parameter is where it was gathered."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = (0, WEIGHTS, storage)

    def segment(self, name: str) -> None:
        """What follows belongs to the part of the step that is called so."""
        if self.recording:
            self.part = name
            self._points = self.segments.setdefault(name, [])
            self._point()

    def event(self) -> None:
        """ZeRO-3 gathers or lets go: what it holds changes, as `memory.gathers` tells."""
        number = self._events[self.part] = self._events.get(self.part, 0) + 1
        self._points.append((tuple(self.live), -number))
        self._point()

    def _point(self, inside: int = 0, kind: int = ACTIVATIONS) -> None:
        now = list(self.live)
        now[kind] += inside
        self._points.append((tuple(now), self._events.get(self.part, 0)))

    def recount(self, tensor: torch.Tensor, kind: int) -> None:
        """Counts a storage as another kind from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self._known:
            size, old, reference = self._known[key]
            self.live[old] -= size
            self.live[kind] += size
            self._known[key] = (size, kind, reference)

    def hold(self, size_bytes: int, kind: int = ZERO) -> None:
        """Memory that no operation of the trace shows: more, or less when negative."""
        self.live[kind] += size_bytes
        if size_bytes > 0 and self.recording:
            self._point()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and counts the storages that it returns."""
        out = shape_cache.run(func, args, kwargs or {}, self.labelled)
        before = sum(self.live)
        name = getattr(func, "_opname", "")
        made = DEQUANTISED if name == "dequantize_4bit" else self.kind
        for tensor in (out,) if isinstance(out, torch.Tensor) else tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor, made)
        if self.recording:
            inside = self.scratch(func, args, out)
            if inside or sum(self.live) > before:
                self._point(inside, DEQUANTISED if name == "gemm_4bit" else self.kind)
        return out

    def _add(self, tensor: torch.Tensor, kind: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()

        def gone(_: Any, key: int = key) -> None:
            size, kind, _reference = self._known.pop(key)
            self.live[kind] -= size

        self._known[key] = (size, kind, weakref.ref(storage, gone))
        self.live[kind] += size
