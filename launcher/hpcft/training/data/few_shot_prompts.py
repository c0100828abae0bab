"""The prompts of a run: written once by rank 0, read by all, in groups that share their shots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.paths import RunPaths
from hpcft.tasks.base import Example
from hpcft.tasks.few_shot.requests import PromptRequest, common_prefix
from hpcft.tasks.few_shot.task import FewShot, Prompt


@dataclass(frozen=True)
class PromptGroup:
    """Prompts that show the same shots, and so begin alike."""

    prefix: list[int]
    """The tokens that all of them begin with."""
    examples: list[int]
    """Which example of the scored split each prompt is of."""
    labels: list[int]
    """The true label of each."""
    requests: list[PromptRequest]
    """What is asked, as whole prompts."""


def write_prompts(
    paths: RunPaths,
    recipe: FullRecipe,
    task: FewShot,
    splits: dict[str, list[Example]],
    tokenizer: Any,
    notes: list[str],
) -> dict[str, int]:
    """Writes the prompts of the scored split; its tokens, with shots.

    What a group's prompts share stands once in the file: eight shots may be most of a prompt.

    Args:
        paths: the run.
        recipe: its recipe.
        task: the recipe's task.
        splits: all examples.
        tokenizer: of the model.
        notes: is told how the number is made.
    """
    scored, seed = recipe.evaluation.split, recipe.train.seed
    prompts = task.prompts(splits, scored, tokenizer, seed)
    notes += task.notes(prompts, seed)
    labels = [example["label"] for example in splits[scored]]
    kinds = sorted({prompt.shots for prompt in prompts}, reverse=True)
    groups = [_group(prompts, labels, shots) for shots in kinds]
    (paths.prepared / "prompts.json").write_text(json.dumps(groups))
    return {scored: sum(len(prompt.request.tokens) for prompt in prompts)}


def _group(prompts: Sequence[Prompt], labels: Sequence[int], shots: int) -> dict[str, Any]:
    members = [index for index, prompt in enumerate(prompts) if prompt.shots == shots]
    requests = [prompts[index].request for index in members]
    shared = common_prefix(requests)
    return {
        "prefix": requests[0].tokens[:shared],
        "examples": members,
        "labels": [labels[index] for index in members],
        "own": [request.tokens[shared:] for request in requests],
        "choices": [request.choices for request in requests],
    }


def read_prompts(paths: RunPaths) -> list[PromptGroup]:
    """The prompts that rank 0 has prepared, those with the most shots first."""
    return [
        PromptGroup(
            group["prefix"],
            group["examples"],
            group["labels"],
            [
                PromptRequest(group["prefix"] + own, choices)
                for own, choices in zip(group["own"], group["choices"], strict=True)
            ],
        )
        for group in json.loads((paths.prepared / "prompts.json").read_text())
    ]
