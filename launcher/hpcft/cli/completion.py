"""Completes commands in a shell: recipes, profiles and runs; and installs the completion.

Candidates come from the names of files and folders alone; no recipe or record is read. They reach
the shell's own completion functions, some of which evaluate them, so that only names without any
character that is special to a shell are offered.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from hpcft.core.errors import UsageError
from hpcft.core.paths import DEFAULT_RUNS, shipped_folder

VARIABLE = "_HPCFT_COMPLETE"
"""Environment variable with which a shell asks for candidates."""
SHELLS = ("bash", "zsh", "fish")
_INSTALL, _SHOW = "--install-completion", "--show-completion"
_HARMLESS = re.compile(r"[\w./+@,=-]+")


# ---------------------------------------------------------------- installing it


def enable() -> None:
    """Lets this process answer a shell that asks for candidates."""
    # Typer calls this itself only with its own options, which detect the shell and cannot be told.
    from typer._completion_classes import completion_init

    completion_init()


def with_shell(arguments: list[str]) -> list[str]:
    """Appends the user's shell to a bare `--install-completion` or `--show-completion`."""
    if arguments and arguments[-1] in (_INSTALL, _SHOW):
        return [*arguments, Path(os.environ.get("SHELL", "")).name]
    return arguments


def _check_shell(option: str, shell: str) -> None:
    if shell not in SHELLS:
        got = f"got {shell!r}" if shell else "and SHELL is not set"
        raise UsageError(
            f"{option}: expected a shell ({', '.join(SHELLS)}), {got}; name it: "
            f"hpcft {option} {SHELLS[0]}"
        )


def _install(shell: str | None) -> None:
    if shell is None:
        return
    from typer._completion_shared import install  # Typer does not export it.

    _check_shell(_INSTALL, shell)
    _, file = install(shell=shell, prog_name="hpcft", complete_var=VARIABLE)
    typer.echo(f"installed the completion for {shell} in {file}; it works in new terminals")
    raise typer.Exit


def _show(shell: str | None) -> None:
    if shell is None:
        return
    from typer._completion_shared import get_completion_script  # Typer does not export it.

    _check_shell(_SHOW, shell)
    typer.echo(get_completion_script(prog_name="hpcft", complete_var=VARIABLE, shell=shell))
    raise typer.Exit


InstallCompletion = Annotated[
    str | None,
    typer.Option(
        _INSTALL, callback=_install, is_eager=True, metavar="[SHELL]",
        help="Install shell completion for bash, zsh or fish (default: your $SHELL) and exit.",
    ),
]  # fmt: skip
ShowCompletion = Annotated[
    str | None,
    typer.Option(
        _SHOW, callback=_show, is_eager=True, metavar="[SHELL]",
        help="Print the completion script for bash, zsh or fish and exit.",
    ),
]  # fmt: skip


# ---------------------------------------------------------------- candidates


def recipes(incomplete: str) -> list[str]:
    """Lists the shipped recipes and the YAML files that begin as the user's text does."""
    shipped = (path.stem for path in _yaml_files(shipped_folder("recipes")))
    return _offered(incomplete, [*shipped, *_files_below(incomplete)])


def profiles(incomplete: str) -> list[str]:
    """Lists the shipped profiles, those in `slurm/`, and YAML files that begin as the text does."""
    folders = (shipped_folder("slurm"), Path("slurm"))
    names = (path.stem for folder in folders for path in _yaml_files(folder))
    return _offered(incomplete, [*names, *_files_below(incomplete)])


def profile_lists(incomplete: str) -> list[str]:
    """Completes the last of several profiles separated by commas."""
    others, comma, last = incomplete.rpartition(",")
    names = [*profiles(last), *_offered(last, [] if comma else ["all"])]
    return [others + comma + name for name in names]


def runs(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Lists run ids and recipes of the runs folder, each with a word of help."""
    given = context.params.get("runs_dir") or os.environ.get("HPCFT_RUNS_DIR") or DEFAULT_RUNS
    helped: dict[str, str] = {}
    for recipe in _folders(Path(given)):
        run_ids = [folder.name for folder in _folders(recipe) if (folder / "job.json").exists()]
        if run_ids:
            helped[recipe.name] = f"{len(run_ids)} run{'s' * (len(run_ids) > 1)}"
        for run_id in run_ids:
            name = f"{recipe.name}/{run_id}" if "/" in incomplete else run_id
            helped[name] = f"run of {recipe.name}"
    return [(name, helped[name]) for name in _offered(incomplete, helped)]


def table_formats(incomplete: str) -> list[str]:
    """Lists the formats of `hpcft collect`."""
    from hpcft.cli.table_formats import FORMATS  # Only completion needs it here.

    return _offered(incomplete, ["table", "json", *FORMATS])


def _offered(incomplete: str, names: Iterable[str]) -> list[str]:
    begun = {name for name in names if name.startswith(incomplete)}
    return sorted(name for name in begun if _HARMLESS.fullmatch(name))


def _files_below(incomplete: str) -> Iterator[str]:
    """Lists YAML files in the folder of an incomplete path, and in folders that it begins.

    A folder itself is no candidate: the shell would put a blank after it.
    """
    begun = incomplete.rpartition("/")[2]
    prefix = incomplete.removesuffix(begun)
    root = Path(os.path.expanduser(prefix or "."))
    for path in _yaml_files(root):
        yield prefix + path.name
    for below in _folders(root) if begun else ():
        if below.name.startswith(begun):
            for path in _yaml_files(below):
                yield f"{prefix}{below.name}/{path.name}"


def _yaml_files(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return [path for path in folder.iterdir() if path.suffix in (".yaml", ".yml")]
    return []


def _folders(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return [Path(entry.path) for entry in entries
                if not entry.name.startswith(".") and entry.is_dir()]  # fmt: skip
    return []
