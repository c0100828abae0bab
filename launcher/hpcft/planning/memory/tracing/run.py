"""The traces that tell the memory of a step: two depths, two micro-batches."""

from __future__ import annotations

import warnings

from hpcft.config.hf_model import build_model_config
from hpcft.planning.memory.import_stubs import gc_paused
from hpcft.planning.memory.trace_types import Segments, TracedStep, Traces
from hpcft.planning.memory.tracing.model import build_model, layer_period
from hpcft.planning.memory.tracing.step import trace_step
from hpcft.planning.memory.tracing.target_device import Target
from hpcft.tasks import packing
from hpcft.tasks.chunked_loss import make_loss


def trace_depths(step: TracedStep) -> Traces:
    """Traces of a step at one or two depths and micro-batches.

    A micro-batch of one example is traced as it is; others are lines through 2 and 3.
    """
    config = build_model_config(step.model, step.task, to_plan=True)
    layers = int(config.get_text_config().num_hidden_layers)
    period = layer_period(config, step.task.max_length)
    low = max(2, period)
    low += (layers - low) % period
    depths = [low, low + period] if layers > low + period else [layers]
    batches = [1] if step.single else [2, 3]
    target = Target(
        step.accelerator,
        step.precision,
        step.flash_attention,
        autocast=step.precision != "fp32" and step.zero_stage == 0,
    )
    found: dict[tuple[int, int], Segments] = {}
    order = None
    with gc_paused(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries among themselves
        for depth in depths:
            model = build_model(
                config,
                step.task,
                step.method,
                precision=step.precision,
                zero_stage=step.zero_stage,
                depth=depth,
                checkpointing=step.checkpointing,
                attention=packing.register_attention()
                if step.packed
                else step.model.attn_implementation,
            )
            loss = make_loss(step.task, model, step.loss_chunks)
            for batch in batches:
                found[depth, batch], order = trace_step(
                    model,
                    step,
                    loss,
                    target,
                    depth=depth,
                    micro_batch=batch,
                    labelled=_labelled(step),
                )
    width = target.dtype.itemsize
    return Traces(found, batches, layers, period, width, order)


def _labelled(step: TracedStep) -> int:
    """Tokens of an example that carry a loss, rounded up to whole parts of one.

    Then the size of a part is linear in the micro-batch, and never below what a run has.
    """
    tokens = step.labelled_tokens or step.task.max_length - 1
    return -(-tokens // step.loss_chunks) * step.loss_chunks
