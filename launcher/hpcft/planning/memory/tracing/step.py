"""Traces one optimizer step on the meta device: live bytes after each operation."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from hpcft.planning.memory.trace_types import Segments, TracedStep
from hpcft.planning.memory.tracing.model import adapter_parameters, four_bit_tensors, layers_of
from hpcft.planning.memory.tracing.optimizer import MetaOptimizer
from hpcft.planning.memory.tracing.storage_tracker import (
    ACTIVATIONS,
    ADAPTERS,
    FOUR_BIT,
    GRADIENTS,
    LOGITS,
    WEIGHTS,
    StorageTracker,
)
from hpcft.planning.memory.tracing.target_device import (
    MetaAutocast,
    TargetDevice,
    patched_kernels,
    scratch_estimator,
)
from hpcft.planning.memory.tracing.zero_hooks import GradientReducer, ScheduleRecorder
from hpcft.planning.memory.zero3_schedule import ModuleSchedule
from hpcft.tasks.base import TrainedTask
from hpcft.tasks.chunked_loss import TaskLoss


def trace_step(
    model: Any,
    step: TracedStep,
    task_loss: TaskLoss,
    target: TargetDevice,
    *,
    depth: int,
    micro_batch: int,
    labelled: int,
) -> tuple[Segments, ModuleSchedule | None]:
    """Returns the live bytes after each operation of a step, by segment.

    The step ends with the evaluation of one micro-batch. A method that trains nothing has two
    evaluations instead, as the `forward` and `evaluation` phases.

    Args:
        model: model from `build_model`.
        step: the step to trace.
        task_loss: the task's loss and scores for the model.
        target: device of the run.
        depth: number of layers of the model.
        micro_batch: examples, B.
        labelled: tokens of an example that carry a loss.

    Returns:
        Samples by segment: `forward embedding`, `forward 0`, …, `forward head`, `backward head`,
        `backward 1`, …, `optimizer`, `evaluation embedding`, …; and ZeRO-3's module schedule, None
        below ZeRO-3.
    """
    stage, zero = step.zero_stage, step.zero
    tracker = StorageTracker(scratch_estimator(step.threads), labelled * micro_batch)
    layers = layers_of(model, depth)
    autocast = MetaAutocast(target) if target.autocast else None
    segment_hooks = _SegmentHooks(tracker, layers)
    passes = _Passes(model, task_loss, segment_hooks, autocast)
    tokens = step.task.max_length
    eval_batch = _padded_batch(step.task, micro_batch, tokens)
    inputs, labels = _packed_batch(micro_batch, tokens) if step.packed else eval_batch
    if stage == 3:
        tracker.ignore(model.parameters())
    tracker.seed(four_bit_tensors(model), FOUR_BIT)
    tracker.seed(adapter_parameters(model), ADAPTERS)
    # The tensors that are counted already keep their kind.
    tracker.seed([*model.parameters(), *model.buffers()], WEIGHTS)
    hooks = segment_hooks.register(model, autocast)
    recorder = ScheduleRecorder(tracker, model, layers) if stage == 3 else None
    hooks += recorder.hooks if recorder else []
    on_cpu = target.accelerator == "cpu"
    reducer = GradientReducer(tracker, model, stage, zero, on_cpu=on_cpu) if zero else None

    def on_gradient(parameter: Any) -> None:
        tracker.recount(parameter.grad, GRADIENTS)
        if reducer:
            reducer.add_gradient(parameter)

    trained = [p for p in model.parameters() if p.requires_grad]
    hooks += [p.register_post_accumulate_grad_hook(on_gradient) for p in trained]
    # Under ZeRO the optimizer works on shards, which `zero_memory` counts.
    optimizer = MetaOptimizer(model, step.optim, target, tracker) if trained and not zero else None
    try:
        with (
            warnings.catch_warnings(),
            patched_kernels(target, padded=step.padded, zero_stage=stage),
            autocast or contextlib.nullcontext(),
        ):
            warnings.simplefilter("ignore")
            with tracker:
                if optimizer:
                    optimizer.create_states()
                batch = [*inputs.values(), *labels.values()]
                tracker.seed([t for t in batch if isinstance(t, torch.Tensor)], ACTIVATIONS)
                tracker.is_recording = True
                if not trained:
                    evaluate = passes.extract if step.method.extracts_features else passes.evaluate
                    for phase in ("forward", "evaluation"):
                        evaluate(phase, *eval_batch)
                    return tracker.segments, None
                passes.train(inputs, labels)
                if reducer:
                    reducer.end_backward()
                    reducer.begin_optimizer()
                tracker.begin_segment("optimizer")
                if optimizer:
                    optimizer.step()
                model.zero_grad()
                passes.evaluate("evaluation", *eval_batch)
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    return tracker.segments, recorder.schedule() if recorder else None


def _padded_batch(task: TrainedTask, b: int, s: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns token ids and mask (B, S), and labels, on the meta device."""
    with torch.device("meta"):
        inputs = {
            "input_ids": torch.empty((b, s), dtype=torch.long),
            "attention_mask": torch.empty((b, s), dtype=torch.long),
        }
        labels = {"labels": torch.empty(task.labels_shape(b, s), dtype=torch.long)}
    return inputs, labels


