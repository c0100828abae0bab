"""What happens between two steps: ranks agree whether to save, and whether to end then."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from hpcft.training.checkpointing.interval import interval_s
from hpcft.training.distributed.stop_signal import StoppedAfterSave, StopRequest
from hpcft.training.trainer.checkpointing import CheckpointingTrainer

WORTH_S = 60.0
"""Training that took less is done again faster than it is worth saving before the last scoring."""
SAVE_MARGIN = 1.5
"""A save may take so many times as long as the one before."""
STEPS_AHEAD = 2
"""Before a time limit there has to be room for so many steps besides the save."""


class SaveCallback(TrainerCallback):  # type: ignore[misc]
    """Saves when it is time, when the time limit is near, and when this run was told to end.

    A notice or a clock may reach one rank before another, and a save takes all of them. So at the
    end of each step they agree, over a group of processors that no GPU waits for.
    """

    def __init__(
        self,
        trainer: CheckpointingTrainer,
        notice: StopRequest,
        minutes: float | str,
        guess_s: float,
    ) -> None:
        """When to save.

        Args:
            trainer: whose steps these are.
            notice: what this process was told.
            minutes: `resources.checkpoint_min`.
            guess_s: seconds that a save takes, until one was measured.
        """
        self.trainer = trainer
        self.notice = notice
        self.minutes = minutes
        self.guess_s = guess_s
        self.step_s = 0.0
        self.saved_at = self.since = time.monotonic()
        self.user_requested = self.saves = self.ends = False

    @property
    def save_s(self) -> float:
        """Seconds that a save takes."""
        saving = self.trainer.saving
        earlier = saving.earlier.save_s if saving.earlier else None
        return saving.save_s or earlier or self.guess_s

    @property
    def pause_s(self) -> float:
        """Seconds for which a save keeps training."""
        return self.trainer.saving.pause_s or self.save_s

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Training begins, or goes on."""
        self.trainer.continue_losses()
        self.saved_at = self.since = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step is done: the ranks agree; the end of an epoch is left to `on_epoch_end`."""
        now = time.monotonic()
        self.step_s, self.since = now - self.since, now
        last = state.global_step >= state.max_steps
        self._agree(now - self.saved_at, last=last)
        self.user_requested = control.should_save
        if last or float(state.epoch).is_integer():
            control.should_save = False
        else:
            self._decide(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An epoch is done, and its validation follows: what is saved then knows its result."""
        self.user_requested = self.user_requested or control.should_save
        self._decide(control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A validation is no part of a step's time."""
        self.since = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Training is done; the last checkpoint may be one that the recipe asked for."""
        self.trainer.publish()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A batch was scored: told to end, there is nothing to wait for where all is saved.

        Raises:
            Saved: this process was told to end.
        """
        saved = state.global_step == self.trainer.saving.step
        if self.notice.has_to_end(0) and (saved or not self.trainer.is_in_train):
            raise StoppedAfterSave

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """All ranks have saved, unless what they have learned is nothing.

        Raises:
            Saved: they had agreed to end then.
        """
        self.saved_at = self.since = time.monotonic()
        if self.ends:
            self.trainer.publish()
            raise StoppedAfterSave

    def _agree(self, unsaved_s: float, *, last: bool) -> None:
        saving = self.trainer.saving
        underway = saving.underway
        first = saving.rank.is_first  # by one clock
        nodes = saving.plan.layout.nodes
        most_s = WORTH_S if last and self.minutes else interval_s(self.minutes, self.pause_s, nodes)
        due = first and unsaved_s > most_s and not underway
        copies = underway is not None and not underway.is_there
        self.ends, due, copies = saving.agreement.any(self._has_to_end(), due, copies)
        self.saves = self.ends or due
        if underway and not copies:
            self.trainer.publish()

    def _has_to_end(self) -> bool:
        saves = 2 if self.trainer.saving.underway else 1  # that has to arrive first
        return self.notice.has_to_end(saves * SAVE_MARGIN * self.save_s + STEPS_AHEAD * self.step_s)

    def _decide(self, control: Any) -> None:
        self.trainer.user_requested = self.user_requested
        control.should_save = self.user_requested or self.saves
