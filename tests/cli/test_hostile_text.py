"""Tests of hostile text in input: it is refused, or reaches neither shell nor sbatch."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from builders import RECIPE, SITE, Cli, Said, line_of, write_rows
from hpcft.config import yaml_document

HOSTILE = {
    "newline": "x\ntouch canary",
    "double": 'x"; touch canary; "',
    "single": "x'; touch canary; '",
    "dollar": "$(touch canary)",
    "semicolon": "x; touch canary",
    "backtick": "`touch canary`",
    "pipe": "x | touch canary & touch canary2 > canary3",
    "parent": "../../canary",
    "nul": "x\0y",
    "pattern": "x%j",
    "dash": "--wrap=touch canary",
    "escape": "\x1b[31m",
}
RECIPE_FIELDS = [
    "name", "description", "model.path", "model.revision", "model.tokenizer",
    "task.text", "task.label", "task.labels.1", "task.data.path", "task.data.name",
    "task.data.revision", "task.data.files.test", "task.data.splits.test",
    "train.metric_for_best_model", "resources.partition", "sweep.grid.name.0",
    "baseline.source", "baseline.outcome", "extends",
]  # fmt: skip
PROFILE_FIELDS = [
    "name", "description", "partition", "partitions.0", "account", "qos", "constraint",
    "gpu.name", "gpu.type", "node_disk_path", "python", "srun_args.0", "environment.VALUE",
]  # fmt: skip
# Fields that take one of a few words, or a number: they are tested with one hostile text.
RECIPE_WORDS = [
    "model.attn_implementation", "task.name", "method.name", "train.optim",
    "train.seed", "evaluation.split", "resources.nodes", "resources.offload_optimizer",
]  # fmt: skip
PROFILE_WORDS = ["scheduler", "accelerator", "gpu_request", "master_address", "max_nodes"]
# Text for people, and columns and labels: they may hold anything printable.
FREE = {"description", "task.text", "task.label", "task.labels.1", "task.data.splits.test",
        "baseline.source", "baseline.outcome"}  # fmt: skip
MANY_LINES = {"description", "task.text", "task.label"}
QUOTED = {"description", "srun_args.0", "environment.VALUE"}
GPU = {"name": "T4", "type": "t4", "memory_gib": 14.5, "compute_capability": 7.5}


def put(value: Any, keys: list[str], text: str) -> Any:
    """Returns a value with a text set at a place; a number is an index of a list."""
    if not keys:
        return text
    key, *rest = keys
    if key.isdigit():
        found = list(value) if isinstance(value, list) else []
        found[int(key) : int(key) + 1] = [put(None, rest, text)]
        return found
    found = value if isinstance(value, dict) else {}
    return {**found, key: put(found.get(key), rest, text)}


def write_value(path: Path, value: Any) -> None:
    """Writes a value as JSON, which is YAML too, with each field on its own line."""
    path.write_text(json.dumps(value, indent=1))


@functools.cache
def value_of(text: str) -> dict[str, Any]:
    made: dict[str, Any] = yaml_document.parse_document(text, yaml_document.Origin("here")).value
    return made


def run_script(script: str, folder: Path) -> dict[str, Any]:
    """Runs an sbatch script with bash and a stub of srun; returns the stub's arguments."""
    bare, stubs = folder / "bare", folder / "stubs"
    shutil.rmtree(bare, ignore_errors=True)
    bare.mkdir()
    stubs.mkdir(exist_ok=True)
    stub = stubs / "srun"
    stub.write_text('#!/bin/bash\nprintf "%s\\0" "$@" > args\nenv -0 > env\n')
    stub.chmod(0o755)
    environment = {"PATH": f"{stubs}:/usr/bin:/bin", "SLURM_CPUS_PER_TASK": "3", "HOME": "/nohome"}
    done = subprocess.run(
        ["bash"], input=script, cwd=bare, env=environment, text=True, capture_output=True,
        timeout=20, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {path.name for path in bare.iterdir()} == {"args", "env"}
    seen = (bare / "env").read_text().split("\0")
    return {
        "args": (bare / "args").read_text().split("\0"),
        "env": dict(pair.split("=", 1) for pair in seen if pair),
    }


def dry_script(cli: Cli, *arguments: str) -> tuple[Said, str]:
    said = cli("submit", "tiny.yaml", "-c", "site.yaml", "--dry-run", "--json", *arguments)
    return said, said.json["jobs"][0]["sbatch_script"] if said.code == 0 else ""


def check_directives(script: str) -> None:
    """Asserts that hpcft wrote every line before the first command."""
    known = ("#!/bin/bash", "# Parameters", "# setup", "# command", "#SBATCH --")
    head = script[: script.index("\nexport ")].splitlines()
    for line in head:
        assert line == "" or line.startswith(known) or line in ("set -e", "set +e"), line


def cases(fields: list[str], words: list[str]) -> list[tuple[str, str]]:
    """Returns every field with every kind of hostile text."""
    return [(f, kind) for f in fields for kind in HOSTILE] + [(f, "dollar") for f in words]


@pytest.mark.process
@pytest.mark.parametrize(("field", "kind"), cases(RECIPE_FIELDS, RECIPE_WORDS))
def test_dry_run_with_hostile_text_in_a_recipe_runs_none_of_it(
    tiny: Path, cli: Cli, field: str, kind: str
) -> None:
    text = HOSTILE[kind]
    (tiny.parent / "site.yaml").write_text(SITE)
    rows = [{"text": "a", text: "b", "label": "bad"}, {"text": "c", text: "d", "label": 1}]
    if field == "task.label":
        rows = [{"text": "a", text: "bad"}, {"text": "c", text: "good"}]
    write_rows(tiny.parent / "train.jsonl", rows)
    write_rows(tiny.parent / "test.jsonl", rows)
    value = put(value_of(RECIPE), ["baseline", "source"], "a paper")
    write_value(tiny, put(value, field.split("."), text))
    said, script = dry_script(cli)
    assert "Traceback" not in said.err
    lines = text.splitlines() if field in MANY_LINES else [text]
    if field in FREE and all(line.isprintable() for line in lines):
        assert said.code == 0, said.err
        assert "canary" not in script, "it reaches nothing"
        check_directives(script)
        run_script(script, tiny.parent)
    else:
        assert said.code == 2, said.out
        assert "tiny.yaml:" in said.err
    assert not [*tiny.parent.rglob("*canary*")]
    assert not (tiny.parent / "runs").exists()


@pytest.mark.process
@pytest.mark.parametrize(("field", "kind"), cases(PROFILE_FIELDS, PROFILE_WORDS))
@pytest.mark.usefixtures("tiny")
def test_dry_run_with_hostile_text_in_a_profile_runs_none_of_it(
    workplace: Path, cli: Cli, field: str, kind: str
) -> None:
    text = HOSTILE[kind]
    value = value_of(SITE) | ({"gpu": GPU} if field.startswith("gpu.") else {})
    write_value(workplace / "site.yaml", put(value, field.split("."), text))
    said, script = dry_script(cli)
    assert "Traceback" not in said.err
    lines = text.splitlines() if field in MANY_LINES else [text]
    quoted = field in QUOTED and all(line.isprintable() for line in lines)
    if quoted or (field == "python" and kind in ("parent", "pattern")):
        assert said.code == 0, said.err
        check_directives(script)
        ran = run_script(script, workplace)
        if field == "environment.VALUE":
            assert ran["env"]["VALUE"] == text
        if field in ("srun_args.0", "python"):
            assert text in ran["args"]
    else:
        assert said.code == 2, said.out
        line = line_of((workplace / "site.yaml").read_text(), json.dumps(text))
        assert f"site.yaml:{line}" in said.err
    assert not [*workplace.rglob("*canary*")]


@pytest.mark.parametrize("text", [*HOSTILE.values(), "A B", "A=B", "1A", ""])
@pytest.mark.usefixtures("tiny")
def test_dry_run_with_hostile_variable_names_is_refused(
    workplace: Path, cli: Cli, text: str
) -> None:
    write_value(workplace / "site.yaml", {**value_of(SITE), "environment": {text: "x"}})
    said, _ = dry_script(cli)
    assert said.code == 2
    assert "site.yaml:" in said.err
    assert not [*workplace.rglob("*canary*")]


@pytest.mark.parametrize(
    "text", ["x\ntouch canary", "x\rtouch canary", "x\0", "\x1b[31m", "", "\n"]
)
@pytest.mark.usefixtures("tiny")
def test_dry_run_with_a_setup_line_of_several_lines_is_refused(
    workplace: Path, cli: Cli, text: str
) -> None:
    write_value(workplace / "site.yaml", {**value_of(SITE), "setup": ["true", text]})
    said, _ = dry_script(cli)
    assert said.code == 2
    line = line_of((workplace / "site.yaml").read_text(), '"true"') + 1
    assert f"site.yaml:{line}" in said.err


@pytest.mark.usefixtures("tiny")
def test_dry_run_passes_the_text_of_a_profile_to_the_ranks_unchanged(
    workplace: Path, cli: Cli
) -> None:
    site = value_of(SITE) | {
        "setup": ["greeting='hello there'", 'export SEEN="$greeting"', "#SBATCH --mem=1"],
        "environment": {"A": "it's \"$HOME\" `x` \\ %j  two", "B": "ü"},
        "srun_args": ["--container-image=a b:c", "--mpi=$x"],
        "python": "apptainer exec --nv ${HOME}/image-1.0.sif python3",
        "account": "lab", "qos": "long", "constraint": "[a100|h100]&ib",
    }  # fmt: skip
    write_value(workplace / "site.yaml", site)
    said, script = dry_script(cli, "--runs-dir", "a 'runs' \"dir\"; touch canary $(touch canary)")
    assert said.code == 0, said.err
    assert script.index("\n#SBATCH --mem=1\n") > script.index("set -e"), "after the first command"
    ran = run_script(script, workplace)
    assert ran["env"]["SEEN"] == "hello there"
    assert ran["env"]["A"] == site["environment"]["A"]
    assert ran["env"]["B"] == "ü"
    assert ran["env"]["SRUN_CPUS_PER_TASK"] == "3"
    assert ran["args"][ran["args"].index("--mpi=$x") - 1] == "--container-image=a b:c"
    start = ran["args"].index("apptainer")
    assert ran["args"][start : start + 5] == [
        "apptainer", "exec", "--nv", "/nohome/image-1.0.sif", "python3",
    ]  # fmt: skip
    folder = ran["args"][ran["args"].index("hpcft.training.start_rank") + 1]
    assert folder.startswith(f"{workplace}/a 'runs' \"dir\"; touch canary $(touch canary)/tiny/")
    assert not [*workplace.rglob("canary")]
    lines = script.splitlines()
    assert "#SBATCH --account=lab" in lines
    assert "#SBATCH --constraint='[a100|h100]&ib'" in lines


def test_dry_run_with_hostile_file_names_runs_none_of_them(tiny: Path, cli: Cli) -> None:
    (tiny.parent / "site.yaml").write_text(SITE)
    odd = tiny.parent / "$(touch canary); `touch canary` 'x' %j"
    odd.mkdir()
    (tiny.parent / "train.jsonl").rename(odd / "train.jsonl")
    (odd / "tokenizer.json").write_text("{}")
    value = put(value_of(RECIPE), ["task", "data", "files", "train"], f"{odd.name}/train.jsonl")
    value = put(value, ["model", "tokenizer"], odd.name)
    write_value(tiny, value)
    said, script = dry_script(cli)
    assert said.code == 0, said.err
    assert odd.name not in script
    run_script(script, tiny.parent)
    assert not [*tiny.parent.rglob("canary")]
