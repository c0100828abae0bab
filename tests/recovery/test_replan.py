"""The ladder's last rung, more nodes: what is planned, and what later plans learn."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import builders
import pytest

from hpcft.config.recipe_types import FullRecipe
from hpcft.core import files, run_index
from hpcft.core.paths import RunPaths, calibration_file
from hpcft.core.records import (
    Attempt,
    Calibration,
    Cluster,
    Gpu,
    Job,
    Layout,
    OomCaps,
    Plan,
    Recovery,
    RunRecord,
)
from hpcft.jobs import learn, status
from hpcft.planning import calibration, caps, model_facts, oom_fallback, planner
from hpcft.recovery import log, replan

SMALL = {"model_type": "bert", "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2, "intermediate_size": 64,
         "max_position_embeddings": 64}  # fmt: skip


def recipe(**sections: Any) -> FullRecipe:
    made: dict[str, Any] = {
        "name": "made", "model": {"config": SMALL, "tokenizer": {"vocab_size": 400}},
        "task": {"name": "classification", "labels": ["a", "b"], "data": {"path": "x/y"},
                 "max_length": 32},
        "method": {"name": "full"}, "train": {"global_batch_size": 16}, **sections,
    }  # fmt: skip
    return FullRecipe.model_validate(made)


def site(**changes: Any) -> Cluster:
    fields: dict[str, Any] = {
        "name": "site", "scheduler": "slurm", "accelerator": "cpu", "max_nodes": 4,
        "cores_per_node": 8, "host_memory_gib": 8.0, **changes,
    }  # fmt: skip
    return Cluster(**fields)


def layout(nodes: int, **changes: Any) -> Layout:
    """One rank on each of so many nodes, as low as it gets on them."""
    least = {"gradient_accumulation_steps": 16 // nodes, "gradient_checkpointing": True}
    return builders.layout(0, nodes=nodes, **(least | changes))


def at_the_end(made: FullRecipe, there: Cluster, first: Layout) -> Plan:
    """A plan of which nothing is left to lower on its nodes."""
    facts = model_facts.compute_model_facts(made.model, made.task, made.method)
    plan = oom_fallback.with_layout(planner.make_plan(made, there, facts), first, 1, made, there)
    assert oom_fallback.next_fallback(plan, made, there, "step") is None
    return plan


# ---------------------------------------------------------------- what is planned


def test_each_time_the_run_takes_more_nodes_until_the_profile_has_no_more() -> None:
    made, there = recipe(), site()
    now: Plan | None = at_the_end(made, there, layout(1))
    told = []
    while now is not None:
        new = replan.plan_on_more_nodes(now, made, there)
        if new is not None:
            after = new.layout
            assert after.per_device_train_batch_size == 1
            assert after.gradient_accumulation_steps * after.world_size == 16
            assert after.gradient_checkpointing
            assert after.zero_stage >= max(now.layout.zero_stage, 1)
            assert new.per_device_eval_batch_size == 1
            assert new.mem_mib >= now.mem_mib, "what was too little is not lowered"
            assert new.ds_config is not None
            assert new.ds_config["train_batch_size"] == 16
            told.append(oom_fallback.describe_change(now, new))
        now = new
    assert told == ["1 → 2 nodes, no sharding → ZeRO-1, resubmitted", "2 → 4 nodes, resubmitted"]


@pytest.mark.parametrize(
    ("sections", "changes"),
    [
        ({"resources": {"nodes": 1}}, {}),  # a person's word
        ({"resources": {"zero_stage": 0}}, {}),  # unsharded, each node would hold it all
        ({}, {"max_nodes": 1}),
        ({}, {"scheduler": "local"}),
        ({"train": {"global_batch_size": 1}}, {}),  # a rank needs an example
    ],
)
def test_where_more_nodes_are_not_for_the_run_to_take(
    sections: dict[str, Any], changes: dict[str, Any]
) -> None:
    made, there = recipe(**sections), site(**changes)
    batch = made.train.global_batch_size
    first = layout(1, gradient_accumulation_steps=batch)
    assert replan.plan_on_more_nodes(at_the_end(made, there, first), made, there) is None


def test_several_nodes_are_whole_ones() -> None:
    """A run that began on one of four GPUs does not take one GPU of each of two nodes."""
    gpu = Gpu(name="A", memory_gib=40.0, compute_capability=8.0)
    there = site(accelerator="cuda", gpu=gpu, gpus_per_node=4, host_memory_gib=500.0)
    first = layout(1, zero_stage=3, offload_optimizer="cpu", offload_param="cpu")
    made = recipe()
    before = at_the_end(made, there, first)
    after = replan.plan_on_more_nodes(before, made, there)
    assert after is not None
    assert (
        oom_fallback.describe_change(before, after)
        == "1 → 2 nodes, 1 → 4 ranks on each, resubmitted"
    )
    assert (after.layout.offload_optimizer, after.layout.offload_param) == ("cpu", "cpu")


# ---------------------------------------------------------------- what later plans learn


def rung(number: int, laid: Layout, action: log.Action = "restart", job_id: str = "1") -> Recovery:
    return Recovery(number=number, at=1.0, cause="out_of_memory", job_id=job_id, rank=0, node="n",
                change=f"rung {number}",
                evidence="", action=action, layout=laid, per_device_eval_batch_size=1)  # fmt: skip


def record(*steps: Recovery) -> RunRecord:
    return RunRecord(
        run_id="a" * 8, recipe="made", cluster="site", finished_at=1.0, recoveries=[*steps]
    )


def test_nodes_and_a_loss_in_parts_are_learned() -> None:
    alone = record(rung(1, layout(1, per_device_train_batch_size=4, loss_chunks=8)))
    wider = record(rung(1, layout(1)), rung(2, layout(2, zero_stage=1), "resubmit"))
    planned_wide = record(rung(1, layout(4, zero_stage=1)))
    cap = {"per_device_train_batch_size": 1, "gradient_checkpointing": True}
    assert caps.caps_from_runs([alone, wider], "made", "site") == OomCaps(
        **cap, loss_chunks=8, nodes=2
    )
    assert caps.caps_from_runs([planned_wide], "made", "site") == OomCaps(**cap), (
        "it was never too few"
    )


def test_a_run_without_a_result_is_learned_from_too() -> None:
    ended = learn.UnfinishedRun("made", "site", (rung(1, layout(1, loss_chunks=8)),))
    cap = OomCaps(per_device_train_batch_size=1, gradient_checkpointing=True, loss_chunks=8)
    fitted = calibration.fit_calibration([], "site", [ended])
    assert (fitted.oom_caps, fitted.runs) == ({"made": cap}, 0)
    assert calibration.fit_calibration([], "elsewhere", [ended]).oom_caps == {}


def test_a_failed_run_lowers_the_next_plan(workplace: Path) -> None:
    (folder := workplace / "runs/made/aaaa0000").mkdir(parents=True)
    paths = RunPaths(folder)
    paths.recoveries.mkdir()
    attempt = Attempt(job_id="999999999", token="t", submitted_at=1.0, logs=str(paths.logs),
                      host=os.uname().nodename, process_started=1.0)  # fmt: skip
    files.write_record(paths.job, Job(run_id="aaaa0000", recipe="made", cluster="site",
                               scheduler="local", attempts=[attempt]))  # fmt: skip
    files.write_record(paths.recoveries / "1.json", rung(1, layout(1)))
    root = workplace / "runs"
    views = status.run_statuses(run_index.list_runs(root))
    assert [view.state for view in views] == ["FAILED"]
    assert learn.update_calibration(views, root) == [
        "calibration of site by 0 runs: made came down to micro-batch 1, checkpointing"
    ]
    known = files.read_record(calibration_file(root, "site"), Calibration)
    assert "made" in known.oom_caps


def shapes(made: FullRecipe, there: Cluster, **cap: Any) -> list[Layout]:
    """All layouts that are left to a recipe of which earlier runs came down."""
    least = {"per_device_train_batch_size": 64, "gradient_checkpointing": False} | cap
    known = Calibration(oom_caps={"made": OomCaps.model_validate(least)})
    held = there.model_copy(update={"calibration": known})
    found = list(planner.allowed_layouts(made, there, supports_chunked_loss=True))
    return caps.apply_caps(found, made, held)


def test_plans_are_held_to_what_earlier_runs_needed() -> None:
    made, there = recipe(), site()
    nodes = {(x.nodes, x.zero_stage > 0) for x in shapes(made, there, nodes=2)}
    assert nodes == {(2, True), (4, True)}
    assert {x.loss_chunks for x in shapes(made, there)} == {1, 8}
    assert {x.loss_chunks for x in shapes(made, there, loss_chunks=8)} == {8}
    both = shapes(made, there, loss_chunks=8, nodes=4, per_device_train_batch_size=2)
    assert {(x.nodes, x.loss_chunks) for x in both} == {(4, 8)}
    assert {x.per_device_train_batch_size for x in both} == {1, 2}


@pytest.mark.parametrize(
    ("sections", "changes", "cap"),
    [
        ({"resources": {"nodes": 1}}, {}, {"nodes": 2}),
        ({}, {"max_nodes": 1}, {"nodes": 2}),
        ({"train": {"global_batch_size": 16, "per_device_train_batch_size": 8}}, {},
         {"per_device_train_batch_size": 2}),
        ({"train": {"global_batch_size": 16, "gradient_checkpointing": False}}, {},
         {"gradient_checkpointing": True}),
    ],
)  # fmt: skip
def test_never_against_what_recipe_and_profile_fix(
    sections: dict[str, Any], changes: dict[str, Any], cap: dict[str, Any]
) -> None:
    made, there = recipe(**sections), site(**changes)
    assert shapes(made, there, **cap) == list(
        planner.allowed_layouts(made, there, supports_chunked_loss=True)
    )


def test_a_plan_says_what_it_learned() -> None:
    cap = OomCaps(per_device_train_batch_size=2, gradient_checkpointing=False, nodes=2)
    there = site(calibration=Calibration(oom_caps={"made": cap}))
    assert calibration.calibration_reasons(recipe(), there) == [
        "micro-batch at most 2, at least 2 nodes: earlier runs of made were out of memory and "
        "came down to it"
    ]
