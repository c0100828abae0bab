"""Sweeps are expanded to points, and wrong ones are refused with their line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from builders import RECIPE, recipe_problems
from hpcft.config import recipe


@pytest.mark.parametrize(
    ("sweep", "count"),
    [
        ("{grid: {train.seed: [1, 2, 3]}}", 3),
        ("{grid: {train.seed: [1, 2], train.learning_rate: [1e-3, 1e-4, 1e-5]}}", 6),
        ("{zip: {train.seed: [1, 2], train.learning_rate: [1e-3, 1e-4]}}", 2),
        ("{list: [{train.seed: 1}, {train.max_steps: 2, train.seed: 5}]}", 2),
        ("{seeds: [1, 2, 3, 4]}", 4),
        ("{grid: {train.max_steps: [1, 2]}, seeds: [1, 2, 3]}", 6),
        (
            "{grid: {train.max_steps: [1, 2]}, seeds: [1, 2],"
            " list: [{train.weight_decay: 0.1}, {}],"
            " zip: {train.learning_rate: [1e-3, 1e-4], train.adam_beta1: [0.8, 0.9]}}",
            16,
        ),
        ("{grid: {model.config: [{hidden_size: 32}, {hidden_size: 64}]}}", 2),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_sweep_has_the_product_of_its_axes_as_points(sweep: str, count: int) -> None:
    points = recipe.load_recipe("tiny.yaml", [f"sweep={sweep}"])
    assert len(points) == count
    assert len({json.dumps(point.values, sort_keys=True) for point in points}) == count
    assert all(point.recipe.sweep is None for point in points)
    assert len({point.recipe.model_dump_json() for point in points}) == count


@pytest.mark.usefixtures("tiny")
def test_point_has_its_values_and_the_rest_of_the_recipe() -> None:
    sweep = "{zip: {train.seed: [1, 2], method: [{name: full}, {name: lora, r: 4}]}}"
    first, second = recipe.load_recipe("tiny.yaml", [f"sweep={sweep}"])
    assert first.values == {"train.seed": 1, "method": {"name": "full"}}
    assert (first.recipe.method.name, second.recipe.method.name) == ("full", "lora")
    assert (first.recipe.train.seed, second.recipe.train.seed) == (1, 2)
    assert first.recipe.train.max_steps == second.recipe.train.max_steps == 3


def test_swept_relative_paths_start_at_the_recipe_file(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny.parent / "more.jsonl").write_bytes((tiny.parent / "train.jsonl").read_bytes())
    tiny.write_text(
        RECIPE + "sweep:\n  grid:\n    task.data.files.train: [train.jsonl, more.jsonl]\n"
    )
    monkeypatch.chdir(tiny.parent.parent)
    points = recipe.load_recipe(str(tiny))
    files = [(p.recipe.task.data.files or {})["train"] for p in points]
    assert files == [str(tiny.parent / "train.jsonl"), str(tiny.parent / "more.jsonl")]
    assert points[1].location_of("task.data.files.train") == f"{tiny}:{RECIPE.count(chr(10)) + 3}"


@pytest.mark.parametrize(
    ("sweep", "patterns"),
    [
        (
            "  zip: {train.seed: [1, 2], train.max_steps: [1]}",
            [
                "@1 sweep.zip: expected lists of equal length, got train.seed: 2, "
                "train.max_steps: 1; give each"
            ],
        ),
        ("  grid: {}", ["@0 sweep: expected 1 to 5000 points, got 0"]),
        ("  grid: {train.seed: []}", ["@0 sweep: .* got 0"]),
        ("  grid:\n    train.sed: [1, 2]", ["@2 train.sed: unknown key; .*seed"]),
        ("  grid:\n    trian.seed: [1]", ["@2 trian: unknown key; .*train"]),
        ("  grid:\n    sweep.seeds: [1]", ["@2 sweep.seeds: expected a field of the recipe"]),
        ("  grid:\n    'a b': [1]", ["@2 a b: expected a field of the recipe .* got 'a b'"]),
        (
            "  grid:\n    train.seed: [1, x, y]\n    train.max_steps: [z, 4]",
            [
                '@2 train.seed: .* got "x"',
                '@2 train.seed: .* got "y"',
                '@3 train.max_steps: .* got "z"',
            ],
        ),
        ("\n  seeds: [1, -1]", ["@2 train.seed: .*greater than or equal to 0, got -1"]),
        ("\n  list: [{train.sed: 1}]", ["@2 train.sed: unknown key"]),
        ("  seeds: [a]", ["@1 sweep.seeds.0: expected a whole number"]),
        ("  gird: {}", [r"@1 sweep.gird: unknown key; did you mean grid\?"]),
        (
            "  list:\n" + "".join(f"    - train.max_steps: {n}\n" for n in range(1, 5002)),
            ["@0 sweep: expected 1 to 5000 points, got 5001"],
        ),
    ],
)
def test_wrong_sweep_is_refused_with_its_line(tiny: Path, sweep: str, patterns: list[str]) -> None:
    tiny.write_text(RECIPE + "sweep:\n" + sweep + "\n")
    first = RECIPE.count("\n") + 1
    problems = recipe_problems()
    for pattern in patterns:
        line = re.sub(r"@(\d)", lambda match: f"tiny.yaml:{first + int(match[1])}", pattern)
        assert any(re.match(line, text) for text in problems), problems
    assert len(problems) == len(patterns)
