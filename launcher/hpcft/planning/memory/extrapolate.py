"""Extrapolates traces of shallow models to the full depth."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from hpcft.planning.memory.trace_types import LinearBytes, Sample, Segments, Sizes


def moments(
    traced: dict[tuple[int, int], Segments], batches: Sequence[int], layers: int, period: int
) -> list[tuple[LinearBytes, int]]:
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


def _largest(points: Sequence[Sample]) -> Sample:
    return max(points, key=lambda point: sum(point[0]))


def _line(part: str, sizes: Sequence[Sizes], batches: Sequence[int]) -> LinearBytes:
    first, last = sizes[0], sizes[-1]
    steps = (batches[-1] - batches[0]) or 1
    each = [(b - a) // steps for a, b in zip(first, last, strict=True)]
    fixed = [a - batches[0] * e for a, e in zip(first, each, strict=True)]
    return LinearBytes(part=part, fixed=fixed, each=each)


def envelope(lines: list[LinearBytes], without: int | None = None) -> list[LinearBytes]:
    """Lines that are the largest for some micro-batch from 1 on: their upper envelope.

    Args:
        lines: moments.
        without: a kind that does not count.
    """

    def total(values: Sequence[int]) -> int:
        return sum(values) - (values[without] if without is not None else 0)

    best: list[LinearBytes] = []
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


def _whole(traced: dict[int, Segments], layers: int, period: int) -> Segments:
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
    whole: Segments = {}
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


def _moved(point: Sample, by: Sizes, times: int) -> Sample:
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
