"""The heartbeat: how far a run is, in progress.json and metrics.jsonl, and what it measures.

A folder that cannot be written for a while (full, read-only, a server away) does not end the
training: what was to be written is written later. The result and checkpoints do not wait so.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hpcft.core.files import read_record_if_exists, write_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Progress
from hpcft.training.distributed.rank_env import RankInfo
from hpcft.training.distributed.worker_channel import HeartbeatSender
from hpcft.training.telemetry.memory_peaks import Peaks, StepTimes, memory_now_bytes

log = logging.getLogger(__name__)

INTERVAL_S = 1.0


def _earlier(paths: RunPaths) -> Progress | None:
    """The last heartbeat of an earlier start, which may have been set aside for another job."""
    aside = list(paths.previous.glob(f"*/{paths.progress.name}"))
    aside.sort(key=lambda file: (len(file.parent.name), file.parent.name))  # they are numbered
    found = (read_record_if_exists(file, Progress) for file in (paths.progress, *reversed(aside)))
    return next((progress for progress in found if progress is not None), None)


class ProgressReporter(TrainerCallback):  # type: ignore[misc]
    """Writes how far the run is; only rank 0 does, the others leave the files alone.

    Every rank beats: it tells its supervisor that it is at work.
    """

    def __init__(
        self,
        paths: RunPaths,
        rank: RankInfo,
        restart_index: int = 0,
        beats: HeartbeatSender | None = None,
    ) -> None:
        self.paths = paths
        self.rank = rank
        self.tokens_per_step = 0.0
        self.peaks = Peaks()
        self.times = StepTimes()
        now = time.time()
        earlier = _earlier(paths) if restart_index else None
        previous_s, previous_rank_s = earlier.ran_s() if earlier else (0.0, 0.0)
        self.progress = Progress(
            phase="starting",
            updated_at=now,
            started_at=now,
            ranks=rank.world_size,
            previous_s=previous_s,
            previous_rank_s=previous_rank_s,
            job_id=rank.job_id,
            node=rank.node,
        )
        self._beats = beats or HeartbeatSender()
        self._written = 0.0
        self._lines = b""
        self._fails = False
        self._train_started: tuple[float, int] | None = None
        self.set()

    def set(self, **fields: Any) -> None:
        """Changes fields and writes the heartbeat: every second at most, or with a new phase."""
        now = time.time()
        new_phase = fields.get("phase", self.progress.phase) != self.progress.phase
        if new_phase:
            self.peaks.end(self.progress.phase)
        self.progress = self.progress.model_copy(update={**fields, "updated_at": now})
        self._beats.beat(self.progress.phase, self.progress.step)
        if not self.rank.is_first or not (new_phase or now - self._written > INTERVAL_S):
            return
        self.progress = self.progress.model_copy(
            update={
                "memory_bytes": memory_now_bytes(),
                "peak_memory_bytes": self.peaks.most_bytes(),
            }
        )
        self._written = now
        self._try(self._write_all)

    def log(self, kind: str, values: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        if self.rank.is_first:
            line = {"time": time.time(), "kind": kind, **values}
            self._lines += json.dumps(line).encode() + b"\n"
            self._try(self._write_lines)

    def logged(self, kind: str) -> dict[str, Any]:
        """The latest values that were logged as `kind`, by an earlier start of this run too."""
        lines = self.paths.metrics.read_text().splitlines() if self.paths.metrics.exists() else []
        found = [line for line in map(json.loads, lines) if line["kind"] == kind]
        return {k: v for k, v in found[-1].items() if k not in ("time", "kind")} if found else {}

    def _write_lines(self) -> None:
        if self._lines:
            _append(self.paths.metrics, self._lines)
            self._lines = b""

    def _write_all(self) -> None:
        self._write_lines()
        write_record(self.paths.progress, self.progress)

    def _try(self, writing: Callable[[], None]) -> None:
        """Writes, or leaves it to the next time where that fails."""
        try:
            writing()
        except OSError as error:
            if not self._fails:
                log.warning("the heartbeat cannot be written; the training goes on: %s", error)
            self._fails = True
        else:
            self._fails = False

    # ------------------------------------------------------------ what the Trainer calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Training starts: the number of steps is known."""
        self._train_started = (time.time(), state.global_step)
        self.set(phase="training", total_steps=state.max_steps, step=state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An optimizer step begins, maybe after a scoring."""
        self.set(phase="training")
        self.times.begin()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A micro-batch is done, but not the last one of its step."""
        self.set(phase="training")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An optimizer step is done: speed and time to go follow from all steps so far."""
        assert self._train_started is not None
        self.times.end()
        begun, first_step = self._train_started
        each_s = (time.time() - begun) / max(state.global_step - first_step, 1)
        self.set(
            phase="training",
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=float(state.epoch or 0.0),
            tokens_per_s=self.tokens_per_step / each_s,
            eta_s=each_s * (state.max_steps - state.global_step),
        )
        self._after(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An epoch is done: a scoring or a checkpoint may follow."""
        self._after(control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A split was scored during training: a checkpoint may follow."""
        if control.should_save:
            self.set(phase="saving")

    def _after(self, control: Any) -> None:
        """Begins the phase that the Trainer is about to enter."""
        if control.should_evaluate:
            self.set(phase="evaluation")
        elif control.should_save:
            self.set(phase="saving")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """The Trainer logs a loss or an evaluation."""
        logs = dict(logs or {})
        if "loss" in logs:
            self.set(loss=float(logs["loss"]), learning_rate=float(logs["learning_rate"]))
        self.log("step", {"step": state.global_step, **logs})

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A batch was scored; where nothing else is done, these are the steps."""
        done = {}
        if self._train_started is None and self.progress.total_steps:
            more = args.per_device_eval_batch_size * self.rank.world_size
            done = {"step": min(self.progress.step + more, self.progress.total_steps)}
        self.set(phase="evaluation", **done)


def _append(file: Path, lines: bytes) -> None:
    """Appends lines to a file, all or none.

    Raises:
        OSError: there is no room, or the file cannot be written.
    """
    with file.open("ab", buffering=0) as stream:
        size = stream.tell()
        try:
            if stream.write(lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        except OSError:
            stream.truncate(size)
            raise
