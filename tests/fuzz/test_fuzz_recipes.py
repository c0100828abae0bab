"""Ten thousand mutated recipes and profiles: each is read, or refused in a sentence, in time."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutations
import pytest

from builders import ROOT, Cli
from hpcft.config import cluster_profile, recipe, yaml_document
from hpcft.core.errors import HpcftError

HANG_S = 5.0
SECRET = "hf_thisIsNobodysToken"
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
LOADERS: dict[str, tuple[Callable[[], list[Path]], Callable[[str], Any]]] = {
    "recipe": (recipe.list_recipes, recipe.load_recipe),
    "cluster": (cluster_profile.list_profiles, cluster_profile.load_profile),
}


@pytest.fixture
def shipped(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that shipped recipes name, and a secret in the environment."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    shutil.copytree(ROOT / "recipes", workplace / "recipes")
    (workplace / "slurm").mkdir()
    return workplace


def contents(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def check_text(text: str, took_s: float) -> None:
    """Checks what a user reads: in time, without control characters, secrets and tracebacks."""
    assert took_s < HANG_S
    assert not CONTROL.search(text)
    assert SECRET not in text
    assert "Traceback" not in text


def load_mutations(kind: str, seeds: range, folder: Path) -> int:
    """Loads the mutations of these seeds; returns how many of them were accepted."""
    available, load = LOADERS[kind]
    known = [(path.read_text(), yaml_document.load_document(path).value) for path in available()]
    case = folder / ("recipes" if kind == "recipe" else "slurm") / "case.yaml"
    case.touch()
    before, accepted = contents(folder), 0
    for seed in seeds:
        content = mutations.document(seed, *known[seed % len(known)])
        case.write_bytes(content)
        started, message = time.monotonic(), ""
        try:
            load(str(case))
            accepted += 1
        except HpcftError as error:
            message = str(error) if error.exit_code == 2 else "Traceback"
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {content!r}") from error
        try:
            check_text(message, time.monotonic() - started)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {content!r}") from error
    assert contents(folder).keys() == before.keys()
    return accepted


@pytest.mark.parametrize("kind", LOADERS)
def test_load_of_a_few_mutations_accepts_some(kind: str, shipped: Path) -> None:
    assert 0 < load_mutations(kind, range(50), shipped) < 25


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("kind", LOADERS)
def test_load_of_many_mutations_ends_in_time(kind: str, part: int, shipped: Path) -> None:
    """In all there are 10,000 of them."""
    load_mutations(kind, range(1000 * part, 1000 * (part + 1)), shipped)


def plan_and_submit(seeds: range, folder: Path, cli: Cli) -> None:
    """Runs `hpcft plan` or `hpcft submit --dry-run` on the mutation of each seed."""
    small = (ROOT / "recipes" / "quickstart.yaml").read_text()
    sites = [
        (path.read_text(), yaml_document.load_document(path).value)
        for path in cluster_profile.list_profiles()
    ]
    for seed in seeds:
        case, site = folder / "recipes" / "quickstart.yaml", folder / "slurm" / "local.yaml"
        case.write_text(small)
        site.write_text((ROOT / "slurm" / "local.yaml").read_text())
        if seed % 2:
            content = mutations.document(seed, small, yaml_document.load_document(case).value)
            case.write_bytes(content)
        else:
            content = mutations.document(seed, *sites[seed // 2 % len(sites)])
            site.write_bytes(content)
        verb = ["plan"] if seed % 4 < 2 else ["submit", "--dry-run"]
        started = time.monotonic()
        said = cli(*verb, case, "-c", site, "--runs-dir", "runs")
        try:
            assert said.code in (0, 2)
            assert (said.out != "") == (said.code == 0)
            check_text(said.out.replace("\t", "") + said.err, time.monotonic() - started)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {content!r}: {said.err[-500:]}") from error
    assert not (folder / "runs").exists()


@pytest.mark.process
def test_plan_and_submit_survive_a_few_mutations(shipped: Path, cli: Cli) -> None:
    cli(
        "plan", shipped / "recipes" / "quickstart.yaml", "-c", "cpu"
    )  # The first plan imports the heavy libraries.
    plan_and_submit(range(8), shipped, cli)


@pytest.mark.slow
def test_plan_and_submit_survive_many_mutations(shipped: Path, cli: Cli) -> None:
    cli("plan", shipped / "recipes" / "quickstart.yaml", "-c", "cpu")
    plan_and_submit(range(8, 400), shipped, cli)


# ---------------------------------------------------------------- faults that fuzzing has found


@pytest.mark.process
@pytest.mark.parametrize("text", ["!", "|\n", "["])
def test_parse_document_of_the_largest_size_ends_in_time(text: str) -> None:
    size = yaml_document.MAX_BYTES
    started = time.process_time()  # of this process alone, however busy the machine is
    try:
        yaml_document.parse_document((text * size)[:size], yaml_document.Origin("here", 1))
    except HpcftError as error:
        check_text(str(error), 0)
    assert time.process_time() - started < HANG_S


def test_load_recipe_with_a_long_sweep_takes_linear_time(
    shipped: Path,
) -> None:
    case = shipped / "recipes" / "quickstart.yaml"
    points = "".join(f"  - {{train.seed: {seed}}}\n" for seed in range(300))
    case.write_text(case.read_text() + f"sweep:\n  list:\n{points}")
    started = time.monotonic()
    points_read = recipe.load_recipe(str(case))
    assert time.monotonic() - started < HANG_S
    assert [point.recipe.train.seed for point in points_read] == list(range(300))
    assert all(point.recipe.sweep is None for point in points_read)
    assert points_read[0].location_of("sweep").endswith("quickstart.yaml:44")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.num_train_epochs=1e308", "less than or equal to 1000000"),
        ("train.max_grad_norm=1e13", "less than or equal to 1000000000000"),
        ("model.config.num_hidden_layers=100000", "num_hidden_layers: expected at most 1000"),
    ],
)
def test_load_recipe_refuses_numbers_beyond_any_plan(override: str, says: str) -> None:
    with pytest.raises(HpcftError, match=re.escape(says)):
        recipe.load_recipe("quickstart", [override])


@pytest.mark.parametrize("field", ["host_memory_gib: ", "memory_gib: "])
def test_load_profile_refuses_memory_beyond_any_machine(field: str, shipped: Path) -> None:
    case = shipped / "slurm" / "case.yaml"
    text = (ROOT / "slurm" / "a100-40.yaml").read_text()
    case.write_text(re.sub(rf"\b{field}[0-9.]+", f"{field}1e308", text))
    with pytest.raises(HpcftError, match="memory_gib: expected a number less than or equal to"):
        cluster_profile.load_profile(str(case))
