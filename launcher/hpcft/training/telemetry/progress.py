"""ProgressReporter: writes progress.json and metrics.jsonl, and measures the run.

Training continues if the run folder cannot be written for a while (it is full, read-only, or its
server is away): the reporter writes later. The result and checkpoints do not wait so.
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
from hpcft.training.telemetry.job_start import job_started_at
from hpcft.training.telemetry.memory_peaks import PeakTracker, StepTimer, memory_now_bytes

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
"""Shortest time in seconds between two writes of progress.json."""


def _read_previous_progress(paths: RunPaths) -> Progress | None:
    """Reads the last heartbeat of an earlier start, which may be archived for another job."""
    archives = (paths.folder / "earlier", paths.previous)  # `earlier` is what hpcft 0.1 wrote.
    archived = [
        file
        for archive in archives
        for file in sorted(
            archive.glob(f"*/{paths.progress.name}"),
            # The folders of an archive are numbered.
            key=lambda file: (len(file.parent.name), file.parent.name),
        )
    ]
    files = (paths.progress, *reversed(archived))
    records = (read_record_if_exists(file, Progress) for file in files)
    return next((progress for progress in records if progress is not None), None)


def _charged_before(
    started_at: float, job_id: str, previous: Progress | None
) -> tuple[float, float]:
    """Returns the seconds before this job, and their sum over all ranks.

    Args:
        started_at: Unix time at which this job began.
        job_id: id of this job, which it keeps when Slurm requeues it.
        previous: the last heartbeat of an earlier start, in this job or an earlier one.
    """
    if previous is None:
        return 0.0, 0.0
    if previous.job_id == job_id and previous.updated_at > started_at:
        # The ranks have restarted within this job, which counts as a whole.
        return previous.previous_s, previous.previous_rank_s
    return previous.ran_s()


class ProgressReporter(TrainerCallback):  # type: ignore[misc]
    """Reports how far a run is: to the run folder on rank 0, to its supervisor on every rank."""

    def __init__(
        self,
        paths: RunPaths,
        rank: RankInfo,
        restart_index: int = 0,
        heartbeats: HeartbeatSender | None = None,
    ) -> None:
        """Creates the reporter, and writes the first heartbeat.

        Args:
            paths: the run's files.
            rank: this process among the ranks.
            restart_index: number of recoveries before this process started.
            heartbeats: sends heartbeats to the supervisor; None sends none.
        """
        self.paths = paths
        self.rank = rank
        self.tokens_per_step = 0.0
        self.peaks = PeakTracker()
        self.step_timer = StepTimer()
        now = time.time()
        previous = _read_previous_progress(paths) if restart_index else None
        started_at = job_started_at()
        previous_s, previous_rank_s = _charged_before(started_at, rank.job_id, previous)
        self.progress = Progress(
            phase="starting",
            updated_at=now,
            started_at=started_at,
            ranks=rank.world_size,
            previous_s=previous_s,
            previous_rank_s=previous_rank_s,
            job_id=rank.job_id,
            node=rank.node,
        )
        self._heartbeats = heartbeats or HeartbeatSender()
        self._written_at = 0.0
        self._unwritten_lines = b""
        self._is_failing = False
        self._train_started: tuple[float, int] | None = None
        self.set()

    def set(self, **fields: Any) -> None:
        """Changes fields of the progress, and sends a heartbeat.

        progress.json is written at most once a second, and whenever the phase changes.

        Args:
            fields: fields of `Progress` with their new values.
        """
        now = time.time()
        is_new_phase = fields.get("phase", self.progress.phase) != self.progress.phase
        if is_new_phase:
            self.peaks.end_phase(self.progress.phase)
        self.progress = self.progress.model_copy(update={**fields, "updated_at": now})
        self._heartbeats.send(self.progress.phase, self.progress.step)
        is_due = is_new_phase or now - self._written_at > INTERVAL_S
        if not (self.rank.is_first and is_due):
            return
        self.progress = self.progress.model_copy(
            update={
                "memory_bytes": memory_now_bytes(),
                "peak_memory_bytes": self.peaks.largest_bytes(),
            }
        )
        self._written_at = now
        self._try(self._write_all)

    def log(self, kind: str, values: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        if self.rank.is_first:
            line = {"time": time.time(), "kind": kind, **values}
            self._unwritten_lines += json.dumps(line).encode() + b"\n"
            self._try(self._write_lines)

    def last_logged(self, kind: str) -> dict[str, Any]:
        """Returns the last values of a kind in metrics.jsonl, from earlier starts too."""
        text = self.paths.metrics.read_text(encoding="utf-8") if self.paths.metrics.exists() else ""
        lines = [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]
        last = lines[-1] if lines else {}
        return {key: value for key, value in last.items() if key not in ("time", "kind")}

    def logged_losses(self) -> list[float]:
        """Returns the training losses in metrics.jsonl, from earlier starts too."""
        text = self.paths.metrics.read_text(encoding="utf-8") if self.paths.metrics.exists() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        return [line["loss"] for line in lines if line["kind"] == "step" and "loss" in line]

    def _write_lines(self) -> None:
        if self._unwritten_lines:
            _append(self.paths.metrics, self._unwritten_lines)
            self._unwritten_lines = b""

    def _write_all(self) -> None:
        self._write_lines()
        write_record(self.paths.progress, self.progress)

    def _try(self, write: Callable[[], None]) -> None:
        """Writes; if that fails, warns once and leaves it to the next write."""
        try:
            write()
        except OSError as error:
            if not self._is_failing:
                log.warning(
                    "progress.json and metrics.jsonl cannot be written now; training continues, "
                    "and they will be written later: %s",
                    error,
                )
            self._is_failing = True
        else:
            self._is_failing = False

    # ------------------------------------------------------------ callbacks of the Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Reports the number of steps, which is known once training starts."""
        self._train_started = (time.time(), state.global_step)
        self.set(phase="training", total_steps=state.max_steps, step=state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts the step timer; the phase before may have been an evaluation."""
        self.set(phase="training")
        self.step_timer.start()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Sends a heartbeat after each micro-batch but the last one of a step."""
        self.set(phase="training")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Reports the step, with speed and remaining time from all steps of this start."""
        assert self._train_started is not None
        self.step_timer.stop()
        started_at, first_step = self._train_started
        step_s = (time.time() - started_at) / max(state.global_step - first_step, 1)
        self.set(
            phase="training",
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=float(state.epoch or 0.0),
            tokens_per_s=self.tokens_per_step / step_s,
            eta_s=step_s * (state.max_steps - state.global_step),
        )
        self._set_next_phase(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Reports the evaluation or checkpoint that follows the epoch."""
        self._set_next_phase(control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Reports the checkpoint that follows an evaluation."""
        if control.should_save:
            self.set(phase="saving")

    def _set_next_phase(self, control: Any) -> None:
        if control.should_evaluate:
            self.set(phase="evaluation")
        elif control.should_save:
            self.set(phase="saving")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Reports a loss or the metrics of an evaluation."""
        logs = dict(logs or {})
        if "loss" in logs:
            self.set(loss=float(logs["loss"]), learning_rate=float(logs["learning_rate"]))
        # The Trainer also logs its validations, and a summary at its end.
        kind = "step" if "loss" in logs else "summary"
        if any(name.startswith("eval_") for name in logs):
            kind = "validation"
        self.log(kind, {"step": state.global_step, **logs})

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Sends a heartbeat after a scored batch; a run that only evaluates counts its examples."""
        done = {}
        if self._train_started is None and self.progress.total_steps:
            examples = args.per_device_eval_batch_size * self.rank.world_size
            done = {"step": min(self.progress.step + examples, self.progress.total_steps)}
        self.set(phase="evaluation", **done)


def _append(file: Path, lines: bytes) -> None:
    """Appends lines to a file, all or none.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    with file.open("ab", buffering=0) as stream:
        size = stream.tell()
        try:
            if stream.write(lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        except OSError:
            stream.truncate(size)
            raise
