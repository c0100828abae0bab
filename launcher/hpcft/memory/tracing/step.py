"""One optimizer step on the meta device: what is alive in each part of it."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch

from hpcft.memory.curves import Parts
from hpcft.memory.gathers import Order
from hpcft.memory.tracing import model as models
from hpcft.memory.tracing.optimizer import Optimizer
from hpcft.memory.tracing.target import Autocast, Target, kernels, scratch
from hpcft.memory.tracing.tracker import ACTIVATIONS, GRADIENTS, LOGITS, WEIGHTS, StorageTracker
from hpcft.memory.tracing.zero import Recorder, Reducer
from hpcft.records import ZeroSizes
from hpcft.tasks import AnyTask
from hpcft.tasks.chunked_loss import TaskLoss


def trace(
    model: Any,
    task: AnyTask,
    task_loss: TaskLoss,
    target: Target,
    *,
    depth: int,
    micro_batch: int,
    sequence_tokens: int,
    padded: bool,
    labelled: int,
    optim: str,
    zero_stage: int = 0,
    zero: ZeroSizes | None = None,
    threads: int = 1,
) -> tuple[Parts, Order | None]:
    """Bytes alive after each operation, by part of the step.

    Args:
        model: from `models.build`.
        task: whose inputs.
        task_loss: its loss and scores for the model.
        target: device.
        depth: layers of the model.
        micro_batch: examples, B.
        sequence_tokens: tokens of each, S.
        padded: whether attention takes a mask.
        labelled: tokens of an example that carry a loss.
        optim: optimizer, as in the recipe.
        zero_stage: DeepSpeed's stage.
        zero: sizes of its buckets; None without DeepSpeed.
        threads: CPU threads of a rank.

    Returns:
        Part to points; parts are `forward embedding`, `forward 0`, …, `forward head`,
        `backward head`, `backward 1`, …, `optimizer`. And the order of ZeRO-3's gathers.
    """
    tracker = StorageTracker(scratch(target, threads), labelled * micro_batch)
    layers = models.layers_of(model, depth)
    marks = _Marks(tracker, layers)
    autocast = Autocast(target) if target.autocast else None
    inputs, labels = _inputs(task, micro_batch, sequence_tokens)
    if zero_stage == 3:
        tracker.ignore(model.parameters())
    tracker.seed(model.parameters(), WEIGHTS)
    tracker.seed(model.buffers(), WEIGHTS)
    tracker.seed(models.quantisation_tensors(model), WEIGHTS)
    hooks = marks.register(model, autocast)
    recorder = Recorder(tracker, model, layers) if zero_stage == 3 else None
    hooks += recorder.hooks if recorder else []
    on_cpu = target.accelerator == "cpu"
    reducer = Reducer(tracker, model, zero_stage, zero, on_cpu=on_cpu) if zero else None

    def accumulated(parameter: Any) -> None:
        tracker.recount(parameter.grad, GRADIENTS)
        if reducer:
            reducer.ready(parameter)

    trained = [p for p in model.parameters() if p.requires_grad]
    hooks += [p.register_post_accumulate_grad_hook(accumulated) for p in trained]
    # Under ZeRO the optimizer works on shards, which `memory.zero` counts.
    optimizer = Optimizer(model, optim, target, tracker) if trained and not zero else None

    def micro_step() -> None:
        _micro_step(model, task_loss, inputs, labels, marks, autocast)
        if reducer:
            reducer.end()

    try:
        with (
            warnings.catch_warnings(),
            kernels(target, padded=padded, zero_stage=zero_stage),
            autocast or contextlib.nullcontext(),
        ):
            warnings.simplefilter("ignore")
            with tracker:
                if optimizer:
                    optimizer.start()
                tracker.seed([*inputs.values(), *labels.values()], ACTIVATIONS)
                if not trained:
                    tracker.recording = True
                    _extract(model, inputs, marks, autocast)
                    return tracker.segments, None
                tracker.recording = True
                micro_step()
                if reducer:
                    reducer.step()
                tracker.segment("optimizer")
                if optimizer:
                    optimizer.step()
                model.zero_grad()
                _evaluate(model, task_loss, inputs, labels, marks, autocast)
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    return tracker.segments, recorder.order() if recorder else None


def _inputs(task: AnyTask, b: int, s: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Token ids and mask, and labels, in shapes only."""
    with torch.device("meta"):
        inputs = {
            "input_ids": torch.empty((b, s), dtype=torch.long),
            "attention_mask": torch.empty((b, s), dtype=torch.long),
        }
        labels = {"labels": torch.empty(task.labels_shape(b, s), dtype=torch.long)}
    return inputs, labels


def _micro_step(
    model: Any,
    task_loss: TaskLoss,
    inputs: Any,
    labels: Any,
    marks: _Marks,
    autocast: Autocast | None,
) -> None:
    marks.forward("forward")
    outputs = _outputs(model, inputs, autocast)
    loss = task_loss(outputs, labels["labels"], None, 0.0)
    del outputs
    marks.backward()
    # Not loss.backward(): inside that, autocast's rules would be off while layers are recomputed.
    torch.autograd.graph._engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (),
        allow_unreachable=True, accumulate_grad=True,
    )  # fmt: skip
    if autocast:
        autocast.casts = {}
    del loss


def _outputs(model: Any, inputs: Any, autocast: Autocast | None) -> Any:
    outputs = model(**inputs)
    if autocast:
        # Accelerate casts what a model returns under mixed precision (convert_outputs_to_fp32).
        for name in list(outputs):
            if isinstance(outputs[name], torch.Tensor):
                outputs[name] = outputs[name].float()
        autocast.end_forward()
    return outputs


def _evaluate(
    model: Any,
    task_loss: TaskLoss,
    inputs: Any,
    labels: Any,
    marks: _Marks,
    autocast: Autocast | None,
) -> None:
    """Scores a micro-batch as the Trainer does: loss, then what is kept of the logits."""
    model.eval()
    if autocast:
        autocast.casts = None
    marks.forward("evaluation")
    with torch.no_grad():
        outputs = _outputs(model, inputs, autocast)
        loss = task_loss(outputs, labels["labels"], None, 0.0)
        kept = task_loss.reduce_logits(task_loss.task.logits(outputs), labels["labels"])
    del outputs, loss, kept
    model.train()


def _extract(model: Any, inputs: Any, marks: _Marks, autocast: Autocast | None) -> None:
    """A forward pass of a model of which nothing is trained, as training and as scoring."""
    model.eval()
    for name in ("forward", "evaluation"):
        if autocast:
            autocast.casts = None
        marks.forward(name)
        with torch.no_grad():
            model(**inputs)


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
