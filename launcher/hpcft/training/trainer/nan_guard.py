"""NanGuard: stops a run whose loss is not finite, because it can learn nothing more."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback

from hpcft.core import checkpoints
from hpcft.core.paths import RunPaths

FP16_LIMIT = 3
"""Number of logged losses in a row that are not finite and stop a run in fp16. Fewer may be an
overflow, after which the gradient scaler skips the step."""


class NanGuard(TrainerCallback):  # type: ignore[misc]
    """Checks each loss that the Trainer logs, which is the mean over ranks and steps.

    It costs the device nothing: one loss that is not finite makes the mean so, on all ranks. The
    Trainer's own `logging_nan_inf_filter`, which would hide it, has to be off.
    """

    def __init__(self, paths: RunPaths, precision: str) -> None:
        self.paths = paths
        self.limit = FP16_LIMIT if precision == "fp16" else 1
        self._in_a_row = 0
        self._last_finite_step = 0
        self._has_logged = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes earlier losses to be finite: only then was there a checkpoint to resume from."""
        self._last_finite_step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Checks the loss of the steps since the last log, or at the end that of all steps.

        Raises:
            FloatingPointError: the loss is not finite, too often in a row or at the end.
        """
        values = dict(logs or {})
        at_end = "train_loss" in values
        loss = values.get("train_loss" if at_end else "loss")
        if loss is None:
            return
        if not at_end or self.limit == 1 or not self._has_logged:
            self._in_a_row = 0 if math.isfinite(loss) else self._in_a_row + 1
        self._has_logged = True
        if self._in_a_row >= (1 if at_end else self.limit):
            raise FloatingPointError(self._message(loss, state.global_step, values))
        if self._in_a_row == 0:
            self._last_finite_step = state.global_step

    def _message(self, loss: float, step: int, values: dict[str, Any]) -> str:
        rate = f", learning rate {values['learning_rate']:g}" if "learning_rate" in values else ""
        first = min(self._last_finite_step + 1, step)
        steps = f"steps {first:,} to {step:,}" if first < step else f"step {step:,}"
        return f"the loss is {loss} ({steps}{rate}); {self._last_good_checkpoint()}"

    def _last_good_checkpoint(self) -> str:
        steps = sorted(
            checkpoints.checkpoint_step(folder)
            for folder in checkpoints.checkpoint_folders(self.paths)
        )
        # A finite loss shows that the weights before its step were good, not those after it.
        good = [step for step in steps if step < self._last_finite_step]
        newer = [step for step in steps if step >= self._last_finite_step]
        if not good:
            return "there is no checkpoint from before"
        fix = " (to resume from it, remove the newer ones)" if newer else ""
        return f"the last checkpoint from before is that of step {good[-1]:,}{fix}"
