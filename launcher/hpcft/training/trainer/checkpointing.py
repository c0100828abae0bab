"""The Trainer that saves what a run can go on from, and goes on from it.

A checkpoint is written aside by all ranks; if they can, on the disks of their nodes, from where it
is copied while they train on (`copying`). Once all of it is there, rank 0 adds a mark with the size
of every file, and gives the folder its name. A process that is killed at any instant leaves the
checkpoint before, or the new one, whole.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import os
import shutil
import time
import zlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME

from hpcft.core.checkpoints import LATEST_FILE, MARKER_FILE, CompleteCheckpoint
from hpcft.core.files import read_record, write_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Checkpoint, Plan
from hpcft.training.checkpointing import reshard, retention, universal_format
from hpcft.training.checkpointing.node_local import AsyncCopy, has_room
from hpcft.training.distributed import stop_signal
from hpcft.training.distributed.collectives import RankConsensus
from hpcft.training.distributed.rank_env import RankInfo
from hpcft.training.trainer.oom_retry import OomRetryTrainer

log = logging.getLogger(__name__)

VERSIONS = ("hpcft", "torch", "transformers", "deepspeed")
SPEEDS = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
"""Figures of the Trainer that hold for a run without an interruption only."""


@dataclass
class PendingCheckpoint:
    """A checkpoint that all ranks have written, and that has no name yet."""

    record: Checkpoint
    """What its mark will say, but for the files."""
    folder: Path
    """Where it is published from, in the run folder."""
    copy: AsyncCopy | None
    """Has this node's part of it there on the disk; None where another rank of the node does."""
    begun: float
    """When the ranks began to write it."""

    @property
    def is_there(self) -> bool:
        """Whether this rank's part is done."""
        return self.copy is None or self.copy.is_done


@dataclass
class CheckpointState:
    """What a run saves to, and what it went on from."""

    paths: RunPaths
    plan: Plan
    rank: RankInfo
    agreement: RankConsensus
    save_total_limit: int | None
    """`train.save_total_limit`."""
    checkpoint_bytes: int
    """What a checkpoint is taken to need."""
    near: Path | None = None
    """Folder on this node's own disk, to write to first; None where there is none."""
    earlier: Checkpoint | None = None
    """What this start went on from."""
    notes: list[str] = field(default_factory=list)
    """What the reader of the result should know of starts."""
    begun: float = field(default_factory=time.monotonic)
    """When this start began to train."""
    underway: PendingCheckpoint | None = None
    """The next checkpoint, while it is copied."""
    pause_s: float | None = None
    """Seconds for which the latest save kept training."""
    save_s: float | None = None
    """Seconds until it was safe."""
    step: int = 0
    """Step that is safe: of the latest checkpoint."""

    @property
    def train_s(self) -> float:
        """Seconds of training that led here, over all starts."""
        return (self.earlier.train_s if self.earlier else 0.0) + time.monotonic() - self.begun


