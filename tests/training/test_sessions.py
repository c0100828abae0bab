"""Runs on this machine from odd sessions: locales, folders, homes, and cancelled at any moment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from builders import RECIPE, ROOT, Cli, film_rows, write_rows
from real_runs import current_step, is_gone, until

pytestmark = pytest.mark.process

LONG = ("-c", "local", "-o", "train.max_steps=100000")


@pytest.fixture
def turkish(tmp_path: Path) -> dict[str, str]:
    """The variables of a locale whose encoding has no Japanese letters."""
    made = tmp_path / "locales" / "tr_TR.ISO-8859-9"
    made.parent.mkdir()
    command = ["localedef", "-f", "ISO-8859-9", "-i", "tr_TR", str(made)]
    if shutil.which("localedef") is None or subprocess.run(command, check=False).returncode:
        pytest.skip("no locale can be made here")
    return {"LOCPATH": str(made.parent), "LC_ALL": made.name}


def test_a_local_run_needs_nothing_of_its_session(tmp_path: Path, turkish: dict[str, str]) -> None:
    """The home cannot be written, the locale is not UTF-8, and the folder has odd modules."""
    folder = tmp_path / "日本 ü"
    folder.mkdir()
    rows = [row | {"text": row["text"] + " 良い"} for row in film_rows(12)]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "test.jsonl", rows[:8])
    (folder / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    for name in ("datasets", "tokenizers", "random", "submitit"):
        (folder / f"{name}.py").write_text("raise SystemExit('this module was imported')\n")
    (tmp_path / "home").touch()  # No folder can be made in it, not even by root.
    home = str(tmp_path / "home")
    profile = (ROOT / "slurm/local.yaml").read_text(encoding="utf-8")
    (folder / "homeless.yaml").write_text(
        f"{profile}\nenvironment: {{HOME: {home}, XDG_CACHE_HOME: {home}/cache}}\n",
        encoding="utf-8",
    )
    session = os.environ | turkish
    session.pop("PYTHONUTF8", None)
    session["PYTHONPATH"] = f":{ROOT / 'launcher'}"
    code = (
        "import os, sys; sys.path[:] = [p for p in sys.path if p not in ('', os.getcwd())]; "
        "from hpcft.cli.app import main; main()"
    )
    (folder.parent / "hpcft").write_text(code)  # As the script that pip installs.
    done = subprocess.run(
        [sys.executable, "-P", str(folder.parent / "hpcft"), "submit", "tiny.yaml",
         "-c", "homeless.yaml", "--watch"],
        cwd=folder, env=session, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    (run,) = (folder / "runs/tiny").glob("*")
    logs = "".join(log.read_text(errors="replace") for log in run.glob("logs/*_log.*"))
    assert done.returncode == 0, done.stderr.decode("iso-8859-9") + logs
    assert "cannot be written here, so caches lie in" in logs
    assert json.loads((run / "result.json").read_text(encoding="utf-8"))["metrics"]


def test_cancelled_local_runs_are_cancelled_at_any_moment(tiny: Path, cli: Cli) -> None:
    """One trains, one waits for it, and one has just been submitted."""
    said = cli("submit", tiny, *LONG, "-o", "name=trains", "--json")
    assert said.code == 0, said.err
    folder = Path(said.json[0]["folder"])
    until(lambda: current_step(folder) > 0)
    assert cli("submit", tiny, *LONG, "-o", "name=waits").code == 0
    until(lambda: "waiting for another" in cli("status", "waits", "--json").json[0]["note"], 20)
    assert cli("submit", tiny, *LONG, "-o", "name=starts").code == 0
    said = cli("cancel", "trains", "waits", "starts")
    assert said.code == 0, said.err
    assert said.err.count("was cancelled") == 3
    views = cli("status", "--json").json
    assert [view["state"] for view in views] == ["CANCELLED"] * 3
    assert {view["failure"]["class"] for view in views} == {"cancelled"}
    assert {"the job was cancelled by" in view["note"] for view in views} == {True}
    for view in views:
        assert is_gone(Path(view["folder"]))
    began = [view["recipe"] for view in views if view["progress"]]
    assert began == ["trains"], "none that waited began when the first one ended"
