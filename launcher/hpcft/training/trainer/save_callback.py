"""SaveCallback: after each step, the ranks agree whether to save, and whether to stop.

It resembles `JITCheckpointCallback` of transformers, which saves as soon as a rank gets a signal.
Here the ranks agree first, since a signal or a clock may reach one of them a step before another.
"""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from hpcft.training.checkpointing.interval import checkpoint_interval_s
from hpcft.training.distributed.stop_signal import StoppedAfterSave, StopRequest
from hpcft.training.trainer.checkpointing import CheckpointingTrainer

MIN_UNSAVED_S = 60.0
"""Seconds of unsaved training that are worth a checkpoint before the final evaluation."""
SAVE_MARGIN = 1.5
"""Factor by which a save may take longer than the one before it."""
STEPS_AHEAD = 2
"""Number of steps that must fit before a time limit, besides the save."""


class SaveCallback(TrainerCallback):  # type: ignore[misc]
    """Saves at intervals, before the time limit, and when this run is asked to stop.

    A save takes all ranks. So they agree at the end of each step, by a collective on CPUs, for
    which no GPU waits.
    """

    def __init__(
        self,
        trainer: CheckpointingTrainer,
        stop_request: StopRequest,
        *,
        checkpoint_min: float | str,
        expected_save_s: float,
    ) -> None:
        """Creates the callback.

        Args:
            trainer: the Trainer whose steps these are.
            stop_request: the signal that this process gets, and the time limit of its job.
            checkpoint_min: `resources.checkpoint_min`.
            expected_save_s: seconds that a save is expected to take, until one was measured.
        """
        self.trainer = trainer
        self.stop_request = stop_request
        self.checkpoint_min = checkpoint_min
        self.expected_save_s = expected_save_s
        self.step_s = 0.0
        self.saved_at = self.step_started = time.monotonic()
        self.user_requested = self.is_save_due = self.is_stopping = False

    @property
    def save_s(self) -> float:
        """Seconds that a save takes."""
        state = self.trainer.checkpoint_state
        previous_s = state.resumed_from.save_s if state.resumed_from else None
        return state.save_s or previous_s or self.expected_save_s

    @property
    def pause_s(self) -> float:
        """Seconds that a save pauses training."""
        return self.trainer.checkpoint_state.pause_s or self.save_s

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restores the sums of losses, and starts the clock."""
        self.trainer.restore_losses()
        self.saved_at = self.step_started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Lets the ranks agree on a save; after an epoch's last step `on_epoch_end` starts it."""
        now = time.monotonic()
        self.step_s, self.step_started = now - self.step_started, now
        is_last = state.global_step >= state.max_steps
        self._agree(now - self.saved_at, is_last=is_last)
        self.user_requested = control.should_save
        if is_last or float(state.epoch).is_integer():
            control.should_save = False
        else:
            self._apply(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts the save of an epoch, which follows its validation and so knows the metrics."""
        self.user_requested = self.user_requested or control.should_save
        self._apply(control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restarts the clock of the step, which an evaluation is no part of."""
        self.step_started = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Publishes the last checkpoint, which may be one that the recipe asked for."""
        self.trainer.publish()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stops an evaluation if this process is asked to stop and everything is saved.

        Raises:
            StoppedAfterSave: this process was asked to stop.
        """
        is_saved = state.global_step == self.trainer.checkpoint_state.saved_step
        if self.stop_request.has_to_end(0) and (is_saved or not self.trainer.is_in_train):
            raise StoppedAfterSave

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restarts the clock of the interval, and stops if the ranks have agreed to.

        Raises:
            StoppedAfterSave: the ranks have agreed to stop.
        """
        self.saved_at = self.step_started = time.monotonic()
        if self.is_stopping:
            self.trainer.publish()
            raise StoppedAfterSave

    def _agree(self, unsaved_s: float, *, is_last: bool) -> None:
        state = self.trainer.checkpoint_state
        pending = state.pending
        nodes = state.plan.layout.nodes
        limit_s = (
            MIN_UNSAVED_S
            if is_last and self.checkpoint_min
            else checkpoint_interval_s(self.checkpoint_min, self.pause_s, nodes)
        )
        # Rank 0 decides, so that all ranks use the same clock.
        is_due = state.rank.is_first and unsaved_s > limit_s and not pending
        is_copying = pending is not None and not pending.is_copied
        self.is_stopping, is_due, is_copying = state.consensus.any(
            self._has_to_stop(), is_due, is_copying
        )
        self.is_save_due = self.is_stopping or is_due
        if pending and not is_copying:
            self.trainer.publish()

    def _has_to_stop(self) -> bool:
        # A pending checkpoint has to be copied before the next one is written.
        saves = 2 if self.trainer.checkpoint_state.pending else 1
        return self.stop_request.has_to_end(
            saves * SAVE_MARGIN * self.save_s + STEPS_AHEAD * self.step_s
        )

    def _apply(self, control: Any) -> None:
        self.trainer.user_requested = self.user_requested
        control.should_save = self.user_requested or self.is_save_due
