"""A Trainer of a single rank that goes on with smaller batches when it is out of memory.

The losses of the tasks are sums over examples, divided by the items of the whole global batch: the
gradients of the pieces of a micro-batch add up to its own. Only the random numbers of dropout are
drawn in another order.
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

StepDown = Callable[[BaseException, Stage], Plan | None]
"""Takes a rung that the same process can go on with; None where there is none."""


class OomRetryTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that does a step again in pieces, and a scoring again with smaller batches.

    Only for one rank without DeepSpeed: of several, the others wait inside a collective.
    """

    step_down: StepDown | None = None
    max_length = 0
    _piece: int | None = None
    _window: tuple[Any, ...] = ()
    _done = 0

    def get_batch_samples(self, *arguments: Any) -> tuple[list[Any], Any]:
        """The micro-batches of the next optimizer step; they are small and kept for a replay."""
        samples, items = super().get_batch_samples(*arguments)
        self._window, self._done = tuple(samples), 0
        return samples, items

    def training_step(
        self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any = None
    ) -> Any:
        """Loss and gradients of a micro-batch, in pieces that fit."""
        todo: tuple[Any, ...] = (inputs,)
        while True:
            try:
                for batch in todo:
                    loss = self._in_pieces(model, batch, num_items_in_batch)
            except Exception as error:
                plan = self._lower(error, "step") if num_items_in_batch is not None else None
                if plan is None:
                    raise
            else:
                self._done += 1
                return loss
            # Only here is the exception gone, and with it what its frames held.
            self._piece = plan.layout.per_device_train_batch_size
            self._take_over(plan)
            model.zero_grad()
            todo = self._window[: self._done + 1]

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Scores a split, with batches that fit."""
        while True:
            try:
                result: dict[str, Any] = super().evaluate(*arguments, **options)
            except Exception as error:
                plan = self._lower(error, "evaluation")
                if plan is None:
                    raise
            else:
                return result
            self._take_over(plan)

    def _in_pieces(self, model: Any, inputs: Mapping[str, Any], items: Any) -> Any:
        parts = self._parts(inputs, self._piece) if self._piece else [inputs]
        losses = [super(OomRetryTrainer, self).training_step(model, p, items) for p in parts]
        return torch.stack(losses).sum()

    def _parts(self, inputs: Mapping[str, Any], size: int) -> list[Mapping[str, Any]]:
        """A micro-batch as several of at most so many examples, or what is planned for those."""
        if "lengths" in inputs:
            return [*packing.split_packed(inputs, size * self.max_length)]
        return [
            {name: part[first : first + size] for name, part in inputs.items()}
            for first in range(0, len(inputs["input_ids"]), size)
        ]

    def _lower(self, error: Exception, stage: Stage) -> Plan | None:
        if self.step_down is None:
            return None
        plan = self.step_down(error, stage)
        if plan is not None:
            traceback.clear_frames(error.__traceback__)
        return plan

    def _take_over(self, plan: Plan) -> None:
        self.args.per_device_eval_batch_size = plan.per_device_eval_batch_size
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _changes_the_model(before: Layout, after: Layout) -> bool:
    recomputes = after.gradient_checkpointing != before.gradient_checkpointing
    divides = after.loss_chunks != before.loss_chunks
    return recomputes or divides or not oom_fallback.same_sharding(before, after)


def fallback_in_process(context: WorkerContext) -> StepDown | None:
    """Returns what applies a fallback within this process; None where all ranks must restart."""
    run, plan, rank = context.run, context.plan, context.rank
    if rank.world_size > 1 or plan.ds_config is not None:
        return None

    def step_down(error: BaseException, stage: Stage) -> Plan | None:
        short = out_of_memory_of(error, plan)
        if short is None or not can_fall_back(short, plan):
            return None
        if short.fragmented and not segments_expandable():
            return None  # a new process with another allocator is tried before a fallback
        before = run.read_plan()
        after = oom_fallback.next_fallback(before, run.recipe, run.cluster, stage)
        if after is None or _changes_the_model(before.layout, after.layout):
            return None
        append_recovery(
            run.paths,
            before,
            after,
            number=len(run.read_recoveries()) + 1,
            action="retry_step",
            error=rank.error(type(error).__name__, short.evidence),
        )
        change = oom_fallback.describe_change(before, after)
        log.warning("out of memory (%s): retrying with %s", short.evidence, change)
        number = len(run.read_recoveries())
        what = {"number": number, "change": change, "action": "retry_step"}
        context.reporter.log("recovery", what)
        return after

    return step_down
