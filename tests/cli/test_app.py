"""Tests of what all commands share: help, version, exit codes, and the note on versions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builders import Cli
from hpcft import __version__
from hpcft.cli import app as app_module
from hpcft.cli.app import COMMANDS

NOTE = "note: made"


@pytest.fixture
def note(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the installed versions differ from the tested ones; `cli` has left out the note."""
    monkeypatch.setattr(app_module, "untested_versions_note", lambda _: NOTE)


def test_help_lists_every_command_in_a_whole_sentence(cli: Cli) -> None:
    said = cli("--help")
    assert (said.code, said.err) == (0, "")
    commands = said.out[said.out.index("Commands:") :].splitlines()[1:]
    assert [line.split()[0] for line in commands] == [command.__name__ for command in COMMANDS]
    assert all(line.endswith(".") and not line.endswith("...") for line in commands)
    assert cli("-h").out == said.out


@pytest.mark.parametrize("command", [command.__name__ for command in COMMANDS])
def test_help_of_a_command_explains_each_option(command: str, cli: Cli) -> None:
    said = cli(command, "--help")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith(f"Usage: hpcft {command} ")
    options = said.out[said.out.index("Options:") :].splitlines()[1:]
    assert all(len(line.split()) > 2 for line in options if line.strip().startswith("-"))


def test_version_is_printed(cli: Cli) -> None:
    assert cli("--version").out == f"{__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nonsense",), 2, "No such command 'nonsense'"),
        (("submit",), 2, "Missing argument 'RECIPE'"),
        (("submit", "quickstart", "--nonsense"), 2, "No such option: --nonsense"),
        (("status", "nobody"), 2, "error: there is no run 'nobody' in runs; to list all: "
                                  "hpcft status"),
        (("logs", "nobody", "--rank", "-1"), 2, "Invalid value for '--rank'"),
    ],
    ids=["command", "argument", "option", "run", "value"],
)  # fmt: skip
@pytest.mark.usefixtures("workplace")
def test_exit_code_of_a_wrong_command_line(
    arguments: tuple[str, ...], code: int, message: str, cli: Cli
) -> None:
    said = cli(*arguments)
    assert (said.code, said.out) == (code, "")
    assert message in said.err
    assert "Traceback" not in said.err


@pytest.mark.usefixtures("workplace")
def test_exit_code_of_an_unreadable_file_is_that_of_usage(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error", "/made/file")

    monkeypatch.setattr("hpcft.cli.status.select_runs", broken)
    said = cli("status")
    assert (said.code, said.err) == (2, "error: /made/file: Input/output error\n")


@pytest.mark.usefixtures("workplace", "note")
def test_note_on_versions_goes_to_stderr_only(cli: Cli) -> None:
    said = cli("status", "--json")
    assert (said.code, said.err) == (0, f"{NOTE}\n")
    assert json.loads(said.out) == []


@pytest.mark.usefixtures("workplace")
def test_note_on_versions_that_fails_does_not_stop_a_command(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(site_packages: Path) -> str:
        raise RuntimeError(f"no metadata in {site_packages}")

    monkeypatch.setattr(app_module, "untested_versions_note", broken)
    said = cli("status", "--json")
    assert (said.code, said.out, said.err) == (0, "[]\n", "")
