"""Tests the caps on a plan, which follow from the fallbacks of earlier runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import builders
from builders import small_site
from hpcft.config.recipe_types import FullRecipe
from hpcft.core import run_index
from hpcft.core.files import read_record, write_record
from hpcft.core.paths import RunPaths, calibration_file
from hpcft.core.records import (
    Attempt,
    Calibration,
    Cluster,
    Job,
    Layout,
    OomCaps,
    Recovery,
    RunRecord,
)
from hpcft.core.records.recovery import Action
from hpcft.jobs import learn, status
from hpcft.planning import calibration, caps
from hpcft.planning.layouts import allowed_layouts


def recipe(**sections: Any) -> FullRecipe:
    return builders.recipe(**({"train": {"global_batch_size": 16}} | sections))


def layout(nodes: int, **changes: Any) -> Layout:
    fields = {"gradient_accumulation_steps": 16 // nodes, "gradient_checkpointing": True}
    return builders.layout(0, nodes=nodes, **(fields | changes))


def fallback(number: int, after: Layout, action: Action = "restart") -> Recovery:
    return Recovery(
        number=number, at=1.0, job_id="1", rank=0, node="n", cause="out_of_memory", evidence="",
        action=action, change=f"fallback {number}", layout=after, per_device_eval_batch_size=1,
    )  # fmt: skip


def record(*fallbacks: Recovery) -> RunRecord:
    return RunRecord(
        run_id="a" * 8, recipe="made", cluster="site", finished_at=1.0, recoveries=[*fallbacks]
    )


def test_caps_from_runs_are_the_smallest_fallbacks_of_a_recipe() -> None:
    def run(name: str, *micros: int, cause: str = "out_of_memory", **changes: Any) -> RunRecord:
        sizes = {"gradient_checkpointing": False} | changes
        recoveries = [
            fallback(i, layout(1, per_device_train_batch_size=micro, **sizes)).model_copy(
                update={"cause": cause}
            )
            for i, micro in enumerate(micros, 1)
        ]
        return record(*recoveries).model_copy(update={"recipe": name})

    runs = [
        run("made"),
        run("made", 8, 4),
        run("made", 2),
        run("other", 1),
        run("made", 1, cause="host_oom"),
        run("made", 2, gradient_checkpointing=True),
    ]
    cap = caps.caps_from_runs(runs, "made", "site")
    assert cap == OomCaps(per_device_train_batch_size=2, gradient_checkpointing=True)
    assert caps.caps_from_runs(runs, "made", "elsewhere") is None
    assert caps.caps_from_runs(runs[:1], "made", "site") is None


def test_caps_from_runs_learns_nodes_and_loss_chunks() -> None:
    one_node = record(fallback(1, layout(1, per_device_train_batch_size=4, loss_chunks=8)))
    wider = record(fallback(1, layout(1)), fallback(2, layout(2, zero_stage=1), "resubmit"))
    planned_wide = record(fallback(1, layout(4, zero_stage=1)))
    cap = {"per_device_train_batch_size": 1, "gradient_checkpointing": True}
    assert caps.caps_from_runs([one_node, wider], "made", "site") == OomCaps(
        **cap, loss_chunks=8, nodes=2
    )
    learned = caps.caps_from_runs([planned_wide], "made", "site")
    assert learned == OomCaps(**cap), "fewer nodes were never tried"


def test_fit_calibration_learns_caps_from_a_run_without_a_result() -> None:
    unfinished = learn.UnfinishedRun("made", "site", (fallback(1, layout(1, loss_chunks=8)),))
    cap = OomCaps(per_device_train_batch_size=1, gradient_checkpointing=True, loss_chunks=8)
    fitted = calibration.fit_calibration([], "site", [unfinished])
    assert (fitted.oom_caps, fitted.runs) == ({"made": cap}, 0)
    assert calibration.fit_calibration([], "elsewhere", [unfinished]).oom_caps == {}


def test_update_calibration_learns_caps_from_a_failed_run(workplace: Path) -> None:
    paths = RunPaths(workplace / "runs/made/aaaa0000")
    paths.recoveries.mkdir(parents=True)
    attempt = Attempt(job_id="999999999", token="t", submitted_at=1.0, logs=str(paths.logs),
                      host=os.uname().nodename, process_started=1.0)  # fmt: skip
    job = Job(run_id="aaaa0000", recipe="made", cluster="site", scheduler="local",
              attempts=[attempt])  # fmt: skip
    write_record(paths.job, job)
    write_record(paths.recoveries / "1.json", fallback(1, layout(1)))
    root = workplace / "runs"
    runs = status.run_statuses(run_index.list_runs(root))
    assert [run.state for run in runs] == ["FAILED"]
    assert learn.update_calibration(runs, root) == [
        "site: plans of made use micro-batch at most 1, checkpointing"
    ]
    known = read_record(calibration_file(root, "site"), Calibration)
    assert "made" in known.oom_caps


def layouts_within(recipe: FullRecipe, cluster: Cluster, **cap: Any) -> list[Layout]:
    """Returns all layouts of a recipe within a cap."""
    fields = {"per_device_train_batch_size": 64, "gradient_checkpointing": False} | cap
    known = Calibration(oom_caps={"made": OomCaps.model_validate(fields)})
    layouts = list(allowed_layouts(recipe, cluster, supports_chunked_loss=True))
    return caps.apply_caps(layouts, recipe, cluster.model_copy(update={"calibration": known}))


def test_apply_caps_keeps_the_layouts_within_the_caps() -> None:
    made, site = recipe(), small_site()
    nodes = {(x.nodes, x.zero_stage > 0) for x in layouts_within(made, site, nodes=2)}
    assert nodes == {(2, True), (4, True)}
    assert {x.loss_chunks for x in layouts_within(made, site)} == {1, 8}
    assert {x.loss_chunks for x in layouts_within(made, site, loss_chunks=8)} == {8}
    both = layouts_within(made, site, loss_chunks=8, nodes=4, per_device_train_batch_size=2)
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
def test_apply_caps_ignores_a_cap_that_recipe_or_profile_exclude(
    sections: dict[str, Any], changes: dict[str, Any], cap: dict[str, Any]
) -> None:
    made, site = recipe(**sections), small_site(**changes)
    every = list(allowed_layouts(made, site, supports_chunked_loss=True))
    assert layouts_within(made, site, **cap) == every


def test_calibration_reasons_names_the_caps_of_a_recipe() -> None:
    cap = OomCaps(per_device_train_batch_size=2, gradient_checkpointing=False, nodes=2)
    site = small_site(calibration=Calibration(oom_caps={"made": cap}))
    inputs = builders.plan_inputs(recipe(), site)
    assert calibration.calibration_reasons(inputs, builders.layout(0)) == [
        "micro-batch at most 2, at least 2 nodes: earlier runs of made ran out of memory and fell "
        "back to it"
    ]
