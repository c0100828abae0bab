"""Tests of the progress and metrics that rank 0 writes into the run folder."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import TrainerState

from hpcft.core import attempts
from hpcft.core.files import read_record, write_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Progress
from hpcft.training.distributed.rank_env import RankInfo
from hpcft.training.telemetry import job_start
from hpcft.training.telemetry.progress import ProgressReporter


@pytest.fixture
def reporter(tmp_path: Path) -> ProgressReporter:
    """The reporter of rank 0 in an empty run folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    return ProgressReporter(RunPaths(folder), RankInfo(0, 1, 0, "here", "1"))


def test_ran_s_adds_the_seconds_of_all_starts_without_those_between(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    first = Progress(phase="training", started_at=1000.0, updated_at=1600.0, ranks=2)
    write_record(paths.progress, first)
    second = ProgressReporter(paths, RankInfo(0, 4, 0, "here", "2"), restart_index=1).progress
    second = second.model_copy(update={"updated_at": second.started_at + 30})
    assert second.ran_s() == pytest.approx((630, 2 * 600 + 4 * 30))
    write_record(paths.progress, second)
    attempts.archive(paths, [paths.progress])  # A job that resubmits its run does so.
    third = ProgressReporter(paths, RankInfo(0, 1, 0, "here", "3"), restart_index=2).progress
    assert third.previous_s == pytest.approx(630)
    new_run = ProgressReporter(paths, RankInfo(0, 1, 0, "here", "4")).progress
    assert new_run.previous_s == 0


def test_progress_reporter_restart_reads_archive_of_hpcft_0_1(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    archive = tmp_path / "earlier/0"
    archive.mkdir(parents=True)
    previous = Progress(phase="training", started_at=1000.0, updated_at=1600.0)
    write_record(archive / "progress.json", previous)
    reporter = ProgressReporter(paths, RankInfo(0, 1, 0, "here", "2"), restart_index=1)
    assert reporter.progress.previous_s == pytest.approx(600)


def logged_losses(reporter: ProgressReporter) -> list[Any]:
    text = reporter.paths.metrics.read_text()
    return [json.loads(line)["loss"] for line in text.splitlines()]


def test_log_keeps_lines_while_the_run_folder_is_away(
    reporter: ProgressReporter, caplog: pytest.LogCaptureFixture
) -> None:
    reporter.log("step", {"loss": 1})
    folder = reporter.paths.folder
    folder.rename(folder.with_name("away"))
    reporter.set(phase="model")
    reporter.log("step", {"loss": 2})
    reporter.set(phase="training", step=1)
    reporter.log("step", {"loss": 3})
    assert [record.levelname for record in caplog.records] == ["WARNING"], "it warns once"
    assert "No such file or directory" in caplog.text
    folder.with_name("away").rename(folder)
    reporter.set(phase="evaluation")
    assert logged_losses(reporter) == [1, 2, 3]
    assert read_record(reporter.paths.progress, Progress).phase == "evaluation"


def test_log_on_a_full_disk_writes_no_part_of_a_line(reporter: ProgressReporter) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = 4000  # Largest size of a file in bytes; progress.json is smaller.
    written = 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (full, before[1]))
    try:
        while written == 0 or reporter.paths.metrics.stat().st_size < full - 500:
            reporter.log("step", {"loss": written})
            written += 1
        for _ in range(20):
            reporter.log("step", {"loss": written})
            written += 1
        assert len(logged_losses(reporter)) < written
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    reporter.set(phase="training")
    assert logged_losses(reporter) == list(range(written))


def test_ran_s_counts_from_the_start_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is charged begins with the job, 48 s before its worker; also after a restart in it."""
    paths, rank = RunPaths(tmp_path), RankInfo(0, 2, 0, "here", "7")
    began = time.time() - 48
    monkeypatch.setenv("SLURM_JOB_START_TIME", f"{began:.0f}")
    for name, value in job_start.worker_variable().items():
        monkeypatch.setenv(name, value)
    first = ProgressReporter(paths, rank).progress
    assert first.ran_s() == pytest.approx((48, 2 * 48), abs=3)
    restarted = ProgressReporter(paths, rank, restart_index=1).progress
    assert restarted.ran_s() == pytest.approx((48, 2 * 48), abs=3)


def test_worker_variable_without_slurms_is_the_start_of_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SLURM_JOB_START_TIME", raising=False)
    ((name, value),) = job_start.worker_variable().items()
    assert float(value) == pytest.approx(psutil.Process().create_time(), abs=0.01)
    monkeypatch.setenv(name, value)
    assert job_start.job_started_at() == float(value)
    monkeypatch.setenv(name, "soon")
    assert job_start.job_started_at() == pytest.approx(time.time(), abs=2)


def test_on_log_tells_steps_from_validations_and_the_summary(reporter: ProgressReporter) -> None:
    state = TrainerState(global_step=4, max_steps=4)
    for logs in (
        {"loss": 0.5, "learning_rate": 1e-4}, {"eval_loss": 0.4, "epoch": 1.0},
        {"train_runtime": 3.0, "train_loss": 0.45},
    ):  # fmt: skip
        reporter.on_log(None, state, None, logs=logs)
    lines = [json.loads(line) for line in reporter.paths.metrics.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["step", "validation", "summary"]
