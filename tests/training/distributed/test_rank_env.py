"""Tests of the environment that a rank sets for its libraries."""

from __future__ import annotations

import os

import pytest

from builders import cluster, facts, plan_of, recipe
from hpcft.training.distributed import rank_env


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 0), (1, 2)])
def test_set_environment_single_rank_sets_no_world_size(
    ranks: int, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its model would be wrapped in DDP, which holds every gradient twice."""
    shape = {"nodes": 1, "gpus_per_node": ranks, "zero_stage": stage}
    offload = {"offload_optimizer": "cpu"} if stage and ranks == 1 else {}
    plan = plan_of(recipe(resources=shape | offload), cluster("a100-80"), facts(100_000_000))
    monkeypatch.setattr(os, "environ", {"CUDA_VISIBLE_DEVICES": "3,4"})
    rank_env._set_environment(rank_env.RankInfo(0, ranks, 0, "here", "1"), plan)
    alone = (ranks, stage) == (1, 0)
    assert rank_env.single_process(plan) == alone
    assert ("WORLD_SIZE" in os.environ) == ("LOCAL_RANK" in os.environ) == (not alone)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("3" if alone else "3,4")
