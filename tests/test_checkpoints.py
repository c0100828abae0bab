"""Checkpoints: complete or not there, and a run that goes on from one as if it had never ended."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import starts
from conftest import film_rows, write_rows
from hpcft import checkpoints, recoveries
from hpcft.paths import RunPaths
from hpcft.records import Checkpoint, Cluster, Layout, RunRecord
from hpcft.store import read, write
from hpcft.train import answers, cleaning, copying, interval, notice
from hpcft.train.rank import SAVED_EXIT
from hpcft.train.start import Rank
from made_plans import cluster

# ---------------------------------------------------------------- which one to go on from


LAYOUT = Layout(
    nodes=1, ranks_per_node=1, per_device_train_batch_size=1, gradient_accumulation_steps=1,
    gradient_checkpointing=False, zero_stage=3, offload_optimizer="none", offload_param="none",
)  # fmt: skip


def made(paths: RunPaths, step: int, **changes: Any) -> Path:
    """A checkpoint that is complete, with a shard of 100 bytes."""
    folder = paths.checkpoints / f"checkpoint-{step}"
    (folder / f"global_step{step}").mkdir(parents=True)
    (folder / f"global_step{step}/shard.pt").write_bytes(b"x" * 100)
    (folder / "latest").write_text(f"global_step{step}")
    fields: dict[str, Any] = {
        "step": step, "at": 1.0, "asked": False, "layout": LAYOUT, "precision": "bf16",
        "files": {f"global_step{step}/shard.pt": 100}, "tag": f"global_step{step}",
        "metrics_bytes": 0, "losses": [0.0], "logged_loss": 0.0, "logged_step": 0, "train_s": 1.0,
    }  # fmt: skip
    write(folder / checkpoints.MARK, Checkpoint.model_validate(fields | changes))
    return folder


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path)


def test_the_newest_by_number_is_taken(paths: RunPaths) -> None:
    assert checkpoints.latest(paths) == (None, [])
    for step in (8, 9, 10):
        made(paths, step)
    found, skipped = checkpoints.latest(paths)
    assert found is not None
    assert (found.record.step, skipped) == (10, [])


DAMAGE = {
    "truncated shard": (lambda f: os.truncate(f / "global_step12/shard.pt", 60),
                        "global_step12/shard.pt has 60 of 100 bytes"),
    "missing shard": (lambda f: (f / "global_step12/shard.pt").unlink(),
                      "global_step12/shard.pt: No such file or directory"),
    "no mark": (lambda f: (f / "checkpoint.json").unlink(), "it has no checkpoint.json"),
    "mark is garbage": (lambda f: (f / "checkpoint.json").write_bytes(b"\x80\x04."),
                        "checkpoint.json: is damaged"),
    "wrong latest": (lambda f: (f / "latest").write_text("global_step8"),
                     "latest names 'global_step8' instead of 'global_step12'"),
    "no latest": (lambda f: (f / "latest").unlink(), "latest: No such file or directory"),
    "another's mark": (lambda f: write(f / "checkpoint.json",
                                       read(f.parent / "checkpoint-8/checkpoint.json", Checkpoint)),
                       "checkpoint.json is of step 8"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_skipped_and_told(kind: str, paths: RunPaths) -> None:
    made(paths, 8)
    folder = made(paths, 12)
    damage, said = DAMAGE[kind]
    damage(folder)
    found, (note,) = checkpoints.latest(paths)
    assert found is not None
    assert found.record.step == recoveries.saved_step(paths) == 8
    assert note.startswith("checkpoint-12 was damaged (")
    assert said in note


def test_what_was_being_written_is_removed(paths: RunPaths) -> None:
    made(paths, 8)
    (paths.checkpoints / ".checkpoint-12.part/checkpoint-12").mkdir(parents=True)
    cleaning.remove_unfinished(paths)
    assert [folder.name for folder in paths.checkpoints.iterdir()] == ["checkpoint-8"]


def test_metrics_of_steps_that_are_done_again_are_cut(paths: RunPaths) -> None:
    lines = [{"kind": "step", "step": 1}, {"kind": "rung", "number": 1},
             {"kind": "step", "step": 2}, {"kind": "recovery", "number": 2},
             {"kind": "step", "step": 3}]  # fmt: skip
    written = [json.dumps(line) + "\n" for line in lines]
    paths.metrics.write_text("".join(written) + '{"kind": "st')
    cleaning.cut_metrics(paths, len("".join(written[:2])))
    assert paths.metrics.read_text() == "".join([*written[:2], written[3]])


@pytest.mark.parametrize(
    ("kept", "left"),
    [(1, [6, 20]), (2, [6, 12, 20]), (3, [6, 8, 12, 20]), (None, [6, 8, 12, 20])],
)
def test_rotation_keeps_the_newest_the_best_and_what_was_asked_for(
    kept: int | None, left: list[int], paths: RunPaths
) -> None:
    for step, asked in ((6, True), (8, True), (10, False), (12, True), (20, False), (30, True)):
        made(paths, step, asked=asked)  # 30 was damaged, and left behind by going on from 12
    best = str(paths.checkpoints / "checkpoint-6")
    cleaning.rotate(paths, 20, best, kept)
    assert sorted(map(checkpoints.step_of, checkpoints.folders(paths))) == left
    cleaning.remove_recoveries(paths)
    assert sorted(map(checkpoints.step_of, checkpoints.folders(paths))) == left[:-1]


# ---------------------------------------------------------------- when


def test_the_interval_loses_least() -> None:
    """Against the sum of what saves cost and what is lost, over all intervals of whole minutes."""
    save_s, fails_s = 60.0, 24 * 3600.0

    def lost(every_s: float) -> float:
        # Daly 2006, equation 20: time to solution over time of work, without restarts.
        return fails_s / every_s * math.expm1((every_s + save_s) / fails_s)

    best = min(range(60, 86_400, 60), key=lost)
    assert interval.best_s(save_s, fails_s) == pytest.approx(best, rel=0.02)
    assert interval.best_s(10.0, 4.0) == 4.0


def test_the_interval_of_a_recipe() -> None:
    assert interval.interval_s(5, 1.0, 1) == 300
    assert interval.interval_s(0, 1.0, 1) == math.inf
    assert interval.interval_s("auto", 30.0, 1) == interval.MOST_S
    many = interval.interval_s("auto", 30.0, 1000)
    assert 0 < many < interval.interval_s("auto", 30.0, 100) < interval.MOST_S


def test_a_notice_is_a_signal_or_the_time_limit() -> None:
    assert not notice.Notice().has_to_end(1e9)
    assert notice.Notice(signum=15).has_to_end(0)
    near = notice.Notice(deadline=time.time() + 60)
    assert not near.has_to_end(30)
    assert near.has_to_end(90)


# ---------------------------------------------------------------- from a node's disk


def test_a_copy_arrives_or_says_why_not(tmp_path: Path) -> None:
    source, target = tmp_path / "near", tmp_path / "far"
    (source / "global_step2").mkdir(parents=True)
    (source / "global_step2/shard.pt").write_bytes(b"x" * 100)
    target.mkdir()
    (target / "of another node").touch()
    copy = copying.Copy(source, target)
    copy.wait()
    assert copy.is_done
    assert (target / "global_step2/shard.pt").read_bytes() == b"x" * 100
    assert (target / "of another node").exists()
    assert not source.exists()
    copying.Copy(target, target).wait()
    assert (target / "global_step2/shard.pt").exists(), "it only had to reach the disk"
    target.joinpath("global_step2").rename(source)
    source.joinpath("shard.pt").rename(source / "of another node")
    (target / "of another node").unlink()
    (target / "of another node").mkdir()
    with pytest.raises(IsADirectoryError):
        copying.Copy(source, target).wait()


def test_a_folder_of_somebody_else_is_not_used(
    paths: RunPaths, caplog: pytest.LogCaptureFixture
) -> None:
    me = Rank(0, 1, 0, "n1", "7")
    assert copying.made(paths, cluster("local"), me) is None
    site = cluster("local", node_disk_path=str(paths.folder))
    near = copying.near_folder(paths, site, me)
    assert near is not None
    assert copying.made(paths, site, me) == near
    assert near.stat().st_mode & 0o777 == 0o700
    assert copying.has_room(near, 1)
    assert not copying.has_room(near, 1 << 60)
    copying.remove(near)
    near.symlink_to(paths.folder)
    assert copying.made(paths, site, me) is None
    assert "checkpoints are written to the run folder at once" in caplog.text


# ---------------------------------------------------------------- runs that go on


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


@pytest.fixture
def small(workplace: Path) -> Path:
    """A recipe with dropout, a validation each third step, and lines of four steps."""
    rows = film_rows(12)
    for name, part in (("train", rows), ("validation", rows[4:16]), ("test", rows[:8])):
        write_rows(workplace / f"{name}.jsonl", part)
    path = workplace / "tiny.yaml"
    path.write_text(TINY)
    return path


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "model").glob("*.safetensors")}


def saved(folder: Path) -> list[int]:
    return sorted(map(checkpoints.step_of, checkpoints.folders(RunPaths(folder))))


def assert_same(folder: Path, whole: Path) -> RunRecord:
    """A run ended as another one did: to the bit, apart from the clock."""
    assert starts.lines(folder) == starts.lines(whole)
    assert weights(folder) == weights(whole)
    result, other = (read(RunPaths(f).result, RunRecord) for f in (folder, whole))
    assert (result.metrics, result.metrics_before) == (other.metrics, other.metrics_before)
    return result


@pytest.mark.slow
def test_one_rank_told_to_end_goes_on_to_the_bit(small: Path, tmp_path: Path) -> None:
    """In the middle of an epoch and of a line of metrics."""
    folder = starts.made(tmp_path / "run", small)
    whole = starts.copied(folder, tmp_path / "whole")
    assert starts.start(whole) == [0]
    assert starts.start(folder, at=5, signum=signal.SIGUSR2) == [SAVED_EXIT]
    assert saved(folder) == [5]
    assert starts.start(folder) == [0]
    result = assert_same(folder, whole)
    assert result.notes == []
    assert saved(folder) == [], "those to go on from go with the end"


def test_ranks_of_zero3_killed_at_a_step_go_on_to_the_bit(small: Path, tmp_path: Path) -> None:
    """One rank is killed, and the newest checkpoint is damaged: the one before is taken."""
    folder = starts.made(
        tmp_path / "run", small, "resources.gpus_per_node=2", "resources.zero_stage=3",
        "train.save_strategy=steps", "train.save_steps=2", "train.save_total_limit=3",
    )  # fmt: skip
    whole = starts.copied(folder, tmp_path / "whole")
    assert starts.start(whole) == [0, 0]
    assert saved(whole) == [6, 8, 10]
    first, second = starts.start(folder, at=7, who="1")
    assert (first != 0, second) == (True, -signal.SIGKILL)
    assert saved(folder) == [2, 4, 6]
    (shard,) = folder.glob("checkpoints/checkpoint-6/global_step6/*rank_1*optim_states.pt")
    os.truncate(shard, 100)
    assert starts.start(folder) == [0, 0]
    result = assert_same(folder, whole)
    (note,) = result.notes
    assert note.startswith("checkpoint-6 was damaged (global_step6/")
    assert saved(folder) == [6, 8, 10]


def test_what_a_nodes_disk_had_not_handed_over_is_done_again(small: Path, tmp_path: Path) -> None:
    """Written to the disk of the node, copied while training goes on; the same to the bit."""
    folder = starts.made(
        tmp_path / "run", small, "resources.gpus_per_node=2", "resources.zero_stage=3",
        "train.save_strategy=steps", "train.save_steps=2", "train.save_total_limit=3",
    )  # fmt: skip
    whole = starts.copied(folder, tmp_path / "whole")
    assert starts.start(whole) == [0, 0]
    disk = tmp_path / "disk"
    disk.mkdir()
    paths = RunPaths(folder)
    site = read(paths.cluster, Cluster).model_copy(update={"node_disk_path": str(disk)})
    write(paths.cluster, site)
    starts.start(folder, at=7, who="1")  # that of step 6 gets its name in step 7 at the earliest
    assert saved(folder) == [2, 4]
    near = copying.near_folder(paths, site, Rank(0, 2, 0, os.uname().nodename, "1"))
    assert near is not None
    (near / "left.pt").touch()
    assert starts.start(folder) == [0, 0]
    assert assert_same(folder, whole).notes == []
    assert saved(folder) == [6, 8, 10]
    assert [*near.iterdir()] == []
    assert "training paused for " in (folder / "logs/2.log").read_text()


# ---------------------------------------------------------------- every way, in the nightly tier

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
def test_interrupted_twice_it_ends_the_same(kind: str, small: Path, tmp_path: Path) -> None:
    """Told to end in mid-epoch, and killed while it saved; epochs have three steps."""
    often = "resources.checkpoint_min=0.000001"
    folder = starts.made(tmp_path / "run", small, *LAYOUTS[kind], often)
    whole = starts.copied(folder, tmp_path / "whole")
    assert {*starts.start(whole)} == {0}
    assert {*starts.start(folder, at=4, signum=signal.SIGTERM)} == {SAVED_EXIT}
    assert 4 in saved(folder)
    codes = starts.start(folder, at=7, moment="save", who="0")
    assert codes[0] == -signal.SIGKILL
    assert max(saved(folder)) == 6
    assert {*starts.start(folder)} == {0}
    assert_same(folder, whole)


RESHAPES = {
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
@pytest.mark.parametrize("kind", RESHAPES)
def test_it_goes_on_in_another_layout(kind: str, small: Path, tmp_path: Path) -> None:
    """Without dropout, whose random numbers depend on the ranks, losses are the same."""
    still = ("model.config.hidden_dropout_prob=0", "model.config.attention_probs_dropout_prob=0")
    first, then = (
        (*still, f"resources.gpus_per_node={ranks}", f"resources.zero_stage={stage}")
        for ranks, stage in RESHAPES[kind]
    )
    folder = starts.made(tmp_path / "run", small, *first)
    whole = starts.copied(folder, tmp_path / "whole")
    assert {*starts.start(whole)} == {0}
    assert {*starts.start(folder, at=5, signum=signal.SIGTERM)} == {SAVED_EXIT}
    starts.made(folder, small, *then)
    assert {*starts.start(folder)} == {0}
    ours, theirs = starts.lines(folder), starts.lines(whole)
    for key in ("loss", "eval_loss", "learning_rate"):
        values = [[line[key] for line in lines if key in line] for lines in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=1e-5), key
    assert read(RunPaths(folder).result, RunRecord).notes == []


@pytest.mark.slow
def test_before_a_time_limit_it_saves_and_ends(small: Path, tmp_path: Path) -> None:
    """The limit is some seconds away when training begins: at least one step is done and saved."""
    folder = starts.made(tmp_path / "run", small, "train.max_steps=100000",
                         "evaluation.before=false")  # fmt: skip
    near = {"SLURM_JOB_END_TIME": str(int(time.time()) + 5)}
    assert starts.start(folder, environment=near) == [SAVED_EXIT]
    (step,) = saved(folder)
    assert step >= 1


@pytest.mark.slow
def test_a_model_that_is_asked_goes_on_with_the_next_batch(asked: Path, tmp_path: Path) -> None:
    folder = starts.made(tmp_path / "run", asked)
    whole = starts.copied(folder, tmp_path / "whole")
    assert {*starts.start(whole)} == {0}
    assert {*starts.start(folder, at=0, signum=signal.SIGTERM, moment="answer")} == {SAVED_EXIT}
    assert 0 < len(answers.read(folder / "answers")) < 40
    assert {*starts.start(folder)} == {0}
    assert answers.read(folder / "answers") == answers.read(whole / "answers")
    ours, theirs = (read(RunPaths(f).result, RunRecord).metrics for f in (folder, whole))
    assert ours == theirs
