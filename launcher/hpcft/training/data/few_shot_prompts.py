"""Writes the prompts of a run once, in groups that share their shots; all ranks read them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.paths import RunPaths
from hpcft.tasks.base import Example
from hpcft.tasks.few_shot.requests import PromptRequest, common_prefix_length
from hpcft.tasks.few_shot.task import Prompt


@dataclass(frozen=True)
class PromptGroup:
    """Prompts that show the same shots, and so begin with the same tokens."""

    prefix: list[int]
    """Tokens that all prompts of the group begin with."""
    examples: list[int]
    """Index of each prompt's example in the scored split."""
    labels: list[int]
    """Index of each example's true label."""
    requests: list[PromptRequest]
    """The whole prompts, prefix included, with the choices to score."""


def write_prompts(
    paths: RunPaths,
    recipe: FullRecipe,
    splits: Mapping[str, list[Example]],
    tokenizer: Any,
) -> tuple[dict[str, int], list[str]]:
    """Writes the prompts of the scored split.

    The file holds the tokens that a group shares only once: eight shots may be most of a prompt.

    Args:
        paths: the run's files.
        recipe: the run's recipe.
        splits: all examples, by split.
        tokenizer: the model's tokenizer.

    Returns:
        The tokens of the split, shots included; and notes for the reader of the result.
    """
    task, scored, seed = recipe.few_shot_task, recipe.evaluation.split, recipe.train.seed
    prompts = task.build_prompts(splits, scored, tokenizer, seed)
    labels = [example["label"] for example in splits[scored]]
    shot_counts = sorted({prompt.shots for prompt in prompts}, reverse=True)
    groups = [_group(prompts, labels, shots) for shots in shot_counts]
    (paths.prepared / "prompts.json").write_text(json.dumps(groups), encoding="utf-8")
    tokens: dict[str, int] = {scored: sum(len(prompt.request.tokens) for prompt in prompts)}
    return tokens, task.describe_prompts(prompts, seed)


def _group(prompts: Sequence[Prompt], labels: Sequence[int], shots: int) -> dict[str, Any]:
    members = [index for index, prompt in enumerate(prompts) if prompt.shots == shots]
    requests = [prompts[index].request for index in members]
    shared = common_prefix_length(requests)
    return {
        "prefix": requests[0].tokens[:shared],
        "examples": members,
        "labels": [labels[index] for index in members],
        "own": [request.tokens[shared:] for request in requests],
        "choices": [request.choices for request in requests],
    }


def read_prompts(paths: RunPaths) -> list[PromptGroup]:
    """Reads the prompts that rank 0 has prepared, the group with the most shots first."""
    return [
        PromptGroup(
            prefix=group["prefix"],
            examples=group["examples"],
            labels=group["labels"],
            requests=[
                PromptRequest(group["prefix"] + own, choices)
                for own, choices in zip(group["own"], group["choices"], strict=True)
            ],
        )
        for group in json.loads((paths.prepared / "prompts.json").read_text(encoding="utf-8"))
    ]
