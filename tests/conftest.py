"""Shared fixtures: the command line in this process, tiny recipes and models, one real Slurm."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import absl.logging
import pytest

from builders import ASKED, RECIPE, ROOT, Cli, Said, film_rows, write_rows
from hpcft.core.paths import cache_folder
from hpcft.scheduler import scheduler_named

# rouge_score logs through absl. When logging is configured again, absl closes the stream that it
# logs to unless that is the process's own; in a test it would be the stream that pytest captures.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__

if TYPE_CHECKING:
    from builders import Runs


def pytest_configure(config: pytest.Config) -> None:
    """Gives each worker of pytest-xdist a cache of its own: local runs take turns within one.

    Each process uses one thread: those of several processes would wait for each other's cores.
    """
    if not hasattr(config, "workerinput"):
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    compiled = cache_folder() / "torch_extensions"
    cache = Path(tempfile.mkdtemp(prefix="hpcft-cache-"))
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    (cache / "hpcft").mkdir()
    (cache / "hpcft" / "torch_extensions").symlink_to(compiled)  # takes a minute to compile
    os.environ["XDG_CACHE_HOME"] = str(cache)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups tests for pytest-xdist: those on Slurm share one cluster, others those of their file.

    Workers take groups in the order of the items: what takes longest comes first.
    """
    for item in items:
        on_slurm = "testbed" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("slurm" if on_slurm else str(item.path)))
    seconds = {str(ROOT / "tests" / name): s for name, s in SECONDS.items()}
    items.sort(
        key=lambda item: (
            "testbed" not in getattr(item, "fixturenames", ()),
            -seconds.get(str(item.path), 0),
        )
    )


# Files whose tests take longest, in seconds on two cores; renew them by `--durations=0`.
SECONDS = {
    "training/test_local_runs.py": 300,
    "training/test_oom_fallback_runs.py": 200,
    "planning/memory/test_step_memory.py": 190,
    "cli/test_plan.py": 140,
    "planning/test_predictions.py": 120,
    "test_release_0_1.py": 110,
    "training/modes/test_few_shot_runs.py": 100,
    "training/checkpointing/test_resume_runs.py": 80,
    "training/test_gradients.py": 80,
    "planning/test_planner.py": 60,
    "training/modes/test_evaluate.py": 60,
    "test_contributing.py": 50,
    "methods/test_methods.py": 50,
    "staging/test_stage.py": 30,
    "tasks/test_pretraining.py": 30,
    "config/test_schema.py": 30,
    "tasks/test_packing.py": 30,
    "planning/test_model_facts.py": 25,
    "cli/test_completion.py": 25,
    "training/trainer/test_trainer.py": 20,
}


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides the user's settings, Hugging Face cache and Slurm from every test."""
    scheduler_named.cache_clear()
    monkeypatch.delenv("HPCFT_CLUSTER", raising=False)
    monkeypatch.delenv("HPCFT_RUNS_DIR", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.fixture(scope="module")
def cache_of_this_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder for the tests of one module: models are counted and traced once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Returns a function that runs `hpcft …` in this process and returns what it printed."""
    # With other versions than the tested ones (`make test-newest`) a test would get the note.
    monkeypatch.setattr("hpcft.cli.app.untested_versions_note", lambda _: "")

    def run(*arguments: object) -> Said:
        from hpcft.cli.app import main

        scheduler_named.cache_clear()  # Each command asks Slurm anew.
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
    """An empty folder, which is the current one."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def tiny(workplace: Path) -> Path:
    """The file of a valid recipe of a tiny model, next to its data; tests vary its text."""
    rows = film_rows(16)
    write_rows(workplace / "train.jsonl", rows[:24])
    write_rows(workplace / "test.jsonl", rows[24:])
    path = workplace / "tiny.yaml"
    path.write_text(RECIPE)
    return path


# ---------------------------------------------------------------- a tiny model for prompts


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Uses one thread: tiny models would wait for threads longer than they compute."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama whose tokens are bytes."""
    from builders import llama_folder

    return llama_folder(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="session")
def tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


@pytest.fixture(scope="session")
def model(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base).eval()


@pytest.fixture
def asked(workplace: Path, base: Path) -> Path:
    """The file of a recipe that prompts a tiny model, next to its data."""
    (workplace / "base").symlink_to(base)
    splits = {"train": [("film", 24)], "test": [("play", 40)]}
    for split, ((noun, count),) in splits.items():
        write_rows(workplace / f"{split}.jsonl",
                   [{"text": f"a {noun}, number {n}{' indeed' * (n % 7)}", "label": n % 2}
                    for n in range(count)])  # fmt: skip
    path = workplace / "asked.yaml"
    path.write_text(ASKED)
    return path


# ---------------------------------------------------------------- fake runs


@pytest.fixture
def runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """A runs folder that the test fills, with a fake Slurm that answers what the test says."""
    from builders import make_runs

    return make_runs(workplace, monkeypatch)


# ---------------------------------------------------------------- a real Slurm


SLURM_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "slurmdbd", "mariadbd")


@pytest.fixture(scope="session")
def testbed() -> Iterator[Any]:
    """A real Slurm of four nodes for the whole session; its environment variables are set."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in SLURM_PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        reason = f"no Slurm on this machine ({', '.join(missing)}): `make slurm-packages` as root"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
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
