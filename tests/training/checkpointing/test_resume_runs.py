"""Tests of runs that are interrupted at some step, and resume as if they had not been."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

import starts
from builders import film_rows, write_rows
from hpcft.core import checkpoints
from hpcft.core.files import read_record, write_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Cluster, RunRecord
from hpcft.training.checkpointing import node_local
from hpcft.training.distributed.rank_env import RankInfo
from hpcft.training.distributed.worker_channel import SAVED_EXIT
from hpcft.training.modes import answer_log

pytestmark = pytest.mark.process

TINY = """\
name: tiny
model:
  config: { model_type: bert, vocab_size: 400, hidden_size: 32, num_hidden_layers: 1,
            num_attention_heads: 2, intermediate_size: 64, max_position_embeddings: 64 }
  tokenizer: { vocab_size: 400 }
task:
  name: classification
  data: { files: { train: train.jsonl, validation: validation.jsonl, test: test.jsonl } }
  labels: [bad, good]
  max_length: 32
method: { name: full }
train: { global_batch_size: 8, max_steps: 10, logging_steps: 4, learning_rate: 1e-3,
         weight_decay: 0.1, warmup_steps: 3 }
evaluation: { before: true }
resources: { nodes: 1, gpus_per_node: 1, time_min: 10 }
"""


ZERO3_SAVED_OFTEN = (
    "resources.gpus_per_node=2", "resources.zero_stage=3",
    "train.save_strategy=steps", "train.save_steps=2", "train.save_total_limit=3",
)  # fmt: skip


@pytest.fixture
def small(workplace: Path) -> Path:
    """A recipe with dropout, an evaluation every three steps, and a log every four."""
    rows = film_rows(16)
    for name, part in (("train", rows[:24]), ("validation", rows[4:16]), ("test", rows[24:])):
        write_rows(workplace / f"{name}.jsonl", part)
    path = workplace / "tiny.yaml"
    path.write_text(TINY)
    return path


def model_files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "model").glob("*.safetensors")}


def saved_steps(folder: Path) -> list[int]:
    return sorted(
        map(checkpoints.checkpoint_step, checkpoints.checkpoint_folders(RunPaths(folder)))
    )


def assert_same(folder: Path, uninterrupted: Path) -> RunRecord:
    """Checks that a run gave the same result as another one to the bit, apart from times."""
    assert starts.logged_lines(folder) == starts.logged_lines(uninterrupted)
    assert model_files(folder) == model_files(uninterrupted)
    result, other = (read_record(RunPaths(f).result, RunRecord) for f in (folder, uninterrupted))
    assert (result.metrics, result.metrics_before) == (other.metrics, other.metrics_before)
    return result


@pytest.mark.slow
def test_resume_one_rank_stopped_within_an_epoch_gives_same_bits(
    small: Path, tmp_path: Path
) -> None:
    """It is stopped within an epoch and between two lines of metrics.jsonl."""
    folder = starts.make_run(tmp_path / "run", small)
    uninterrupted = starts.copy_run(folder, tmp_path / "uninterrupted")
    assert starts.start(uninterrupted) == [0]
    assert starts.start(folder, at=5, signum=signal.SIGUSR2) == [SAVED_EXIT]
    assert saved_steps(folder) == [5]
    assert starts.start(folder) == [0]
    result = assert_same(folder, uninterrupted)
    assert result.notes == []
    assert saved_steps(folder) == [], "checkpoints to resume from are removed at the end"


def test_resume_zero3_killed_rank_and_damaged_checkpoint_gives_same_bits(
    small: Path, tmp_path: Path
) -> None:
    """One rank is killed and a bit of the newest checkpoint flips: it resumes from another one."""
    folder = starts.make_run(tmp_path / "run", small, *ZERO3_SAVED_OFTEN)
    uninterrupted = starts.copy_run(folder, tmp_path / "uninterrupted")
    assert starts.start(uninterrupted) == [0, 0]
    assert saved_steps(uninterrupted) == [6, 8, 10]
    first, second = starts.start(folder, at=7, ranks="1")
    assert (first != 0, second) == (True, -signal.SIGKILL)
    assert saved_steps(folder) == [2, 4, 6]
    (shard,) = folder.glob("checkpoints/checkpoint-6/global_step6/*rank_1*optim_states.pt")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert starts.start(folder) == [0, 0]
    result = assert_same(folder, uninterrupted)
    (note,) = result.notes
    assert note.startswith("checkpoint-6 was damaged (the content of global_step6/")
    assert saved_steps(folder) == [6, 8, 10]


@pytest.mark.slow
def test_resume_checkpoint_not_copied_from_node_disk_repeats_its_steps(
    small: Path, tmp_path: Path
) -> None:
    """Checkpoints go to the node's disk first; the result is the same to the bit."""
    folder = starts.make_run(tmp_path / "run", small, *ZERO3_SAVED_OFTEN)
    uninterrupted = starts.copy_run(folder, tmp_path / "uninterrupted")
    assert starts.start(uninterrupted) == [0, 0]
    disk = tmp_path / "disk"
    disk.mkdir()
    paths = RunPaths(folder)
    site = read_record(paths.cluster, Cluster).model_copy(update={"node_disk_path": str(disk)})
    write_record(paths.cluster, site)
    starts.start(folder, at=7, ranks="1")  # That of step 6 is published in step 7 at the earliest.
    assert saved_steps(folder) == [2, 4]
    node_folder = node_local.node_folder(paths, site, RankInfo(0, 2, 0, os.uname().nodename, "1"))
    assert node_folder is not None
    (node_folder / "left.pt").touch()
    assert starts.start(folder) == [0, 0]
    assert assert_same(folder, uninterrupted).notes == []
    assert saved_steps(folder) == [6, 8, 10]
    assert [*node_folder.iterdir()] == []
    assert "training paused for " in (folder / "logs/2.log").read_text()


