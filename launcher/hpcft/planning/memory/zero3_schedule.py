"""ZeRO-3's gathers over a whole step: which parameters are whole after each fetch and release.

It plays DeepSpeed's coordinator (0.19, runtime/zero/partitioned_param_coordinator.py) in its steady
state, on the order of modules that a trace of a few layers gave and that is stretched to the true
depth here. Sizes are in elements until the end; nothing depends on the number of ranks but padding.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hpcft.core.records import ZeroSizes

FETCH, RELEASE = "fetch", "release"

Event = tuple[str, str]
"""`fetch` or `release`, and the module's name; in the order of the step."""


@dataclass(frozen=True)
class ModuleSchedule:
    """The events of a step by part, and what the modules own."""

    parts: dict[str, list[Event]]
    """Part of the step to its events."""
    owned: dict[str, dict[str, int]]
    """Module to its own parameters and their elements; tied ones bear one name."""
    layers: str
    """Name of the list of layers (`model.layers`)."""


@dataclass
class Gathered:
    """Elements that are whole, by part and event."""

    always: int
    """At all times."""
    settled: dict[str, list[int]] = field(default_factory=dict)
    """After each event; the first entry is before any."""
    highest: dict[str, list[int]] = field(default_factory=dict)
    """During each event."""


def extend_to_depth(
    order: ModuleSchedule, traced: int, layers: int, period: int
) -> tuple[ModuleSchedule, dict[str, str]]:
    """The order at the true depth, and the part of the trace that each of its parts repeats.

    Args:
        order: of a model with `traced` layers.
        traced: its layers.
        layers: the true number.
        period: layers after which their types repeat.
    """
    front = (traced - period) - (traced - period) // 2
    inside = f"{order.layers}."
    owned = {name: its for name, its in order.owned.items() if not name.startswith(inside)}
    parts: dict[str, list[Event]] = {}
    like: dict[str, str] = {}

    def twin(index: int) -> int:
        if index < front:
            return index
        tail = traced - period - front
        if index >= layers - tail:
            return index - layers + traced
        return front + (index - front) % period

    def renamed(text: str, old: int, new: int) -> str:
        return re.sub(rf"^{re.escape(order.layers)}\.{old}(?=\.|$)", f"{order.layers}.{new}", text)

    def copy(name: str, index: int) -> None:
        old = f"{name} {twin(index)}"
        if old in order.parts:
            like[f"{name} {index}"] = old
            parts[f"{name} {index}"] = [
                (what, renamed(module, twin(index), index)) for what, module in order.parts[old]
            ]

    for index in range(layers):
        old = twin(index)
        for module, its in order.owned.items():
            if f"{module}.".startswith(f"{order.layers}.{old}."):
                owned[renamed(module, old, index)] = {
                    renamed(p, old, index): n for p, n in its.items()
                }
    for name, sequence in (("forward", range(layers)), ("backward", reversed(range(layers)))):
        before, after = ("embedding", "head") if name == "forward" else ("head", "embedding")
        for end, places in ((before, ()), ("", sequence), (after, ())):
            for index in places:
                copy(name, index)
            if end and f"{name} {end}" in order.parts:
                like[f"{name} {end}"] = f"{name} {end}"
                parts[f"{name} {end}"] = order.parts[f"{name} {end}"]
    return ModuleSchedule(parts, owned, order.layers), like


def simulate(order: ModuleSchedule, sizes: ZeroSizes, *, on_cpu: bool) -> Gathered:
    """What is whole at each event of a step, once DeepSpeed knows the order.

    Args:
        order: of the whole model.
        sizes: what DeepSpeed is given.
        on_cpu: whether gloo gathers, which does so into a copy.
    """
    return _Coordinator(order, sizes, on_cpu=on_cpu).play()


