"""Checkpoints: complete or not there, when they are written, and how they leave a node's disk."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest

from builders import cluster
from hpcft.core import checkpoints
from hpcft.core.files import read_record, write_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Checkpoint, Layout
from hpcft.recovery import log
from hpcft.training.checkpointing import interval, node_local, retention
from hpcft.training.distributed import stop_signal
from hpcft.training.distributed.rank_env import RankInfo

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
        "step": step, "at": 1.0, "user_requested": False, "layout": LAYOUT, "precision": "bf16",
        "files": {f"global_step{step}/shard.pt": 100}, "tag": f"global_step{step}",
        "metrics_bytes": 0, "losses": [0.0], "logged_loss": 0.0, "logged_step": 0, "train_s": 1.0,
    }  # fmt: skip
    write_record(folder / checkpoints.MARKER_FILE, Checkpoint.model_validate(fields | changes))
    return folder


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path)


def test_the_newest_by_number_is_taken(paths: RunPaths) -> None:
    assert checkpoints.latest_checkpoint(paths) == (None, [])
    for step in (8, 9, 10):
        made(paths, step)
    found, skipped = checkpoints.latest_checkpoint(paths)
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
    "another's mark": (lambda f: write_record(f / "checkpoint.json",
                                       read_record(f.parent / "checkpoint-8/checkpoint.json", Checkpoint)),
                       "checkpoint.json is of step 8"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_skipped_and_told(kind: str, paths: RunPaths) -> None:
    made(paths, 8)
    folder = made(paths, 12)
    damage, said = DAMAGE[kind]
    damage(folder)
    found, (note,) = checkpoints.latest_checkpoint(paths)
    assert found is not None
    assert found.record.step == log.saved_step(paths) == 8
    assert note.startswith("checkpoint-12 was damaged (")
    assert said in note


def test_what_was_being_written_is_removed(paths: RunPaths) -> None:
    made(paths, 8)
    (paths.checkpoints / ".checkpoint-12.part/checkpoint-12").mkdir(parents=True)
    retention.remove_unfinished(paths)
    assert [folder.name for folder in paths.checkpoints.iterdir()] == ["checkpoint-8"]


def test_metrics_of_steps_that_are_done_again_are_cut(paths: RunPaths) -> None:
    lines = [{"kind": "step", "step": 1}, {"kind": "recovery", "number": 1},
             {"kind": "step", "step": 2}, {"kind": "recovery", "number": 2},
             {"kind": "step", "step": 3}]  # fmt: skip
    written = [json.dumps(line) + "\n" for line in lines]
    paths.metrics.write_text("".join(written) + '{"kind": "st')
    retention.cut_metrics(paths, len("".join(written[:2])))
    assert paths.metrics.read_text() == "".join([*written[:2], written[3]])


@pytest.mark.parametrize(
    ("kept", "left"),
    [(1, [6, 20]), (2, [6, 12, 20]), (3, [6, 8, 12, 20]), (None, [6, 8, 12, 20])],
)
def test_rotation_keeps_the_newest_the_best_and_what_was_asked_for(
    kept: int | None, left: list[int], paths: RunPaths
) -> None:
    for step, asked in ((6, True), (8, True), (10, False), (12, True), (20, False), (30, True)):
        made(
            paths, step, user_requested=asked
        )  # 30 was damaged, and left behind by going on from 12
    best = str(paths.checkpoints / "checkpoint-6")
    retention.remove_old_checkpoints(paths, 20, best, kept)
    assert sorted(map(checkpoints.checkpoint_step, checkpoints.checkpoint_folders(paths))) == left
    retention.remove_resume_checkpoints(paths)
    assert (
        sorted(map(checkpoints.checkpoint_step, checkpoints.checkpoint_folders(paths))) == left[:-1]
    )


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
    assert not stop_signal.StopRequest().has_to_end(1e9)
    assert stop_signal.StopRequest(signum=15).has_to_end(0)
    near = stop_signal.StopRequest(deadline=time.time() + 60)
    assert not near.has_to_end(30)
    assert near.has_to_end(90)


# ---------------------------------------------------------------- from a node's disk


def test_a_copy_arrives_or_says_why_not(tmp_path: Path) -> None:
    source, target = tmp_path / "near", tmp_path / "far"
    (source / "global_step2").mkdir(parents=True)
    (source / "global_step2/shard.pt").write_bytes(b"x" * 100)
    target.mkdir()
    (target / "of another node").touch()
    copy = node_local.AsyncCopy(source, target)
    copy.wait()
    assert copy.is_done
    assert (target / "global_step2/shard.pt").read_bytes() == b"x" * 100
    assert (target / "of another node").exists()
    assert not source.exists()
    node_local.AsyncCopy(target, target).wait()
    assert (target / "global_step2/shard.pt").exists(), "it only had to reach the disk"
    target.joinpath("global_step2").rename(source)
    source.joinpath("shard.pt").rename(source / "of another node")
    (target / "of another node").unlink()
    (target / "of another node").mkdir()
    with pytest.raises(IsADirectoryError):
        node_local.AsyncCopy(source, target).wait()


def test_a_copy_that_fails_for_any_reason_is_not_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "near").mkdir()
    (tmp_path / "near/shard.pt").touch()

    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(node_local.shutil, "copyfile", fails)
    with pytest.raises(MemoryError):
        node_local.AsyncCopy(tmp_path / "near", tmp_path / "far").wait()


def test_a_folder_of_somebody_else_is_not_used(
    paths: RunPaths, caplog: pytest.LogCaptureFixture
) -> None:
    me = RankInfo(0, 1, 0, "n1", "7")
    assert node_local.prepare_node_folder(paths, cluster("local"), me) is None
    site = cluster("local", node_disk_path=str(paths.folder))
    near = node_local.node_folder(paths, site, me)
    assert near is not None
    assert node_local.prepare_node_folder(paths, site, me) == near
    assert near.stat().st_mode & 0o777 == 0o700
    assert node_local.has_room(near, 1)
    assert not node_local.has_room(near, 1 << 60)
    node_local.remove_node_folder(near)
    near.symlink_to(paths.folder)
    assert node_local.prepare_node_folder(paths, site, me) is None
    assert "checkpoints are written to the run folder at once" in caplog.text
