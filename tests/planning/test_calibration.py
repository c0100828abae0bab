"""Tests calibration: fitted from runs, stored in the runs folder, used by plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builders import ROOT, Cli, cluster, facts, layout, plan_inputs, plan_of, recipe
from hpcft.core.errors import StoreError
from hpcft.core.paths import RunPaths, calibration_file
from hpcft.core.records import (
    CALIBRATION_BOUNDS,
    Calibration,
    Job,
    Measurement,
    OomCaps,
    PhasePeaks,
    Prediction,
    Recovery,
    RunRecord,
)
from hpcft.core.units import GIB, MIB
from hpcft.jobs import learn
from hpcft.jobs.status import RunStatus
from hpcft.planning import calibration
from hpcft.planning.calibration import MAX_RUNS, fit_calibration
from hpcft.planning.feasibility import with_calibration
from hpcft.planning.memory.host_memory import host_memory_items
from hpcft.planning.memory.model_states import COMMUNICATOR_BYTES, tensor_bytes

pytestmark = pytest.mark.usefixtures("cache_of_this_module")


PREDICTED: dict[str, Any] = {
    "tensor_bytes": 10 * GIB, "communicator_bytes": 0, "step_s": 1.25, "flops_s": 1.0,
    "efficiency": 0.35, "tokens_per_step": 1000,
}  # fmt: skip


def on_gpu(reserved_bytes: int = 10 * GIB, context_bytes: int = GIB // 2) -> PhasePeaks:
    """Returns the peaks of a phase on a GPU."""
    return PhasePeaks(resident_bytes=GIB, allocated_bytes=reserved_bytes - MIB,
                      reserved_bytes=reserved_bytes,
                      device_bytes=reserved_bytes + context_bytes)  # fmt: skip


def record(
    peaks: PhasePeaks | None = None, predicted: dict[str, Any] | None = None, **changes: Any
) -> RunRecord:
    """Returns a finished run, by default one that went as predicted."""
    phases = {"model": peaks, "training": peaks} if peaks else {}
    timed = {"step_s": 1.25, "timed_steps": 20, "tokens_per_step": 1000.0}
    measured = Measurement(wall_s=1.0, gpu_hours=1.0, peak_memory_bytes=1, peak_host_bytes=1,
                        phases=phases, **(timed | changes.pop("measured", {})))  # fmt: skip
    fields: dict[str, Any] = {"run_id": "a" * 12, "recipe": "made", "cluster": "site",
                              "finished_at": 1.0} | changes  # fmt: skip
    prediction = Prediction(**(PREDICTED | (predicted or {})))
    return RunRecord(measured=measured, predicted=prediction, **fields)


def fallback(micro: int, *, checkpointing: bool = False) -> Recovery:
    """Returns an out-of-memory fallback to a micro-batch."""
    changed = layout(0, per_device_train_batch_size=micro, gradient_checkpointing=checkpointing)
    return Recovery(number=1, at=1.0, cause="out_of_memory", job_id="1", rank=0, node="n1",
                change="less", evidence="oom",
                action="restart", layout=changed, per_device_eval_batch_size=1)  # fmt: skip


# ---------------------------------------------------------------- the fit


def test_fit_calibration_without_measurements_is_empty() -> None:
    assert fit_calibration([], "site") == Calibration()
    old = RunRecord(run_id="a", recipe="made", cluster="site", finished_at=1.0)
    assert fit_calibration([old], "site") == Calibration(), (
        "records of earlier versions have no phases"
    )
    assert fit_calibration([record(on_gpu())] * 3, "elsewhere") == Calibration()


def test_fit_calibration_takes_memory_from_one_run_and_efficiency_from_three() -> None:
    one = fit_calibration([record(on_gpu(11 * GIB))], "site")
    assert one.context_bytes == GIB // 2
    assert one.fragmentation == pytest.approx(0.1)
    assert (one.efficiency, one.process_bytes, one.runs) == (None, None, 1)
    three = fit_calibration([record(on_gpu())] * 3, "site")
    assert three.efficiency == pytest.approx(0.35), "the step took as long as predicted"


def test_fit_calibration_takes_largest_memory_and_median_efficiency() -> None:
    runs = [
        record(on_gpu(int(10 * GIB * (1 + share)), context), measured={"step_s": 0.25 + step})
        for share, context, step in ((0.05, 400, 0.5), (0.08, 300, 1.0), (0.03, 450, 4.0))
        for context in [context * MIB]
    ]
    known = fit_calibration(runs, "site")
    assert known.fragmentation == pytest.approx(0.08)
    assert known.context_bytes == 450 * MIB
    assert known.efficiency == pytest.approx(0.35), "median of 0.7, 0.35 and 0.0875"
    assert known.runs == 3
    assert known.notes == []


def test_fitted_efficiency_would_have_predicted_the_step() -> None:
    """Efficiency divides the time of FLOPs, and not the rest of a predicted step."""
    slow = fit_calibration([record(measured={"step_s": 2.25})] * 3, "site")
    assert slow.efficiency == pytest.approx(0.35 / 2), "2 s instead of 1 s"
    short = fit_calibration([record(measured={"tokens_per_step": 500.0})] * 3, "site")
    assert short.efficiency == pytest.approx(0.35 / 2), "half as much was computed in that time"
    for useless in ({"timed_steps": 19}, {"step_s": 0.4}, {"step_s": None}):
        assert fit_calibration([record(measured=useless)] * 3, "site").efficiency is None, useless


def test_fit_calibration_leaves_out_communicators_and_small_runs() -> None:
    peaks = on_gpu(context_bytes=GIB // 2 + COMMUNICATOR_BYTES)
    shared = record(peaks, {"communicator_bytes": COMMUNICATOR_BYTES})
    assert fit_calibration([shared], "site").context_bytes == GIB // 2
    small = record(on_gpu(60 * MIB), {"tensor_bytes": 10 * MIB})
    assert fit_calibration([small], "site").fragmentation is None


def test_fit_calibration_on_a_cpu_gives_process_bytes() -> None:
    known = fit_calibration([record(PhasePeaks(resident_bytes=11 * GIB))], "site")
    assert known.process_bytes == GIB
    assert (known.context_bytes, known.fragmentation) == (None, None)


@pytest.mark.parametrize(
    ("field", "peaks", "bound"),
    [
        ("context_bytes", on_gpu(context_bytes=MIB), 0),
        ("context_bytes", on_gpu(context_bytes=9 * GIB), 1),
        ("fragmentation", on_gpu(9 * GIB), 0),
        ("fragmentation", on_gpu(20 * GIB), 1),
        ("process_bytes", PhasePeaks(resident_bytes=GIB), 0),
        ("process_bytes", PhasePeaks(resident_bytes=90 * GIB), 1),
    ],
)
def test_fit_calibration_beyond_bounds_takes_the_bound_with_a_note(
    field: str, peaks: PhasePeaks, bound: int
) -> None:
    known = fit_calibration([record(peaks)], "site")
    assert getattr(known, field) == CALIBRATION_BOUNDS[field][bound]
    (note,) = (note for note in known.notes if note.startswith(field.removesuffix("_bytes")))
    assert f"the {('lowest', 'highest')[bound]} value that is accepted" in note
    assert note in calibration.describe_calibration(known)


@pytest.mark.parametrize(("step_s", "bound"), [(0.5001, 1), (1000.0, 0)])
def test_fitted_efficiency_stays_within_bounds(step_s: float, bound: int) -> None:
    known = fit_calibration(
        [record(predicted={"efficiency": 0.8}, measured={"step_s": step_s})] * 3, "site"
    )
    assert known.efficiency == CALIBRATION_BOUNDS["efficiency"][bound]
    assert known.notes


def test_fit_calibration_takes_the_latest_runs() -> None:
    old = record(on_gpu(context_bytes=GIB), finished_at=0.5)
    new = [record(on_gpu(), finished_at=float(n)) for n in range(1, MAX_RUNS + 1)]
    assert fit_calibration([*new[1:], old], "site").context_bytes == GIB
    assert fit_calibration([*new, old], "site").context_bytes == GIB // 2
    assert fit_calibration([*new, old], "site").runs == MAX_RUNS


def test_fit_calibration_of_runs_with_fallbacks_gives_caps_only() -> None:
    down = record(on_gpu(context_bytes=GIB), recoveries=[fallback(2)])
    known = fit_calibration([down, record(on_gpu(), recipe="other")], "site")
    assert known.context_bytes == GIB // 2
    cap = OomCaps(per_device_train_batch_size=2, gradient_checkpointing=False)
    assert known.oom_caps == {"made": cap}
    assert known.runs == 1


# ---------------------------------------------------------------- calibrated plans


KNOWN = Calibration(context_bytes=300 * MIB, fragmentation=0.1, process_bytes=GIB, efficiency=0.7,
                    runs=3, notes=["a note"])  # fmt: skip


def test_plan_on_gpus_uses_the_calibration() -> None:
    made = recipe(resources={"nodes": 1, "gpus_per_node": 2, "zero_stage": 2})
    stated = plan_of(made, cluster("a100-80"), facts(100_000_000))
    known = plan_of(made, cluster("a100-80", calibration=KNOWN), facts(100_000_000))
    items = {item.name: item for item in known.gpu_memory}
    assert items["CUDA context"].bytes == 300 * MIB
    assert items["CUDA context"].rule == "300 MiB, calibrated"
    assert items["fragmentation"].bytes == int(0.1 * tensor_bytes(known))
    assert items["fragmentation"].rule == "10% of the above, calibrated"
    assert known.time is not None
    assert stated.time is not None
    assert known.time.step.compute_s < stated.time.step.compute_s
    (why,) = (reason for reason in known.reasons if "calibrated" in reason)
    assert why == ("calibrated by 3 runs: context 300 MiB, process 1 GiB, fragmentation 10.0%, "
                   "efficiency 0.7; a note")  # fmt: skip
    assert not [reason for reason in stated.reasons if "calibrated" in reason]
    assert not [item for item in stated.gpu_memory if "calibrated" in item.rule]


def test_plan_on_cpus_uses_the_calibration() -> None:
    made = recipe(resources={"nodes": 1, "gpus_per_node": 2})
    plan = plan_of(made, cluster("cpu", calibration=KNOWN), facts(100_000_000))
    process = next(item for item in plan.gpu_memory if item.name == "process")
    assert (process.bytes, process.rule) == (GIB, "1 GiB, calibrated")
    processes = next(item for item in plan.host_memory if item.name == "processes")
    assert processes.bytes == 2 * GIB
    assert tensor_bytes(plan) == plan.gpu_peak_bytes - GIB
    uncalibrated = plan_inputs(made, cluster("cpu"), plan.facts)
    stated = host_memory_items(uncalibrated, plan.layout, 0)
    assert stated[0].bytes == 3 * GIB


def test_plan_stays_within_caps_of_earlier_runs() -> None:
    wanted = {"global_batch_size": 16}
    one = {"nodes": 1, "gpus_per_node": 1}
    cap = OomCaps(per_device_train_batch_size=2, gradient_checkpointing=True)
    site = cluster("a100-80", calibration=Calibration(oom_caps={"made": cap}))
    before = plan_of(recipe(train=wanted, resources=one), cluster("a100-80"), SMALL).layout
    assert before.per_device_train_batch_size > 2
    assert not before.gradient_checkpointing
    after = plan_of(recipe(train=wanted, resources=one), site, SMALL)
    assert after.layout.per_device_train_batch_size == 2
    assert after.layout.gradient_accumulation_steps == 8
    assert after.layout.gradient_checkpointing
    assert any(reason.startswith("micro-batch at most 2, checkpointing: earlier runs of made")
               for reason in after.reasons)  # fmt: skip
    other = plan_of(recipe(name="other", train=wanted, resources=one), site, SMALL)
    assert other.layout == before
    fixed = wanted | {"per_device_train_batch_size": 8, "gradient_checkpointing": False}
    requested = plan_of(recipe(train=fixed, resources=one), site, SMALL)
    assert requested.layout.per_device_train_batch_size == 8, "a person may know better"
    assert not any("earlier runs" in reason for reason in requested.reasons)


SMALL = facts(100_000_000)


# ---------------------------------------------------------------- the stored calibration


def views(root: Path, *records: RunRecord) -> list[RunStatus]:
    """Returns completed runs with these results."""
    return [
        RunStatus(
            paths=RunPaths(root / r.recipe / r.run_id),
            job=Job(run_id=r.run_id, recipe=r.recipe, cluster=r.cluster, scheduler="slurm"),
            state="COMPLETED", record=r)
        for r in records
    ]  # fmt: skip


def test_update_calibration_writes_what_was_measured(tmp_path: Path) -> None:
    found = [
        record(on_gpu()),
        record(recoveries=[fallback(4, checkpointing=True)], cluster="other"),
    ]
    changes = learn.update_calibration(views(tmp_path, *found), tmp_path)
    assert changes == [
        "calibration of other from 0 runs: plans of made use micro-batch at most 4, checkpointing",
        "calibration of site from 1 run: context 512 MiB, fragmentation 2.0%; "
        "fragmentation measured as 0.0%: set to 2.0%, the lowest value that is accepted",
    ]
    file = calibration_file(tmp_path, "site")
    assert (file.parent.stat().st_mode & 0o777) == 0o700
    assert Calibration.model_validate_json(file.read_text()) == fit_calibration(found, "site")
    assert learn.update_calibration(views(tmp_path, *found), tmp_path) == [], "nothing new"
    site = with_calibration(profile_of("a100-80", "site"), tmp_path, pytest.fail)
    assert site.cluster.calibration == fit_calibration(found, "site")


def profile_of(shipped: str, name: str) -> Any:
    """Returns a shipped profile under another name."""
    from dataclasses import replace

    from hpcft.config import cluster_profile

    site = cluster_profile.load_profile(shipped)
    return replace(site, cluster=site.cluster.model_copy(update={"name": name}))


def test_override_prefers_measured_to_stated_values(tmp_path: Path) -> None:
    stated = Calibration(efficiency=0.5, context_bytes=GIB)
    known = calibration.override(stated, fit_calibration([record(on_gpu())], "site"))
    assert (known.efficiency, known.context_bytes) == (0.5, GIB // 2)


@pytest.mark.parametrize("damage", ["{", '{"context_bytes": 1}', '{"runs": "three"}', "null"])
def test_damaged_calibration_is_reported_ignored_and_replaced(tmp_path: Path, damage: str) -> None:
    file = calibration_file(tmp_path, "site")
    file.parent.mkdir(mode=0o700)
    file.write_text(damage)
    warnings: list[str] = []
    site = with_calibration(profile_of("a100-80", "site"), tmp_path, warnings.append)
    assert site.cluster.calibration == Calibration()
    (warning,) = warnings
    assert str(file) in warning
    assert "planned without it" in warning
    assert learn.update_calibration(views(tmp_path, record(on_gpu())), tmp_path)
    assert with_calibration(site, tmp_path, pytest.fail).cluster.calibration.runs == 1


def test_calibration_of_a_newer_release_is_read_without_its_new_fields(tmp_path: Path) -> None:
    file = calibration_file(tmp_path, "site")
    file.parent.mkdir(mode=0o700)
    file.write_text(json.dumps(KNOWN.model_dump(mode="json") | {"new": 1}))
    site = with_calibration(profile_of("a100-80", "site"), tmp_path, pytest.fail)
    assert site.cluster.calibration == KNOWN


def test_calibration_that_others_may_write_is_not_used(tmp_path: Path) -> None:
    file = calibration_file(tmp_path, "site")
    file.parent.mkdir()
    file.write_text(KNOWN.model_dump_json())
    file.parent.chmod(0o777)
    warnings: list[str] = []
    site = with_calibration(profile_of("a100-80", "site"), tmp_path, warnings.append)
    assert site.cluster.calibration == Calibration()
    assert "others may write to it" in warnings[0]
    with pytest.raises(StoreError, match="others may write"):
        learn.update_calibration(views(tmp_path, record(on_gpu())), tmp_path)


# ---------------------------------------------------------------- the command line


def test_plan_and_submit_use_the_calibration_of_the_runs_folder(cli: Cli, tiny: Path) -> None:
    cap = OomCaps(per_device_train_batch_size=2, gradient_checkpointing=False)
    known = Calibration(process_bytes=2 * GIB, runs=2, oom_caps={"tiny": cap})
    file = calibration_file(tiny.parent / "runs", "cpu")
    file.parent.mkdir(parents=True, mode=0o700)
    file.write_text(known.model_dump_json())
    plans = {
        more: cli("plan", tiny, "-c", "cpu", "--json", *more).json
        for more in ((), ("--uncalibrated",), ("--runs-dir", "empty"))
    }
    calibrated_, pure, elsewhere = plans.values()
    assert calibrated_["gpu_peak_bytes"] - pure["gpu_peak_bytes"] > GIB // 4
    assert calibrated_["layout"]["per_device_train_batch_size"] == 2
    assert pure == elsewhere
    shown = cli("plan", tiny, "-c", "cpu").err
    assert "calibrated by 2 runs: process 2 GiB" in shown
    assert "earlier runs of tiny ran out of memory and fell back to it" in shown
    (run,) = cli("submit", tiny, "-c", "local", "--dry-run", "--json").json["runs"]
    assert run["plan"]["layout"]["per_device_train_batch_size"] == 4, "of another cluster"
    (tiny.parent / "runs/calibration/local.json").write_text(known.model_dump_json())
    lowered, stated = (
        cli("submit", tiny, "-c", "local", "--dry-run", "--json", *more).json
        for more in ((), ("--uncalibrated",))
    )
    assert lowered["runs"][0]["plan"]["layout"]["per_device_train_batch_size"] == 2
    assert lowered["cluster"]["calibration"]["runs"] == 2
    assert stated["runs"][0]["plan"]["layout"]["per_device_train_batch_size"] == 4
    ids = {shown["runs"][0]["run_id"] for shown in (lowered, stated)}
    assert ids == {run["run_id"]}, "calibration is no part of a run's identity"
    (tiny.parent / "runs/calibration/local.json").write_text("{")
    damaged = cli("submit", tiny, "-c", "local", "--dry-run", "--json")
    assert damaged.code == 0
    assert "planned without it" in damaged.err


def test_collect_shows_prediction_and_measurement(cli: Cli, tiny: Path) -> None:
    folder = tiny.parent / "runs/made" / ("a" * 12)
    folder.mkdir(parents=True, mode=0o700)
    done = record(on_gpu(), predicted_memory_bytes=11 * GIB)
    (folder / "result.json").write_text(done.model_dump_json())
    job = Job(run_id="a" * 12, recipe="made", cluster="site", scheduler="slurm")
    attempt = {"job_id": "1", "token": "t", "submitted_at": 1.0, "logs": str(folder), "host": "h"}
    (folder / "job.json").write_text(
        json.dumps(job.model_dump(mode="json") | {"attempts": [attempt]})
    )
    assert cli("collect", "made").err == "", "of some runs nothing is learnt"
    result = cli("collect")
    assert result.err.startswith("calibration of site from 1 run: context 512 MiB")
    header, cells = (line.split("\t") for line in result.out.splitlines())
    row = dict(zip(header, cells, strict=True))
    assert row["memory predicted"] == "11 GiB"
    assert row["memory measured"] == "10.5 GiB", "context included, as in the prediction"
    assert (row["step predicted"], row["step measured"]) == ("1.25 s", "1.25 s")
    (shown,) = cli("collect", "--json").json
    assert shown["phases"]["training"]["reserved_bytes"] == 10 * GIB


def test_shipped_profiles_state_no_calibration() -> None:
    """Measurements belong to a runs folder, not to shipped profiles."""
    from hpcft.config import cluster_profile

    for file in (ROOT / "slurm").glob("*.yaml"):
        assert cluster_profile.load_profile(str(file)).cluster.calibration == Calibration()