class _Coordinator:
    """DeepSpeed's coordinator, with numbers for tensors."""

    def __init__(self, order: ModuleSchedule, sizes: ZeroSizes, *, on_cpu: bool) -> None:
        self.on_cpu = on_cpu
        self.order = order
        self.sizes = sizes
        self.numel = {p: n for its in order.owned.values() for p, n in its.items()}
        self.fetched = [
            module for events in order.parts.values() for what, module in events if what == FETCH
        ]
        self.queue = deque(
            (step, p) for step, module in enumerate(self.fetched) for p in self._own(module)
        )
        self.last_fetched: dict[str, int] = {}
        self.step = 0
        small = sizes.persistence_threshold_elements
        self.persistent = {p for p, n in self.numel.items() if n <= small}
        self.available = set(self.persistent)
        self.live = sum(self.numel[p] for p in self.available)
        self.counted = self.live
        self.inflight: dict[str, _Handle] = {}
        self.users: dict[str, set[str]] = {}
        self.high = self.live

    def play(self) -> Gathered:
        """Plays all parts."""
        found = Gathered(self.live)
        for part, events in self.order.parts.items():
            settled, highest = [self.live], [self.live]
            for what, module in events:
                self.high = self.live
                if what == FETCH:
                    self._fetch(module)
                else:
                    self._release(module)
                copied = self._copied()
                settled.append(self.live + copied)
                highest.append(max(self.high, self.live + copied))
            found.settled[part], found.highest[part] = settled, highest
        return found

    def _copied(self) -> int:
        """Gloo gathers one after the other, each into a copy; NCCL needs none."""
        if not self.on_cpu:
            return 0
        return max((h.elements for h in self.inflight.values() if not h.done), default=0)

    def _own(self, module: str) -> Mapping[str, int]:
        return self.order.owned.get(module, {})

    def _change(self, elements: int) -> None:
        self.live += elements
        self.high = max(self.high, self.live)

    def _gather(self, names: Iterable[str]) -> None:
        names = [n for n in names if n not in self.available and n not in self.inflight]
        if names:
            handle = _Handle(names, sum(self.numel[n] for n in names))
            self.counted += handle.elements
            self._change(handle.elements)
            self.inflight.update(dict.fromkeys(names, handle))

    def _fetch(self, module: str) -> None:
        own = self._own(module)
        self._gather(own)
        for name in own:
            self.users.setdefault(name, set()).add(module)
            handle = self.inflight.pop(name, None)
            if handle:
                self._wait(handle)
        fresh = {n for n in own if self.last_fetched.get(n, -1) < self.step}
        dropped: set[str] = set()
        while self.queue and len(dropped) < len(fresh):
            at, name = self.queue.popleft()
            self.last_fetched[name] = at
            dropped.add(name)
        self._prefetch()
        self.step += 1

    def _prefetch(self) -> None:
        most = min(self.sizes.max_live_elements - self.counted, self.sizes.prefetch_bucket_elements)
        coming: dict[str, int] = {}
        while self.queue and sum(coming.values()) < most:
            at, name = self.queue.popleft()
            self.last_fetched[name] = max(self.last_fetched.get(name, -1), at)
            if name not in self.available and name not in self.inflight:
                coming[name] = self.numel[name]
        self._gather(coming)

    def _wait(self, handle: _Handle) -> None:
        """One parameter stays where it was gathered; of several each is copied out.

        The flat tensor ends with the last one that is fetched from it.
        """
        if not handle.done:
            handle.done = True
            self.available.update(handle.names)
            if len(handle.names) > 1:
                self._change(handle.elements)
        if len(handle.names) > 1 and not any(self.inflight.get(n) is handle for n in handle.names):
            self._change(-handle.elements)

    def _release(self, module: str) -> None:
        own = self._own(module)
        going = {
            n for n in own if n not in self.persistent and self.last_fetched.get(n, -1) <= self.step
        }
        passed = 0
        for later in self.fetched[self.step :] if going else ():
            if passed >= self.sizes.max_reuse_distance_elements:
                break
            for name, elements in self._own(later).items():
                going.discard(name)
                passed += elements
        for name in own:
            self.users.get(name, set()).discard(module)
            free = name in going and name in self.available and name not in self.inflight
            if free and not self.users.get(name):
                self.available.discard(name)
                self.counted -= self.numel[name]
                self._change(-self.numel[name])


@dataclass(eq=False)
class _Handle:
    names: Sequence[str]
    elements: int
    done: bool = False
