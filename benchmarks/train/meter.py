"""Measures a contender after warm-up: useful tokens, seconds and resident memory.

All contenders but the bare loop are `transformers.Trainer`s, measured by the same hooks.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

WARM_UP = 2
"""Number of first steps that are not measured."""
PAD = 0
"""Token of padding, which no text has."""


class Meter:
    """Counts the tokens of batches, and the time between two optimizer steps."""

    def __init__(self) -> None:
        self.tokens = 0
        self.steps = 0
        self._ends: list[float] = []

    def count_batch(self, inputs: Any) -> None:
        """Counts the tokens of a batch before it is trained on."""
        self.tokens += int((inputs["input_ids"] != PAD).sum())

    def end_step(self) -> None:
        """Takes the time at the end of an optimizer step."""
        self.steps += 1
        if self.steps == WARM_UP:
            Path("/proc/self/clear_refs").write_text(
                "5"
            )  # This resets the peak of resident memory.
            self.tokens = 0
        if self.steps >= WARM_UP:
            self._ends.append(time.perf_counter())

    def result(self) -> dict[str, Any]:
        """Returns the measurement up to the end of the last step."""
        seconds = [end - begin for begin, end in itertools.pairwise(self._ends)]
        steps = self.steps - WARM_UP
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM"))
        return {
            "tokens_per_s": self.tokens / sum(seconds),
            "steps_s": seconds,
            "tokens_per_step": self.tokens / steps,
            "peak_mib": int(peak.split()[1]) / 1024,
        }


class Watch(TrainerCallback):  # type: ignore[misc]
    """Puts a meter into every Trainer of this process, and writes its result at the last step."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.meter = Meter()
        original = Trainer.training_step

        def counted(trainer: Any, model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
            self.meter.count_batch(inputs)
            return original(trainer, model, inputs, *more, **named)

        Trainer.training_step = counted

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Checks that every contender trains all weights, in fp32, without recomputation."""
        assert all(p.requires_grad and str(p.dtype) == "torch.float32" for p in model.parameters())
        assert not args.gradient_checkpointing
        assert not args.bf16

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ends the step, before the Trainer logs or evaluates."""
        self.meter.end_step()
        if state.global_step == state.max_steps:
            self.file.write_text(json.dumps(self.meter.result()))
