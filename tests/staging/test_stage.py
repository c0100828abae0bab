"""`hpcft stage` against a local hub: downloads, checks, refusals, and runs without network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from builders import Said, film_rows, llama_folder, load_one
from hpcft.config import cluster_profile
from hpcft.core.errors import DataError
from hpcft.core.files import write_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import StagedInputs
from hpcft.staging import staged_inputs
from hpcft.staging.hub_inputs import HubInput
from hpcft.tasks.data.examples import load_examples
from local_hub import LocalHub

# Runs command lines one after the other in one process, which imports the Hugging Face libraries
# once, with its own environment.
SHELL = """
import io, json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from hpcft.cli import console
from hpcft.cli.app import main
answers = sys.stdout
for line in sys.stdin:
    arguments, variables = json.loads(line)
    sys.argv = ["hpcft", *arguments]
    os.environ.update(variables)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    answers.write(json.dumps([code, out.getvalue(), err.getvalue()]) + "\\n")
    answers.flush()
    for name in variables:
        del os.environ[name]
"""

README = """\
---
configs:
- config_name: other
  data_files:
  - split: train
    path: other/train-*
- config_name: films
  data_files:
  - split: train
    path: films/train-*
  - split: validation_matched
    path: films/validation_matched-*
---
"""

RECIPE = """\
name: staged
model: {{ path: {model} }}
task:
  name: classification
  data:
    path: acme/films
    name: films
    splits: {{ train: train, test: validation_matched }}
  labels: [bad, good]
  max_length: 32
method: {{ name: full }}
train: {{ global_batch_size: 4, max_steps: 2 }}
resources: {{ nodes: 1, gpus_per_node: 1, time_min: 10 }}
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """A local hub with a model, and a data set of two configurations."""
    import pyarrow
    import pyarrow.parquet

    with LocalHub(tmp_path_factory.mktemp("hub")) as running:
        llama_folder(running.repository("models", "acme/tiny"))
        films = running.repository("datasets", "acme/films")
        (films / "README.md").write_text(README)
        for name in ("other/train", "films/train", "films/validation_matched"):
            file = films / f"{name}-00000-of-00001.parquet"
            file.parent.mkdir(exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(film_rows(8)), file)
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf home ü")


@pytest.fixture(scope="module")
def variables(hub: LocalHub, home: Path) -> dict[str, str]:
    """Environment of a login node that uses the local hub."""
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | ours


Shell = Callable[..., Said]


