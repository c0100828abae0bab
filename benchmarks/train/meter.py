"""What a contender needs: useful tokens, seconds and resident memory of the steps after warm-up.

All contenders but the bare loop are `transformers.Trainer`s, and are measured by the same hooks.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

WARM_UP = 2
"""Steps that are not counted."""
PAD = 0
"""The token of padding; no text has it."""


class Meter:
    """Counts the tokens of batches, and the time between two optimizer steps."""

    def __init__(self) -> None:
        self.tokens = 0
        self.steps = 0
        self._ends: list[float] = []

    def batch(self, inputs: Any) -> None:
        """A batch is about to be trained on."""
        self.tokens += int((inputs["input_ids"] != PAD).sum())

    def step(self) -> None:
        """An optimizer step is done."""
        self.steps += 1
        if self.steps == WARM_UP:
            Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident set anew
            self.tokens = 0
        if self.steps >= WARM_UP:
            self._ends.append(time.perf_counter())

    def found(self) -> dict[str, Any]:
        """What was measured, at the end of the last step."""
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
    """Puts a meter into every Trainer of this process; writes what it found when it ends."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.meter = Meter()
        plain = Trainer.training_step

        def counted(trainer: Any, model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
            self.meter.batch(inputs)
            return plain(trainer, model, inputs, *more, **named)

        Trainer.training_step = counted

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """All train the same: every weight, in fp32, without recomputation."""
        assert all(p.requires_grad and str(p.dtype) == "torch.float32" for p in model.parameters())
        assert not args.gradient_checkpointing
        assert not args.bf16

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An optimizer step is done; of the last one no log or evaluation is counted."""
        self.meter.step()
        if state.global_step == state.max_steps:
            self.file.write_text(json.dumps(self.meter.found()))