# ---------------------------------------------------------------- every layout, in the nightly tier

LAYOUTS = {
    "fp32 alone": (),
    "lora": ("method.name=lora",),
    "qlora": ("method.name=qlora",),
    "head only": ("method.name=head_only",),
    "p-tuning": ("method.name=p_tuning",),
    "ddp": ("resources.gpus_per_node=2", "resources.zero_stage=0"),
    "zero 2": ("resources.gpus_per_node=2", "resources.zero_stage=2"),
    "lora zero 3": ("method.name=lora", "resources.gpus_per_node=2", "resources.zero_stage=3"),
    "zero 3 on four": ("resources.gpus_per_node=4", "resources.zero_stage=3"),
    "workers": ("train.dataloader_num_workers=2",),
    "best": ("train.save_strategy=epoch", "train.load_best_model_at_end=true",
             "train.metric_for_best_model=accuracy", "train.learning_rate=0.01"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYOUTS)
def test_resume_interrupted_twice_gives_same_bits(kind: str, small: Path, tmp_path: Path) -> None:
    """It is stopped within an epoch of three steps, and later killed while it saves."""
    often = "resources.checkpoint_min=0.000001"
    folder = starts.make_run(tmp_path / "run", small, *LAYOUTS[kind], often)
    uninterrupted = starts.copy_run(folder, tmp_path / "uninterrupted")
    assert {*starts.start(uninterrupted)} == {0}
    assert {*starts.start(folder, at=4, signum=signal.SIGTERM)} == {SAVED_EXIT}
    assert 4 in saved_steps(folder)
    codes = starts.start(folder, at=7, moment="save", ranks="0")
    assert codes[0] == -signal.SIGKILL
    assert max(saved_steps(folder)) == 6
    assert {*starts.start(folder)} == {0}
    assert_same(folder, uninterrupted)


RESHARDED = {
    "fewer ranks": ((2, 3), (1, 3)),
    "more ranks": ((2, 3), (4, 3)),
    "stage 3 to 2": ((2, 3), (2, 2)),
    "stage 2 to 3": ((2, 2), (2, 3)),
    "plain to more ranks": ((1, 0), (2, 0)),
    "plain to zero 3": ((1, 0), (2, 3)),
    "plain to zero 2": ((1, 0), (1, 2)),
    "zero 3 to plain": ((2, 3), (1, 0)),
    "zero 2 to ddp": ((2, 2), (2, 0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RESHARDED)
def test_resume_in_another_layout_gives_same_losses(kind: str, small: Path, tmp_path: Path) -> None:
    """There is no dropout, whose random numbers depend on the number of ranks."""
    no_dropout = (
        "model.config.hidden_dropout_prob=0",
        "model.config.attention_probs_dropout_prob=0",
    )
    first, then = (
        (*no_dropout, f"resources.gpus_per_node={ranks}", f"resources.zero_stage={stage}")
        for ranks, stage in RESHARDED[kind]
    )
    folder = starts.make_run(tmp_path / "run", small, *first)
    uninterrupted = starts.copy_run(folder, tmp_path / "uninterrupted")
    assert {*starts.start(uninterrupted)} == {0}
    assert {*starts.start(folder, at=5, signum=signal.SIGTERM)} == {SAVED_EXIT}
    starts.make_run(folder, small, *then)
    assert {*starts.start(folder)} == {0}
    ours, theirs = starts.logged_lines(folder), starts.logged_lines(uninterrupted)
    for key in ("loss", "eval_loss", "learning_rate"):
        values = [[line[key] for line in lines if key in line] for lines in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=1e-5), key
    assert read_record(RunPaths(folder).result, RunRecord).notes == []


@pytest.mark.slow
def test_time_limit_near_saves_and_stops(small: Path, tmp_path: Path) -> None:
    """The limit is some seconds away when training starts: at least one step is done and saved."""
    folder = starts.make_run(tmp_path / "run", small, "train.max_steps=100000",
                         "evaluation.before=false")  # fmt: skip
    time_limit = {"SLURM_JOB_END_TIME": str(int(time.time()) + 5)}
    assert starts.start(folder, environment=time_limit) == [SAVED_EXIT]
    (step,) = saved_steps(folder)
    assert step >= 1


@pytest.mark.slow
def test_resume_few_shot_run_continues_with_the_next_batch(asked: Path, tmp_path: Path) -> None:
    folder = starts.make_run(tmp_path / "run", asked)
    uninterrupted = starts.copy_run(folder, tmp_path / "uninterrupted")
    assert {*starts.start(uninterrupted)} == {0}
    assert {*starts.start(folder, at=0, signum=signal.SIGTERM, moment="answer")} == {SAVED_EXIT}
    assert 0 < len(answer_log.read_answers(folder / "answers")) < 40
    assert {*starts.start(folder)} == {0}
    assert answer_log.read_answers(folder / "answers") == answer_log.read_answers(
        uninterrupted / "answers"
    )
    ours, theirs = (
        read_record(RunPaths(f).result, RunRecord).metrics for f in (folder, uninterrupted)
    )
    assert ours == theirs
