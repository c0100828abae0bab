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
from collections.abc import Iterator, Sequence

from hpcft.core.disk_cache import cached
from hpcft.planning.memory import zero3_schedule
from hpcft.planning.memory.cache_key import adapter_config_content, model_config_content
from hpcft.planning.memory.extrapolate import envelope, moments
from hpcft.planning.memory.import_stubs import gc_paused, meta_imports
from hpcft.planning.memory.trace_errors import translate_trace_errors
from hpcft.planning.memory.trace_types import (
    KINDS,
    PHASES,
    LinearBytes,
    StepMemory,
    TracedStep,
    Traces,
)

TRACING = 8  # raised when what is traced changes, so that earlier cache files are not read


def step_memory(step: TracedStep) -> StepMemory:
    """The step's memory; traced where it is not cached.

    Raises:
        DataError: the model or the method cannot be built.
    """
    return cached("steps", _key(step), StepMemory, lambda: _traced(step))


def _key(step: TracedStep) -> str:
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


@gc_paused()
@meta_imports()
def _traced(step: TracedStep) -> StepMemory:
    from hpcft.planning.memory.tracing.run import trace_depths

    fix = "another model, task or method, or attn_implementation: eager"
    with translate_trace_errors("its training step", fix):
        found = trace_depths(step)
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
    return StepMemory(training=training, evaluation=envelope(scoring))


def _with_gathers(
    lines: Sequence[tuple[LinearBytes, int]], step: TracedStep, found: Traces
) -> Iterator[LinearBytes]:
    """The lines with what ZeRO-3 has gathered at each of its events."""
    elements: dict[str, tuple[list[int], list[int]]] = {}
    always = most = 0
    if found.order is not None and step.zero is not None:
        deep = max(depth for depth, _ in found.parts)
        order, like = zero3_schedule.extend_to_depth(found.order, deep, found.layers, found.period)
        played = zero3_schedule.simulate(order, step.zero, on_cpu=step.accelerator == "cpu")
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
