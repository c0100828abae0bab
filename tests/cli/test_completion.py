"""Tests of shell completion: the protocols of bash, zsh and fish in a process of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import ROOT, Cli, run_record
from hpcft.cli import completion
from hpcft.core.files import write_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Job

pytestmark = pytest.mark.process

SHELLS = pytest.mark.parametrize("shell", completion.SHELLS)
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
PROFILES = sorted(path.stem for path in (ROOT / "slurm").glob("*.yaml"))


def complete(shell: str, line: str, folder: Path, **environment: str) -> list[str]:
    """Asks for the candidates at the end of a command line, as the script of a shell does."""
    words = line.split(" ")
    variables = {
        "bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
        "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    done = subprocess.run(
        [sys.executable, "-m", "hpcft"], cwd=folder, capture_output=True, text=True, check=True,
        env={**os.environ, completion.VARIABLE: f"complete_{shell}", **variables, **environment},
        timeout=60,
    )  # fmt: skip
    assert done.stderr == ""
    if shell == "zsh":
        return re.findall(r'^(?:_arguments \S+ :\(\()?"([^"]*)"', done.stdout, re.MULTILINE)
    return [text.partition("\t")[0] for text in done.stdout.splitlines() if text]


@SHELLS
def test_complete_of_a_command(shell: str, tmp_path: Path) -> None:
    assert complete(shell, "hpcft st", tmp_path) == ["stage", "status"]
    assert "submit" in complete(shell, "hpcft ", tmp_path)


@SHELLS
def test_complete_of_a_recipe_offers_shipped_names_and_files(shell: str, tmp_path: Path) -> None:
    (tmp_path / "quick.yaml").touch()
    (tmp_path / "quiet").mkdir()
    (tmp_path / "quiet" / "own.yaml").touch()
    (tmp_path / "quirk.txt").touch()
    expected = ["quick.yaml", "quickstart", "quiet/own.yaml"]
    assert complete(shell, "hpcft submit qui", tmp_path) == expected
    assert complete(shell, "hpcft plan quickstart qui", tmp_path) == expected, "a second recipe"
    assert complete(shell, "hpcft submit quiet/", tmp_path) == ["quiet/own.yaml"]
    assert set(complete(shell, "hpcft params ", tmp_path)) == {*RECIPES, "quick.yaml"}


@SHELLS
def test_complete_of_a_profile_offers_shipped_and_own_ones(shell: str, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "a-site.yaml").touch()
    expected = [name for name in PROFILES if name.startswith("a")] + ["a-site"]
    for option in ("-c", "--cluster"):
        assert complete(shell, f"hpcft submit x {option} a", tmp_path) == sorted(expected)
    several = complete(shell, "hpcft plan x --clusters t4-16,a-", tmp_path)
    assert several == ["t4-16,a-site"]


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    """A runs folder with two runs of a recipe, one of another, and folders that are not runs."""
    root = tmp_path / "my-runs"
    for recipe, run_id in (("one", "aaaa0001"), ("one", "aaaa0002"), ("two", "bbbb0001")):
        paths = RunPaths(root / recipe / run_id)
        paths.folder.mkdir(parents=True)
        job = Job(run_id=run_id, recipe=recipe, cluster="site", scheduler="slurm")
        write_record(paths.job, job)
    write_record(RunPaths(root / "one" / "aaaa0001").result, run_record("aaaa0001"))
    for name in ("$(touch canary)", "`touch canary`", "x;touch canary"):
        paths = RunPaths(root / name / "cccc0001")
        paths.folder.mkdir(parents=True)
        paths.job.write_text("not JSON: completion does not read it")
    (root / "calibration").mkdir()
    (root / "calibration" / "site.json").touch()
    return root


@SHELLS
def test_complete_of_a_run_offers_run_ids_and_recipes(
    shell: str, runs_dir: Path, tmp_path: Path
) -> None:
    option = "--runs-dir my-runs"
    expected = ["aaaa0001", "aaaa0002", "bbbb0001", "cccc0001", "one", "two"]
    others = ("logs", "cancel", "explain", "resume", "collect") if shell == "bash" else ()
    for command in ("status", *others):
        assert complete(shell, f"hpcft {command} {option} ", tmp_path) == expected
    assert complete(shell, f"hpcft status {option} aaaa0001 b", tmp_path) == ["bbbb0001"]
    of_one = complete(shell, f"hpcft logs {option} one/", tmp_path)
    assert of_one == ["one/aaaa0001", "one/aaaa0002"]
    by_variable = complete(shell, "hpcft logs t", tmp_path, HPCFT_RUNS_DIR=str(runs_dir))
    assert by_variable == ["two"]
    runs_dir.rename(tmp_path / "runs")
    assert complete(shell, "hpcft logs t", tmp_path) == ["two"], "the default folder"


@SHELLS
def test_complete_of_a_run_without_a_runs_folder_offers_nothing(shell: str, tmp_path: Path) -> None:
    assert complete(shell, "hpcft logs ", tmp_path) == []


@SHELLS
def test_complete_of_a_table_format(shell: str, tmp_path: Path) -> None:
    formats = complete(shell, "hpcft collect --format ", tmp_path)
    assert formats == ["csv", "json", "latex", "md", "table", "tsv"]


def test_complete_writes_no_note_on_versions(tmp_path: Path) -> None:
    """The note would come in the middle of a command line that is being typed."""
    cache = tmp_path / "cache"
    assert complete("bash", "hpcft st", tmp_path, XDG_CACHE_HOME=str(cache))
    assert not cache.exists()


# ---------------------------------------------------------------- in a real shell


def install_fake(folder: Path) -> None:
    """Writes an `hpcft` that runs this Python, for the PATH of a shell."""
    program = folder / "bin" / "hpcft"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m hpcft "$@"\n')
    program.chmod(0o755)


def test_script_of_bash_completes_in_bash(tmp_path: Path, runs_dir: Path) -> None:
    bash = shutil.which("bash")
    assert bash
    install_fake(tmp_path)
    script = f"""
        PATH="{tmp_path}/bin:$PATH"
        eval "$(hpcft --show-completion bash)"
        complete -p hpcft
        COMP_WORDS=(hpcft status --runs-dir my-runs aaaa) COMP_CWORD=4
        _hpcft_completion hpcft
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        [bash, "--norc", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[1:] == ["aaaa0001", "aaaa0002"]
    assert not [*tmp_path.rglob("canary")]


# ---------------------------------------------------------------- installing it


@SHELLS
def test_show_completion_prints_the_script_of_a_shell(
    shell: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = cli("--show-completion", shell)
    assert (named.code, named.err) == (0, "")
    assert f"{completion.VARIABLE}=complete_{shell}" in named.out
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    assert cli("--show-completion").out == named.out, "the default is the user's shell"


@pytest.mark.parametrize(
    ("shell", "file"),
    [("bash", ".bash_completions/hpcft.sh"), ("zsh", ".zfunc/_hpcft"),
     ("fish", ".config/fish/completions/hpcft.fish")],
)  # fmt: skip
def test_install_completion_writes_the_script(
    shell: str, file: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    said = cli("--install-completion", shell)
    assert said.code == 0, said.err
    assert str(tmp_path / file) in said.out
    assert f"{completion.VARIABLE}=complete_{shell}" in (tmp_path / file).read_text()


@pytest.mark.parametrize("option", ["--install-completion", "--show-completion"])
@pytest.mark.parametrize(
    ("arguments", "shell", "message"),
    [(("tcsh",), "/bin/bash", "got 'tcsh'"), ((), "/bin/tcsh", "got 'tcsh'"),
     ((), "", "SHELL is not set")],
    ids=["named", "by SHELL", "without SHELL"],
)  # fmt: skip
def test_install_completion_of_another_shell_names_the_command(
    option: str, arguments: tuple[str, ...], shell: str, message: str, cli: Cli,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", shell)
    said = cli(option, *arguments)
    assert said.code == 2
    assert message in said.err
    assert f"hpcft {option} bash" in said.err
    assert not [path for path in tmp_path.rglob("*hpcft*") if path.is_file()]


# ---------------------------------------------------------------- candidates


@pytest.mark.parametrize(
    ("candidates", "folder"), [(completion.recipes, "."), (completion.profiles, "slurm")]
)
def test_candidates_with_characters_special_to_a_shell_are_left_out(
    candidates: Callable[[str], list[str]], folder: str, workplace: Path
) -> None:
    place = workplace / folder
    place.mkdir(exist_ok=True)
    for name in ("own $(touch x)", "own`x`", "own;x", "own x", "own'x", "own\nx", "own-plain"):
        (place / f"{name}.yaml").touch()
    names = [Path(name).stem for name in candidates("own")]
    assert names == ["own-plain"]
