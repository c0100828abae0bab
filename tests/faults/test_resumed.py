"""Tests of runs that a person resumes: damaged checkpoints, another layout, more epochs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from misbehaving import profile

from builders import Cli
from hpcft.core import files
from hpcft.core.records import RunRecord
from real_runs import current_step, folder_of, is_gone, losses, until

# Slow steps, so that a test can act between them.
SLOW = "import time; time.sleep(0.05)"
COMMON = ("-c", "slow.yaml", "-o", "train.logging_steps=5", "-o", "train.save_strategy=steps",
          "-o", "train.save_steps=10", "-o", "train.save_total_limit=3")  # fmt: skip
# Dropout draws other random numbers with other ranks.
NO_DROPOUT = ("-o", "model.config.hidden_dropout_prob=0",
         "-o", "model.config.attention_probs_dropout_prob=0")  # fmt: skip


@pytest.fixture(autouse=True)
def _slow(workplace: Path) -> None:
    profile("slow", SLOW, of="local")


def result(folder: Path) -> RunRecord:
    return files.read_record(folder / "result.json", RunRecord)


def finished(cli: Cli, *command: object) -> None:
    said = cli(*command, "--watch")
    assert said.code == 0, said.err


def interrupted(tiny: Path, cli: Cli, *options: object) -> Path:
    """Submits a run and cancels it after its second checkpoint; returns its folder."""
    said = cli("submit", tiny, *COMMON, *options)
    assert said.code == 0, said.err
    folder = folder_of("tiny")
    until(lambda: current_step(folder) > 25)
    said = cli("cancel", "tiny")
    assert "tiny" in said.err
    assert is_gone(folder)
    return folder


def checkpoint_steps(folder: Path) -> list[int]:
    files = folder.glob("checkpoints/checkpoint-*")
    return sorted(int(file.name.rpartition("-")[2]) for file in files)


@pytest.mark.slow
def test_a_resumed_run_ends_like_an_undisturbed_one(tiny: Path, cli: Cli) -> None:
    folder = interrupted(tiny, cli, "-o", "train.max_steps=60")
    (view,) = cli("status", "--json").json
    assert (view["state"], view["failure"]["class"]) == ("CANCELLED", "cancelled")
    step = max(checkpoint_steps(folder))
    finished(cli, "resume", "tiny")
    (recovery,) = result(folder).recoveries
    assert (recovery.cause, recovery.action, recovery.step) == ("resumed", "resume", step)
    finished(cli, "submit", tiny, *COMMON, "-o", "train.max_steps=60", "-o", "name=calm")
    assert losses(folder) == losses(folder_of("calm")), "the digits differ"
    assert result(folder).metrics == result(folder_of("calm")).metrics
    assert "complete already" in cli("resume", "tiny").err


def truncated(folder: Path) -> None:
    os.truncate(folder / "trained.safetensors", 100)


def without_state(folder: Path) -> None:
    (folder / "trainer_state.json").unlink()


def wrong_latest(folder: Path) -> None:
    (folder / "latest").write_text("global_step10")


DAMAGE: dict[str, tuple[Callable[[Path], None], str, tuple[str, ...]]] = {
    "truncated": (truncated, "trained.safetensors has 100 of ", ()),
    "no state": (without_state, "trainer_state.json: No such file", ()),
    "wrong latest": (wrong_latest, "latest names 'global_step10'",
                     ("-o", "resources.zero_stage=2")),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGE)
def test_resume_skips_a_damaged_checkpoint_and_says_so(kind: str, tiny: Path, cli: Cli) -> None:
    damage, said, options = DAMAGE[kind]
    folder = interrupted(tiny, cli, "-o", "train.max_steps=60", *options)
    newest = max(checkpoint_steps(folder))
    damage(folder / f"checkpoints/checkpoint-{newest}")
    finished(cli, "resume", "tiny")
    (note,) = result(folder).notes
    assert note.startswith(f"checkpoint-{newest} was damaged (")
    assert said in note
    finished(cli, "submit", tiny, *COMMON, "-o", "train.max_steps=60", "-o", "name=calm", *options)
    assert losses(folder) == losses(folder_of("calm")), "the digits differ"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_resume_with_more_ranks_continues_the_same_run(stage: int, tiny: Path, cli: Cli) -> None:
    common = ("-o", "train.max_steps=60", "-o", f"resources.zero_stage={stage}", *NO_DROPOUT)
    folder = interrupted(tiny, cli, *common)
    finished(cli, "resume", "tiny", "-o", "resources.gpus_per_node=2")
    (recovery,) = result(folder).recoveries
    assert (recovery.action, recovery.layout.world_size) == ("resume", 2)
    assert folder == folder_of("tiny"), "it is the same run"
    finished(cli, "submit", tiny, *COMMON, *common, "-o", "name=calm")
    assert losses(folder) == pytest.approx(losses(folder_of("calm")), rel=1e-5)


@pytest.mark.slow
def test_resume_with_more_epochs_is_another_run(tiny: Path, cli: Cli) -> None:
    """The other run starts from a copy of the checkpoint, and says so."""
    steady = ("-o", "train.max_steps=-1", "-o", "train.lr_scheduler_type=constant")
    finished(cli, "submit", tiny, *COMMON, *steady, "-o", "train.num_train_epochs=5")
    first = folder_of("tiny")
    before = (first / "result.json").read_bytes()
    finished(cli, "resume", "tiny", "-o", "train.num_train_epochs=8")
    (second,) = set(first.parent.glob("*")) - {first}
    assert (first / "result.json").read_bytes() == before
    (recovery,) = result(second).recoveries
    assert recovery.step == 30
    assert recovery.evidence.startswith(f"it continues run {first.name} at step 30, ")
    finished(cli, "submit", tiny, *COMMON, *steady, "-o", "train.num_train_epochs=8",
             "-o", "name=calm")  # fmt: skip
    assert losses(second) == losses(folder_of("calm")), "the digits differ"
