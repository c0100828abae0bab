"""Tests of `hpcft plan`: tables, all layouts, scale, shared GPUs, wrong input, and its speed."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from builders import ROOT, Cli, film_rows, write_rows
from hpcft.core.torch_build import installed_build
from imports import imported_by

GEMMA, QLORA = "gemma7b_full", "llama3_8b_winogrande_qlora"

pytestmark = pytest.mark.usefixtures("cache_of_this_module")


# ---------------------------------------------------------------- one plan


def test_plan_shows_time_disk_and_other_layouts(cli: Cli) -> None:
    said = cli("plan", GEMMA, "-c", "a100-80")
    assert said.code == 0, said.err
    lines = {line.split()[0]: line for line in said.err.splitlines()}
    assert "s a step: compute" in said.err
    assert "GPU hours per 1,000 steps" in said.err
    assert "number of examples is not known before the run starts" in lines["time"]
    assert lines["time"].endswith("; time limit 24:00:00")
    assert "finished model 15.9 GiB" in lines["disk"]
    partly = cli("plan", QLORA, "-c", "a100-80").err
    assert "of training for 500 steps; the size of the scored split is not known" in partly
    assert "GPU h per 1,000 steps" in lines["next"]
    assert "of 79.2 GiB a GPU" in lines["not"]


def test_plan_as_json_has_all_numbers(cli: Cli) -> None:
    shown = cli("plan", "quickstart", "-c", "testbed", "--json").json
    assert shown["time"]["steps"] == 600, "20 epochs of 480 rows, 16 at a time"
    step = shown["time"]["step"]
    parts = step["compute_s"] + step["communication_s"] + step["offload_s"]
    assert shown["step_s"] == pytest.approx(parts)
    assert shown["gpu_hours"] == pytest.approx(2 * shown["run_s"] / 3600)
    assert shown["time_min"] == 30, "as the recipe asks"
    freed = cli("plan", "quickstart", "-c", "testbed", "--json", "-o", "resources.time_min=auto")
    assert freed.json["time_min"] == 15, "twice two minutes, and ten"


def test_plan_uncalibrated_ignores_measurements(cli: Cli, workplace: Path) -> None:
    text = (ROOT / "slurm" / "a100-80.yaml").read_text()
    (workplace / "mine.yaml").write_text(text + "calibration: { efficiency: 0.7 }\n")
    calibrated, pure = (
        cli("plan", "roberta_mnli_full", "-c", "mine.yaml", "--json", *more).json["step_s"]
        for more in ((), ("--uncalibrated",))
    )
    assert calibrated < pure


# ---------------------------------------------------------------- rows of local data


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"txt": "a", "label": "good"}', "text: there is no such column; the row has: txt, label"),
        ('{"text": "a", "label": null}', "label: the label is missing; expected one of bad, good"),
    ],
)
def test_plan_reads_the_rows_of_local_data(cli: Cli, tiny: Path, line: str, what: str) -> None:
    with (tiny.parent / "test.jsonl").open("a") as stream:
        stream.write(line + "\n")
    said = cli("plan", tiny, "-c", "local")
    assert said.code == 2
    assert "test.jsonl:9" in said.err
    assert what in said.err
    table = cli("plan", tiny, "--clusters", "local,cpu")
    assert table.out.count(f"no: {what.partition(';')[0]}") == 2


def test_plan_and_submit_warn_of_rows_that_are_trained_on_and_scored(cli: Cli, tiny: Path) -> None:
    warning = "test: 1 of 2 examples also stand in the train split"
    rows = [*film_rows(1)[:1], {"text": "a new film", "label": "good"}]
    write_rows(tiny.with_name("test.jsonl"), rows)
    assert warning in cli("plan", tiny, "-c", "local").err
    assert warning in cli("submit", tiny, "-c", "local", "--dry-run").err
    write_rows(tiny.with_name("test.jsonl"), rows[1:])
    assert warning not in cli("plan", tiny, "-c", "local").err


# ---------------------------------------------------------------- tables


def test_plan_of_several_recipes_shows_problems_in_the_cells(cli: Cli, tiny: Path) -> None:
    """Rows are recipes and columns profiles; the problem of a wrong recipe stands in its row."""
    broken = tiny.parent / "broken.yaml"
    broken.write_text("name: broken\n")
    unknown = tiny.parent / "unknown.yaml"
    unknown.write_text(tiny.read_text().replace("bert", "nope").replace("tiny", "unknown"))
    said = cli("plan", GEMMA, tiny, broken, unknown, "--clusters", "a100-80, t4-16,cpu")
    assert said.code == 0, said.err
    header, *lines = (line.split("\t") for line in said.out.splitlines())
    assert header == ["recipe", "a100-80", "t4-16", "cpu"]
    rows = {line[0]: line[1:] for line in lines}
    assert rows[GEMMA][0].startswith("4×, ZeRO-3, ")
    assert rows[GEMMA][1].startswith("no: ")
    assert rows[GEMMA][1].endswith("GiB of 14.7 GiB a GPU")
    assert all(cell.startswith("1×, ") for cell in rows["tiny"])
    assert rows[str(broken)] == ["no: model: required"] * 3 or "model" in rows[str(broken)][0]
    assert all("no usable configuration" in cell for cell in rows["unknown"])
    assert f"planning 4 of 4: {unknown}" in said.err


def test_plan_with_clusters_as_json_has_a_plan_or_a_reason(cli: Cli) -> None:
    said = cli("plan", GEMMA, "--clusters", "a100-80,t4-16", "--json").json
    assert said[GEMMA]["a100-80"]["fits"] is True
    assert said[GEMMA]["a100-80"]["plan"]["gpu_peak_bytes"] > 60 * 2**30
    assert said[GEMMA]["t4-16"]["fits"] is False
    assert "14.7 GiB a GPU" in said[GEMMA]["t4-16"]["reason"]


@pytest.mark.process
@pytest.mark.parametrize(
    "names", ["*_sst2", pytest.param("*", marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_plan_with_all_clusters_has_a_column_for_each(cli: Cli, names: str) -> None:
    recipes = sorted((ROOT / "recipes").glob(f"{names}.yaml"))
    said = cli("plan", *recipes, "--clusters", "all")
    assert said.code == 0, said.err
    header, *lines = (line.split("\t") for line in said.out.splitlines())
    assert sorted(header[1:]) == sorted(path.stem for path in (ROOT / "slurm").glob("*.yaml"))
    assert len(lines) >= len(recipes)
    assert all(len(line) == len(header) for line in lines)
    assert all("×, " in cell or cell.startswith("no: ") for line in lines for cell in line[1:])


def test_plan_of_a_sweep_has_a_row_for_each_point(cli: Cli) -> None:
    said = cli("plan", "quickstart", "--clusters", "testbed", "-o", "sweep.seeds=[1,2]")
    rows = [line.split("\t")[0] for line in said.out.splitlines()[1:]]
    assert rows == ["quickstart train.seed=1", "quickstart train.seed=2"]


def test_plan_all_lists_the_cheapest_layout_first(cli: Cli) -> None:
    said = cli("plan", GEMMA, "-c", "a100-80", "--all")
    header, *lines = (line.split("\t") for line in said.out.splitlines())
    hours = [float(line[-1].replace(",", "")) for line in lines]
    assert header[-1] == "GPU h / 1,000 steps"
    assert hours == sorted(hours), "the cheapest first"
    fitting = [line for line in lines if line[2] == "yes"]
    chosen = cli("plan", GEMMA, "-c", "a100-80", "--json").json
    assert any(line[0].startswith("1 node × 4, ZeRO-3, micro-batch 4") for line in fitting[:3])
    assert chosen["layout"]["ranks_per_node"] == 4
    listed = cli("plan", GEMMA, "-c", "a100-80", "--all", "--json").json
    assert len(listed) == len(lines)


def test_plan_scale_shows_time_by_number_of_gpus(cli: Cli) -> None:
    recipe = ROOT / "docs" / "reference" / "scale" / "llama3_8b.yaml"
    said = cli("plan", recipe, "-c", "h100-80", "--scale", "8,64,512,1024")
    assert said.code == 0, said.err
    header, *lines = (line.split("\t") for line in said.out.splitlines())
    assert [line[0] for line in lines] == ["8", "64", "512", "1,024"]
    steps = [float(line[header.index("step s")]) for line in lines]
    hours = [float(line[-1]) for line in lines]
    assert steps == sorted(steps, reverse=True), "more GPUs are faster"
    assert hours == sorted(hours), "and cost more"
    shown = cli("plan", recipe, "-c", "h100-80", "--scale", "1024", "--json").json["1024"]["plan"]
    assert shown["layout"]["nodes"] * shown["layout"]["ranks_per_node"] == 1024
    step = shown["time"]["step"]
    assert step["communication_s"] > 0.1
    assert step["offload_s"] == 0


def test_plan_scale_with_too_many_gpus_says_why(cli: Cli) -> None:
    said = cli("plan", GEMMA, "-c", "h100-80", "--scale", "8,64")
    rows = [line.split("\t") for line in said.out.splitlines()[1:]]
    assert rows[1][1] == "no: the global batch cannot be split"


def test_pages_of_plans_have_every_recipe_and_a_figure() -> None:
    page = (ROOT / "docs" / "reference" / "fits.md").read_text()
    names = [file.stem for file in (ROOT / "recipes").glob("*.yaml")]
    assert [name for name in names if f"| {name}" not in page] == [], "run `make docs`"
    figure = ElementTree.parse(ROOT / "docs" / "reference" / "scale.svg").getroot()
    words = [text for text in figure.itertext() if text.strip()]
    assert words[:3] == ["compute", "communication", "offload"]
    assert words.count("1,024") == 3
    assert "](scale.svg)" in (ROOT / "docs" / "reference" / "scale.md").read_text()


# ---------------------------------------------------------------- a shared GPU


def test_plan_on_a_shared_gpu_explains_the_memory(cli: Cli) -> None:
    shared = ("--gpu-memory", "14.74GiB", "--other-processes", "14.69GiB")
    said = cli("plan", QLORA, "-c", "t4-16", *shared)
    assert said.code == 2
    assert "they hold 14.69 of 14.74 GiB and leave 51.2 MiB" in said.err
    assert "a smaller batch cannot help" in said.err
    some = cli("plan", QLORA, "-c", "a100-40", "--other-processes", "5 GiB")
    assert some.code == 0, some.err
    assert "other processes\t5 GiB" in some.out
    assert "of 34.4 GiB per GPU" in some.err


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--gpu-memory", "banana"),
         "--gpu-memory: expected a size such as 14.74GiB, got 'banana'"),
        (("--gpu-memory=-3GiB",), "--gpu-memory: expected a size such as 14.74GiB, got '-3GiB'"),
        (("--gpu-memory", "0GiB"), "--gpu-memory: expected a size such as 14.74GiB, got '0GiB'"),
        (("--other-processes", "lots"), "--other-processes: expected a size"),
        (("--other-processes", "80GiB"),
         "--other-processes: expected less than the 79.2 GiB of a A100-SXM4-80GB, got 80 GiB"),
        (("--scale", "8,many"), "--scale: expected numbers such as 8,64,512, got '8,many'"),
        (("--scale", "6"), "--scale: expected 1 to 4 or a multiple of 4 GPUs"),
        (("--scale", "0"), "--scale: expected 1 to 4 or a multiple of 4 GPUs"),
        (("--scale", "8", "--all"), "--all and --scale exclude each other"),
        (("--clusters", "all", "--all"), "--all and --scale show one recipe on one cluster"),
        (("--clusters", "a100-80,nope"), "--cluster nope: there is no such profile"),
        (("--clusters", " , "), "--clusters: expected profiles separated by commas or `all`"),
        (("-o", "task.max_length=9000"),
         "task.max_length: the model takes at most 8192 tokens, got 9000; lower it"),
        (("-o", "task.max_length=-1"), "task.max_length"),
        (("-o", "resources.gpus_per_node=0"), "resources.gpus_per_node"),
        (("-o", "resources.nodes=-2"), "resources.nodes"),
        (("-o", "model.config.model_type=fooo"), "Unrecognized model identifier"),
    ],
)  # fmt: skip
def test_plan_with_wrong_options_is_refused(
    cli: Cli, arguments: tuple[str, ...], says: str
) -> None:
    said = cli("plan", GEMMA, *(() if "--clusters" in arguments else ("-c", "a100-80")), *arguments)
    assert said.code == 2
    assert says in said.err
    assert "Traceback" not in said.err


def test_plan_with_gpu_memory_but_without_gpus_is_refused(cli: Cli) -> None:
    said = cli("plan", "quickstart", "-c", "cpu", "--gpu-memory", "16GiB")
    assert said.code == 2
    assert "--gpu-memory: the cluster cpu has no GPUs; choose one that has" in said.err


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("memory_gib: 79.2", "memory_gib: -1", "expected a number greater than 0, got"),
        ("memory_gib: 79.2", "memory_gib: 0", "expected a number greater than 0, got"),
        ("  memory_gib: 79.2\n", "", "gpu.memory_gib"),
        ("gpus_per_node: 4", "gpus_per_node: 0", "needs `gpu` and `gpus_per_node`"),
        ("gpus_per_node: 4", "gpus_per_node: -4",
         "expected a number greater than or equal to 0, got -4"),
        ("host_memory_gib: 960\n", "", "host_memory_gib"),
        ("host_memory_gib: 960", "host_memory_gib: -5", "expected a number greater than 0, got -5"),
        ("network_gb_s: 100.0", "network_gb_s: 0", "expected a number greater than 0, got 0"),
        ("max_nodes: 16", "max_nodes: 0", "expected a number greater than 0, got 0"),
        ("memory_gib: 79.2", "memory_gib: 79.2\n  other_processes_gib: 90",
         "mine.yaml:15 gpu.other_processes_gib: expected less than the GPU's 79.2 GiB, got 90"),
        ("max_nodes: 16", "max_nodes: 16\ncalibration: { efficiency: 3 }",
         "expected a number less than or equal to 0.9, got 3"),
    ],
)  # fmt: skip
def test_plan_on_a_wrong_profile_is_refused(
    cli: Cli, workplace: Path, before: str, after: str, says: str
) -> None:
    text = (ROOT / "slurm" / "a100-80.yaml").read_text()
    assert before in text
    (workplace / "mine.yaml").write_text(text.replace(before, after, 1))
    said = cli("plan", GEMMA, "-c", "mine.yaml")
    assert said.code == 2
    assert "mine.yaml:" in said.err
    assert says in said.err
    assert "Traceback" not in said.err


# ---------------------------------------------------------------- speed

HEAVY = {"torch", "transformers", "deepspeed", "peft", "datasets", "submitit", "numpy"}


@pytest.mark.process
@pytest.mark.parametrize(
    "arguments", [(GEMMA, "-c", "a100-80"), (GEMMA, "--clusters", "a100-80,t4-16,cpu")]
)
def test_plan_of_a_cached_model_loads_nothing_heavy(
    cli: Cli, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    installed_build.cache_clear()  # what it found is then written into this test's cache
    cli("plan", *arguments)
    planned = imported_by("plan", *arguments, cwd=tmp_path)
    assert HEAVY & planned.modules == set()
    assert planned.cpu_s < 1.5, "it takes half a second on an idle machine"
