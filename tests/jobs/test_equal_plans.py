"""Points of a sweep that share a plan: only those whose plans are equal."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builders import RECIPE, ROOT, Cli
from hpcft.config import cluster_profile, recipe
from hpcft.config.recipe_types import SweepPoint
from hpcft.jobs import equal_plans, prepare
from hpcft.jobs.equal_plans import WITHOUT_INFLUENCE, EqualPlans
from hpcft.planning.feasibility import plan_resolved

OTHER_VALUES: dict[str, Any] = {
    "seed": 7, "learning_rate": 0.3, "lr_scheduler_type": "constant", "warmup_steps": 2,
    "weight_decay": 0.5, "adam_beta1": 0.1, "adam_beta2": 0.2, "adam_epsilon": 0.01,
}  # fmt: skip


def changed(point: SweepPoint, **train: Any) -> SweepPoint:
    """A point with fields of its training changed."""
    own = point.recipe
    return replace(
        point, recipe=own.model_copy(update={"train": own.train.model_copy(update=train)})
    )


def test_points_that_share_a_plan_have_equal_plans(tiny: Path) -> None:
    assert set(OTHER_VALUES) == set(WITHOUT_INFLUENCE)
    (point,) = recipe.load_recipe(str(tiny), [])
    site = cluster_profile.load_profile("a100-80")
    plan = plan_resolved(point, site)
    plans = EqualPlans()
    plans.add(point, plan)
    other = changed(point, **OTHER_VALUES)
    assert plans.find(other) is plan
    assert plan_resolved(other, site) == plan
    assert plans.find(changed(point, global_batch_size=8)) is None
    assert plans.find(changed(point, optim="adafactor")) is None


def test_plans_read_none_of_the_fields_that_they_do_not_depend_on() -> None:
    fields = "|".join(field for field in WITHOUT_INFLUENCE if field != "seed")
    for file in (ROOT / "launcher/hpcft/planning").rglob("*.py"):
        assert not re.search(rf"train\.({fields})\b", file.read_text()), file


def test_the_shots_of_a_prompt_depend_on_the_seed(asked: Path) -> None:
    (point,) = recipe.load_recipe(str(asked), [])
    assert equal_plans._key(point) != equal_plans._key(changed(point, seed=7))
    assert equal_plans._key(point) == equal_plans._key(changed(point, learning_rate=0.3))


def test_submit_of_a_sweep_searches_equal_plans_once(
    tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[SweepPoint] = []

    def counted(point: SweepPoint, *arguments: Any, **more: Any) -> Any:
        planned.append(point)
        return plan_resolved(point, *arguments, **more)

    monkeypatch.setattr(prepare, "plan_resolved", counted)
    grid = (
        "train.seed: [0, 1, 2], train.learning_rate: [1e-4, 1e-3], train.global_batch_size: [4, 8]"
    )
    Path("sweep.yaml").write_text(RECIPE + f"sweep: {{ grid: {{ {grid} }} }}\n")
    said = cli("submit", "sweep.yaml", "-c", "local", "--dry-run", "--json")
    assert said.code == 0, said.err
    assert len(said.json["runs"]) == 12
    assert len(planned) == 2
    assert said.err.count("planning ") == 2
