"""Tests of the note on installed versions that hpcft was not tested with."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcft import __version__
from hpcft.core import paths, tested_versions
from hpcft.core.tested_versions import UntestedVersion, untested_versions, untested_versions_note

CONSTRAINTS = """\
# a comment
made-torch==2.8.0
Made_Transformers==5.23.0
made-peft==0.21.0
made-other==1.0
"""


def install(folder: Path, name: str, version: str, *requirements: str) -> None:
    """Writes the metadata of a made-up distribution, as pip leaves it in site-packages."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = [f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
    (info / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")


@pytest.fixture
def constraints(tmp_path: Path) -> Path:
    file = tmp_path / "constraints.txt"
    file.write_text(CONSTRAINTS)
    return file


@pytest.fixture
def site_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up environment: `made` needs five packages, of which one is not installed."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    install(folder, "made", "1.0", "made-torch<3,>=2.8",
            "made.transformers>=5; python_version > '3'", "made-peft", "made-unpinned",
            "made-missing", "made-other; extra == 'dev'")  # fmt: skip
    install(folder, "made-torch", "2.8.0+cpu")
    install(folder, "made-transformers", "5.24.0")
    install(folder, "made-peft", "0.22.0")
    install(folder, "made-unpinned", "1.0")
    install(folder, "made-other", "2.0")
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.mark.usefixtures("site_packages")
def test_untested_versions_lists_direct_dependencies_that_differ(constraints: Path) -> None:
    assert untested_versions(constraints, "made") == [
        UntestedVersion("made.transformers", "5.24.0", "5.23.0"),
        UntestedVersion("made-peft", "0.22.0", "0.21.0"),
    ]


@pytest.fixture
def noting(
    constraints: Path, site_packages: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Path:
    """Lets the note be about the made-up distribution, with a cache folder of its own."""

    def of_made(file: Path) -> list[UntestedVersion]:
        return untested_versions(file, "made")

    monkeypatch.setattr(tested_versions, "untested_versions", of_made)
    monkeypatch.setattr(tested_versions, "tested_versions_file", lambda: constraints)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return site_packages


def test_untested_versions_note_names_versions_and_command(noting: Path, constraints: Path) -> None:
    note = untested_versions_note(noting)
    assert note.startswith(f"note: hpcft {__version__} was not tested with")
    assert "made.transformers 5.24.0 (tested: 5.23.0), made-peft 0.22.0 (tested: 0.21.0)" in note
    assert f"pip install -c {constraints} hpcft" in note
    assert len(note.splitlines()) == 1


def test_untested_versions_note_comes_once_until_packages_change(noting: Path) -> None:
    assert untested_versions_note(noting)
    assert untested_versions_note(noting) == ""
    install(noting, "made-new", "1.0")
    assert untested_versions_note(noting)
    assert untested_versions_note(noting) == ""


def test_untested_versions_note_is_empty_with_tested_versions(
    noting: Path, constraints: Path
) -> None:
    constraints.write_text("made-transformers==5.24.0\n")
    assert untested_versions_note(noting) == ""


def test_untested_versions_note_is_empty_without_a_cache_folder(
    noting: Path, monkeypatch: pytest.MonkeyPatch, constraints: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(constraints))  # A file, in which nothing can be made.
    assert untested_versions_note(noting) == ""


def test_untested_versions_note_is_empty_if_hpcft_is_not_installed(
    noting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_nothing(file: Path) -> list[UntestedVersion]:
        return untested_versions(file, "made-nowhere")

    monkeypatch.setattr(tested_versions, "untested_versions", of_nothing)
    assert untested_versions_note(noting) == ""


def test_tested_versions_file_is_shipped_and_has_every_dependency() -> None:
    names = {line.partition("==")[0] for line in paths.tested_versions_file().read_text().split()}
    assert {"torch", "transformers", "deepspeed", "peft", "typer"} <= names
