"""The memory of a training step as lines in the micro-batch: traced once, then read from a cache.

A peak is a maximum over moments of the step. At each moment what is alive is a sum of tensors whose
sizes are linear in the number of layers and in the micro-batch, so two small traces tell every
moment of the whole model; the maximum is taken last. (Extrapolating the peak itself would be wrong:
which moment wins changes with the depth.)
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import json
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hpcft.planning.memory import zero3_schedule
from hpcft.core.disk_cache import adapter_content, cached, content
from hpcft.planning.memory.trace_errors import explained
from hpcft.methods import AnyMethod
from hpcft.core.records import (ModelSpec, Precision, Record, ZeroSizes)
from hpcft.tasks.base import TrainedTask

TRACING = 8  # raised when what is traced changes, so that earlier cache files are not read

KINDS = (
    "weights", "4-bit weights", "adapters", "gradients", "optimizer states", "activations",
    "dequantised weights", "logits and loss", "ZeRO gathers and buckets", "gradient shards",
)  # fmt: skip
"""What a tensor is counted as; the last one is that of all ranks together."""

PHASES = ("forward", "backward", "optimizer")
"""Parts of a step by their first word: what is there beside the trace differs between them."""

Sizes = tuple[int, ...]
"""Bytes alive of each kind."""
Point = tuple[Sizes, int]
"""What is alive at one moment, and how many of ZeRO-3's events were before it in its part of the
step; negative: during that event."""
Parts = dict[str, list[Point]]
"""Part of the step to its moments, in order."""


class Step(Record):
    """Everything that the memory of a step depends on, besides the micro-batch."""

    model: ModelSpec
    """The model."""
    task: TrainedTask
    """The task: head, loss and sequence length."""
    method: AnyMethod
    """The method."""
    precision: Precision
    """Compute precision."""
    optim: str
    """Optimizer."""
    zero_stage: int
    """DeepSpeed ZeRO stage; 0 is without DeepSpeed."""
    zero: ZeroSizes | None = None
    """Sizes of its buckets; None without DeepSpeed."""
    checkpointing: bool
    """Whether layers are recomputed."""
    loss_chunks: int = 1
    """Parts in which the loss is computed."""
    single: bool
    """Whether a micro-batch is one example, which some kernels treat otherwise."""
    padded: bool
    """Whether the examples of a batch differ in length, so that attention takes a mask."""
    packed: bool = False
    """Whether those of a micro-batch share a row when training, where none does."""
    accelerator: str
    """`cuda` or `cpu`."""
    flash_attention: bool = False
    """Whether the GPU has flash attention (compute capability 8.0 on)."""
    threads: int = 1
    """CPU threads of a rank."""
    labelled_tokens: int | None = None
    """Tokens of an example that carry a loss; None: all, the most there can be."""


class Line(Record):
    """A moment of the step: bytes of each kind, affine in the micro-batch."""

    part: str
    """Part of the step."""
    fixed: list[int]
    """Bytes that do not depend on the micro-batch, by kind."""
    each: list[int]
    """Bytes for each example, by kind."""

    @property
    def phase(self) -> str:
        """The first word of the part."""
        return self.part.partition(" ")[0]

    def at(self, micro_batch: int, share: float = 1.0) -> list[int]:
        """Bytes of each kind on a rank that holds this share of the shards."""
        found = [a + b * micro_batch for a, b in zip(self.fixed, self.each, strict=True)]
        return [*found[:-1], int(found[-1] * share)]


class Curve(Record):
    """The moments of a step that are the largest for some micro-batch."""

    training: list[Line]
    """Moments of an optimizer step."""
    evaluation: list[Line]
    """Moments of scoring a batch."""

    def accumulating(self) -> Curve:
        """The same step with the gradients of an earlier micro-batch there from the start.

        A gradient is then added to what is there, and goes; else it stays. So all of them take the
        place of those that are there so far.
        """
        place = KINDS.index("gradients")
        every = max(line.fixed[place] for line in self.training)
        training = [
            line.model_copy(
                update={"fixed": [*line.fixed[:place], every, *line.fixed[place + 1 :]]}
            )
            for line in self.training
        ]
        return self.model_copy(update={"training": training})

    def evaluation_bytes(self, batch: int) -> int:
        """The most memory while a batch is scored."""
        return max(sum(line.at(batch)) for line in self.evaluation)


@dataclass(frozen=True)
class Traces:
    """What small traces of a step told."""

    parts: dict[tuple[int, int], Parts]
    """Depth and micro-batch to what is alive."""
    batches: list[int]
    """The micro-batches: one, or two that a line goes through."""
    layers: int
    """The model's true depth."""
    period: int
    """Layers after which their types repeat."""
    width: int
    """Bytes of a gathered element."""
    order: zero3_schedule.Order | None
    """ZeRO-3's events in the deepest trace."""


