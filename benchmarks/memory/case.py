"""Defines a case of the memory benchmark: model, task, method and layout, and its recipe."""

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
"""One part in four of a sequence is prompt, whose labels are ignored."""


@dataclass(frozen=True)
class Case:
    """One run whose memory is measured and predicted."""

    name: str
    """Unique name that says what is special about the case."""
    model: dict[str, Any]
    """`transformers` configuration with its `model_type`."""
    method: dict[str, Any] = field(default_factory=lambda: {"name": "full"})
    """Method section of the recipe."""
    task: str = "instruction"
    """Name of the task: `instruction`, `classification` or `prompting`."""
    batch: int = 2
    """Examples of a micro-batch, B; in few-shot prompting, prompts of S tokens per batch."""
    sequence: int = 256
    """Tokens of every example, S; in few-shot prompting, with its shots and its choice."""
    accumulation: int = 1
    """Number of micro-batches per optimizer step."""
    checkpointing: bool = False
    """Whether activations are recomputed in the backward pass (gradient checkpointing)."""
    precision: str = "fp32"
    """Compute precision: `fp32` or `bf16`."""
    optim: str = "adamw_torch"
    """Optimizer, as in the recipe."""
    attention: str = "sdpa"
    """Attention implementation: `sdpa` or `eager`."""
    stage: int = 0
    """ZeRO stage; 0 on several ranks is data parallelism without ZeRO."""
    ranks: int = 1
    """Number of ranks."""
    loss_chunks: int = 1
    """Number of chunks in which the loss is computed."""
    packed: bool = False
    """Whether the examples of a micro-batch are packed into one row."""
    words: tuple[str, ...] = ()
    """Choices of a few-shot prompt."""

    @property
    def digest(self) -> str:
        """Hash of the case; measurements that were stored with another hash are of another case."""
        fields = asdict(self)
        for name, default in NEW_FIELDS.items():
            if fields[name] == default:
                del fields[name]
        text = json.dumps(fields, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def labelled_tokens(self) -> int:
        """Number of tokens of an example that carry a loss; the rest is prompt."""
        return self.sequence - self.sequence // PROMPT_PART

    @property
    def threads(self) -> int:
        """Number of CPU threads per rank; the benchmark is made for two cores."""
        return 2 if self.ranks == 1 else 1

    def recipe(self) -> FullRecipe:
        """Returns the recipe of the case."""
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


NEW_FIELDS: dict[str, Any] = {"loss_chunks": 1, "packed": False, "words": ()}
"""Fields added after the first measurements, with the values of those cases, which stay valid."""

STEPS = 3
"""Optimizer steps of a measurement. Adam creates its states in the first; the others repeat."""
