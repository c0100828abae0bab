"""CheckpointingTrainer: saves checkpoints, each whole or not at all, and resumes from them.

All ranks write a checkpoint into a staging folder; if they can, on the disks of their nodes, from
where it is copied while training continues (`checkpointing.node_local`). Once all files are there,
rank 0 adds a marker with the size and checksum of every file, and renames the folder. A process
that is killed at any moment leaves the checkpoint before, or the new one, whole.
"""

from __future__ import annotations

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

from hpcft.core import checkpoints
from hpcft.core.checkpoints import LATEST_FILE, MARKER_FILE, CompleteCheckpoint, file_checksum
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

SPEED_METRICS = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
"""Figures that the Trainer logs at its end, and that leave out the starts before a restart."""


@dataclass
class PendingCheckpoint:
    """A checkpoint that all ranks have written, and that is not published yet."""

    record: Checkpoint
    """Its marker, still without the files."""
    folder: Path
    """Its staging folder, in the run folder."""
    copy: AsyncCopy | None
    """Copies this node's part into the staging folder; None if another rank of the node does."""
    started: float
    """`time.monotonic` when the ranks began to write it."""

    @property
    def is_copied(self) -> bool:
        """Whether this rank has nothing left to copy."""
        return self.copy is None or self.copy.is_done


@dataclass
class CheckpointState:
    """The state of checkpointing in one training process."""

    paths: RunPaths
    """The run's files."""
    plan: Plan
    """The plan that runs now."""
    rank: RankInfo
    """This process among the ranks."""
    consensus: RankConsensus
    """Lets the ranks agree, and wait for each other."""
    save_total_limit: int | None
    """`train.save_total_limit`: checkpoints to keep of those that the recipe asked for."""
    checkpoint_bytes: int
    """Predicted size of a checkpoint."""
    node_folder: Path | None = None
    """Folder on this node's own disk, to write to first; None if there is none."""
    resumed_from: Checkpoint | None = None
    """The checkpoint that this start resumed from; None if it started from step 0."""
    notes: list[str] = field(default_factory=list)
    """Notes for the reader of the result, about this start and the earlier ones."""
    started: float = field(default_factory=time.monotonic)
    """`time.monotonic` when this start began to train."""
    pending: PendingCheckpoint | None = None
    """The newest checkpoint, while it is being copied."""
    pause_s: float | None = None
    """Seconds that the latest save paused training."""
    save_s: float | None = None
    """Seconds from the start of the latest save until it was published."""
    saved_step: int = 0
    """Optimizer step of the newest published checkpoint."""

    @property
    def train_s(self) -> float:
        """Seconds of training so far, over all starts that led to this state."""
        previous_s = self.resumed_from.train_s if self.resumed_from else 0.0
        return previous_s + time.monotonic() - self.started


