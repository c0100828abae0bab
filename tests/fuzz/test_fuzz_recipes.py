"""Ten thousand mutated recipes and profiles: refused in a sentence, in time, nothing written."""

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
DOORS: dict[str, tuple[Callable[[], list[Path]], Callable[[str], Any]]] = {
    "recipe": (recipe.list_recipes, recipe.load_recipe),
    "cluster": (cluster_profile.list_profiles, cluster_profile.load_profile),
}


@pytest.fixture
def shipped(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that a shipped recipe names, and a secret in the environment."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    shutil.copytree(ROOT / "recipes", workplace / "recipes")
    (workplace / "slurm").mkdir()
    return workplace


def contents(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def check(said: str, took_s: float) -> None:
    assert took_s < HANG_S
    assert not CONTROL.search(said)
    assert SECRET not in said
    assert "Traceback" not in said


def knock(kind: str, seeds: range, folder: Path) -> int:
    """Loads the mutations of these seeds; how many of them were accepted."""
    available, load = DOORS[kind]
    known = [(path.read_text(), yaml_document.load_document(path).value) for path in available()]
    case = folder / ("recipes" if kind == "recipe" else "slurm") / "case.yaml"
    case.touch()
    before, accepted = contents(folder), 0
    for seed in seeds:
        content = mutations.document(seed, *known[seed % len(known)])
        case.write_bytes(content)
        started, said = time.monotonic(), ""
        try:
            load(str(case))
            accepted += 1
        except HpcftError as error:
            said = str(error) if error.exit_code == 2 else "Traceback"
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {content!r}") from error
        try:
            check(said, time.monotonic() - started)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {content!r}") from error
    assert contents(folder).keys() == before.keys()
    return accepted


@pytest.mark.parametrize("kind", DOORS)
def test_a_few_mutated(kind: str, shipped: Path) -> None:
    assert 0 < knock(kind, range(50), shipped) < 25


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("kind", DOORS)
def test_many_mutated(kind: str, part: int, shipped: Path) -> None:
    """With those above 10,000 in all."""
    knock(kind, range(1000 * part, 1000 * (part + 1)), shipped)


def whole_commands(seeds: range, folder: Path, cli: Cli) -> None:
    """`hpcft plan` and `submit --dry-run` of mutations, one after the other."""
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
            check(said.out.replace("\t", "") + said.err, time.monotonic() - started)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {content!r}: {said.err[-500:]}") from error
    assert not (folder / "runs").exists()


def test_a_few_whole_commands(shipped: Path, cli: Cli) -> None:
    cli("plan", shipped / "recipes" / "quickstart.yaml", "-c", "cpu")  # imports what is heavy
    whole_commands(range(8), shipped, cli)


@pytest.mark.slow
def test_many_whole_commands(shipped: Path, cli: Cli) -> None:
    cli("plan", shipped / "recipes" / "quickstart.yaml", "-c", "cpu")
    whole_commands(range(8, 400), shipped, cli)


# ---------------------------------------------------------------- what mutations have found


@pytest.mark.parametrize("text", ["!", "|\n", "["])
def test_as_much_as_is_accepted_is_refused_or_read_in_time(text: str) -> None:
    size = yaml_document.MAX_BYTES
    started = time.monotonic()
    try:
        yaml_document.parse_document((text * size)[:size], yaml_document.Origin("here", 1))
    except HpcftError as error:
        check(str(error), 0)
    assert time.monotonic() - started < HANG_S


def test_a_written_out_sweep_takes_time_with_its_points_not_with_their_square(
    shipped: Path,
) -> None:
    case = shipped / "recipes" / "quickstart.yaml"
    points = "".join(f"  - {{train.seed: {seed}}}\n" for seed in range(300))
    case.write_text(case.read_text() + f"sweep:\n  list:\n{points}")
    started = time.monotonic()
    found = recipe.load_recipe(str(case))
    assert time.monotonic() - started < HANG_S
    assert [point.recipe.train.seed for point in found] == list(range(300))
    assert all(point.recipe.sweep is None for point in found)
    assert found[0].where(("sweep",)).endswith("quickstart.yaml:44")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.num_train_epochs=1e308", "less than or equal to 1000000"),
        ("train.max_grad_norm=1e13", "less than or equal to 1000000000000"),
        ("model.config.num_hidden_layers=100000", "num_hidden_layers: expected at most 1000"),
    ],
)
def test_what_no_plan_can_be_made_of(override: str, says: str) -> None:
    with pytest.raises(HpcftError, match=re.escape(says)):
        recipe.load_recipe("quickstart", [override])


@pytest.mark.parametrize("field", ["host_memory_gib: ", "memory_gib: "])
def test_memory_beyond_all_measure(field: str, shipped: Path) -> None:
    case = shipped / "slurm" / "case.yaml"
    text = (ROOT / "slurm" / "a100-40.yaml").read_text()
    case.write_text(re.sub(rf"\b{field}[0-9.]+", f"{field}1e308", text))
    with pytest.raises(HpcftError, match="memory_gib: input should be less than or equal to"):
        cluster_profile.load_profile(str(case))
