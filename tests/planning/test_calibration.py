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
    Calibration,
    Job,
    LearnedValue,
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
from hpcft.planning import calibration, learned_values
from hpcft.planning.calibration import MAX_RUNS, fit_calibration
from hpcft.planning.feasibility import with_calibration
from hpcft.planning.memory.host_memory import host_memory_items
from hpcft.planning.memory.model_states import COMMUNICATOR_BYTES, heap_bytes, tensor_bytes

pytestmark = pytest.mark.usefixtures("cache_of_this_module")


PREDICTED: dict[str, Any] = {
    "tensor_bytes": 10 * GIB, "communicator_bytes": 0, "step_s": 1.25, "flops_s": 1.0,
    "efficiency": 0.35, "tokens_per_step": 1000, "device": "A100", "precision": "bf16",
    "layout": "one rank", "size": "1 B to 10 B",
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


def learned(known: Calibration, field: str) -> dict[tuple[str, ...], float]:
    """Returns the learned values of a field by device, precision, layout and size."""
    return {(v.device, v.precision, v.layout, v.size): v.value
            for v in known.learned if v.field == field}  # fmt: skip


ONE_RANK = ("A100", "bf16", "one rank", "1 B to 10 B")


def test_fit_calibration_without_measurements_is_empty() -> None:
    assert fit_calibration([], "site") == Calibration()
    old = RunRecord(run_id="a", recipe="made", cluster="site", finished_at=1.0)
    assert fit_calibration([old], "site") == Calibration(), (
        "records of earlier versions have no phases"
    )
    unknown = record(on_gpu(), {"device": ""})
    assert fit_calibration([unknown] * 3, "site") == Calibration(), "nor what they were planned for"
    assert fit_calibration([record(on_gpu())] * 3, "elsewhere") == Calibration()


def test_fit_calibration_takes_the_median_of_three_runs_and_names_them() -> None:
    runs = [
        record(on_gpu(context_bytes=context * MIB), measured={"step_s": 0.25 + step}, run_id=name)
        for name, context, step in (("a", 400, 0.5), ("b", 300, 1.0), ("c", 450, 4.0))
    ]
    assert fit_calibration(runs[:2], "site") == Calibration(), "two may both be in another's way"
    known = fit_calibration(runs, "site")
    assert learned(known, "context_bytes") == {("A100", "", "", ""): 400 * MIB}
    assert learned(known, "efficiency") == {ONE_RANK: pytest.approx(0.35)}, (
        "median of 0.7, 0.35 and 0.0875"
    )
    assert all(value.runs == ["made/a", "made/b", "made/c"] for value in known.learned)
    assert (known.runs, known.notes) == (3, [])


def test_fit_calibration_keeps_gpus_layouts_and_sizes_apart() -> None:
    runs = [
        record(predicted=kind, measured={"step_s": 0.25 + step})
        for kind, step in (({}, 1.0), ({"layout": "ZeRO-3"}, 2.0), ({"device": "T4"}, 4.0),
                           ({"size": "under 10 M"}, 5.0))
        for _ in range(3)
    ]  # fmt: skip
    assert learned(fit_calibration(runs, "site"), "efficiency") == {
        ONE_RANK: pytest.approx(0.35),
        ("A100", "bf16", "ZeRO-3", "1 B to 10 B"): pytest.approx(0.175),
        ("T4", *ONE_RANK[1:]): pytest.approx(0.0875),
        (*ONE_RANK[:3], "under 10 M"): pytest.approx(0.07),
    }


def test_fitted_efficiency_would_have_predicted_the_step() -> None:
    """Efficiency divides the time of FLOPs, and not the rest of a predicted step."""
    slow = fit_calibration([record(measured={"step_s": 2.25})] * 3, "site")
    assert learned(slow, "efficiency")[ONE_RANK] == pytest.approx(0.35 / 2), "2 s instead of 1 s"
    short = fit_calibration([record(measured={"tokens_per_step": 500.0})] * 3, "site")
    assert learned(short, "efficiency")[ONE_RANK] == pytest.approx(0.35 / 2), (
        "half as much was computed in that time"
    )


@pytest.mark.parametrize(
    ("measured", "predicted"),
    [
        ({"timed_steps": 19}, {}),
        ({"step_s": None}, {}),
        ({"step_s": 0.4}, {}),  # mostly what efficiency does not divide
        ({"step_s": 60.0}, {"step_s": 1.0, "flops_s": 0.4}),  # predicted so
        ({"step_s": 0.02}, {"step_s": 0.001, "flops_s": 0.0009}),  # a toy
        ({"tokens_per_step": 400.0}, {}),
    ],
)
def test_runs_that_cannot_tell_set_no_efficiency(
    measured: dict[str, Any], predicted: dict[str, Any]
) -> None:
    runs = [record(measured=measured, predicted=predicted)] * 3
    assert fit_calibration(runs, "site") == Calibration()


def test_reserved_memory_sets_no_fragmentation() -> None:
    """PyTorch keeps what it has reserved while there is room: that is no need."""
    known = fit_calibration([record(on_gpu(15 * GIB))] * 3, "site")
    assert known.fragmentation is None
    assert {value.field for value in known.learned} == {"context_bytes", "efficiency"}


def test_fit_calibration_learns_no_context_beside_communicators() -> None:
    peaks = on_gpu(context_bytes=GIB // 2 + COMMUNICATOR_BYTES)
    shared = record(peaks, {"communicator_bytes": COMMUNICATOR_BYTES})
    assert learned(fit_calibration([shared] * 3, "site"), "context_bytes") == {}


def on_cpu(resident_gib: float, tensor_gib: float = 0.125, tokens: float = 1000.0) -> RunRecord:
    """Returns a finished run on a CPU."""
    predicted = {"tensor_bytes": int(tensor_gib * GIB), "device": "cpu"}
    peaks = PhasePeaks(resident_bytes=int(resident_gib * GIB))
    return record(peaks, predicted, measured={"tokens_per_step": tokens, "step_s": None})


def test_fit_calibration_on_a_cpu_gives_process_bytes() -> None:
    known = fit_calibration([on_cpu(1.25)] * 3, "site")
    beside = 0.125 * GIB + heap_bytes(GIB // 8)
    assert learned(known, "process_bytes") == {("cpu", "", "", ""): 1.25 * GIB - beside}
    assert [value.field for value in known.learned] == ["process_bytes"]


@pytest.mark.parametrize(
    "run", [on_cpu(4.0, tensor_gib=3.0), on_cpu(1.25, tokens=500.0)], ids=["large", "short texts"]
)
def test_runs_that_cannot_tell_set_no_process_bytes(run: RunRecord) -> None:
    """Short texts never held the predicted tensors: what is left of them is no process."""
    assert fit_calibration([run] * 7, "site") == Calibration()


@pytest.mark.parametrize(
    ("run", "note"),
    [
        (record(on_gpu(context_bytes=MIB)),
         "context outside 256 MiB to 2 GiB is left out: made/aaaaaaaaaaaa (1 MiB)"),
        (record(on_gpu(context_bytes=9 * GIB)),
         "context outside 256 MiB to 2 GiB is left out: made/aaaaaaaaaaaa (9 GiB)"),
        (on_cpu(0.1), "process outside 512 MiB to 3 GiB is left out: "
                      "made/aaaaaaaaaaaa (-160 MiB)"),
        (record(measured={"step_s": 1000.0}),
         "efficiency outside 0.05 to 0.9 is left out: made/aaaaaaaaaaaa (0.00035)"),
    ],
)  # fmt: skip
def test_measurements_beyond_bounds_are_left_out_with_a_note(run: RunRecord, note: str) -> None:
    one = fit_calibration([run], "site")
    assert (one.notes, one.learned) == ([note], [])
    fine = record(on_gpu()) if run.predicted and run.predicted.device != "cpu" else on_cpu(1.25)
    both = fit_calibration([run, fine, fine, fine], "site")
    assert both.learned == fit_calibration([fine] * 3, "site").learned or "context" in note
    assert both.notes == [note]


def test_fit_calibration_takes_the_latest_runs() -> None:
    old = [record(on_gpu(context_bytes=GIB), finished_at=0.5)] * 3
    new = [record(on_gpu(), finished_at=float(n)) for n in range(1, MAX_RUNS + 1)]
    fitted = fit_calibration([*new, *old], "site")
    (context,) = (value for value in fitted.learned if value.field == "context_bytes")
    assert (context.value, len(context.runs)) == (GIB // 2, MAX_RUNS)


def test_fit_calibration_of_runs_with_fallbacks_gives_caps_only() -> None:
    down = record(on_gpu(context_bytes=GIB), recoveries=[fallback(2)])
    known = fit_calibration([*[down] * 5, *[record(on_gpu(), recipe="other")] * 3], "site")
    assert learned(known, "context_bytes") == {("A100", "", "", ""): GIB // 2}
    cap = OomCaps(per_device_train_batch_size=2, gradient_checkpointing=False)
    assert known.oom_caps == {"made": cap}
    assert known.runs == 1, "three records of one id here"


# ---------------------------------------------------------------- calibrated plans


KNOWN = Calibration(context_bytes=300 * MIB, fragmentation=0.1, process_bytes=GIB, efficiency=0.7)


def test_plan_on_gpus_uses_what_the_profile_states() -> None:
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
    assert known.reasons[-1] == (
        "stated by the profile: efficiency 0.7, context 300 MiB, fragmentation 10.0%"
    )
    assert not [reason for reason in stated.reasons if "stated" in reason or "calib" in reason]
    assert not [item for item in stated.gpu_memory if "calibrated" in item.rule]


def efficiency(value: float, device: str = "A100-SXM4-80GB", **kind: str) -> LearnedValue:
    """Returns a learned efficiency, by default of one rank with a small model."""
    fields = {"precision": "bf16", "layout": "one rank", "size": "100 M to 1 B"} | kind
    return LearnedValue(
        field="efficiency", device=device, value=value, runs=["x/1", "x/2", "x/3"], **fields
    )


@pytest.mark.parametrize(
    ("known", "used"),
    [
        (efficiency(0.2), 0.2),
        (efficiency(0.2, device="T4"), 0.5),
        (efficiency(0.2, size="under 10 M"), 0.5),
        (efficiency(0.2, precision="fp32"), 0.5),
        (efficiency(0.2, layout="ZeRO-3"), 0.2),  # untried layouts do not look fast for it
    ],
)
def test_plan_uses_what_was_learned_of_its_kind(known: LearnedValue, used: float) -> None:
    """A toy's efficiency, or another GPU's, is none of a plan's; a stated one is."""
    site = cluster("a100-80", calibration=Calibration(efficiency=0.5, learned=[known]))
    made = recipe(resources={"nodes": 1, "gpus_per_node": 1})
    inputs = plan_inputs(made, site, facts(200_000_000))
    assert inputs.efficiency(layout(0)) == used
    reasons = calibration.calibration_reasons(inputs, layout(0))
    names_runs = any("median of 3 runs (x/1, x/2, x/3)" in reason for reason in reasons)
    assert names_runs == (used == 0.2)


def test_toy_runs_change_no_plan_of_a_large_model() -> None:
    """Three finished toys once set the efficiency of the whole cluster to 0.0111."""
    toys = [record(predicted={"step_s": 0.0211, "flops_s": 0.0166, "size": "under 10 M"},
                   measured={"step_s": 0.6})] * 3  # fmt: skip
    site = cluster("a100-80", calibration=fit_calibration(toys, "site"))
    made = recipe(resources={"nodes": 1, "gpus_per_node": 4})
    assert plan_of(made, site, facts()) == plan_of(made, cluster("a100-80"), facts())


def test_plan_on_cpus_uses_the_calibration() -> None:
    made = recipe(resources={"nodes": 1, "gpus_per_node": 2})
    value = LearnedValue(field="process_bytes", device="cpu", value=2.0 * GIB, runs=["x/1"])
    for known in (Calibration(process_bytes=2 * GIB), Calibration(learned=[value])):
        plan = plan_of(made, cluster("cpu", calibration=known), facts(100_000_000))
        process = next(item for item in plan.gpu_memory if item.name == "process")
        assert (process.bytes, process.rule) == (2 * GIB, "2 GiB, calibrated")
        processes = next(item for item in plan.host_memory if item.name == "processes")
        assert processes.bytes == 4 * GIB
        tensors = tensor_bytes(plan)
        assert tensors + heap_bytes(tensors) == plan.gpu_peak_bytes - 2 * GIB
    stated = host_memory_items(plan_inputs(made, cluster("cpu"), plan.facts), plan.layout, 0)
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
        *(record(on_gpu(), run_id=name * 12) for name in "abc"),
        record(recoveries=[fallback(4, checkpointing=True)], cluster="other"),
    ]
    runs = f"median of 3 runs (made/{'a' * 12}, made/{'b' * 12}, made/{'c' * 12})"
    said = learn.update_calibration(views(tmp_path, *found), tmp_path)
    assert said == [
        "other: plans of made use micro-batch at most 4, checkpointing",
        f"site: context 512 MiB for A100: {runs}",
        f"site: efficiency 0.35 for A100, bf16, one rank, 1 B to 10 B parameters: {runs}",
    ]
    file = calibration_file(tmp_path, "site")
    assert (file.parent.stat().st_mode & 0o777) == 0o700
    assert Calibration.model_validate_json(file.read_text()) == fit_calibration(found, "site")
    assert learn.update_calibration(views(tmp_path, *found), tmp_path) == said
    site = with_calibration(profile_of("a100-80", "site"), tmp_path, pytest.fail)
    assert site.cluster.calibration == fit_calibration(found, "site")


def test_update_calibration_says_when_nothing_is_learned(tmp_path: Path) -> None:
    assert learn.update_calibration(views(tmp_path, record(on_gpu())), tmp_path) == [
        "site: nothing is learned yet: no 3 runs of one kind have measured the same value"
    ]


def profile_of(shipped: str, name: str) -> Any:
    """Returns a shipped profile under another name."""
    from dataclasses import replace

    from hpcft.config import cluster_profile

    site = cluster_profile.load_profile(shipped)
    return replace(site, cluster=site.cluster.model_copy(update={"name": name}))


def test_override_prefers_measured_to_stated_values(tmp_path: Path) -> None:
    stated = Calibration(efficiency=0.5, context_bytes=GIB)
    known = calibration.override(stated, fit_calibration([record(on_gpu())] * 3, "site"))
    gpu = cluster("a100-80").gpu
    assert gpu is not None
    site = cluster("a100-80", calibration=known, gpu=gpu.model_copy(update={"name": "A100"}))
    assert learned_values.context_bytes(site) == GIB // 2
    assert learned_values.context_bytes(cluster("a100-80", calibration=known)) == GIB


def test_values_that_an_earlier_version_learned_of_all_sizes_are_ignored(tmp_path: Path) -> None:
    file = calibration_file(tmp_path, "site")
    file.parent.mkdir(mode=0o700)
    file.write_text('{"efficiency": 0.0111, "fragmentation": 0.237, "runs": 3}')
    site = with_calibration(profile_of("a100-80", "site"), tmp_path, pytest.fail)
    known = site.cluster.calibration
    assert (known.efficiency, known.fragmentation, known.learned) == (None, None, [])


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
    assert learn.update_calibration(views(tmp_path, *[record(on_gpu())] * 3), tmp_path)
    assert with_calibration(site, tmp_path, pytest.fail).cluster.calibration.learned


def test_calibration_of_a_newer_release_is_read_without_its_new_fields(tmp_path: Path) -> None:
    file = calibration_file(tmp_path, "site")
    file.parent.mkdir(mode=0o700)
    known = Calibration(learned=[efficiency(0.2)], runs=3)
    file.write_text(json.dumps(known.model_dump(mode="json") | {"new": 1}))
    site = with_calibration(profile_of("a100-80", "site"), tmp_path, pytest.fail)
    assert site.cluster.calibration == known


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
    value = LearnedValue(field="process_bytes", device="cpu", value=2.0 * GIB, runs=["tiny/1"])
    known = Calibration(learned=[value], runs=2, oom_caps={"tiny": cap})
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
    assert "calibrated: process 2 GiB for cpu: median of 1 runs (tiny/1)" in shown
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
    before = sorted(folder.parents[1].rglob("*"))
    result = cli("collect")
    assert result.err == ""
    assert sorted(folder.parents[1].rglob("*")) == before, "what reads changes no plan"
    assert "nothing is learned yet" in cli("calibrate").err
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
