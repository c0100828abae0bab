"""Checks that choices which a local tokenizer cannot tell apart are refused before the queue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from builders import family_tokenizer, write_rows
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.errors import DataError
from hpcft.staging.check_rows import check_rows

ROWS = [{"q": "how many legs has a horse ?", "x": "Good", "y": "good", "label": n % 2,
         "a": "good"} for n in range(4)]  # fmt: skip
INSTRUCTION = {"name": "instruction", "prompt": "{q} ", "completion": "{a}"}
PROMPTING = {"name": "prompting", "prompt": "{q} ", "labels": ["a", "b"]}


@pytest.mark.parametrize(
    ("task", "method"),
    [
        ({**INSTRUCTION, "choices": ["Good", "good"]}, "full"),
        ({**INSTRUCTION, "completion": "{y}", "choices": ["{x}", "{y}"]}, "full"),
        ({**PROMPTING, "choices": ["Good", "good"]}, "frozen"),
        ({**PROMPTING, "choices": ["{x}", "{y}"]}, "frozen"),
    ],
    ids=["instruction", "instruction-templates", "prompting", "prompting-templates"],
)
def test_check_rows_choices_with_the_same_tokens_are_refused(
    tmp_path: Path, task: dict[str, Any], method: str
) -> None:
    data = {"files": {name: str(write_rows(tmp_path / f"{name}.jsonl", ROWS))
                      for name in ("train", "test")}}  # fmt: skip

    def recipe(family: str) -> FullRecipe:
        folder = tmp_path / family
        family_tokenizer(family).save_pretrained(folder)
        return FullRecipe.model_validate(
            {"name": "made", "model": {"path": str(folder)}, "task": {**task, "data": data},
             "method": {"name": method}}
        )  # fmt: skip

    with pytest.raises(DataError, match=r"test\.jsonl:1 task\.choices: the choices .* have the sa"):
        check_rows(recipe("wordpiece"), fixed=False)
    check_rows(recipe("bpe"), fixed=False)