class CheckpointingTrainer(OomRetryTrainer):
    """Saves whole checkpoints only, and resumes as if training had never been interrupted."""

    checkpoint_state: CheckpointState
    user_requested = False
    """Whether the recipe asked for the next checkpoint."""

    # ------------------------------------------------------------ saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes a checkpoint into its staging folder; publishes it now, or after later steps."""
        state, step = self.checkpoint_state, self.state.global_step
        self.publish()  # A checkpoint of an earlier step may still be pending.
        if step == state.saved_step:
            return  # The last step of an epoch was saved, and the end of the epoch asks for it too.
        losses = state.consensus.gather(self._tr_loss.item())
        if not all(map(math.isfinite, losses)):
            log.warning("step %d is not saved, because its loss is not a number", step)
            return  # NanGuard ends the run at the next loss that is logged.
        started = time.monotonic()
        name, home = f"checkpoint-{step}", state.paths.checkpoints
        staging_dir = home / f".{name}.part"
        if state.rank.is_first:
            retention.remove_unfinished(state.paths)
            (staging_dir / name).mkdir(mode=0o700, parents=True)
        node_folder = self._usable_node_folder()
        is_first_of_node = state.rank.local_rank == 0
        if node_folder and is_first_of_node:
            (node_folder / name).mkdir(mode=0o700)
        state.consensus.barrier()
        first_dir = node_folder or staging_dir
        self._write(model, trial, first_dir, name)
        state.consensus.barrier()  # The other ranks of this node have to be done before the copy.
        layout = state.plan.layout
        node = state.rank.rank // layout.ranks_per_node
        copy = (
            AsyncCopy(first_dir / name, staging_dir / name, node=node, nodes=layout.nodes)
            if is_first_of_node
            else None
        )
        state.pending = PendingCheckpoint(
            record=self._record(losses), folder=staging_dir / name, copy=copy, started=started
        )
        if node_folder is None:
            self.publish()
        state.pause_s = time.monotonic() - started
        log.info("step %d: training paused for %.1f s to save it", step, state.pause_s)

    def _usable_node_folder(self) -> Path | None:
        """Returns the folder on this node's disk if all nodes have one with room; else None."""
        state = self.checkpoint_state
        folder = state.node_folder
        lacks_room = folder is None or not has_room(folder, state.checkpoint_bytes)
        (any_lacks_room,) = state.consensus.any(lacks_room)
        return None if any_lacks_room else folder

    def _write(self, model: Any, trial: Any, parent: Path, name: str) -> None:
        """Writes what this rank holds.

        Args:
            model: the Trainer's argument.
            trial: the Trainer's argument.
            parent: folder to write the checkpoint's folder to.
            name: name of the checkpoint's folder.
        """
        home = self.checkpoint_state.paths.checkpoints
        folder = parent / name
        self.args.output_dir = str(parent)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(home)
        is_first = self.checkpoint_state.rank.is_first
        if not self.is_deepspeed_enabled and is_first:
            universal_format.save_trained_weights(self.model, self.optimizer, folder)
        if self.state.best_model_checkpoint == str(folder):
            self.state.best_model_checkpoint = str(home / name)
            if is_first:
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _record(self, losses: list[float]) -> Checkpoint:
        state = self.checkpoint_state
        return Checkpoint(
            step=self.state.global_step,
            at=time.time(),
            user_requested=self.user_requested,
            layout=state.plan.layout,
            precision=state.plan.precision,
            files={},
            metrics_bytes=_file_size(state.paths.metrics),
            losses=losses,
            logged_loss=self._total_loss_scalar,
            logged_step=self._globalstep_last_logged,
            train_s=state.train_s,
            save_s=state.save_s,
            notes=state.notes,
        )

    def publish(self) -> None:
        """Waits until the pending checkpoint is copied, and gives it its marker and its name.

        Raises:
            OSError: this node's part could not be copied.
        """
        state, pending = self.checkpoint_state, self.checkpoint_state.pending
        if pending is None:
            return
        if pending.copy:
            pending.copy.wait()
        parts = state.consensus.gather_objects(pending.copy.checksums if pending.copy else {})
        if state.rank.is_first:
            self._publish(pending, parts)
        state.consensus.barrier()  # Otherwise another rank might end the job before rank 0 is done.
        state.pending = None
        state.saved_step = pending.record.step
        state.save_s = time.monotonic() - pending.started
        log.info("step %d: its checkpoint is complete after %.1f s", state.saved_step, state.save_s)

    def _publish(self, pending: PendingCheckpoint, checksums: list[dict[str, str]]) -> None:
        """Adds the marker, renames the folder, and removes checkpoints that are not needed.

        Args:
            pending: the checkpoint.
            checksums: by rank, checksums of files that its node has written.
        """
        state, folder = self.checkpoint_state, pending.folder
        home = state.paths.checkpoints
        latest = folder / LATEST_FILE
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        known = {name: value for part in checksums for name, value in part.items()}
        names = {str(file.relative_to(folder)): file for file in files}
        contents = {
            # The list of a shared folder may lag behind on the node that was to read a file.
            "checksums": {name: known.get(name) or file_checksum(names[name]) for name in names},
            "files": {str(file.relative_to(folder)): file.stat().st_size for file in files},
            "tag": latest.read_text(encoding="utf-8").strip() if latest.exists() else "",
        }
        write_record(folder / MARKER_FILE, pending.record.model_copy(update=contents))
        _sync_folder(folder)
        # A damaged checkpoint of the same step, which was skipped, may be in the way.
        shutil.rmtree(home / folder.name, ignore_errors=True)
        os.replace(folder, home / folder.name)
        _sync_folder(home)
        folder.parent.rmdir()
        retention.remove_old_checkpoints(
            state.paths,
            newest_step=pending.record.step,
            best_folder=self.state.best_model_checkpoint,
            save_total_limit=state.save_total_limit,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes weights for others to load: the final ones, and of checkpoints asked for."""
        if self.user_requested or not _internal_call:
            super().save_model(output_dir, _internal_call)

    # ------------------------------------------------------------ resuming

    def restore_losses(self) -> None:
        """Restores the sums of losses, so that the next line of metrics.jsonl is the same."""
        checkpoint, rank = self.checkpoint_state.resumed_from, self.checkpoint_state.rank
        if checkpoint is None:
            return
        same_size = len(checkpoint.losses) == rank.world_size
        mean = sum(checkpoint.losses) / len(checkpoint.losses)
        self._tr_loss += checkpoint.losses[rank.rank] if same_size else mean
        self._total_loss_scalar = checkpoint.logged_loss
        self._globalstep_last_logged = checkpoint.logged_step
        self._initial_global_step = 0

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        """Logs figures, except those that count this start alone."""
        super().log({key: value for key, value in logs.items() if key not in SPEED_METRICS}, *rest)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Loads the trained weights; the others are those of the base model."""
        universal_format.load_trained_weights(model or self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads both, and sets the learning rates, which a converted checkpoint does not hold."""
        if checkpoint is None:
            return
        with_deepspeed = self.is_deepspeed_enabled
        is_converted = not with_deepspeed and universal_format.load_optimizer_states(
            self.model, self.optimizer, self.lr_scheduler, Path(checkpoint)
        )
        if not is_converted:
            super()._load_optimizer_and_scheduler(checkpoint)
        if is_converted or with_deepspeed:
            rates = self.lr_scheduler.get_last_lr()
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def _load_best_model(self) -> None:
        self.publish()
        state, best = self.checkpoint_state, self.state.best_model_checkpoint
        layout = state.plan.layout
        record = read_record(Path(best) / MARKER_FILE, Checkpoint)
        checkpoint = CompleteCheckpoint(Path(best), record)
        if state.rank.is_first:
            checkpoints.check_contents(checkpoint)
            reshard.resharded(checkpoint, layout)
        state.consensus.barrier()
        folder = reshard.resharded_folder(checkpoint, layout)
        if not self.is_deepspeed_enabled:
            self._load_from_checkpoint(str(folder))
            return
        self.state.best_model_checkpoint = str(folder)
        self.deepspeed._config.load_universal_checkpoint = folder != checkpoint.folder
        super()._load_best_model()
        self.state.best_model_checkpoint = best

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restores random numbers; on another number of ranks it draws a new seed for each rank."""
        resumed, rank = self.checkpoint_state.resumed_from, self.checkpoint_state.rank
        if resumed is None or resumed.layout.world_size == rank.world_size:
            super()._load_rng_state(checkpoint)
        else:
            set_seed(zlib.crc32(f"{self.args.seed} {resumed.step} {rank.rank}".encode()))

    def _run_epoch(self, **options: Any) -> None:
        """Does nothing after the last step, where the Trainer would take one step more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**options)

    def get_train_dataloader(self) -> Any:
        """Returns the loader of micro-batches, whose workers ignore stop signals."""
        loader = super().get_train_dataloader()
        if loader.num_workers:
            loader.worker_init_fn = partial(_init_worker, loader.worker_init_fn)
        return loader


def _init_worker(init: Any, number: int) -> None:
    stop_signal.ignore_stop_signals()
    init(number)


def _file_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sync_folder(folder: Path) -> None:
    """Flushes the names of a folder's files to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
