"""The traces that tell the memory of a step: two depths, two micro-batches."""

from __future__ import annotations

import warnings

from hpcft.config.hf_model import model_config
from hpcft.planning.memory.import_stubs import without_collection
from hpcft.planning.memory.trace_types import Parts, Step, Traces
from hpcft.planning.memory.tracing import model as models
from hpcft.planning.memory.tracing import step as steps
from hpcft.planning.memory.tracing.target_device import Target
from hpcft.tasks import packing
from hpcft.tasks.chunked_loss import loss_of


def traces(step: Step) -> Traces:
    """Traces of a step at one or two depths and micro-batches.

    A micro-batch of one example is traced as it is; others are lines through 2 and 3.
    """
    config = model_config(step.model, step.task, to_plan=True)
    layers = int(config.get_text_config().num_hidden_layers)
    period = models.period(config, step.task.max_length)
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
    found: dict[tuple[int, int], Parts] = {}
    order = None
    with without_collection(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries among themselves
        for depth in depths:
            model = models.build(
                config,
                step.task,
                step.method,
                precision=step.precision,
                zero_stage=step.zero_stage,
                depth=depth,
                checkpointing=step.checkpointing,
                attention=packing.attention() if step.packed else step.model.attn_implementation,
            )
            loss = loss_of(step.task, model, step.loss_chunks)
            for batch in batches:
                found[depth, batch], order = steps.trace(
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


def _labelled(step: Step) -> int:
    """Tokens of an example that carry a loss, rounded up to whole parts of one.

    Then the size of a part is linear in the micro-batch, and never below what a run has.
    """
    tokens = step.labelled_tokens or step.task.max_length - 1
    return -(-tokens // step.loss_chunks) * step.loss_chunks