def curve(step: Step) -> Curve:
    """The step's memory; traced where it is not cached.

    Raises:
        DataError: the model or the method cannot be built.
    """
    return cached("steps", _key(step), Curve, lambda: _traced(step))


def _key(step: Step) -> str:
    task = step.task
    return json.dumps(
        [
            TRACING,
            _versions(),
            step.model_dump(mode="json", exclude={"task": True, "model": {"tokenizer": True}}),
            [task.name, task.max_length, task.head().auto_class, dict(task.head().config)],
            content(step.model),
            adapter_content(step.method),
        ],
        sort_keys=True,
    )


@functools.cache
def _versions() -> list[str]:
    return [importlib.metadata.version(p) for p in ("torch", "transformers", "peft")]


def _traced(step: Step) -> Curve:
    from hpcft.planning.memory.tracing.run import traces

    fix = "another model, task or method, or attn_implementation: eager"
    with explained("its training step", fix):
        found = traces(step)
    found_lines = moments(found.parts, found.batches, found.layers, found.period)
    lines = list(_with_gathers(found_lines, step, found))
    scoring = [line for line in lines if line.part.startswith("evaluation")]
    training = []
    for name in PHASES:
        of_phase = [line for line in lines if line.part.startswith(name)]
        if of_phase:
            training += envelope(of_phase)
        if name == "backward" and of_phase:
            # Where gradients are there from before, another moment of the pass may be the largest.
            training += envelope(of_phase, without=KINDS.index("gradients"))
    return Curve(training=training, evaluation=envelope(scoring))


def _with_gathers(lines: Sequence[tuple[Line, int]], step: Step, found: Traces) -> Iterator[Line]:
    """The lines with what ZeRO-3 has gathered at each of its events."""
    elements: dict[str, tuple[list[int], list[int]]] = {}
    always = most = 0
    if found.order is not None and step.zero is not None:
        deep = max(depth for depth, _ in found.parts)
        order, like = zero3_schedule.stretched(found.order, deep, found.layers, found.period)
        played = zero3_schedule.play(order, step.zero, on_cpu=step.accelerator == "cpu")
        most = max(max(high) for high in played.highest.values())
        always = played.always
        for part, traced in like.items():
            old = elements.get(traced, ([0], [0]))
            elements[traced] = (
                _each_largest(old[0], played.settled[part]),
                _each_largest(old[1], played.highest[part]),
            )
    for line, event in lines:
        settled, highest = elements.get(line.part.partition(" of ")[0], ([always], [always]))
        size = (
            most
            if line.part.startswith("evaluation")
            else (highest[-event] if event < 0 else settled[event])
        )
        line.fixed[KINDS.index("ZeRO gathers and buckets")] += size * found.width
        yield line


def _each_largest(a: list[int], b: list[int]) -> list[int]:
    return [max(pair) for pair in itertools.zip_longest(a, b, fillvalue=0)]


# ---------------------------------------------------------------- from small traces to the model


