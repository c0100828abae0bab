"""OomRetryTrainer: retries a step in smaller pieces when memory runs out on a single rank.

It resembles `find_executable_batch_size` of accelerate, but keeps the global batch. The losses of
the tasks are sums over examples, divided by the items of the whole global batch. So the gradients
of the pieces of a micro-batch add up to its own gradient; only dropout draws its random numbers in
another order.
"""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import Trainer

from hpcft.core.records import Layout, Plan
from hpcft.planning import oom_fallback
from hpcft.planning.oom_fallback import Stage
from hpcft.recovery.log import append_recovery
from hpcft.tasks import packing
from hpcft.training.context import WorkerContext
from hpcft.training.distributed.gpu_memory import (
    can_fall_back,
    out_of_memory_of,
    segments_expandable,
)

log = logging.getLogger(__name__)

FallbackHook = Callable[[BaseException, Stage], Plan | None]
"""Applies the next fallback after an error, and returns its plan; None if this process has none."""


class OomRetryTrainer(Trainer):  # type: ignore[misc]
    """Retries a step in pieces, and an evaluation with smaller batches.

    It is for one rank without DeepSpeed: of several ranks, the others would wait in a collective.
    """

    fallback_hook: FallbackHook | None = None
    """Called when memory runs out; None lets the error end the process."""
    max_length = 0
    """Tokens of the longest example."""
    _piece_size: int | None = None
    _micro_batches: tuple[Any, ...] = ()
    _micro_batches_done = 0

    def get_batch_samples(self, *arguments: Any) -> tuple[list[Any], Any]:
        """Returns the micro-batches of the next optimizer step, and keeps them for a retry."""
        samples, items = super().get_batch_samples(*arguments)
        self._micro_batches, self._micro_batches_done = tuple(samples), 0
        return samples, items

    def training_step(
        self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any = None
    ) -> Any:
        """Computes loss and gradients of a micro-batch, in pieces if memory runs out."""
        todo: tuple[Any, ...] = (inputs,)
        while True:
            try:
                for micro_batch in todo:
                    loss = self._step_in_pieces(model, micro_batch, num_items_in_batch)
            except Exception as error:
                plan = self._fall_back(error, "step") if num_items_in_batch is not None else None
                if plan is None:
                    raise
            else:
                self._micro_batches_done += 1
                return loss
            # Only here the exception is gone, and with it the tensors that its frames held.
            self._piece_size = plan.layout.per_device_train_batch_size
            self._apply(plan)
            model.zero_grad()
            todo = self._micro_batches[: self._micro_batches_done + 1]

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Evaluates a split, with smaller batches if memory runs out."""
        while True:
            try:
                metrics: dict[str, Any] = super().evaluate(*arguments, **options)
            except Exception as error:
                plan = self._fall_back(error, "evaluation")
                if plan is None:
                    raise
            else:
                return metrics
            self._apply(plan)

    def _step_in_pieces(self, model: Any, inputs: Mapping[str, Any], items: Any) -> Any:
        pieces = self._split(inputs, self._piece_size) if self._piece_size else [inputs]
        losses = [
            super(OomRetryTrainer, self).training_step(model, piece, items) for piece in pieces
        ]
        return torch.stack(losses).sum()

    def _split(self, inputs: Mapping[str, Any], size: int) -> list[Mapping[str, Any]]:
        """Splits a micro-batch into pieces.

        Args:
            inputs: the micro-batch, padded or packed.
            size: examples of a padded piece; a packed piece has room for as many long ones.
        """
        if "lengths" in inputs:
            return [*packing.split_packed(inputs, size * self.max_length)]
        return [
            {name: tensor[first : first + size] for name, tensor in inputs.items()}
            for first in range(0, len(inputs["input_ids"]), size)
        ]

    def _fall_back(self, error: Exception, stage: Stage) -> Plan | None:
        if self.fallback_hook is None:
            return None
        plan = self.fallback_hook(error, stage)
        if plan is not None:
            traceback.clear_frames(error.__traceback__)
        return plan

    def _apply(self, plan: Plan) -> None:
        self.args.per_device_eval_batch_size = plan.per_device_eval_batch_size
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def make_fallback_hook(context: WorkerContext) -> FallbackHook | None:
    """Returns the function that applies fallbacks in this process; None if ranks must restart."""
    run, plan, rank = context.run, context.plan, context.rank
    if rank.world_size > 1 or plan.ds_config is not None:
        return None

    def fall_back(error: BaseException, stage: Stage) -> Plan | None:
        shortage = out_of_memory_of(error, plan, context.planned_bytes)
        if shortage is None or not can_fall_back(shortage, plan):
            return None
        if shortage.fragmented and not segments_expandable():
            return None  # A restart with expandable segments is tried before a fallback.
        before = run.read_plan()
        after = oom_fallback.next_fallback(before, run.recipe, run.cluster, stage)
        if after is None or _changes_model(before.layout, after.layout):
            return None
        number = len(run.read_recoveries()) + 1
        append_recovery(
            run.paths,
            before,
            after,
            number=number,
            action="retry_step",
            error=rank.error(type(error).__name__, shortage.evidence),
        )
        change = oom_fallback.describe_change(before, after)
        log.warning("out of memory (%s): retrying with %s", shortage.evidence, change)
        values = {"number": number, "change": change, "action": "retry_step"}
        context.reporter.log("recovery", values)
        return after

    return fall_back


def _changes_model(before: Layout, after: Layout) -> bool:
    """Returns whether a fallback needs the model to be loaded and wrapped again."""
    return (
        after.gradient_checkpointing != before.gradient_checkpointing
        or after.loss_chunks != before.loss_chunks
        or not oom_fallback.same_sharding(before, after)
    )
