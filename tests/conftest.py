"""Shared fixtures: the command line in this process, data to vary, one Slurm a session."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import absl.logging
import pytest

# Of rouge_score: when logging is set up anew it closes the stream that it logs to, if that is not
# the process's own; and in a test that is the one which pytest captures with.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__

if TYPE_CHECKING:
    from made_runs import Runs

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Said:
    """What a command line printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Said]


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads the user's settings; plans are cached for the session only."""
    monkeypatch.delenv("HPCFT_CLUSTER", raising=False)
    monkeypatch.delenv("HPCFT_RUNS_DIR", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.fixture(scope="module")
def cache_of_this_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of a module's own: models are counted and traced once, by today's code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs `hpcft …` in this process, as `main()` would, and returns what it said."""

    def run(*arguments: object) -> Said:
        from hpcft.cli.app import main

        monkeypatch.setattr(sys, "argv", ["hpcft", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        code = ended.value.code
        return Said(code if isinstance(code, int) else 0, out, err)

    return run


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


RECIPE = """\
name: tiny
model:
  config:
    model_type: bert
    vocab_size: 400
    hidden_size: 32
    num_hidden_layers: 1
    num_attention_heads: 2
    intermediate_size: 64
    max_position_embeddings: 64
  tokenizer: { vocab_size: 400 }
task:
  name: classification
  data:
    files: { train: train.jsonl, test: test.jsonl }
  labels: [bad, good]
  max_length: 32
method: { name: full }
train:
  global_batch_size: 4
  max_steps: 3
resources: { nodes: 1, gpus_per_node: 1, time_min: 10 }
"""

# A Slurm cluster without GPUs, for what is written and never queued.
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


def line_of(text: str, part: str) -> int:
    """Line of the first occurrence of a part of a text."""
    assert part in text
    return text[: text.index(part)].count("\n") + 1


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes a JSONL file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def film_rows(pairs: int) -> list[dict[str, Any]]:
    """Texts that a single word makes good or bad."""
    kinds = (("fine", "good"), ("poor", "bad"))
    return [{"text": f"a {word} film number {i}", "label": label}
            for i in range(pairs) for word, label in kinds]  # fmt: skip


@pytest.fixture
def tiny(workplace: Path) -> Path:
    """A valid recipe of a tiny model with its data beside it; tests vary its text."""
    rows = film_rows(12)
    write_rows(workplace / "train.jsonl", rows)
    write_rows(workplace / "test.jsonl", rows[:8])
    path = workplace / "tiny.yaml"
    path.write_text(RECIPE)
    return path


# ---------------------------------------------------------------- a tiny model that is asked


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models wait for threads longer than they compute."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose tokens are bytes."""
    from tiny_models import llama_folder

    return llama_folder(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="session")
def tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


@pytest.fixture(scope="session")
def model(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base).eval()


ASKED = """\
name: asked
model: { path: base }
task:
  name: prompting
  data: { files: { train: train.jsonl, test: test.jsonl } }
  prompt: "Review: {text}\\nIt is "
  labels: [bad, good]
  shots: 4
  max_length: 250
method: { name: frozen }
evaluation: { per_device_eval_batch_size: 1 }
resources: { nodes: 1, gpus_per_node: 2, zero_stage: 0, time_min: 10 }
"""


@pytest.fixture
def asked(workplace: Path, base: Path) -> Path:
    """A recipe of a tiny model that is asked, with its data beside it."""
    (workplace / "base").symlink_to(base)
    splits = {"train": [("film", 24)], "test": [("play", 40)]}
    for split, ((noun, count),) in splits.items():
        write_rows(workplace / f"{split}.jsonl",
                   [{"text": f"a {noun}, number {n}{' indeed' * (n % 7)}", "label": n % 2}
                    for n in range(count)])  # fmt: skip
    path = workplace / "asked.yaml"
    path.write_text(ASKED)
    return path


# ---------------------------------------------------------------- made-up runs


@pytest.fixture
def runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Runs whose folders are written by the test, and whose scheduler answers as it says."""
    from made_runs import made_in

    return made_in(workplace, monkeypatch)


# ---------------------------------------------------------------- a real Slurm


SLURM_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "slurmdbd", "mariadbd")


@pytest.fixture(scope="session")
def testbed() -> Iterator[Any]:
    """A real Slurm of four nodes, one for the whole session; its environment is exported."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in SLURM_PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        reason = f"no Slurm on this machine ({', '.join(missing)}): `make slurm-packages` as root"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    import tempfile

    from testbed import Testbed

    folder = Path(tempfile.mkdtemp(prefix="hpcft-tb-"))
    with Testbed(folder) as running:
        before = {name: os.environ.get(name) for name in running.env}
        os.environ.update(running.env)
        try:
            yield running
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
    shutil.rmtree(folder, ignore_errors=True)
