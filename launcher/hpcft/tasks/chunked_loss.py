"""Computes the loss in chunks, so that a large vocabulary's logits never exist as a whole.

The output layer's input is kept. Loss and scores apply the layer to the positions that carry a
label, one chunk after the other, and the backward pass computes each chunk's logits again (Chen et
al. 2016, arXiv:1604.06174).

Shapes: B examples, S tokens, H the model's width, V the vocabulary, N positions with a label.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from hpcft.tasks.base import TrainedTask, summed_cross_entropy
from hpcft.tasks.instruction import log_likelihoods, next_token_pairs, sum_by_example


def make_loss(task: TrainedTask, model: Any, chunks: int) -> TaskLoss:
    """Makes the task's loss for a model that is about to be trained.

    Args:
        task: the task; with more than one chunk, one whose loss is that of the next tokens.
        model: the model with its method, not yet wrapped for several ranks; with more than one
            chunk its output layer is changed.
        chunks: `Layout.loss_chunks`.
    """
    return ChunkedLoss(task, model, chunks) if chunks > 1 else TaskLoss(task)


class TaskLoss:
    """Computes a task's loss and scores from the model's outputs."""

    def __init__(self, task: TrainedTask) -> None:
        self.task = task

    def __call__(self, outputs: Any, labels: Any, items: Any, smoothing: float) -> Any:
        """Computes the loss from the model's outputs; arguments as of `TrainedTask.loss`."""
        return self.task.loss(self.task.logits(outputs), labels, items, smoothing)

    def reduce_logits(self, logits: Any, labels: Any) -> Any:
        """Reduces the outputs of a scored batch, as `TrainedTask.reduce_logits` does."""
        return self.task.reduce_logits(logits, labels)


class ChunkedLoss(TaskLoss):
    """Computes the same numbers as `TaskLoss`, up to rounding, chunk by chunk."""

    def __init__(self, task: TrainedTask, model: Any, chunks: int) -> None:
        super().__init__(task)
        self.chunks = chunks
        self.layer = model.get_output_embeddings()
        self.soft_cap = logit_soft_cap(model.config)
        self._layer_forward = self.layer.forward
        self._is_applied = False
        self._captured: tuple[Any, Callable[[], Any]] | None = None
        self._scores: Any = None
        self.layer.forward = self._capture

    def __call__(self, outputs: Any, labels: Any, items: Any, smoothing: float) -> Any:
        """Computes the loss of the last forward pass, for labels (B, S)."""
        import torch
        from torch.utils.checkpoint import checkpoint

        assert self._captured is not None
        (hidden, autocast), self._captured = self._captured, None
        # Virtual tokens in front of the text have positions of their own, without labels.
        hidden = hidden[:, -labels.shape[1] :]
        hidden, targets = next_token_pairs(hidden, labels)  # (N, H) and (N,)
        is_training = torch.is_grad_enabled()
        total, scores = 0.0, []
        # Every rank takes the same number of chunks, empty ones too: ZeRO-3 gathers the weights
        # for each of them.
        for chunk in zip(
            hidden.tensor_split(self.chunks), targets.tensor_split(self.chunks), strict=True
        ):
            if is_training:
                total += checkpoint(self._loss, *chunk, smoothing, autocast, use_reentrant=False)
            else:
                logits = self._logits(chunk[0], autocast)
                total += summed_cross_entropy(logits, chunk[1], 1, smoothing)
                scores.append(log_likelihoods(logits, chunk[1]))
                del logits
        self._scores = None if is_training else torch.cat(scores)
        return total / (max(targets.numel(), 1) if items is None else items)

    def reduce_logits(self, logits: Any, labels: Any) -> Any:
        """Returns log-likelihood and number of each example's tokens, from the last loss."""
        scores, self._scores = self._scores, None
        return sum_by_example(scores, labels)

    def _capture(self, hidden: Any) -> Any:
        """Keeps the output layer's input (B, S, H) for the loss, in place of its forward."""
        if self._is_applied:
            return self._layer_forward(hidden)
        self._captured = hidden, _current_autocast(hidden)
        # The model gets one column for its logits, so that its own work on them costs nothing.
        return hidden[..., :1].detach()

    def _loss(
        self, hidden: Any, targets: Any, smoothing: float, autocast: Callable[[], Any]
    ) -> Any:
        return summed_cross_entropy(self._logits(hidden, autocast), targets, 1, smoothing)

    def _logits(self, hidden: Any, autocast: Callable[[], Any]) -> Any:
        """Computes the logits of some positions, in the types that the model itself would use."""
        self._is_applied = True
        try:
            with autocast():
                # The layer is called as a module, not through `_layer_forward`: under ZeRO-3 the
                # module's hooks gather its weights.
                logits = self.layer(hidden)
                if self.soft_cap is not None:
                    logits = (logits / self.soft_cap).tanh() * self.soft_cap
        finally:
            self._is_applied = False
        return logits


def logit_soft_cap(config: Any) -> float | None:
    """Returns the bound of Gemma's logits, cap · tanh(logits / cap); None for other models."""
    cap: float | None = getattr(config.get_text_config(), "final_logit_softcapping", None)
    return cap


def _current_autocast(value: Any) -> Callable[[], Any]:
    """Returns a function that restores autocast's present state, for the loss outside of it."""
    import torch

    device = value.device.type
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext
    is_on, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    # Without autocast's cache, a chunk's cast of the weights is freed with the chunk, and the
    # chunks' gradients are summed in fp32.
    return lambda: torch.autocast(device, dtype=dtype, enabled=is_on, cache_enabled=False)
