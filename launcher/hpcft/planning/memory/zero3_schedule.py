"""Simulates which parameters ZeRO-3 holds gathered after each fetch and release of a step.

The simulation follows DeepSpeed's coordinator (0.19, runtime/zero/partitioned_param_coordinator.py)
in its steady state. The order of modules comes from a trace of a few layers and is extended to the
full depth here. Sizes are elements of whole parameters; they do not depend on the number of ranks,
except for padding, which is left out.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hpcft.core.records import ZeroSizes

FETCH, RELEASE = "fetch", "release"

Event = tuple[str, str]
"""`fetch` or `release`, and the name of the module."""


@dataclass(frozen=True)
class ModuleSchedule:
    """The order in which ZeRO-3 fetches and releases modules, and the parameters they own."""

    events: dict[str, list[Event]]
    """Segment of the step to its events in order."""
    owned: dict[str, dict[str, int]]
    """Module to its own parameters and their elements; a tied parameter has one name everywhere."""
    layer_list: str
    """Name of the module list that holds the layers, for example `model.layers`."""


@dataclass
class GatheredElements:
    """Elements of gathered parameters at each event of a step, by segment."""

    initial: int
    """Elements that are gathered before the step: parameters below the persistence threshold."""
    after: dict[str, list[int]] = field(default_factory=dict)
    """Segment to the elements after each event; the first entry is before the first event."""
    during: dict[str, list[int]] = field(default_factory=dict)
    """Segment to the most elements during each event; the first entry as in `after`."""


def extend_to_depth(
    schedule: ModuleSchedule, traced: int, layers: int, period: int
) -> tuple[ModuleSchedule, dict[str, str]]:
    """Returns the schedule at the full depth, and the traced segment that each segment repeats.

    Args:
        schedule: schedule of a model with `traced` layers.
        traced: number of traced layers.
        layers: number of layers of the full model.
        period: number of layers after which the layer types repeat.
    """
    front = (traced - period) - (traced - period) // 2
    prefix = f"{schedule.layer_list}."
    owned = {
        name: parameters
        for name, parameters in schedule.owned.items()
        if not name.startswith(prefix)
    }
    events: dict[str, list[Event]] = {}
    source: dict[str, str] = {}

    def traced_layer(index: int) -> int:
        """Returns the traced layer that a layer of the full model repeats."""
        if index < front:
            return index
        tail = traced - period - front
        if index >= layers - tail:
            return index - layers + traced
        return front + (index - front) % period

    def renamed(text: str, old: int, new: int) -> str:
        pattern = rf"^{re.escape(schedule.layer_list)}\.{old}(?=\.|$)"
        return re.sub(pattern, f"{schedule.layer_list}.{new}", text)

    def copy_layer(phase: str, index: int) -> None:
        old = f"{phase} {traced_layer(index)}"
        if old in schedule.events:
            source[f"{phase} {index}"] = old
            events[f"{phase} {index}"] = [
                (kind, renamed(module, traced_layer(index), index))
                for kind, module in schedule.events[old]
            ]

    def copy_end(segment: str) -> None:
        if segment in schedule.events:
            source[segment] = segment
            events[segment] = schedule.events[segment]

    for index in range(layers):
        old = traced_layer(index)
        for module, parameters in schedule.owned.items():
            if f"{module}.".startswith(f"{schedule.layer_list}.{old}."):
                owned[renamed(module, old, index)] = {
                    renamed(p, old, index): n for p, n in parameters.items()
                }
    copy_end("forward embedding")
    for index in range(layers):
        copy_layer("forward", index)
    copy_end("forward head")
    copy_end("backward head")
    for index in reversed(range(layers)):
        copy_layer("backward", index)
    copy_end("backward embedding")
    return ModuleSchedule(events, owned, schedule.layer_list), source


def simulate(schedule: ModuleSchedule, sizes: ZeroSizes, *, on_cpu: bool) -> GatheredElements:
    """Returns the gathered elements at each event of a step in which DeepSpeed knows the order.

    Args:
        schedule: schedule of the full model.
        sizes: sizes given to DeepSpeed.
        on_cpu: whether gloo gathers, which needs a copy.
    """
    return _Coordinator(schedule, sizes, on_cpu=on_cpu).simulate()


class _Coordinator:
    """DeepSpeed's parameter coordinator, with numbers of elements instead of tensors."""

    def __init__(self, schedule: ModuleSchedule, sizes: ZeroSizes, *, on_cpu: bool) -> None:
        self.on_cpu = on_cpu
        self.schedule = schedule
        self.sizes = sizes
        self.numel = {
            name: elements
            for parameters in schedule.owned.values()
            for name, elements in parameters.items()
        }
        self.fetch_order = [
            module
            for events in schedule.events.values()
            for kind, module in events
            if kind == FETCH
        ]
        self.queue = deque(
            (step, p) for step, module in enumerate(self.fetch_order) for p in self._own(module)
        )
        self.last_fetched: dict[str, int] = {}
        self.step = 0
        threshold = sizes.persistence_threshold_elements
        self.persistent = {p for p, n in self.numel.items() if n <= threshold}
        self.available = set(self.persistent)
        self.live = sum(self.numel[p] for p in self.available)
        # DeepSpeed's own count, which `max_live_elements` limits; copies are not in it.
        self.counted = self.live
        self.inflight: dict[str, _AllGather] = {}
        self.active_modules: dict[str, set[str]] = {}
        self.highest = self.live

    def simulate(self) -> GatheredElements:
        """Simulates all segments in order."""
        gathered = GatheredElements(self.live)
        for segment, events in self.schedule.events.items():
            after, during = [self.live], [self.live]
            for kind, module in events:
                self.highest = self.live
                if kind == FETCH:
                    self._fetch(module)
                else:
                    self._release(module)
                copied = self._copied()
                after.append(self.live + copied)
                during.append(max(self.highest, self.live + copied))
            gathered.after[segment], gathered.during[segment] = after, during
        return gathered

    def _copied(self) -> int:
        """Returns the elements of gloo's copy.

        Gloo gathers one parameter after the other, each into a copy; NCCL needs none.
        """
        if not self.on_cpu:
            return 0
        return max((h.elements for h in self.inflight.values() if not h.is_done), default=0)

    def _own(self, module: str) -> Mapping[str, int]:
        return self.schedule.owned.get(module, {})

    def _change(self, elements: int) -> None:
        self.live += elements
        self.highest = max(self.highest, self.live)

    def _gather(self, names: Iterable[str]) -> None:
        names = [n for n in names if n not in self.available and n not in self.inflight]
        if names:
            handle = _AllGather(names, sum(self.numel[n] for n in names))
            self.counted += handle.elements
            self._change(handle.elements)
            self.inflight.update(dict.fromkeys(names, handle))

    def _fetch(self, module: str) -> None:
        own = self._own(module)
        self._gather(own)
        for name in own:
            self.active_modules.setdefault(name, set()).add(module)
            handle = self.inflight.pop(name, None)
            if handle:
                self._wait(handle)
        not_prefetched = {n for n in own if self.last_fetched.get(n, -1) < self.step}
        dequeued: set[str] = set()
        while self.queue and len(dequeued) < len(not_prefetched):
            at, name = self.queue.popleft()
            self.last_fetched[name] = at
            dequeued.add(name)
        self._prefetch()
        self.step += 1

    def _prefetch(self) -> None:
        limit = min(
            self.sizes.max_live_elements - self.counted, self.sizes.prefetch_bucket_elements
        )
        bucket: dict[str, int] = {}
        while self.queue and sum(bucket.values()) < limit:
            at, name = self.queue.popleft()
            self.last_fetched[name] = max(self.last_fetched.get(name, -1), at)
            if name not in self.available and name not in self.inflight:
                bucket[name] = self.numel[name]
        self._gather(bucket)

    def _wait(self, handle: _AllGather) -> None:
        """Makes the parameters of an all-gather available.

        A single parameter stays where it was gathered. Several are gathered into one flat tensor
        and each is copied out; the flat tensor is freed with the last one that is fetched from it.
        """
        if not handle.is_done:
            handle.is_done = True
            self.available.update(handle.names)
            if len(handle.names) > 1:
                self._change(handle.elements)
        if len(handle.names) > 1 and not any(self.inflight.get(n) is handle for n in handle.names):
            self._change(-handle.elements)

    def _release(self, module: str) -> None:
        own = self._own(module)
        to_release = {
            n for n in own if n not in self.persistent and self.last_fetched.get(n, -1) <= self.step
        }
        distance = 0
        for later in self.fetch_order[self.step :] if to_release else ():
            if distance >= self.sizes.max_reuse_distance_elements:
                break
            for name, elements in self._own(later).items():
                to_release.discard(name)
                distance += elements
        for name in own:
            self.active_modules.get(name, set()).discard(module)
            can_free = name in to_release and name in self.available and name not in self.inflight
            if can_free and not self.active_modules.get(name):
                self.available.discard(name)
                self.counted -= self.numel[name]
                self._change(-self.numel[name])


@dataclass(eq=False)
class _AllGather:
    """One all-gather that DeepSpeed has started, for one parameter or several."""

    names: Sequence[str]
    elements: int
    is_done: bool = False
