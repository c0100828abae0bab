"""Writes run folders of finished runs, as many as wanted, from one that was submitted."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from hpcft.core.paths import RunPaths
from hpcft.core.records import (
    Confusion,
    Job,
    Measurement,
    ParameterCount,
    PhasePeaks,
    Progress,
    RunRecord,
)

GIB = 2**30
COPIED = ("recipe", "cluster", "plan", "current_plan", "fingerprints", "staged", "ds_config")


def write_finished_runs(root: Path, submitted: Path, count: int) -> None:
    """Writes the folders of finished runs, ten seeds for each learning rate.

    Args:
        root: the runs folder.
        submitted: run folder that was submitted; its recipe, plan and the like are copied.
        count: number of runs.
    """
    source = RunPaths(submitted)
    texts = {name: file.read_bytes() for name in COPIED if (file := getattr(source, name)).exists()}
    job = Job.model_validate_json(source.job.read_bytes())
    (attempt,) = job.attempts
    for index in range(count):
        run_id = hashlib.sha256(str(index).encode()).hexdigest()[:12]
        paths = RunPaths(root / job.recipe / run_id)
        paths.folder.mkdir(mode=0o700, parents=True)
        for name, text in texts.items():
            seed = f'"seed": {index % 10}'.encode()
            rate = f'"learning_rate": {1e-6 * (1 + index // 10):.3g}'.encode()
            if name == "recipe":
                text = text.replace(b'"seed": 0', seed).replace(b'"learning_rate": 1e-05', rate)
            getattr(paths, name).write_bytes(text)
        own = attempt.model_copy(
            update={"job_id": f"1_{index}", "submitted_at": float(index), "array_index": index}
        )
        point = {"train.learning_rate": 1e-6 * (1 + index // 10), "train.seed": index % 10}
        changed = job.model_copy(update={"run_id": run_id, "point": point, "attempts": [own]})
        paths.job.write_text(changed.model_dump_json(indent=2))
        paths.result.write_text(_result(run_id, job, index).model_dump_json(indent=2))
        paths.progress.write_text(_heartbeat(index).model_dump_json(indent=2))


def forget_pages(root: Path) -> None:
    """Has the kernel forget the content of all files, so that the next reads go to the disk."""
    os.sync()
    for folder, _, names in os.walk(root):
        for name in names:
            handle = os.open(os.path.join(folder, name), os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def _result(run_id: str, job: Job, index: int) -> RunRecord:
    peaks = PhasePeaks(resident_bytes=3 * GIB, host_bytes=3 * GIB)
    return RunRecord(
        run_id=run_id,
        recipe=job.recipe,
        cluster=job.cluster,
        finished_at=time.time(),
        job_id=f"1_{index}",
        split="test",
        metrics={"accuracy": 0.5 + index % 97 / 300, "f1": 0.5},
        intervals={"accuracy": (0.4, 0.6), "f1": (0.4, 0.6)},
        confusion=Confusion(labels=["bad", "good"], counts=[[4, 1], [2, 3]]),
        examples={"train": 24, "test": 8},
        parameters=ParameterCount(total=30_000, trainable=30_000, added=100, largest_layer=9_000),
        measured=Measurement(
            wall_s=60.0,
            gpu_hours=0.02,
            peak_memory_bytes=3 * GIB,
            peak_host_bytes=3 * GIB,
            tokens_per_s=1e4,
            phases=dict.fromkeys(("model", "training", "evaluation"), peaks),
            step_s=0.1,
            timed_steps=3,
        ),
        versions={"torch": "2.13.0", "transformers": "5.24.0"},
    )


def _heartbeat(index: int) -> Progress:
    now = time.time()
    return Progress(phase="done", updated_at=now, started_at=now - 60, job_id=f"1_{index}",
                    node="n1", step=3, total_steps=3, loss=0.5, tokens_per_s=1e4,
                    memory_bytes=GIB, peak_memory_bytes=3 * GIB)  # fmt: skip
