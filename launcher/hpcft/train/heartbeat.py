"""The heartbeat and what was measured: progress.json, metrics.jsonl, memory, speed."""

from __future__ import annotations

import json
import resource
import time
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from hpcft.paths import RunPaths
from hpcft.records import Progress
from hpcft.store import write
from hpcft.train.start import Rank

INTERVAL_S = 1.0


def memory_now_bytes() -> int:
    """Device memory allocated on a GPU; resident set of this process on a CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    return int(psutil.Process().memory_info().rss)


def memory_peak_bytes() -> int:
    """Peak of device memory reserved on a GPU; peak resident set of this process on a CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    return host_peak_bytes()


def host_peak_bytes() -> int:
    """Peak resident set of this process; Linux counts it in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Heartbeat(TrainerCallback):  # type: ignore[misc]
    """Writes how far the run is; only rank 0 does, the others leave the files alone."""

    def __init__(self, paths: RunPaths, me: Rank) -> None:
        self.paths = paths
        self.me = me
        self.tokens_per_step = 0.0
        now = time.time()
        self.progress = Progress(
            phase="starting", updated_at=now, started_at=now, job_id=me.job_id, node=me.node
        )
        self._written = 0.0
        self._train_started: tuple[float, int] | None = None
        self.set()

    def set(self, **fields: Any) -> None:
        """Changes fields and writes the heartbeat: every second at most, or with a new phase."""
        now = time.time()
        new_phase = fields.get("phase", self.progress.phase) != self.progress.phase
        self.progress = self.progress.model_copy(update={**fields, "updated_at": now})
        if not self.me.is_first or not (new_phase or now - self._written > INTERVAL_S):
            return
        self.progress = self.progress.model_copy(
            update={"memory_bytes": memory_now_bytes(), "peak_memory_bytes": memory_peak_bytes()}
        )
        write(self.paths.progress, self.progress)
        self._written = now

    def log(self, kind: str, values: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        if self.me.is_first:
            line = {"time": time.time(), "kind": kind, **values}
            with self.paths.metrics.open("a") as stream:
                stream.write(json.dumps(line) + "\n")

    # ------------------------------------------------------------ what the Trainer calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Training starts: the number of steps is known."""
        self._train_started = (time.time(), state.global_step)
        self.set(phase="training", total_steps=state.max_steps, step=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An optimizer step is done: speed and time to go follow from all steps so far."""
        assert self._train_started is not None
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

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """The Trainer logs a loss or an evaluation."""
        logs = dict(logs or {})
        if "loss" in logs:
            self.set(loss=float(logs["loss"]), learning_rate=float(logs["learning_rate"]))
        self.log("step", {"step": state.global_step, **logs})

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A batch was scored."""
        self.set(phase="evaluation")
