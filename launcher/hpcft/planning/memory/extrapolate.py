"""Extrapolates traces of shallow models with small micro-batches to the full model."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from hpcft.planning.memory.trace_types import LinearBytes, Sample, Segments, Sizes


def moments(
    traced: dict[tuple[int, int], Segments], micro_batches: Sequence[int], layers: int, period: int
) -> list[tuple[LinearBytes, int]]:
    """Returns every moment of the full model as a linear function of the micro-batch.

    Args:
        traced: traces by depth and micro-batch.
        micro_batches: traced micro-batches: one, or two through which the line is drawn.
        layers: number of layers of the full model.
        period: number of layers after which the layer types repeat.

    Returns:
        The moments, each with the ZeRO-3 event number of its `Sample`.
    """
    at_full_depth = [
        _extend(
            {depth: segments for (depth, b), segments in traced.items() if b == batch},
            layers,
            period,
        )
        for batch in micro_batches
    ]
    lines = []
    for segment in at_full_depth[0]:
        samples = [segments[segment] for segments in at_full_depth]
        if len({len(s) for s in samples}) > 1:
            # PyTorch chose other kernels for another size, so that the moments cannot be matched.
            samples = [[_largest(s)] for s in samples]
        for moment in zip(*samples, strict=True):
            sizes = [at_batch for at_batch, _ in moment]
            # Only the trace of the last micro-batch recorded the schedule's events.
            lines.append((_line(segment, sizes, micro_batches), moment[-1][1]))
    return lines


def _largest(samples: Sequence[Sample]) -> Sample:
    return max(samples, key=lambda sample: sum(sample[0]))


def _line(segment: str, sizes: Sequence[Sizes], micro_batches: Sequence[int]) -> LinearBytes:
    first, last = sizes[0], sizes[-1]
    steps = (micro_batches[-1] - micro_batches[0]) or 1
    per_example = [(b - a) // steps for a, b in zip(first, last, strict=True)]
    fixed = [a - micro_batches[0] * e for a, e in zip(first, per_example, strict=True)]
    return LinearBytes(segment=segment, fixed=fixed, per_example=per_example)


def envelope(lines: list[LinearBytes], without: int | None = None) -> list[LinearBytes]:
    """Returns the lines that are the largest for some micro-batch of at least 1.

    Args:
        lines: moments of a step.
        without: index of a kind that does not count; None counts all kinds.
    """

    def total(values: Sequence[int]) -> int:
        return sum(values) - (values[without] if without is not None else 0)

    upper: list[LinearBytes] = []
    batch = 1
    while True:
        top = max(lines, key=lambda line: (total(line.at(batch)), total(line.per_example)))
        upper.append(top)
        # The next largest line is the steeper one that crosses this line first.
        crossings = [
            (total(top.at(0)) - total(line.at(0)))
            / (total(line.per_example) - total(top.per_example))
            for line in lines
            if total(line.per_example) > total(top.per_example)
        ]
        if not crossings:
            return upper
        batch = max(batch, int(min(crossings))) + 1


def _extend(traced: dict[int, Segments], layers: int, period: int) -> Segments:
    """Returns the segments of the full model from traces of one or two depths.

    The first and the last `period` layers keep their distance from the ends of the model; the
    layers between them repeat. A moment grows by the same amount for each further period. The
    layers in the middle are largest at one of the two ends of the middle, because what is live
    there is linear in their place too. Events are those of the deeper trace, since they are
    numbered within a segment.
    """
    depths = sorted(traced)
    deep = traced[depths[-1]]
    if depths[-1] == layers:
        return deep
    low, high = depths
    periods = (layers - high) // (high - low)
    shallow = traced[low]
    slopes: dict[str, Sizes] = {}
    extended: Segments = {}
    for segment, samples in deep.items():
        before = shallow.get(_shallow_segment(segment, high, low))
        if before is None:
            continue
        if len(before) != len(samples):
            before, samples = [_largest(before)], [_largest(samples)]
        growths = [
            _difference(new, old) for (new, _), (old, _) in zip(samples, before, strict=True)
        ]
        slopes[segment] = growths[0]
        extended[segment] = [
            _grown(sample, growth, periods) for sample, growth in zip(samples, growths, strict=True)
        ]
    for segment, samples in deep.items():
        if segment in extended:
            continue
        phase = segment.split()[0]
        for end in ("0", str(high - 1)):
            slope = slopes.get(f"{phase} {end}")
            if slope:
                extended[f"{segment} of {end}"] = [_grown(s, slope, periods) for s in samples]
    return extended


def _difference(new: Sizes, old: Sizes) -> Sizes:
    return tuple(map(operator.sub, new, old))


def _grown(sample: Sample, by: Sizes, times: int) -> Sample:
    sizes, event = sample
    return tuple([size + times * more for size, more in zip(sizes, by, strict=True)]), event


def _shallow_segment(segment: str, high: int, low: int) -> str:
    """Returns the segment of the shallow trace at the same distance from the model's end.

    The layers in the middle of the deep trace have none; the result is then empty.
    """
    phase, _, place = segment.partition(" ")
    if not place.isdigit():
        return segment
    index, tail = int(place), low // 2
    if index < low - tail:
        return segment
    return f"{phase} {index - (high - low)}" if index >= high - tail else ""