def _packed_batch(b: int, s: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the same examples packed into one row (1, B × S), as `tasks.packing` packs them."""
    with torch.device("meta"):
        shape = (1, b * s)
        inputs = {
            name: torch.empty(shape, dtype=torch.long) for name in ("input_ids", "position_ids")
        }
        labels = {"labels": torch.empty(shape, dtype=torch.long)}
    return {**inputs, "lengths": [s] * b}, labels


@dataclass(frozen=True)
class _Passes:
    """Runs passes through a model and starts the tracker's segments."""

    model: Any
    task_loss: TaskLoss
    segment_hooks: _SegmentHooks
    autocast: MetaAutocast | None

    def train(self, inputs: dict[str, Any], labels: dict[str, Any]) -> None:
        """Runs a forward and a backward pass."""
        self.segment_hooks.begin_forward("forward")
        outputs = self._outputs(inputs)
        loss = self.task_loss(outputs, labels["labels"], None, 0.0)
        del outputs
        self.segment_hooks.begin_backward()
        # loss.backward() would switch autocast's rules off while layers are recomputed.
        torch.autograd.graph._engine_run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (),
            allow_unreachable=True, accumulate_grad=True,
        )  # fmt: skip
        if self.autocast:
            self.autocast.start_caching()
        del loss

    def evaluate(self, phase: str, inputs: dict[str, Any], labels: dict[str, Any]) -> None:
        """Evaluates a micro-batch as the Trainer does: the loss, then the reduced logits."""
        self.model.eval()
        self._begin_without_gradients(phase)
        with torch.no_grad():
            outputs = self._outputs(inputs)
            loss = self.task_loss(outputs, labels["labels"], None, 0.0)
            task = self.task_loss.task
            scores = self.task_loss.reduce_logits(task.logits(outputs), labels["labels"])
        del outputs, loss, scores
        self.model.train()

    def extract(self, phase: str, inputs: dict[str, Any], _: dict[str, Any]) -> None:
        """Runs a forward pass of a model that is used for its hidden states only."""
        self.model.eval()
        self._begin_without_gradients(phase)
        with torch.no_grad():
            self.model(**inputs)

    def _begin_without_gradients(self, phase: str) -> None:
        if self.autocast:
            self.autocast.stop_caching()
        self.segment_hooks.begin_forward(phase)

    def _outputs(self, inputs: dict[str, Any]) -> Any:
        outputs = self.model(**inputs)
        if self.autocast:
            # Accelerate casts what a model returns under mixed precision
            # (convert_outputs_to_fp32).
            for name in list(outputs):
                if isinstance(outputs[name], torch.Tensor):
                    outputs[name] = outputs[name].float()
            self.autocast.stop_caching()
        return outputs


class _SegmentHooks:
    """Starts the tracker's segments, by hooks on layers and on their inputs' gradients."""

    def __init__(self, tracker: StorageTracker, layers: list[Any]) -> None:
        self.tracker = tracker
        self.layers = layers
        self.is_forward = True
        self.is_after_layers = False
        self.phase = ""

    def begin_forward(self, phase: str) -> None:
        self.phase, self.is_forward, self.is_after_layers = phase, True, False
        self.tracker.kind = ACTIVATIONS
        self.tracker.begin_segment(f"{phase} embedding")

    def begin_backward(self) -> None:
        self.is_forward = False
        self.tracker.begin_segment("backward head")

    def register(self, model: Any, autocast: MetaAutocast | None) -> list[Any]:
        """Registers hooks on every layer, on the first module after them and on rotary embeddings.

        Returns:
            Handles that remove the hooks.
        """
        hooks = []
        for index, layer in enumerate(self.layers):
            hooks.append(
                layer.register_forward_pre_hook(
                    lambda _, args, kwargs, i=index: self._enter_layer(i, args, kwargs),
                    with_kwargs=True,
                )
            )
        hooks.append(self.layers[-1].register_forward_hook(lambda *_: self._leave_layers()))
        hooks.append(torch.nn.modules.module.register_module_forward_pre_hook(self._enter_module))
        if autocast:
            for module in model.modules():
                # Rotary embeddings switch autocast off inside themselves.
                if type(module).__name__.endswith("RotaryEmbedding"):
                    hooks.append(module.register_forward_pre_hook(lambda *_: _disable(autocast, 1)))
                    hooks.append(module.register_forward_hook(lambda *_: _disable(autocast, -1)))
        return hooks

    def _enter_layer(self, index: int, args: Any, kwargs: Any) -> None:
        if not self.is_forward:
            return  # Gradient checkpointing recomputes the layer.
        self.tracker.begin_segment(f"{self.phase} {index}")
        hidden = args[0] if args else kwargs.get("hidden_states")
        if index and hidden is not None and hidden.requires_grad:
            hidden.register_hook(lambda _: self._enter_backward(index - 1))

    def _leave_layers(self) -> None:
        if self.is_forward:
            self.is_after_layers = True
            self.tracker.begin_segment(f"{self.phase} head")
            self.tracker.kind = LOGITS

    def _enter_module(self, _: Any, args: Any) -> None:
        """Hooks the gradient of the last layer's output, when the module after it gets it."""
        if self.is_forward and self.is_after_layers:
            self.is_after_layers = False
            hidden: Any = args[0] if args else None
            if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
                last = len(self.layers) - 1
                hidden.register_hook(lambda _: self._enter_backward(last))  # type: ignore[no-untyped-call]

    def _enter_backward(self, index: int) -> None:
        self.tracker.kind = ACTIVATIONS
        self.tracker.begin_segment(f"backward {index}")


def _disable(autocast: MetaAutocast, by: int) -> None:
    autocast.disabled += by
