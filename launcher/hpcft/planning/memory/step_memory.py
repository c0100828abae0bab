"""Predicts the memory of a training step for any micro-batch, from small traces.

A peak is a maximum over moments of the step. At each moment the live bytes are a sum of tensors
whose sizes are linear in the number of layers and in the micro-batch, so that two small traces give
every moment of the full model. The maximum is taken last: extrapolating the peak itself would be
wrong, because another moment can be the peak at another depth.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import json
from collections.abc import Iterator, Sequence

from hpcft.core.disk_cache import load_or_compute
from hpcft.planning.memory import zero3_schedule
from hpcft.planning.memory.cache_key import adapter_config_content, model_config_content
from hpcft.planning.memory.extrapolate import envelope, moments
from hpcft.planning.memory.import_stubs import meta_imports
from hpcft.planning.memory.trace_errors import translate_trace_errors
from hpcft.planning.memory.trace_types import (
    KINDS,
    PHASES,
    LinearBytes,
    StepMemory,
    TracedStep,
    Traces,
)

# Version of the traces: it rises when they or their stored form change, so that cache files of an
# earlier hpcft are not read.
TRACING = 9


def step_memory(step: TracedStep) -> StepMemory:
    """Returns the memory of a training step, from the cache or a new trace.

    Raises:
        DataError: the model or the method cannot be built or traced.
    """
    return load_or_compute("steps", _cache_key(step), StepMemory, lambda: _trace(step))


def _cache_key(step: TracedStep) -> str:
    task = step.task
    return json.dumps(
        [
            TRACING,
            _versions(),
            step.model_dump(mode="json", exclude={"task": True, "model": {"tokenizer": True}}),
            [task.name, task.max_length, task.head().auto_class, dict(task.head().config)],
            model_config_content(step.model),
            adapter_config_content(step.method),
        ],
        sort_keys=True,
    )


@functools.cache
def _versions() -> list[str]:
    return [importlib.metadata.version(p) for p in ("torch", "transformers", "peft")]


@meta_imports()
def _trace(step: TracedStep) -> StepMemory:
    # Imported here, because tracing imports torch, which a cached step does not need.
    from hpcft.planning.memory.tracing.run import trace_depths

    fix = "another model, task or method, or attn_implementation: eager"
    with translate_trace_errors("a training step", fix):
        traces = trace_depths(step)
    found = moments(traces.segments, traces.micro_batches, traces.layers, traces.period)
    lines = list(_with_zero3_gathers(found, step, traces))
    evaluation = [line for line in lines if line.segment.startswith("evaluation")]
    training = []
    for phase in PHASES:
        of_phase = [line for line in lines if line.segment.startswith(phase)]
        if of_phase:
            training += envelope(of_phase)
        if phase == "backward" and of_phase:
            # With gradient accumulation another moment of the backward pass may be the largest.
            training += envelope(of_phase, without=KINDS.index("gradients"))
    return StepMemory(training=training, evaluation=envelope(evaluation))


def _with_zero3_gathers(
    lines: Sequence[tuple[LinearBytes, int]], step: TracedStep, traces: Traces
) -> Iterator[LinearBytes]:
    """Adds to each line the parameters that ZeRO-3 holds gathered at its event."""
    by_segment: dict[str, tuple[list[int], list[int]]] = {}
    initial = highest = 0
    if traces.schedule is not None and step.zero is not None:
        traced = max(depth for depth, _ in traces.segments)
        schedule, source = zero3_schedule.extend_to_depth(
            traces.schedule, traced, traces.layers, traces.period
        )
        gathered = zero3_schedule.simulate(schedule, step.zero, on_cpu=step.accelerator == "cpu")
        highest = max(max(elements) for elements in gathered.during.values())
        initial = gathered.initial
        # A traced segment stands for several of the full model: the largest of them counts.
        for segment, traced_segment in source.items():
            after, during = by_segment.get(traced_segment, ([0], [0]))
            by_segment[traced_segment] = (
                _elementwise_max(after, gathered.after[segment]),
                _elementwise_max(during, gathered.during[segment]),
            )
    for line, event in lines:
        traced_segment = line.segment.partition(" of ")[0]
        after, during = by_segment.get(traced_segment, ([initial], [initial]))
        if line.segment.startswith("evaluation"):
            elements = highest
        else:
            elements = during[-event] if event < 0 else after[event]
        line.fixed[KINDS.index("ZeRO gathers and buckets")] += elements * traces.element_bytes
        yield line


def _elementwise_max(a: list[int], b: list[int]) -> list[int]:
    return [max(pair) for pair in itertools.zip_longest(a, b, fillvalue=0)]
