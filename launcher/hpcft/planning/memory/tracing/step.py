"""One optimizer step on the meta device: what is alive in each part of it."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from hpcft.planning.memory.trace_types import Segments, TracedStep
from hpcft.planning.memory.tracing.model import adapters, four_bit_tensors, layers_of
from hpcft.planning.memory.tracing.optimizer import Optimizer
from hpcft.planning.memory.tracing.storage_tracker import (
    ACTIVATIONS,
    ADAPTERS,
    FOUR_BIT,
    GRADIENTS,
    LOGITS,
    WEIGHTS,
    StorageTracker,
)
from hpcft.planning.memory.tracing.target_device import Autocast, Target, kernels, scratch
from hpcft.planning.memory.tracing.zero_hooks import Recorder, Reducer
from hpcft.planning.memory.zero3_schedule import ModuleSchedule
from hpcft.tasks.base import TrainedTask
from hpcft.tasks.chunked_loss import TaskLoss


def trace_step(
    model: Any,
    asked: TracedStep,
    task_loss: TaskLoss,
    target: Target,
    *,
    depth: int,
    micro_batch: int,
    labelled: int,
) -> tuple[Segments, ModuleSchedule | None]:
    """Bytes alive after each operation, by part of the step.

    Args:
        model: from `models.build`.
        asked: the step.
        task_loss: the task's loss and scores for the model.
        target: device.
        depth: layers of the model.
        micro_batch: examples, B.
        labelled: tokens of an example that carry a loss.

    Returns:
        Part to points; parts are `forward embedding`, `forward 0`, …, `forward head`,
        `backward head`, `backward 1`, …, `optimizer`. And the order of ZeRO-3's gathers.
    """
    stage, zero = asked.zero_stage, asked.zero
    tracker = StorageTracker(scratch(target, asked.threads), labelled * micro_batch)
    layers = layers_of(model, depth)
    autocast = Autocast(target) if target.autocast else None
    marks = _Marks(tracker, layers)
    passes = _Passes(model, task_loss, marks, autocast)
    tokens = asked.task.max_length
    scored = _inputs(asked.task, micro_batch, tokens)
    inputs, labels = _packed(micro_batch, tokens) if asked.packed else scored
    if stage == 3:
        tracker.ignore(model.parameters())
    tracker.seed(four_bit_tensors(model), FOUR_BIT)
    tracker.seed(adapters(model), ADAPTERS)
    tracker.seed([*model.parameters(), *model.buffers()], WEIGHTS)  # those that are left
    hooks = marks.register(model, autocast)
    recorder = Recorder(tracker, model, layers) if stage == 3 else None
    hooks += recorder.hooks if recorder else []
    on_cpu = target.accelerator == "cpu"
    reducer = Reducer(tracker, model, stage, zero, on_cpu=on_cpu) if zero else None

    def accumulated(parameter: Any) -> None:
        tracker.recount(parameter.grad, GRADIENTS)
        if reducer:
            reducer.ready(parameter)

    trained = [p for p in model.parameters() if p.requires_grad]
    hooks += [p.register_post_accumulate_grad_hook(accumulated) for p in trained]
    # Under ZeRO the optimizer works on shards, which `memory.zero` counts.
    optimizer = Optimizer(model, asked.optim, target, tracker) if trained and not zero else None
    try:
        with (
            warnings.catch_warnings(),
            kernels(target, padded=asked.padded, zero_stage=stage),
            autocast or contextlib.nullcontext(),
        ):
            warnings.simplefilter("ignore")
            with tracker:
                if optimizer:
                    optimizer.start()
                given = [*inputs.values(), *labels.values()]
                tracker.seed([t for t in given if isinstance(t, torch.Tensor)], ACTIVATIONS)
                tracker.recording = True
                if not trained:
                    once = passes.extract if asked.method.extracts_features else passes.score
                    for name in ("forward", "evaluation"):  # as training, and as scoring
                        once(name, *scored)
                    return tracker.segments, None
                passes.train(inputs, labels)
                if reducer:
                    reducer.end()
                    reducer.step()
                tracker.segment("optimizer")
                if optimizer:
                    optimizer.step()
                model.zero_grad()
                passes.score("evaluation", *scored)
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    return tracker.segments, recorder.order() if recorder else None


def _inputs(task: TrainedTask, b: int, s: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Token ids and mask, and labels, in shapes only."""
    with torch.device("meta"):
        inputs = {
            "input_ids": torch.empty((b, s), dtype=torch.long),
            "attention_mask": torch.empty((b, s), dtype=torch.long),
        }
        labels = {"labels": torch.empty(task.labels_shape(b, s), dtype=torch.long)}
    return inputs, labels