def moments(
    traced: dict[tuple[int, int], Parts], batches: Sequence[int], layers: int, period: int
) -> list[tuple[Line, int]]:
    """Every moment of the whole model as a line in the micro-batch, with its place among events.

    Args:
        traced: depth and micro-batch to what was traced.
        batches: the micro-batches: one, or two that a line goes through.
        layers: the model's true depth.
        period: layers after which their types repeat.
    """
    whole = [_whole({d: p for (d, b), p in traced.items() if b == batch}, layers, period)
             for batch in batches]  # fmt: skip
    lines = []
    for part in whole[0]:
        others = [w[part] for w in whole]
        if len({len(o) for o in others}) > 1:  # other kernels for another size: the largest decide
            others = [[_largest(o)] for o in others]
        for moment in zip(*others, strict=True):
            # Of several micro-batches the events were recorded in the last.
            sizes = [at_batch for at_batch, _ in moment]
            lines.append((_line(part, sizes, batches), moment[-1][1]))
    return lines


def _largest(points: Sequence[Point]) -> Point:
    return max(points, key=lambda point: sum(point[0]))


def _line(part: str, sizes: Sequence[Sizes], batches: Sequence[int]) -> Line:
    first, last = sizes[0], sizes[-1]
    steps = (batches[-1] - batches[0]) or 1
    each = [(b - a) // steps for a, b in zip(first, last, strict=True)]
    fixed = [a - batches[0] * e for a, e in zip(first, each, strict=True)]
    return Line(part=part, fixed=fixed, each=each)


def envelope(lines: list[Line], without: int | None = None) -> list[Line]:
    """Lines that are the largest for some micro-batch from 1 on: their upper envelope.

    Args:
        lines: moments.
        without: a kind that does not count.
    """

    def total(values: Sequence[int]) -> int:
        return sum(values) - (values[without] if without is not None else 0)

    best: list[Line] = []
    batch = 1
    while True:
        top = max(lines, key=lambda line: (total(line.at(batch)), total(line.each)))
        best.append(top)
        # The next line to overtake is the steeper one that does so first.
        ahead = [
            (total(top.at(0)) - total(line.at(0))) / (total(line.each) - total(top.each))
            for line in lines
            if total(line.each) > total(top.each)
        ]
        if not ahead:
            return best
        batch = max(batch, int(min(ahead))) + 1


def _whole(traced: dict[int, Parts], layers: int, period: int) -> Parts:
    """What was traced at one or two small depths, at the true depth.

    The first and last `period` layers keep their place; what is between them repeats. A moment
    moves by the same amount for each further period, and the layers between the ends are largest
    at one of their own ends, because what is alive there is linear in their place too. An event is
    that of the deeper trace: they are numbered within a part.
    """
    depths = sorted(traced)
    deep = traced[depths[-1]]
    if depths[-1] == layers:
        return deep
    low, high = depths
    more = (layers - high) // (high - low)
    shallow = traced[low]
    slopes: dict[str, Sizes] = {}
    whole: Parts = {}
    for part, points in deep.items():
        before = shallow.get(_shifted(part, high, low))
        if before is None:
            continue
        if len(before) != len(points):
            before, points = [_largest(before)], [_largest(points)]
        moves = [_difference(new, old) for (new, _), (old, _) in zip(points, before, strict=True)]
        slopes[part] = moves[0]
        whole[part] = [_moved(point, move, more) for point, move in zip(points, moves, strict=True)]
    for part, points in deep.items():
        if part in whole:
            continue
        name = part.split()[0]
        for end in ("0", str(high - 1)):
            slope = slopes.get(f"{name} {end}")
            if slope:
                whole[f"{part} of {end}"] = [_moved(point, slope, more) for point in points]
    return whole


def _difference(new: Sizes, old: Sizes) -> Sizes:
    return tuple(map(operator.sub, new, old))


def _moved(point: Point, by: Sizes, times: int) -> Point:
    sizes, event = point
    return tuple([size + times * more for size, more in zip(sizes, by, strict=True)]), event


def _shifted(part: str, high: int, low: int) -> str:
    """The part of the shallow trace at the same distance from its end; none for the middle."""
    name, _, place = part.partition(" ")
    if not place.isdigit():
        return part
    index, tail = int(place), low // 2
    if index < low - tail:
        return part
    return f"{name} {index - (high - low)}" if index >= high - tail else ""
