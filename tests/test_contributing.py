"""Runs the worked examples of docs/contributing in a copy of the package, and checks the index."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import house
from builders import ROOT, film_rows, write_rows

pytestmark = pytest.mark.process

PAGES = ROOT / "docs" / "contributing"
BLOCK = re.compile(r'^```(\w+) title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
# Plans, trains and scores the recipe as a job on this machine would, in one process.
RUN = """\
import json
from pathlib import Path

from hpcft.jobs.prepare import prepare_runs
from hpcft.jobs.run_folder import write_run_folder

site, (prepared,) = prepare_runs("recipe.yaml", cluster_name="local", overrides=[])
folder = Path("run").absolute()
write_run_folder(site, prepared, folder)

from hpcft.metrics import metric_info
from hpcft.recovery.run import Run
from hpcft.training.context import WorkerContext
from hpcft.training.distributed.rank_env import RankInfo
from hpcft.training.modes import run_mode
from hpcft.training.telemetry.progress import ProgressReporter

run = Run.open(folder)
reporter = ProgressReporter(run.paths, RankInfo(0, 1, 0, "here", "1"), 0)
run_mode(WorkerContext(run, run.read_plan(), reporter))
result = json.loads(run.paths.result.read_text())
unknown = [name for name in result["metrics"] if metric_info(name) is None]
assert not unknown, f"no metric module describes {unknown}"
"""


def copy_package(folder: Path) -> None:
    """Copies the package, and links the recipes and profiles that it ships."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(house.PACKAGE, folder / "launcher" / "hpcft", ignore=ignored)
    for name in ("recipes", "slurm", "ds_configs", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)


def apply_diff(file: Path, diff: str) -> None:
    """Applies a page's diff: each hunk, up to a line `@@`, has to fit in exactly one place."""
    text = file.read_text()
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(before) == 1, f"{file} does not have once:\n{before}"
        text = text.replace(before, after)
    file.write_text(text)


def apply_page(page: str, folder: Path) -> None:
    """Does in a copy of the package what a page says; its recipe goes into the copy's folder."""
    blocks = BLOCK.findall((PAGES / page).read_text())
    assert {language for language, _, _ in blocks} == {"python", "diff", "yaml"}
    for language, name, text in blocks:
        if language == "diff":
            apply_diff(folder / name, text)
        else:
            assert not (folder / name).exists(), f"{name} exists already"
            (folder / name).write_text(text)


def run_recipe(folder: Path) -> subprocess.CompletedProcess[str]:
    """Trains and scores the recipe in a folder with the copy of the package there."""
    rows = film_rows(20)
    write_rows(folder / "train.jsonl", rows)
    other = {"good": "bad", "bad": "good"}
    # A fifth of the test labels is wrong, so that no metric has its best value.
    noisy = [{**row, "label": other[row["label"]]} if number % 5 == 0 else row
             for number, row in enumerate(rows)]  # fmt: skip
    write_rows(folder / "test.jsonl", noisy)
    env = {**os.environ, "PYTHONPATH": str(folder / "launcher"), "OMP_NUM_THREADS": "1",
           "XDG_CACHE_HOME": str(folder / "cache")}  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def result_of(page: str, folder: Path) -> dict[str, Any]:
    """Applies a page to a copy of the package, runs its recipe, and returns the result."""
    copy_package(folder)
    apply_page(page, folder)
    done = run_recipe(folder)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads((folder / "run" / "result.json").read_text())
    return result


def test_task_page_trains_and_scores_the_new_task(tmp_path: Path) -> None:
    result = result_of("task.md", tmp_path)
    before, after = result["metrics_before"], result["metrics"]
    assert set(after) == {"completion_loss", "perplexity"}
    # An untrained model finds every one of the 300 tokens equally likely.
    assert 250 < before["perplexity"] < 350
    assert after["perplexity"] < 20


def test_method_page_trains_biases_and_head_only(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    counts = result_of("method.md", tmp_path)["parameters"]
    assert 0 < counts["trainable"] < 0.1 * counts["total"]
    first, last = (load_file(tmp_path / "run" / folder / "model.safetensors")
                   for folder in ("prepared/model", "model"))  # fmt: skip
    assert first.keys() == last.keys()
    changed = {name for name, weight in first.items() if not weight.equal(last[name])}
    assert {"classifier.weight", "bert.encoder.layer.0.output.dense.bias"} <= changed
    assert all(name.startswith("classifier.") or name.endswith(".bias") for name in changed)
    trainable = [weight.numel() for name, weight in first.items()
                 if name.startswith("classifier.") or name.endswith(".bias")]  # fmt: skip
    assert sum(trainable) == counts["trainable"]


def test_metric_page_reports_the_new_metric(tmp_path: Path) -> None:
    result = result_of("metric.md", tmp_path)
    counts = result["confusion"]["counts"]
    total = sum(map(sum, counts))
    agreement = sum(row[index] for index, row in enumerate(counts)) / total
    columns = zip(*counts, strict=True)
    chance = sum(sum(row) * sum(column) for row, column in zip(counts, columns, strict=True))
    expected = (agreement - chance / total**2) / (1 - chance / total**2)
    assert 0.1 < expected < 1
    assert result["metrics"]["kappa"] == pytest.approx(expected)
    low, high = result["intervals"]["kappa"]
    assert low < expected < high


def test_task_page_without_its_line_fails(tmp_path: Path) -> None:
    copy_package(tmp_path)
    apply_page("task.md", tmp_path)
    shutil.copy(house.PACKAGE / "tasks" / "__init__.py", tmp_path / "launcher/hpcft/tasks")
    done = run_recipe(tmp_path)
    assert done.returncode != 0
    assert "language_modeling" in done.stderr


def test_apply_diff_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text("a\nb\na\n")
    for diff in (" c\n+d\n", " a\n+d\n"):  # a line that is nowhere, and one that is there twice
        with pytest.raises(AssertionError, match="does not have once"):
            apply_diff(tmp_path / "file.py", diff)
    apply_diff(tmp_path / "file.py", "-b\n+c\n@@\n c\n a\n+d\n")
    assert (tmp_path / "file.py").read_text() == "a\nc\na\nd\n"


def test_index_lists_every_package_above_those_that_it_imports() -> None:
    page = (PAGES / "index.md").read_text().partition("| package |")[2].partition("\n\n")[0]
    listed = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    rooms = house.room_graph(house.module_graph())
    hidden = {"__main__", "cluster", "train"}
    assert sorted(listed) == sorted(rooms.keys() - hidden)
    for number, package in enumerate(listed):
        assert rooms[package] <= set(listed[number + 1 :]), package


@pytest.mark.parametrize("page", ["index.md", "task.md", "method.md", "metric.md"])
def test_pages_name_files_that_exist(page: str) -> None:
    text = (PAGES / page).read_text()
    new = {name for _, name, _ in BLOCK.findall(text)}
    named = set(re.findall(r"`((?:launcher/hpcft|hpcft|tests|docs)/[\w/.-]+\.\w+)`", text)) - new
    missing = [name for name in named
               if not (ROOT / re.sub(r"^hpcft/", "launcher/hpcft/", name)).exists()]  # fmt: skip
    assert not missing