@pytest.fixture(scope="module")
def shell(variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """Runs `hpcft …` in that environment."""
    process = subprocess.Popen(
        [sys.executable, "-c", SHELL], env=variables, text=True,
        cwd=tmp_path_factory.mktemp("shell"), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None

    def run(*arguments: object, **variables: str) -> Said:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([[str(a) for a in arguments], variables]) + "\n")
        process.stdin.flush()
        return Said(*json.loads(process.stdout.readline()))

    yield run
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    process.stdout.close()


@pytest.fixture
def recipe(workplace: Path) -> Path:
    path = workplace / "staged.yaml"
    path.write_text(RECIPE.format(model="acme/tiny"))
    return path


def contents(folder: Path) -> dict[str, int]:
    """Returns every file below a folder with the time of its last change."""
    return {str(p): p.lstat().st_mtime_ns for p in folder.rglob("*") if not p.is_dir()}


def small_model(hub: LocalHub, name: str, **files: bytes) -> Path:
    """Writes a repository with the tiny model's files, some replaced (`_` for the last dot)."""
    folder = hub.repository("models", name)
    for file in hub.repository("models", "acme/tiny").iterdir():
        shutil.copy(file, folder / file.name)
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        (folder / f"{stem}.{suffix}").write_bytes(content)
    return folder


@pytest.mark.process
def test_stage_then_submit_runs_without_network(
    hub: LocalHub, home: Path, shell: Shell, recipe: Path
) -> None:
    runs = recipe.parent / "runs"
    refused = shell("submit", recipe, "-c", "local", "--runs-dir", runs)
    assert refused.code == 2
    assert "model acme/tiny: has not been staged" in refused.err
    assert "data set acme/films (films): has not been staged" in refused.err
    assert f"hpcft stage {recipe} -c local" in refused.err
    assert not runs.exists()

    said = shell("stage", recipe, "-c", "local", "--json")
    assert said.code == 0, said.err
    model, data = said.json
    assert model["commit"] == hub.commit(hub.repository("models", "acme/tiny"))
    assert data["commit"] == hub.commit(hub.repository("datasets", "acme/films"))
    assert data["splits"] == {"train": 16, "validation_matched": 16}
    assert not [file for file in hub.sent if file.startswith("other/")], (
        "only the configuration that the recipe uses"
    )
    assert "5 files, 42" in said.err
    assert "\n\n" not in said.err

    before = contents(home)
    hub.down = True
    try:
        done = shell("submit", recipe, "-c", "local", "--watch", "--runs-dir", runs)
    finally:
        hub.down = False
    assert done.code == 0, done.err
    assert contents(home) == before, "the cache may be read-only for jobs"
    (run,) = (runs / "staged").iterdir()
    fingerprints = json.loads((run / "fingerprints.json").read_text())["files"]
    assert fingerprints["model.revision"] == model["commit"]
    assert fingerprints["task.data.revision"] == data["commit"]
    assert json.loads((run / "recipe.json").read_text())["model"]["path"] == "acme/tiny"
    assert json.loads((run / "result.json").read_text())["examples"] == {"train": 16, "test": 16}


def test_staged_csv_has_the_texts_of_the_file(
    hub: LocalHub, home: Path, shell: Shell, recipe: Path
) -> None:
    """As by `files`: no types are guessed, and the README's class names count."""
    texts = hub.repository("datasets", "acme/texts")
    rows = 'text,label\n0042,0\nnull,1\n4,1\n" None ",0\n'
    (texts / "train.csv").write_text(rows)
    (texts / "test.csv").write_text(rows)
    (texts / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - {name: text, dtype: string}\n  - name: label\n"
        "    dtype: {class_label: {names: {'0': NA, '1': nan}}}\n---\n"
    )
    data = "{path: acme/texts, name: null, splits: {train: train, test: test}}"
    change = ["-c", "local", "-o", f"task.data={data}", "-o", "task.labels=['nan', 'NA']"]
    for _ in range(2):
        said = shell("stage", recipe, *change, "--json")
        assert said.code == 0, said.err
        assert said.json[1]["splits"] == {"train": 4, "test": 4}
    staged = staged_inputs.read_staged(HubInput("dataset", "acme/texts"), home / "hub")
    assert staged is not None
    local = ["task.labels=['nan', 'NA']", "task.data.name=null", f"task.data.path={staged.folder}",
             "task.data.splits={train: train, test: test}"]  # fmt: skip
    found = load_examples(load_one(*local, name=str(recipe)).task)
    for examples in found.splits.values():
        assert [(e["text"], e["label"]) for e in examples] == [
            ("0042", 1), ("null", 0), ("4", 0), (" None ", 1),
        ]  # fmt: skip


def test_stage_again_downloads_nothing_and_needs_no_hub(
    hub: LocalHub, shell: Shell, recipe: Path
) -> None:
    assert shell("stage", recipe).code == 0
    hub.sent.clear()
    again = shell("stage", recipe, "--json")
    assert [entry["fetched_bytes"] for entry in again.json] == [0, 0]
    assert hub.sent == []
    hub.down = True
    try:
        kept = shell("stage", recipe)
        assert kept.code == 0
        assert "using what was staged before, at commit" in kept.err
        lost = shell("stage", recipe, "-o", "model.path=acme/never")
        assert lost.code == 3
        assert "try again on a node with network, such as a login node" in lost.err
    finally:
        hub.down = False


def test_run_id_depends_on_the_staged_commit_not_on_the_branch(
    hub: LocalHub, shell: Shell, recipe: Path
) -> None:
    folder = small_model(hub, "acme/moving")
    change = ["-c", "local", "-o", "model.path=acme/moving"]
    dry = ["submit", recipe, *change, "--dry-run", "--json"]
    unstaged = shell(*dry)
    assert unstaged.code == 0, "a dry run shows the plan, and says what is missing"
    assert "model acme/moving: has not been staged" in unstaged.err
    assert shell("stage", recipe, *change).code == 0
    shown = shell(*dry).json["runs"][0]
    assert shown["plan"]["time"]["evaluation_s"] > 0, "the rows of staged data are known"
    first = shown["run_id"]
    (folder / "README.md").write_text("moved on")
    assert shell(*dry).json["runs"][0]["run_id"] == first
    moved = shell("stage", recipe, *change, "--json").json[0]
    assert moved["commit"] == hub.commit(folder)
    assert shell(*dry).json["runs"][0]["run_id"] != first
    pinned = shell("stage", recipe, *change, "-o", f"model.revision={moved['commit']}", "--json")
    assert pinned.json[0]["commit"] == moved["commit"]


def test_deleted_files_are_refused_by_submit_and_downloaded_again_by_stage(
    hub: LocalHub, home: Path, shell: Shell, recipe: Path
) -> None:
    small_model(hub, "acme/purged")
    change = ["-c", "local", "-o", "model.path=acme/purged"]
    model, data = shell("stage", recipe, *change, "--json").json
    weights = Path(model["folder"]) / "model.safetensors"
    weights.resolve().unlink()
    table = Path(data["folder"]) / "films-train.arrow"
    table.unlink()
    record = staged_inputs.read_staged(HubInput("model", "acme/purged"), home / "hub")
    assert record is not None
    paths = RunPaths(recipe.parent)
    write_record(paths.staged, StagedInputs(inputs={"model.path": record}))
    with pytest.raises(
        DataError, match=r"model\.safetensors was deleted after it was staged \(seen on node"
    ):
        staged_inputs.check_staged_of_run(paths)  # rank 0 does this first
    refused = shell("submit", recipe, *change)
    assert refused.code == 2
    assert f"{weights} was deleted after it was staged" in refused.err
    assert f"{table} was deleted after it was staged" in refused.err
    assert "-o model.path=acme/purged" in refused.err
    hub.sent.clear()
    assert shell("stage", recipe, *change).code == 0
    assert hub.sent == ["model.safetensors"]
    assert table.is_file()


def test_stage_continues_an_interrupted_download(hub: LocalHub, shell: Shell, recipe: Path) -> None:
    small_model(hub, "acme/slow")
    hub.failing.add("model.safetensors")
    change = ["-o", "model.path=acme/slow"]
    broken = shell("stage", recipe, *change)
    hub.failing.clear()
    assert broken.code == 3
    assert "answered 500" in broken.err
    hub.sent.clear()
    assert shell("stage", recipe, *change).code == 0
    assert hub.sent == ["model.safetensors"]


def test_file_with_another_hash_than_on_the_hub_is_refused(
    hub: LocalHub, shell: Shell, recipe: Path, home: Path
) -> None:
    small_model(hub, "acme/garbled", model_safetensors=b"x" * 1000)
    hub.garbled.add("model.safetensors")
    said = shell("stage", recipe, "-o", "model.path=acme/garbled")
    hub.garbled.clear()
    assert said.code == 2
    assert "downloading it again" in said.err
    assert "model.safetensors has other content than on the hub" in said.err
    left = home / "hub/models--acme--garbled/snapshots"
    assert not [*left.rglob("model.safetensors")]


def test_token_is_sent_to_the_hub_and_written_nowhere(
    hub: LocalHub, shell: Shell, recipe: Path, home: Path
) -> None:
    small_model(hub, "acme/gated")
    hub.gated.add("acme/gated")
    change = ["-o", "model.path=acme/gated"]
    refused = shell("stage", recipe, *change)
    assert refused.code == 2
    assert "model acme/gated: is gated; accept the terms" in refused.err
    said = shell("stage", recipe, *change, "--json", HF_TOKEN="hf_secretsecret")
    assert said.code == 0, said.err
    assert "Bearer hf_secretsecret" in hub.authorised
    assert "secretsecret" not in said.out + said.err
    written = [p for p in home.rglob("*") if p.is_file() and b"secretsecret" in p.read_bytes()]
    assert written == []


BIG = json.dumps({"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}).encode()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["model.path=acme/tinny"], "model acme/tinny: the hub has no repository of that name"),
        (["model.revision=v9"], "model acme/tiny at v9: there is no revision v9"),
        (["model.path=acme/pickled"], "only pickled weights (pytorch_model.bin), which can run"),
        (["model.path=acme/adapter"], "is an adapter, not a model: it has no config.json; set"),
        (["model.path=acme/index"], "names model-00002-of-00002.safetensors, which the hub does"),
        (["model.path=acme/cut"], "is damaged"),
        (["model.path=acme/huge"], "are to be downloaded, but only"),
        (["model.config={model_type: llama, hidden_size: 128}"],
         "model.config.hidden_size: the recipe says 128, acme/tiny has 64"),
        (["model.config={model_type: bert}"], "model_type: the recipe says 'bert'"),
        (["model.tokenizer=acme/bare"], "has no usable tokenizer"),
        (["task.data.name=movies"], "data set acme/films (movies): configuration 'movies' not"),
        (["task.data.splits.test=test"], "-o task.data.splits.test=test task.data.splits.test: "
         "data set acme/films (films) has no split test; use one of train, validation_matched"),
        (["task.text=review"], "review: there is no such column; the row has: text, label"),
        (["task.labels=[no, yes]"], "[train]:1 label: expected one of no, yes"),
        (["model.path=acme/tinny", "task.data.path=acme/flims"], "data set acme/flims (films): "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_unusable_input_is_refused_with_its_reason(
    hub: LocalHub, shell: Shell, recipe: Path, changes: list[str], said: str
) -> None:
    if not (hub.folder / "models/acme/pickled").exists():
        (small_model(hub, "acme/pickled", pytorch_model_bin=b"x") / "model.safetensors").unlink()
        folder = hub.repository("models", "acme/adapter")
        (folder / "adapter_config.json").write_text("{}")
        small_model(hub, "acme/index", model_safetensors_index_json=b"")
        (hub.folder / "models/acme/index/model.safetensors.index.json").write_bytes(BIG)
        small_model(hub, "acme/cut", model_safetensors=b"\0" * 100)
        small_model(hub, "acme/huge", huge_safetensors=b"")
        (hub.repository("models", "acme/bare") / "config.json").write_text("{}")
    if changes == ["model.path=acme/huge"]:
        hub.stated["model.safetensors"] = 2**60
    found = shell("stage", recipe, *(word for change in changes for word in ("-o", change)))
    hub.stated.clear()
    assert found.code == 2
    assert said in found.err
    assert "Traceback" not in found.err


def test_recipe_with_local_files_has_nothing_to_stage(tiny: Path, shell: Shell) -> None:
    said = shell("stage", tiny)
    assert (said.code, said.out) == (0, "")
    assert "nothing to download" in said.err


def test_cache_folder_follows_the_profile_then_the_environment() -> None:
    assert str(staged_inputs.hub_cache_folder({"HF_HOME": "/x"})) == "/x/hub"
    assert str(staged_inputs.hub_cache_folder({"HF_HOME": "/x", "HF_HUB_CACHE": "/y"})) == "/y"
    assert str(staged_inputs.hub_cache_folder({"XDG_CACHE_HOME": "/z"})) == "/z/huggingface/hub"
    site = cluster_profile.load_profile("local").cluster.model_copy(
        update={"environment": {"HF_HOME": "/p"}}
    )
    assert staged_inputs.job_environment(site)["HF_HOME"] == "/p"
