"""Bad and hostile input at the command line: told with file and line, nothing made, nothing run."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import RECIPE, ROOT, Cli, Said, write_rows
from hpcft import document

MODES = pytest.mark.parametrize("mode", [["--dry-run"], []], ids=["dry", "real"])

SITE = """\
name: site
scheduler: slurm
accelerator: cpu
partition: main
partitions: [main, high]
max_nodes: 2
gpus_per_node: 4
cores_per_node: 8
host_memory_gib: 16
time_limit_min: 60
"""


@pytest.fixture
def refused(workplace: Path, cli: Cli) -> Callable[..., Said]:
    """Submits, and asserts that it was refused properly and left nothing behind."""

    def run(*arguments: str, cluster: str = "local", recipe: str = "tiny.yaml") -> Said:
        said = cli("submit", recipe, "-c", cluster, "--runs-dir", "runs", *arguments)
        assert said.code == 2, said.err
        assert said.out == ""
        assert "Traceback" not in said.err
        assert not (workplace / "runs").exists()
        assert not [*workplace.rglob("*canary*")]
        return said

    return run


def line_of(text: str, part: str) -> int:
    """Line of the first occurrence."""
    assert part in text
    return text[: text.index(part)].count("\n") + 1


# ---------------------------------------------------------------- wrong recipes


@MODES
@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("  max_steps: 3", "  max_stpes: 3", "did you mean max_steps"),
        ("  max_steps: 3", "  max_steps: three", "expected a whole number"),
        ("  max_steps: 3", "  max_steps: 3\n  max_steps: 4", "duplicate key"),
        ("  labels: [bad, good]", "  labels: [no, 1]", "quote it if text is meant"),
        ("train: train.jsonl", "train: nosuch.jsonl", "there is no file"),
        ("train: train.jsonl", "train: tiny.yaml", "expected .csv, .jsonl, .json or .parquet"),
        ("train: train.jsonl", "train: .", "there is no file"),
        ("method: { name: full }", "method: { name: fulll }", "expected one of 'full'"),
        ("method: { name: full }", "method: &m { name: full }", "aliases"),
        ("method: { name: full }", "method: !!map { name: full }", "tags"),
        ("  tokenizer: {", "  path: ./model\n  tokenizer: {", "there is no folder"),
        ("nodes: 1", "nodes: 2", "expected at most 1 (local's max_nodes), got 2"),
        ("gpus_per_node: 1", "gpus_per_node: 9999", "a node of local has"),
        ("time_min: 10", "time_min: 99999999", "expected at most"),
        ("time_min: 10", "time_min: 10, partition: nosuch", "has no partition 'nosuch'"),
        ("max_length: 32", "max_length: 65", "the model takes at most 64 tokens"),
        ("name: tiny", "name: ../tiny", "characters that are not allowed"),
        ("name: tiny", "name: '%j'", "characters that are not allowed"),
    ],
)
def test_a_wrong_recipe(
    tiny: Path, refused: Callable[..., Said], mode: list[str], old: str, new: str, what: str
) -> None:
    text = RECIPE.replace(old, new)
    assert text != RECIPE
    tiny.write_text(text)
    said = refused(*mode)
    line = line_of(text, new) + new.count("\n") * ("duplicate" in what)
    assert f"tiny.yaml:{line}" in said.err
    assert what in said.err


@MODES
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "tiny.yaml:1: aliases"),
        (b"a: " + b"[" * 50_000, "tiny.yaml:1: nested deeper"),
        (b"a: b\n c: d\n", "tiny.yaml:2: is not valid YAML"),
        (b"name: caf\xe9\n", "tiny.yaml:1: expected UTF-8"),
        (b"name: t\0x\n", "tiny.yaml:1: has a control character"),
        (b"", "tiny.yaml:1: expected a mapping"),
        (b"[]", "tiny.yaml:1: expected a mapping"),
        (b"extends: tiny.yaml", "tiny.yaml:1 extends: tiny.yaml extends this recipe in a circle"),
        (b"{}", "tiny.yaml:1 name: is required"),
        (None, "tiny.yaml: expected at most 256 kB"),
    ],
)
def test_what_is_no_recipe(
    tiny: Path, refused: Callable[..., Said], mode: list[str], content: bytes | None, what: str
) -> None:
    if content is None:
        with tiny.open("wb") as stream:
            stream.truncate(100_000_000)
    else:
        tiny.write_bytes(content)
    assert what in refused(*mode).err


@MODES
@pytest.mark.parametrize("recipe", ["nosuch.yaml", "nosuch", ".", "x" * 5000, "a\nb.yaml"])
def test_no_such_recipe(refused: Callable[..., Said], mode: list[str], recipe: str) -> None:
    assert recipe in refused(*mode, recipe=recipe).err


@MODES
@pytest.mark.parametrize(
    "override",
    ["train.seed=x", "train.sed=1", "train.seed", "name=$(touch canary)", "name='a; touch canary'",
     "model.path=`touch canary`", "resources.partition=a b", "task.data.files={train: ../x}"],
)  # fmt: skip
@pytest.mark.usefixtures("tiny")
def test_a_wrong_override(refused: Callable[..., Said], mode: list[str], override: str) -> None:
    assert f"-o {override}" in refused(*mode, "-o", override).err


@MODES
@pytest.mark.usefixtures("tiny")
def test_all_problems_at_once(tiny: Path, refused: Callable[..., Said], mode: list[str]) -> None:
    tiny.write_text(RECIPE.replace("max_steps: 3", "max_steps: x").replace("method:", "methud:"))
    said = refused(*mode, "-o", "train.seed=y")
    for part in ("tiny.yaml:21 train.max_steps", "tiny.yaml:18 methud: unknown key; did you mean "
                 "method", "method: is required", "-o train.seed=y train.seed"):  # fmt: skip
        assert part in said.err


@pytest.mark.usefixtures("tiny")
def test_the_label_no_is_accepted_as_text(workplace: Path, cli: Cli) -> None:
    rows = [{"text": "a", "label": "no"}, {"text": "b", "label": "yes"}] * 2
    write_rows(workplace / "train.jsonl", rows)
    write_rows(workplace / "test.jsonl", rows)
    said = cli("submit", "tiny.yaml", "-c", "local", "-o", "task.labels=[no, yes]", "--dry-run",
               "--json")  # fmt: skip
    assert said.json["runs"][0]["recipe"]["task"]["labels"] == ["no", "yes"]


# ---------------------------------------------------------------- wrong models and data


MODEL_FILES = {
    "config.json": '{"model_type": "bert"}',
    "model.safetensors": "",
    "tokenizer.json": "{}",
}


@MODES
@pytest.mark.parametrize(
    ("absent", "what"),
    [
        ("tokenizer.json", "has no tokenizer; save the tokenizer there too"),
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no *.safetensors weights"),
    ],
)
def test_an_incomplete_model_folder(
    tiny: Path, refused: Callable[..., Said], mode: list[str], absent: str, what: str
) -> None:
    folder = tiny.parent / "model"
    folder.mkdir()
    for name, content in MODEL_FILES.items():
        if name != absent:
            (folder / name).write_text(content)
    head, _, tail = RECIPE.partition("model:\n")
    tiny.write_text(head + "model:\n  path: model\n" + tail[tail.index("task:") :])
    said = refused(*mode)
    assert f"tiny.yaml:3 model.path: {folder} {what}" in said.err


@MODES
@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"text": "a", "label": "great"}', "label: expected one of bad, good, got 'great'"),
        ('{"text": "", "label": "good"}', "text: the text is empty"),
        ('{"txt": "a", "label": "good"}', "text: there is no such column; the row has: txt, label"),
        ('{"text": a}', "is not JSON"),
        ("[1]", "expected an object"),
    ],
)
def test_wrong_data(
    tiny: Path, refused: Callable[..., Said], mode: list[str], line: str, what: str
) -> None:
    with (tiny.parent / "test.jsonl").open("a") as stream:
        stream.write(line + "\n")
    said = refused(*mode)
    assert "test.jsonl:9" in said.err
    assert what in said.err


# ---------------------------------------------------------------- wrong profiles


@MODES
@pytest.mark.parametrize(
    ("cluster", "what"),
    [
        ("nosuch", "--cluster nosuch: there is no such profile; known: a100-40"),
        ("nosuch.yaml", "--cluster nosuch.yaml: there is no such profile"),
        ("elsewhere/local.yaml", "--cluster elsewhere/local.yaml: there is no such profile"),
        ("../local", "--cluster ../local: there is no such profile"),
        ("x" * 5000, "there is no such profile"),
        ("~nosuchuser/x.yaml", "there is no such profile"),
        ("tiny.yaml", "tiny.yaml:2 model: unknown key"),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_no_such_profile(
    refused: Callable[..., Said], mode: list[str], cluster: str, what: str
) -> None:
    assert what in refused(*mode, cluster=cluster).err


@MODES
@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("max_nodes: 2", "max_nodse: 2", "unknown key; did you mean max_nodes"),
        ("max_nodes: 2", "max_nodes: two", "expected a whole number"),
        ("max_nodes: 2", "max_nodes: 0", "greater than 0"),
        ("max_nodes: 2", "max_nodes: 2\nmax_nodes: 3", "duplicate key"),
        ("accelerator: cpu", "accelerator: cuda", "needs `gpu` and `gpus_per_node`"),
        ("scheduler: slurm", "scheduler: pbs", "expected one of 'slurm' or 'local'"),
        ("partition: main", "partition: 5", "quote it if text is meant"),
        ("partition: main", "gpu: {name: A100, memroy_gib: 5}", "did you mean memory_gib"),
        ("partition: main", "environment: {A-B: c}", "characters that are not allowed"),
        ("partition: main", "environment: {A: 1}", "quote it if text is meant"),
        ("partition: main", "node_disk_path: scratch", "characters that are not allowed"),
        ("partition: main", 'setup: ["module load x\\ntouch canary"]', "control|not allowed"),
    ],
)
def test_a_wrong_profile(
    tiny: Path, refused: Callable[..., Said], mode: list[str], old: str, new: str, what: str
) -> None:
    text = SITE.replace(old, new)
    (tiny.parent / "site.yaml").write_text(text)
    said = refused(*mode, cluster="site.yaml")
    assert f"site.yaml:{line_of(text, new) + new.count(chr(10))}" in said.err
    assert any(part in said.err for part in what.split("|"))


@MODES
@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("resources.gpus_per_node=5", "expected at most 4: a node of site has 4 GPUs, got 5"),
        ("resources.nodes=3", "expected at most 2 (site's max_nodes), got 3"),
        ("resources.time_min=61", "expected at most 60 (site's time_limit_min), got 61"),
        ("resources.partition=low", "site has no partition 'low'; its profile lists: main, high"),
    ],
)
def test_more_than_the_cluster_has(
    tiny: Path, refused: Callable[..., Said], mode: list[str], override: str, what: str
) -> None:
    (tiny.parent / "site.yaml").write_text(SITE)
    said = refused(*mode, "-o", override, cluster="site.yaml")
    assert f"-o {override}" in said.err
    assert what in said.err


# ---------------------------------------------------------------- hostile text


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
# Fields that take one of a few words, or a number: one text stands for all.
RECIPE_WORDS = [
    "model.attn_implementation", "task.name", "method.name", "train.optim",
    "train.seed", "evaluation.split", "resources.nodes", "resources.offload_optimizer",
]  # fmt: skip
PROFILE_WORDS = ["scheduler", "accelerator", "gpu_request", "master_address", "max_nodes"]
# Text for people, and columns and labels: they may hold anything that can be printed.
FREE = {"description", "task.text", "task.label", "task.labels.1", "task.data.splits.test",
        "baseline.source", "baseline.outcome"}  # fmt: skip
MANY_LINES = {"description", "task.text", "task.label"}
QUOTED = {"description", "srun_args.0", "environment.VALUE"}
GPU = {"name": "T4", "type": "t4", "memory_gib": 14.5, "compute_capability": 7.5}


def put(value: Any, keys: list[str], text: str) -> Any:
    """The value with a text set below; a number is a place in a list."""
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
    """JSON is YAML: each value on a line of its own."""
    path.write_text(json.dumps(value, indent=1))


@functools.cache
def value_of(text: str) -> dict[str, Any]:
    made: dict[str, Any] = document.parse(text, document.Origin("here")).value
    return made


def run_script(script: str, folder: Path) -> dict[str, Any]:
    """Runs an sbatch script with bash, srun being a stub; returns what the stub was given."""
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
    """Every line before the first command is one of ours."""
    known = ("#!/bin/bash", "# Parameters", "# setup", "# command", "#SBATCH --")
    head = script[: script.index("\nexport ")].splitlines()
    for line in head:
        assert line == "" or line.startswith(known) or line in ("set -e", "set +e"), line


def cases(fields: list[str], words: list[str]) -> list[tuple[str, str]]:
    """Every field with every kind of hostile text."""
    return [(f, kind) for f in fields for kind in HOSTILE] + [(f, "dollar") for f in words]


@pytest.mark.parametrize(("field", "kind"), cases(RECIPE_FIELDS, RECIPE_WORDS))
def test_hostile_text_in_a_recipe(tiny: Path, cli: Cli, field: str, kind: str) -> None:
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


@pytest.mark.parametrize(("field", "kind"), cases(PROFILE_FIELDS, PROFILE_WORDS))
@pytest.mark.usefixtures("tiny")
def test_hostile_text_in_a_profile(workplace: Path, cli: Cli, field: str, kind: str) -> None:
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
def test_hostile_names_of_variables(workplace: Path, cli: Cli, text: str) -> None:
    write_value(workplace / "site.yaml", {**value_of(SITE), "environment": {text: "x"}})
    said, _ = dry_script(cli)
    assert said.code == 2
    assert "site.yaml:" in said.err
    assert not [*workplace.rglob("*canary*")]


@pytest.mark.parametrize(
    "text", ["x\ntouch canary", "x\rtouch canary", "x\0", "\x1b[31m", "", "\n"]
)
@pytest.mark.usefixtures("tiny")
def test_a_setup_line_is_one_line(workplace: Path, cli: Cli, text: str) -> None:
    write_value(workplace / "site.yaml", {**value_of(SITE), "setup": ["true", text]})
    said, _ = dry_script(cli)
    assert said.code == 2
    line = line_of((workplace / "site.yaml").read_text(), '"true"') + 1
    assert f"site.yaml:{line}" in said.err


@pytest.mark.usefixtures("tiny")
def test_what_a_site_writes_reaches_the_ranks_unchanged(workplace: Path, cli: Cli) -> None:
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
    folder = ran["args"][-2]
    assert folder.startswith(f"{workplace}/a 'runs' \"dir\"; touch canary $(touch canary)/tiny/")
    assert not [*workplace.rglob("canary")]
    lines = script.splitlines()
    assert "#SBATCH --account=lab" in lines
    assert "#SBATCH --constraint='[a100|h100]&ib'" in lines


def test_hostile_names_of_files_are_harmless(tiny: Path, cli: Cli) -> None:
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


# ---------------------------------------------------------------- run folders


@pytest.mark.parametrize("runs", ["runs%j", "a\nb", "50%/runs"])
@pytest.mark.usefixtures("tiny")
def test_a_runs_folder_that_slurm_would_misread(workplace: Path, cli: Cli, runs: str) -> None:
    before = {path.name for path in workplace.iterdir()}
    said = cli("submit", "tiny.yaml", "-c", "local", "--runs-dir", runs)
    assert said.code == 2
    assert "may not have % or line breaks" in said.err
    assert {path.name for path in workplace.iterdir()} == before


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
@pytest.mark.usefixtures("tiny")
def test_a_run_folder_that_others_may_write_to(workplace: Path, cli: Cli, mode: int) -> None:
    folder = workplace / "runs" / "tiny"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    said = cli("submit", "tiny.yaml", "-c", "local", "--runs-dir", "runs")
    assert said.code == 2
    assert f"{folder}: others may write to it; chmod 700" in said.err
    assert [*folder.iterdir()] == []


@pytest.mark.usefixtures("tiny")
def test_a_runs_folder_that_is_a_file(workplace: Path, cli: Cli) -> None:
    (workplace / "runs").write_text("mine")
    said = cli("submit", "tiny.yaml", "-c", "local", "--runs-dir", "runs")
    assert said.code == 2
    assert "cannot be made" in said.err
    assert (workplace / "runs").read_text() == "mine"


# ---------------------------------------------------------------- what Slurm itself refuses


@pytest.mark.slurm
@MODES
@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("partition: main", "partition: nosuch", "partition"),
        ("account: lab", "account: nosuch", "account"),
        ("account: lab", "account: lab\nconstraint: nosuch", "constraint"),
        ("account: lab", "account: lab\nqos: nosuch", "qos"),
    ],
)
@pytest.mark.usefixtures("testbed")
def test_what_slurm_does_not_know(
    tiny: Path, cli: Cli, mode: list[str], old: str, new: str, key: str
) -> None:
    text = (ROOT / "slurm" / "testbed.yaml").read_text().replace(old, new, 1)
    profile = tiny.parent / "mine.yaml"
    profile.write_text(text)
    tiny.write_text(RECIPE.replace("name: tiny", "name: never-queued"))
    said = cli("submit", "tiny.yaml", "-c", "mine.yaml", "--runs-dir", "runs", *mode)
    if mode:
        assert said.code == 0, "a dry run asks nobody"
        assert f"#SBATCH --{key}=nosuch" in said.out
    else:
        assert said.code == 2, said.err
        assert f"mine.yaml:{line_of(text, f'{key}: nosuch')} {key}: Slurm refuses" in said.err
        assert f"--{key}=nosuch" in said.err
    assert "Traceback" not in said.err
    assert not (tiny.parent / "runs").exists()
    queue = subprocess.run(
        ["squeue", "-h", "-t", "all", "-o", "%j"], capture_output=True, text=True, check=True,
        env=os.environ,
    )  # fmt: skip
    assert "never-queued" not in queue.stdout.split()
