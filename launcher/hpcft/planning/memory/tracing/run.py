"""Traces a step at two depths and two micro-batches, from which its memory is extrapolated."""

from __future__ import annotations

import warnings

from hpcft.config.hf_model import build_model_config
from hpcft.planning.memory.import_stubs import gc_paused
from hpcft.planning.memory.trace_types import Segments, TracedStep, Traces
from hpcft.planning.memory.tracing.model import build_model, layer_period
from hpcft.planning.memory.tracing.step import trace_step
from hpcft.planning.memory.tracing.target_device import TargetDevice
from hpcft.tasks import packing
from hpcft.tasks.chunked_loss import make_loss


def trace_depths(step: TracedStep) -> Traces:
    """Returns traces of a step at one or two depths and micro-batches.

    A micro-batch of one example is traced as it is; larger ones lie on lines through 2 and 3.
    """
    config = build_model_config(step.model, step.task, to_plan=True)
    layers = int(config.get_text_config().num_hidden_layers)
    period = layer_period(config, step.task.max_length)
    low = max(2, period)
    low += (layers - low) % period
    depths = [low, low + period] if layers > low + period else [layers]
    micro_batches = [1] if step.single_example else [2, 3]
    target = TargetDevice(
        step.accelerator,
        step.precision,
        step.flash_attention,
        autocast=step.precision != "fp32" and step.zero_stage == 0,
    )
    traced: dict[tuple[int, int], Segments] = {}
    schedule = None
    with gc_paused(), warnings.catch_warnings():
        # The libraries warn each other of deprecations.
        warnings.simplefilter("ignore")
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
            for micro_batch in micro_batches:
                traced[depth, micro_batch], schedule = trace_step(
                    model,
                    step,
                    loss,
                    target,
                    depth=depth,
                    micro_batch=micro_batch,
                    labelled=_labelled_tokens(step),
                )
    return Traces(traced, micro_batches, layers, period, target.dtype.itemsize, schedule)


def _labelled_tokens(step: TracedStep) -> int:
    """Returns the labelled tokens of an example, rounded up to a multiple of the chunks.

    The size of a chunk is then linear in the micro-batch, and never smaller than in a run.
    """
    tokens = step.labelled_tokens or step.task.max_length - 1
    return -(-tokens // step.loss_chunks) * step.loss_chunks
