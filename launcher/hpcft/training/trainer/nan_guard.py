"""Stops a run whose loss is no longer a number: what it would go on to learn is nothing."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback

from hpcft.core import checkpoints
from hpcft.core.paths import RunPaths

# With fp16 a batch may overflow now and then, and the scaler skips it: so many logged losses in a
# row that are not finite are no overflow.
FP16_IN_A_ROW = 3


class NanGuard(TrainerCallback):  # type: ignore[misc]
    """Looks at each loss that the Trainer logs, which is the mean over ranks and steps since.

    It asks nothing more of the device: one loss that is not finite makes the mean so, on all ranks
    alike. The Trainer's own `logging_nan_inf_filter` has to be off, which would hide it.
    """

    def __init__(self, paths: RunPaths, precision: str) -> None:
        self.paths = paths
        self.allowed = FP16_IN_A_ROW if precision == "fp16" else 1
        self._in_a_row = 0
        self._finite_until = 0
        self._logged = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What was logged before a checkpoint was finite, or there would be no going on."""
        self._finite_until = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """A loss is logged: of the steps since the last one, or at the end of all.

        Raises:
            FloatingPointError: it is not finite, too often in a row, or at the end.
        """
        values = dict(logs or {})
        at_end = "train_loss" in values
        loss = values.get("train_loss" if at_end else "loss")
        if loss is None:
            return
        if not at_end or self.allowed == 1 or not self._logged:
            self._in_a_row = 0 if math.isfinite(loss) else self._in_a_row + 1
        self._logged = True
        if self._in_a_row >= (1 if at_end else self.allowed):
            raise FloatingPointError(self._in_words(loss, state.global_step, values))
        if self._in_a_row == 0:
            self._finite_until = state.global_step

    def _in_words(self, loss: float, step: int, values: dict[str, Any]) -> str:
        rate = f", learning rate {values['learning_rate']:g}" if "learning_rate" in values else ""
        first = min(self._finite_until + 1, step)
        steps = f"steps {first:,} to {step:,}" if first < step else f"step {step:,}"
        return f"the loss is {loss} ({steps}{rate}); {self._last_good()}"

    def _last_good(self) -> str:
        # A finite loss tells of the weights before its step, not of those after it.
        steps = sorted(
            checkpoints.checkpoint_step(folder)
            for folder in checkpoints.checkpoint_folders(self.paths)
        )
        good = [step for step in steps if step < self._finite_until]
        newer = [step for step in steps if step >= self._finite_until]
        if not good:
            return "there is no checkpoint from before"
        remove = " (remove the newer ones to go on from it)" if newer else ""
        return f"the last checkpoint from before is that of step {good[-1]:,}{remove}"
