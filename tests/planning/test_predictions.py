"""Tests plans of all shipped recipes on all shipped profiles, against recorded predictions."""

from __future__ import annotations

import json

import pytest

import predictions
from hpcft.config.cluster_profile import load_profile
from hpcft.config.recipe import load_recipe
from hpcft.core.errors import DoesNotFit
from hpcft.jobs.what_fits import FitResult, plan_run

RECORDED = json.loads(predictions.FILE.read_text())
pytestmark = [pytest.mark.process, pytest.mark.usefixtures("cache_of_this_module")]


@pytest.fixture(scope="module")
def results(cache_of_this_module: None) -> dict[str, FitResult]:
    """The plan, or the reason why there is none, of each recipe on each profile."""
    return predictions.predict()


def test_predictions_are_recorded_for_every_recipe_and_profile() -> None:
    assert list(RECORDED) == predictions.CELLS, "run `python tests/predictions.py`"


@pytest.mark.parametrize("cell", predictions.CELLS)
def test_predictions_are_those_recorded(cell: str, results: dict[str, FitResult]) -> None:
    assert json.loads(json.dumps(predictions.numbers_of(results[cell]))) == RECORDED[cell]


@pytest.mark.parametrize("cell", [cell for cell, numbers in RECORDED.items()
                                  if "refused" not in numbers])  # fmt: skip
def test_plans_stay_within_their_cluster(cell: str, results: dict[str, FitResult]) -> None:
    plan = results[cell].plan
    assert plan is not None
    name, site = cell.split(" @ ")
    cluster = load_profile(site).cluster
    recipe = load_recipe(name)[0].recipe
    layout = plan.layout
    assert 0 < plan.gpu_peak_bytes <= plan.gpu_capacity_bytes
    assert 0 < plan.host_peak_bytes <= plan.host_capacity_bytes
    assert plan.mem_mib * 2**20 <= plan.host_capacity_bytes
    assert plan.cpus_per_task * layout.ranks_per_node <= cluster.cores_per_node
    batch = layout.per_device_train_batch_size * layout.gradient_accumulation_steps
    if recipe.method.trains:
        assert batch * layout.world_size == recipe.train.global_batch_size
    if plan.ds_config is not None:
        assert plan.ds_config["train_batch_size"] == batch * layout.world_size
    assert (plan.ds_config is None) == (layout.zero_stage == 0)


@pytest.mark.parametrize("name", [cell.split(" @ ")[0] for cell, numbers in RECORDED.items()
                                  if "refused" in numbers and cell.endswith("@ t4-16")
                                  and cell != "quickstart @ t4-16"])  # fmt: skip
def test_refusal_names_a_change_that_would_fit(name: str) -> None:
    (point,) = load_recipe(name)
    with pytest.raises(DoesNotFit) as refused:
        plan_run(point, load_profile("t4-16"))
    assert str(refused.value).partition("smallest change: ")[2].strip()


def test_refusal_of_a_few_shot_recipe_names_four_bits() -> None:
    """Gemma 7B in 16 bits is as large as a T4, and Colab has 12.7 GiB of host memory."""
    (point,) = load_recipe("gemma7b_fewshot")
    with pytest.raises(DoesNotFit, match=r"smallest change: method\.load_in_4bit: true"):
        plan_run(point, load_profile("t4-16"))
