"""Checkpoints that are written to a node's own disk, and copied from there while training goes on.

A run folder lies on a disk that all nodes share, and that is slow when all ranks write at once.
With `node_disk_path` in the profile, training pauses only until the node's disk has the files; a
thread copies them. What is on the way when a node fails is lost; the checkpoint before is there.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from threading import Thread

from hpcft.core.paths import RunPaths
from hpcft.core.records import Cluster
from hpcft.training.distributed.rank_env import RankInfo

log = logging.getLogger(__name__)


def node_folder(paths: RunPaths, cluster: Cluster, me: RankInfo) -> Path | None:
    """Where this run writes on this node's own disk; None where the profile names no such disk."""
    if cluster.node_disk_path is None:
        return None
    return Path(cluster.node_disk_path) / f"hpcft-{paths.folder.name}-{me.node}"


def prepare_node_folder(paths: RunPaths, cluster: Cluster, me: RankInfo) -> Path | None:
    """The folder, without what an earlier start has left there; None where it cannot be used."""
    near = node_folder(paths, cluster, me)
    if near is None or me.local_rank != 0:
        return near
    remove_node_folder(near)
    try:
        near.mkdir(mode=0o700)  # one that is there yet is not ours
    except OSError as error:
        log.warning("checkpoints are written to the run folder at once: %s", error)
        return None
    return near


def remove_node_folder(near: Path | None) -> None:
    """Removes the folder, where there is one."""
    if near is not None:
        shutil.rmtree(near, ignore_errors=True)


def has_room(near: Path, size: int) -> bool:
    """Whether a checkpoint of so many bytes has room there."""
    try:
        return shutil.disk_usage(near).free > size
    except OSError:
        return False


class AsyncCopy:
    """What one node wrote of a checkpoint, on its way to where it stays."""

    def __init__(self, source: Path, target: Path) -> None:
        """Begins at once.

        Args:
            source: folder with what this node wrote; removed once it is copied, unless it is
                `target`, whose files then only have to reach the disk.
            target: folder in the run folder, where other nodes write, too.
        """
        self._source, self._target = source, target
        self._error: Exception | None = None
        self._thread = Thread(target=self._copy, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether it has arrived, or failed."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Returns once it has arrived.

        Raises:
            OSError: it could not be written; or whatever else has kept it from arriving.
        """
        self._thread.join()
        if self._error:
            raise self._error

    def _copy(self) -> None:
        near = self._source != self._target
        try:
            for file in self._source.rglob("*"):
                if not file.is_file():
                    continue
                copied = self._target / file.relative_to(self._source)
                if near:
                    copied.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    shutil.copyfile(file, copied)
                with copied.open("rb") as stream:
                    os.fsync(stream.fileno())
        except Exception as error:  # whatever it is, what is there is not all
            self._error = error
        if near:
            remove_node_folder(self._source)
