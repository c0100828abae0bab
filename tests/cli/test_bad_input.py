"""Tests of bad input at the command line: refused with file and line, nothing written or run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import RECIPE, ROOT, SITE, Cli, Said, line_of, write_rows

MODES = pytest.mark.parametrize("mode", [["--dry-run"], []], ids=["dry", "real"])


@pytest.fixture
def refused(workplace: Path, cli: Cli) -> Callable[..., Said]:
    """Submits, and asserts that it was refused with a message and wrote nothing."""

    def run(*arguments: str, cluster: str = "local", recipe: str = "tiny.yaml") -> Said:
        said = cli("submit", recipe, "-c", cluster, "--runs-dir", "runs", *arguments)
        assert said.code == 2, said.err
        assert said.out == ""
        assert "Traceback" not in said.err
        assert not (workplace / "runs").exists()
        assert not [*workplace.rglob("*canary*")]
        return said

    return run


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
        ("train: train.jsonl", "train: tiny.yaml", "expected .csv, .tsv, .jsonl,"),
        ("train: train.jsonl", "train: .", "is not a regular file"),
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
def test_submit_of_a_wrong_recipe_names_the_line(
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
def test_submit_of_a_file_that_is_not_a_recipe_is_refused(
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
def test_submit_of_a_missing_recipe_is_refused(
    refused: Callable[..., Said], mode: list[str], recipe: str
) -> None:
    assert recipe in refused(*mode, recipe=recipe).err


@MODES
@pytest.mark.parametrize(
    "override",
    ["train.seed=x", "train.sed=1", "train.seed", "name=$(touch canary)", "name='a; touch canary'",
     "model.path=`touch canary`", "resources.partition=a b", "task.data.files={train: ../x}"],
)  # fmt: skip
@pytest.mark.usefixtures("tiny")
def test_submit_with_a_wrong_override_names_the_option(
    refused: Callable[..., Said], mode: list[str], override: str
) -> None:
    assert f"-o {override}" in refused(*mode, "-o", override).err


@MODES
@pytest.mark.usefixtures("tiny")
def test_submit_lists_all_problems_at_once(
    tiny: Path, refused: Callable[..., Said], mode: list[str]
) -> None:
    tiny.write_text(RECIPE.replace("max_steps: 3", "max_steps: x").replace("method:", "methud:"))
    said = refused(*mode, "-o", "train.seed=y")
    for part in ("tiny.yaml:21 train.max_steps", "tiny.yaml:18 methud: unknown key; did you mean "
                 "method", "method: is required", "-o train.seed=y train.seed"):  # fmt: skip
        assert part in said.err


@pytest.mark.usefixtures("tiny")
def test_submit_takes_the_label_no_as_text(workplace: Path, cli: Cli) -> None:
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
def test_submit_with_an_incomplete_model_folder_is_refused(
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
def test_submit_with_wrong_data_names_the_row(
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
        (
            "nosuch",
            "--cluster nosuch: there is no such profile; give the path of a YAML file, or "
            "one of a100-40",
        ),
        ("nosuch.yaml", "--cluster nosuch.yaml: there is no such profile"),
        ("elsewhere/local.yaml", "--cluster elsewhere/local.yaml: there is no such profile"),
        ("../local", "--cluster ../local: there is no such profile"),
        ("x" * 5000, "there is no such profile"),
        ("~nosuchuser/x.yaml", "there is no such profile"),
        ("tiny.yaml", "tiny.yaml:2 model: unknown key"),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_submit_to_a_missing_profile_is_refused(
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
def test_submit_to_a_wrong_profile_names_the_line(
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
def test_submit_of_more_than_the_cluster_has_is_refused(
    tiny: Path, refused: Callable[..., Said], mode: list[str], override: str, what: str
) -> None:
    (tiny.parent / "site.yaml").write_text(SITE)
    said = refused(*mode, "-o", override, cluster="site.yaml")
    assert f"-o {override}" in said.err
    assert what in said.err


# ---------------------------------------------------------------- run folders


@pytest.mark.parametrize("runs", ["runs%j", "a\nb", "50%/runs"])
@pytest.mark.usefixtures("tiny")
def test_submit_into_a_folder_whose_name_slurm_would_change_is_refused(
    workplace: Path, cli: Cli, runs: str
) -> None:
    before = {path.name for path in workplace.iterdir()}
    said = cli("submit", "tiny.yaml", "-c", "local", "--runs-dir", runs)
    assert said.code == 2
    assert "may not have % or line breaks" in said.err
    assert {path.name for path in workplace.iterdir()} == before


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
@pytest.mark.usefixtures("tiny")
def test_submit_into_a_folder_that_others_may_write_to_is_refused(
    workplace: Path, cli: Cli, mode: int
) -> None:
    folder = workplace / "runs" / "tiny"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    said = cli("submit", "tiny.yaml", "-c", "local", "--runs-dir", "runs")
    assert said.code == 2
    assert f"{folder}: others may write to it; chmod 700" in said.err
    assert [*folder.iterdir()] == []


@pytest.mark.usefixtures("tiny")
def test_submit_into_a_file_is_refused(workplace: Path, cli: Cli) -> None:
    (workplace / "runs").write_text("mine")
    said = cli("submit", "tiny.yaml", "-c", "local", "--runs-dir", "runs")
    assert said.code == 2
    assert "cannot be created" in said.err
    assert (workplace / "runs").read_text() == "mine"


# ---------------------------------------------------------------- refused by Slurm itself


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
def test_submit_of_names_that_slurm_does_not_know_names_the_line(
    tiny: Path, cli: Cli, mode: list[str], old: str, new: str, key: str
) -> None:
    text = (ROOT / "slurm" / "testbed.yaml").read_text().replace(old, new, 1)
    profile = tiny.parent / "mine.yaml"
    profile.write_text(text)
    tiny.write_text(RECIPE.replace("name: tiny", "name: never-queued"))
    said = cli("submit", "tiny.yaml", "-c", "mine.yaml", "--runs-dir", "runs", *mode)
    if mode:
        assert said.code == 0, "a dry run does not ask Slurm"
        assert f"#SBATCH --{key}=nosuch" in said.out
    else:
        assert said.code == 2, said.err
        assert f"mine.yaml:{line_of(text, f'{key}: nosuch')} {key}: Slurm refuses" in said.err
        assert f"--{key}=nosuch" in said.err
    assert "Traceback" not in said.err
    assert not any((tiny.parent / "runs").glob("[!.]*")), "there is no run, at most a lock"
    queue = subprocess.run(
        ["squeue", "-h", "-t", "all", "-o", "%j"], capture_output=True, text=True, check=True,
        env=os.environ,
    )  # fmt: skip
    assert "never-queued" not in queue.stdout.split()
