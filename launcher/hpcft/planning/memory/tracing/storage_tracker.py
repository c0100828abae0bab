"""Tracks live tensors after each operation, by a dispatch mode that follows storages.

It counts like the allocator: a storage takes `nbytes()` from the operation that returns it until
nothing refers to it. Memory that an operation takes and frees inside itself does not show; it comes
from `target_device.scratch_estimator`. PyTorch's `torch.distributed._tools.mem_tracker.MemTracker`
takes snapshots per module; hpcft needs every moment, to extrapolate it, with ZeRO's buffers.
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

# Indices of `KINDS`.
(WEIGHTS, FOUR_BIT, ADAPTERS, GRADIENTS, STATES, ACTIVATIONS, DEQUANTISED, LOGITS, ZERO,
 SHARDED) = range(len(KINDS))  # fmt: skip


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the live bytes of a step by kind, in `segments`.

    A storage is counted from the operation that first returns it until it is freed.

    Args:
        scratch: returns the bytes that an operation takes inside itself, from the operation and its
            arguments.
        labelled: elements that a mask of labels selects in the whole micro-batch.
    """

    def __init__(self, scratch: Callable[[Any, Any], int], labelled: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.labelled = labelled
        self.scratch = scratch
        self.live = [0] * len(KINDS)
        self.kind = ACTIVATIONS
        self.segment = ""
        self.segments: Segments = {}
        self._events: dict[str, int] = {}
        self._samples: list[Sample] = []
        self._storages: dict[int, tuple[int, int, Any]] = {}
        self.is_recording = False

    def seed(self, tensors: Iterable[torch.Tensor], kind: int) -> None:
        """Counts tensors that exist before the step; one that is counted already keeps its kind."""
        for tensor in tensors:
            self._add(tensor, kind)

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Counts tensors as 0 bytes, for ZeRO-3, whose gathered parameters are counted apart."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = (0, WEIGHTS, storage)

    def begin_segment(self, name: str) -> None:
        """Starts a named segment of the step."""
        if self.is_recording:
            self.segment = name
            self._samples = self.segments.setdefault(name, [])
            self._sample()

    def zero3_event(self) -> None:
        """Records a fetch or release of ZeRO-3, whose bytes `zero3_schedule` adds later.

        One sample stands for the time during the event, one for the time after it.
        """
        number = self._events[self.segment] = self._events.get(self.segment, 0) + 1
        self._samples.append((tuple(self.live), -number))
        self._sample()

    def _sample(self, scratch_bytes: int = 0, kind: int = ACTIVATIONS) -> None:
        now = list(self.live)
        now[kind] += scratch_bytes
        self._samples.append((tuple(now), self._events.get(self.segment, 0)))

    def recount(self, tensor: torch.Tensor, kind: int) -> None:
        """Counts a storage as another kind from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self._storages:
            size, old, reference = self._storages[key]
            self.live[old] -= size
            self.live[kind] += size
            self._storages[key] = (size, kind, reference)

    def hold(self, size_bytes: int, kind: int = ZERO) -> None:
        """Adds memory that no operation of the trace shows; a negative size frees it."""
        self.live[kind] += size_bytes
        if size_bytes > 0 and self.is_recording:
            self._sample()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and counts the storages that it returns."""
        out = shape_cache.run_operation(func, args, kwargs or {}, self.labelled)
        before = sum(self.live)
        name = getattr(func, "_opname", "")
        kind = DEQUANTISED if name == "dequantize_4bit" else self.kind
        for tensor in (out,) if isinstance(out, torch.Tensor) else tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor, kind)
        if self.is_recording:
            scratch_bytes = self.scratch(func, args)
            if scratch_bytes or sum(self.live) > before:
                self._sample(scratch_bytes, DEQUANTISED if name == "gemm_4bit" else self.kind)
        return out

    def _add(self, tensor: torch.Tensor, kind: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()

        def freed(_: Any, key: int = key) -> None:
            size, kind, _reference = self._storages.pop(key)
            self.live[kind] -= size

        self._storages[key] = (size, kind, weakref.ref(storage, freed))
        self.live[kind] += size