class CheckpointingTrainer(OomRetryTrainer):
    """A Trainer whose checkpoints are complete or not there, and that goes on as if never ended."""

    saving: CheckpointState
    asked = False
    """Whether the checkpoint to be written next is one that the recipe asked for."""

    # ------------------------------------------------------------ saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes a checkpoint aside; it is published at once, or after later steps."""
        saving, step = self.saving, self.state.global_step
        self.publish()  # of an earlier step
        if step == saving.step:
            return  # at the end of an epoch, after that of its last step
        losses = saving.agreement.all(self._tr_loss.item())
        if not all(map(math.isfinite, losses)):
            log.warning("step %d is not saved: its loss is not a number", step)
            return  # the next loss that is logged ends the run
        begun = time.monotonic()
        name, home = f"checkpoint-{step}", saving.paths.checkpoints
        aside = home / f".{name}.part"
        if saving.rank.is_first:
            retention.remove_unfinished(saving.paths)
            (aside / name).mkdir(mode=0o700, parents=True)
        near = self._near()
        first_here = saving.rank.local_rank == 0
        if near and first_here:
            (near / name).mkdir(mode=0o700)
        saving.agreement.wait()
        self._write(model, trial, near or aside, name)
        saving.agreement.wait()  # the others of this node have written, too
        copy = AsyncCopy((near or aside) / name, aside / name) if first_here else None
        saving.underway = PendingCheckpoint(self._record(losses), aside / name, copy, begun)
        if near is None:
            self.publish()
        saving.pause_s = time.monotonic() - begun
        log.info("step %d: training paused for %.1f s to save it", step, saving.pause_s)

    def _near(self) -> Path | None:
        """The folder on this node's own disk, where all nodes have one with room."""
        saving = self.saving
        near = saving.near
        (lacks,) = saving.agreement.any(near is None or not has_room(near, saving.checkpoint_bytes))
        return None if lacks else near

    def _write(self, model: Any, trial: Any, aside: Path, name: str) -> None:
        """Has all ranks write what they hold."""
        home = self.saving.paths.checkpoints
        folder = aside / name
        self.args.output_dir = str(aside)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(home)
        if not self.is_deepspeed_enabled and self.saving.rank.is_first:
            universal_format.save(self.model, self.optimizer, folder)
        if self.state.best_model_checkpoint == str(folder):
            self.state.best_model_checkpoint = str(home / name)
            if self.saving.rank.is_first:
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _record(self, losses: list[float]) -> Checkpoint:
        saving = self.saving
        return Checkpoint(
            step=self.state.global_step,
            at=time.time(),
            user_requested=self.user_requested,
            layout=saving.plan.layout,
            precision=saving.plan.precision,
            files={},
            metrics_bytes=_size(saving.paths.metrics),
            losses=losses,
            logged_loss=self._total_loss_scalar,
            logged_step=self._globalstep_last_logged,
            train_s=saving.train_s,
            save_s=saving.save_s,
            notes=saving.notes,
            versions={name: importlib.metadata.version(name) for name in VERSIONS},
        )

    def publish(self) -> None:
        """Waits for the checkpoint that is underway, marks it as complete, and names it.

        Raises:
            OSError: this node's part could not be written.
        """
        saving, underway = self.saving, self.saving.underway
        if underway is None:
            return
        if underway.copy:
            underway.copy.wait()
        saving.agreement.wait()
        if saving.rank.is_first:
            self._complete(underway)
        saving.agreement.wait()  # else the others might end the job before
        saving.underway = None
        saving.step, saving.save_s = underway.record.step, time.monotonic() - underway.begun
        log.info("step %d is safe after %.1f s", saving.step, saving.save_s)

    def _complete(self, underway: PendingCheckpoint) -> None:
        """Adds the mark, gives the folder its name, and removes what is not needed any more."""
        saving, home, folder = self.saving, self.saving.paths.checkpoints, underway.folder
        latest = folder / LATEST_FILE
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        found = {
            "files": {str(file.relative_to(folder)): file.stat().st_size for file in files},
            "tag": latest.read_text().strip() if latest.exists() else "",
        }
        write_record(folder / MARKER_FILE, underway.record.model_copy(update=found))
        _sync_names(folder)
        shutil.rmtree(home / folder.name, ignore_errors=True)  # a damaged one that was skipped
        os.replace(folder, home / folder.name)
        _sync_names(home)
        folder.parent.rmdir()
        best = self.state.best_model_checkpoint
        retention.remove_old_checkpoints(
            saving.paths, underway.record.step, best, saving.save_total_limit
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes weights as others load them: final ones, or of a checkpoint that was asked for."""
        if self.user_requested or not _internal_call:
            super().save_model(output_dir, _internal_call)

    # ------------------------------------------------------------ going on

    def continue_losses(self) -> None:
        """Sums of losses as they were, so that the next line of metrics.jsonl says the same."""
        earlier, rank = self.saving.earlier, self.saving.rank
        if earlier is None:
            return
        alike = len(earlier.losses) == rank.world_size
        mean = sum(earlier.losses) / len(earlier.losses)
        self._tr_loss += earlier.losses[rank.rank] if alike else mean
        self._total_loss_scalar = earlier.logged_loss
        self._globalstep_last_logged = earlier.logged_step
        self._initial_global_step = 0

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        """Logs figures, other than those that are of this start alone."""
        super().log({name: value for name, value in logs.items() if name not in SPEEDS}, *rest)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """What was trained; the rest is as it was loaded."""
        universal_format.load_weights(model or self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Both, and the learning rates: a converted checkpoint has none."""
        if checkpoint is None:
            return
        with_deepspeed = self.is_deepspeed_enabled
        converted = not with_deepspeed and universal_format.load_states(
            self.model, self.optimizer, self.lr_scheduler, Path(checkpoint)
        )
        if not converted:
            super()._load_optimizer_and_scheduler(checkpoint)
        if converted or with_deepspeed:
            rates = self.lr_scheduler.get_last_lr()
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def _load_best_model(self) -> None:
        self.publish()
        saving, best = self.saving, self.state.best_model_checkpoint
        now = saving.plan.layout
        found = CompleteCheckpoint(Path(best), read_record(Path(best) / MARKER_FILE, Checkpoint))
        if saving.rank.is_first:
            reshard.resharded(found, now)
        saving.agreement.wait()
        fits = reshard.resharded_folder(found, now)
        if not self.is_deepspeed_enabled:
            self._load_from_checkpoint(str(fits))
            return
        self.state.best_model_checkpoint = str(fits)
        self.deepspeed._config.load_universal_checkpoint = fits != found.folder
        super()._load_best_model()
        self.state.best_model_checkpoint = best

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Random numbers go on where they were; ranks that were not there begin their own."""
        earlier, rank = self.saving.earlier, self.saving.rank
        if earlier is None or earlier.layout.world_size == rank.world_size:
            super()._load_rng_state(checkpoint)
        else:
            set_seed(zlib.crc32(f"{self.args.seed} {earlier.step} {rank.rank}".encode()))

    def _run_epoch(self, **options: Any) -> None:
        """Nothing where a run goes on from its last step: the Trainer would take one more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**options)

    def get_train_dataloader(self) -> Any:
        """The loader of micro-batches, whose workers do not die of what this process is told."""
        loader = super().get_train_dataloader()
        if loader.num_workers:
            loader.worker_init_fn = partial(_init_worker, loader.worker_init_fn)
        return loader


def _init_worker(init: Any, number: int) -> None:
    stop_signal.ignore_stop_signals()
    init(number)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sync_names(folder: Path) -> None:
    """Has the names of a folder's files reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
