"""The loss in parts: of a large vocabulary's logits only one part exists at a time.

The output layer hands its input on, and loss and scores apply it: to the positions that carry a
label, one part of them after the other. The backward pass computes each part's logits again (Chen
et al. 2016, arXiv:1604.06174).

Shapes: B examples, S tokens, H the model's width, V the vocabulary, N positions with a label.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from hpcft.tasks.base import TrainedTask, summed_cross_entropy
from hpcft.tasks.instruction import by_example, log_likelihoods, next_tokens


def make_loss(task: TrainedTask, model: Any, chunks: int) -> TaskLoss:
    """The task's loss for a model that is about to be trained.

    Args:
        task: whose loss; with more than one part that of the next tokens.
        model: with its method, and not yet wrapped for several ranks; with more than one part its
            output layer is changed.
        chunks: `Layout.loss_chunks`.
    """
    return ChunkedLoss(task, model, chunks) if chunks > 1 else TaskLoss(task)


class TaskLoss:
    """A task's loss and scores from what the model returns."""

    def __init__(self, task: TrainedTask) -> None:
        self.task = task

    def __call__(self, outputs: Any, labels: Any, items: Any, smoothing: float) -> Any:
        """The loss from the model's outputs; otherwise as `TrainedTask.loss`."""
        return self.task.loss(self.task.logits(outputs), labels, items, smoothing)

    def reduce_logits(self, logits: Any, labels: Any) -> Any:
        """What is kept of a scored batch, after its loss; as `TrainedTask.reduce_logits`."""
        return self.task.reduce_logits(logits, labels)


class ChunkedLoss(TaskLoss):
    """The same numbers in parts, up to rounding."""

    def __init__(self, task: TrainedTask, model: Any, chunks: int) -> None:
        super().__init__(task)
        self.chunks = chunks
        self.layer = model.get_output_embeddings()
        self.soft_cap = soft_cap(model.config)
        self._apply = self.layer.forward
        self._is_applied = False
        self._held: tuple[Any, Callable[[], Any]] | None = None
        self._scores: Any = None
        self.layer.forward = self._hold

    def __call__(self, outputs: Any, labels: Any, items: Any, smoothing: float) -> Any:
        """The loss of the forward pass that was the last, for labels (B, S)."""
        import torch
        from torch.utils.checkpoint import checkpoint

        assert self._held is not None
        (hidden, precision), self._held = self._held, None
        # A prompt in front of the text has positions of its own, without labels.
        hidden, targets = next_tokens(hidden[:, -labels.shape[1] :], labels)  # (N, H) and (N,)
        training = torch.is_grad_enabled()
        total, scores = 0.0, []
        # As many parts on every rank, empty ones too: for each ZeRO-3 gathers the weights.
        for part in zip(
            hidden.tensor_split(self.chunks), targets.tensor_split(self.chunks), strict=True
        ):
            if training:
                total += checkpoint(self._loss, *part, smoothing, precision, use_reentrant=False)
            else:
                logits = self._logits(part[0], precision)
                total += summed_cross_entropy(logits, part[1], 1, smoothing)
                scores.append(log_likelihoods(logits, part[1]))
                del logits
        self._scores = None if training else torch.cat(scores)
        return total / (max(targets.numel(), 1) if items is None else items)

    def reduce_logits(self, logits: Any, labels: Any) -> Any:
        """Log-likelihood and number of each example's tokens, from the loss that was the last."""
        scores, self._scores = self._scores, None
        return by_example(scores, labels)

    def _hold(self, hidden: Any) -> Any:
        """The output layer's forward: it keeps its input (B, S, H) for the loss."""
        if self._is_applied:
            return self._apply(hidden)
        self._held = hidden, _precision_of(hidden)
        return hidden[..., :1].detach()  # what the model does to logits it does to next to nothing

    def _loss(
        self, hidden: Any, targets: Any, smoothing: float, precision: Callable[[], Any]
    ) -> Any:
        return summed_cross_entropy(self._logits(hidden, precision), targets, 1, smoothing)

    def _logits(self, hidden: Any, precision: Callable[[], Any]) -> Any:
        """The logits of some positions, in the types that the model itself would have."""
        self._is_applied = True
        try:
            with precision():
                # Called as a module, not through `_apply`: its hooks gather it under ZeRO-3.
                logits = self.layer(hidden)
                if self.soft_cap is not None:
                    logits = (logits / self.soft_cap).tanh() * self.soft_cap
        finally:
            self._is_applied = False
        return logits


def soft_cap(config: Any) -> float | None:
    """The bound that Gemma and its kin press logits into: cap · tanh(logits / cap)."""
    cap: float | None = getattr(config.get_text_config(), "final_logit_softcapping", None)
    return cap


def _precision_of(value: Any) -> Callable[[], Any]:
    """Makes autocast's state of this moment anew; the loss is computed outside of it."""
    import torch

    device = value.device.type
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext
    is_on, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    # Without its cache, a part's cast of the weights ends with the part, and the gradients of the
    # parts are added up in fp32.
    return lambda: torch.autocast(device, dtype=dtype, enabled=is_on, cache_enabled=False)
