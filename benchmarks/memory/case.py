"""A case of the memory benchmark: a model, a task, a method and a layout, and the recipe of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from hpcft.config.recipe_types import FullRecipe

CLASSIFICATION = {"name": "classification", "labels": ["no", "yes"]}
INSTRUCTION = {"name": "instruction", "prompt": "{text}", "completion": "{label}"}
PROMPTING = {"name": "prompting", "prompt": "{text}", "shots": 8}

PROMPT_PART = 4
"""A prompt takes this part of a sequence: its labels are ignored."""


@dataclass(frozen=True)
class Case:
    """One run that is measured and predicted."""

    name: str
    """Says what is special; unique."""
    model: dict[str, Any]
    """`transformers` configuration, `model_type` among its fields."""
    method: dict[str, Any] = field(default_factory=lambda: {"name": "full"})
    """The recipe's method."""
    task: str = "instruction"
    """`instruction`, `classification` or `prompting`."""
    batch: int = 2
    """Micro-batch, B; of prompts, those of S tokens that a batch has room for."""
    sequence: int = 256
    """Tokens of every example, S; of every prompt, with its shots and its answer."""
    accumulation: int = 1
    """Micro-batches of an optimizer step."""
    checkpointing: bool = False
    """Whether activations are recomputed."""
    precision: str = "fp32"
    """`fp32` or `bf16`."""
    optim: str = "adamw_torch"
    """Optimizer, as in the recipe."""
    attention: str = "sdpa"
    """`sdpa` or `eager`."""
    stage: int = 0
    """ZeRO stage; 0 on several ranks is plain data parallelism."""
    ranks: int = 1
    """Processes."""
    loss_chunks: int = 1
    """Parts in which the loss is computed."""
    packed: bool = False
    """Whether the examples of a micro-batch share a row."""
    words: tuple[str, ...] = ()
    """The choices of a prompt."""

    @property
    def digest(self) -> str:
        """Changes when the case does: stored measurements of another case are not taken for it."""
        fields = asdict(self)
        for name, default in LATER.items():
            if fields[name] == default:
                del fields[name]
        text = json.dumps(fields, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def labelled_tokens(self) -> int:
        """Tokens of an example that carry a loss; a quarter of it is prompt."""
        return self.sequence - self.sequence // PROMPT_PART

    @property
    def threads(self) -> int:
        """Threads of a rank: two cores are what such a measurement has."""
        return 2 if self.ranks == 1 else 1

    def recipe(self) -> FullRecipe:
        """The recipe of the case."""
        task = {
            "instruction": INSTRUCTION,
            "classification": CLASSIFICATION,
            "prompting": {**PROMPTING, "labels": list(self.words)},
        }[self.task]
        return FullRecipe.model_validate(
            {
                "name": self.name,
                "model": {"config": self.model, "attn_implementation": self.attention},
                "task": {**task, "max_length": self.sequence, "data": {"path": "synthetic"}},
                "method": self.method,
                "train": {
                    "global_batch_size": self.batch * self.accumulation * self.ranks,
                    "per_device_train_batch_size": self.batch,
                    "max_steps": STEPS,
                    "optim": self.optim,
                    "bf16": self.precision == "bf16",
                    "fp16": False,
                    "gradient_checkpointing": self.checkpointing,
                    "packing": self.packed,
                    "eval_strategy": "no",
                },
                "evaluation": {"per_device_eval_batch_size": self.batch},
                "resources": {
                    "nodes": 1,
                    "gpus_per_node": self.ranks,
                    "zero_stage": self.stage,
                    "offload_optimizer": "none",
                    "offload_param": "none",
                },
            }
        )


LATER: dict[str, Any] = {"loss_chunks": 1, "packed": False, "words": ()}
"""Fields that came later, and what older cases have: their measurements stay valid."""

STEPS = 3
"""Optimizer steps of a measurement: Adam's states appear in the first, the third repeats."""