def _packed(b: int, s: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same examples in a row, as `tasks.packing` makes it."""
    with torch.device("meta"):
        shape = (1, b * s)
        inputs = {
            name: torch.empty(shape, dtype=torch.long) for name in ("input_ids", "position_ids")
        }
        labels = {"labels": torch.empty(shape, dtype=torch.long)}
    return {**inputs, "lengths": [s] * b}, labels


@dataclass(frozen=True)
class _Passes:
    """Passes through a model, each told to the tracker."""

    model: Any
    task_loss: TaskLoss
    marks: _Marks
    autocast: Autocast | None

    def train(self, inputs: dict[str, Any], labels: dict[str, Any]) -> None:
        """Forward and back."""
        self.marks.forward("forward")
        outputs = self._outputs(inputs)
        loss = self.task_loss(outputs, labels["labels"], None, 0.0)
        del outputs
        self.marks.backward()
        # Not loss.backward(): inside it, autocast's rules would be off while layers are recomputed.
        torch.autograd.graph._engine_run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (),
            allow_unreachable=True, accumulate_grad=True,
        )  # fmt: skip
        if self.autocast:
            self.autocast.casts = {}
        del loss

    def score(self, name: str, inputs: dict[str, Any], labels: dict[str, Any]) -> None:
        """Scores a micro-batch as the Trainer does: loss, then what is kept of the logits."""
        self.model.eval()
        self._without_gradients(name)
        with torch.no_grad():
            outputs = self._outputs(inputs)
            loss = self.task_loss(outputs, labels["labels"], None, 0.0)
            task = self.task_loss.task
            kept = self.task_loss.reduce_logits(task.logits(outputs), labels["labels"])
        del outputs, loss, kept
        self.model.train()

    def extract(self, name: str, inputs: dict[str, Any], _: dict[str, Any]) -> None:
        """A forward pass of a model of which nothing but hidden states is asked for."""
        self.model.eval()
        self._without_gradients(name)
        with torch.no_grad():
            self.model(**inputs)

    def _without_gradients(self, name: str) -> None:
        if self.autocast:
            self.autocast.casts = None
        self.marks.forward(name)

    def _outputs(self, inputs: dict[str, Any]) -> Any:
        outputs = self.model(**inputs)
        if self.autocast:
            # Accelerate casts what a model returns under mixed precision
            # (convert_outputs_to_fp32).
            for name in list(outputs):
                if isinstance(outputs[name], torch.Tensor):
                    outputs[name] = outputs[name].float()
            self.autocast.end_forward()
        return outputs


class _Marks:
    """Tells the tracker where in the step it is, by hooks on layers and on their inputs."""

    def __init__(self, tracker: StorageTracker, layers: list[Any]) -> None:
        self.tracker = tracker
        self.layers = layers
        self.is_forward = True
        self.behind_layers = False
        self.name = ""

    def forward(self, name: str) -> None:
        self.name, self.is_forward, self.behind_layers = name, True, False
        self.tracker.kind = ACTIVATIONS
        self.tracker.segment(f"{name} embedding")

    def backward(self) -> None:
        self.is_forward = False
        self.tracker.segment("backward head")

    def register(self, model: Any, autocast: Autocast | None) -> list[Any]:
        """Hooks on every layer, on what follows the last one, and on rotary embeddings."""
        hooks = []
        for index, layer in enumerate(self.layers):
            hooks.append(
                layer.register_forward_pre_hook(
                    lambda _, args, kwargs, i=index: self._enter(i, args, kwargs), with_kwargs=True
                )
            )
        hooks.append(self.layers[-1].register_forward_hook(lambda *_: self._left()))
        hooks.append(torch.nn.modules.module.register_module_forward_pre_hook(self._after))
        if autocast:
            for module in model.modules():
                if type(module).__name__.endswith("RotaryEmbedding"):  # turns autocast off inside
                    hooks.append(module.register_forward_pre_hook(lambda *_: _switch(autocast, 1)))
                    hooks.append(module.register_forward_hook(lambda *_: _switch(autocast, -1)))
        return hooks

    def _enter(self, index: int, args: Any, kwargs: Any) -> None:
        if not self.is_forward:
            return  # a layer that is recomputed
        self.tracker.segment(f"{self.name} {index}")
        hidden = args[0] if args else kwargs.get("hidden_states")
        if index and hidden is not None and hidden.requires_grad:
            hidden.register_hook(lambda _: self._gradient(index - 1))

    def _left(self) -> None:
        if self.is_forward:
            self.behind_layers = True
            self.tracker.segment(f"{self.name} head")
            self.tracker.kind = LOGITS

    def _after(self, _: Any, args: Any) -> None:
        if self.is_forward and self.behind_layers:
            self.behind_layers = False
            hidden: Any = args[0] if args else None
            if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
                last = len(self.layers) - 1
                hidden.register_hook(lambda _: self._gradient(last))  # type: ignore[no-untyped-call]

    def _gradient(self, index: int) -> None:
        self.tracker.kind = ACTIVATIONS
        self.tracker.segment(f"backward {index}")


def _switch(autocast: Autocast, by: int) -> None:
    autocast.off += by
