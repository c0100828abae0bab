"""The wheel works outside the checkout, and generated pages are up to date."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from builders import ROOT
from hpcft.config import schema


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder into which the built wheel is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True, timeout=120)
    return target


def _hpcft(installed: Path, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "hpcft", *arguments], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(installed)}, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.process
def test_wheel_finds_recipes_profiles_and_templates_outside_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    recipes = _hpcft(installed, tmp_path, "recipes").splitlines()
    shipped = sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml"))
    assert [line.split("\t")[0] for line in recipes[1:]] == shipped
    profiles = _hpcft(installed, tmp_path, "clusters").splitlines()
    shipped = sorted(file.stem for file in (ROOT / "slurm").glob("*.yaml"))
    assert [line.split("\t")[0] for line in profiles[1:]] == shipped
    dry = _hpcft(
        installed, tmp_path, "submit", "recipes/quickstart.yaml", "-c", "local", "--dry-run"
    )
    assert '"stage": 3' in dry
    assert str(installed) in dry, "the data comes from the wheel too"


def test_wheel_installs_nothing_but_hpcft(installed: Path) -> None:
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names <= {"hpcft", "bin"}
    assert not list(installed.rglob("*.safetensors"))


@pytest.mark.parametrize("kind", ["recipe", "cluster"])
def test_reference_page_is_current(kind: str) -> None:
    page = (ROOT / "docs" / "reference" / f"{kind}.md").read_text()
    assert page.strip() == schema.reference_page(kind).strip(), "run `make docs`"


def test_readme_names_every_command() -> None:
    from hpcft.cli.app import app

    readme = (ROOT / "README.md").read_text()
    verbs = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert len(verbs) >= 9
    assert [verb for verb in verbs if f"`hpcft {verb}" not in readme] == []
