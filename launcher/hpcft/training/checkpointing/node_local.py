"""Copies checkpoints from a node's own disk to the run folder while training continues.

A run folder lies on a disk that all nodes share, and which is slow when all ranks write at once.
With `node_disk_path` in the profile, training pauses only until the node's disk has the files; a
thread copies them while training continues. If the node fails before the copy is complete, that
checkpoint is lost, and the one before it is still in the run folder.
"""

from __future__ import annotations

import logging
import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

from hpcft.core.checkpoints import CHECKSUM_THREADS, file_checksum
from hpcft.core.paths import RunPaths
from hpcft.core.records import Cluster
from hpcft.training.distributed.rank_env import RankInfo

log = logging.getLogger(__name__)


def node_folder(paths: RunPaths, cluster: Cluster, rank: RankInfo) -> Path | None:
    """Returns the run's folder on this node's own disk; None if the profile names no such disk."""
    if cluster.node_disk_path is None:
        return None
    return Path(cluster.node_disk_path) / f"hpcft-{unique_name(paths, rank)}"


def unique_name(paths: RunPaths, rank: RankInfo) -> str:
    """Returns a name for a folder of this run, user and node.

    Runs of equal recipes in two runs folders have the same id, and on a machine with several nodes
    for tests the nodes share one disk.
    """
    place = f"{zlib.crc32(str(paths.folder.resolve()).encode()):08x}"
    return f"{os.getuid()}-{paths.folder.name}-{place}-{rank.node}"


def prepare_node_folder(paths: RunPaths, cluster: Cluster, rank: RankInfo) -> Path | None:
    """Empties and creates the run's folder on this node's disk; the node's first rank does it.

    Returns:
        The folder; None if the profile names no disk, or if the folder cannot be used.
    """
    folder = node_folder(paths, cluster, rank)
    if folder is None or rank.local_rank != 0:
        return folder
    remove_node_folder(folder)
    try:
        folder.mkdir(mode=0o700)  # If it still exists, it belongs to another user.
    except OSError as error:
        log.warning(
            "%s cannot be used, so checkpoints are written to the run folder directly: %s",
            folder,
            error,
        )
        return None
    return folder


def remove_node_folder(folder: Path | None) -> None:
    """Removes a folder on the node's disk, if there is one."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def has_room(folder: Path, size: int) -> bool:
    """Returns whether the disk of a folder has room for so many bytes."""
    try:
        return shutil.disk_usage(folder).free > size
    except OSError:
        return False


class AsyncCopy:
    """Copies one node's part of a checkpoint into the run folder, in a thread."""

    checksums: dict[str, str]
    """Checksums of the files that were copied, by relative path; complete after `wait`."""

    def __init__(self, source: Path, target: Path, *, node: int = 0, nodes: int = 1) -> None:
        """Starts the thread.

        Args:
            source: folder with the files that this node wrote; it is removed once it is copied. If
                it is `target` itself, its files are only flushed to the disk.
            target: folder in the run folder, which the other nodes write to as well.
            node: number of this node. If all nodes write to `target`, each computes the checksums
                of its share of the files.
            nodes: number of nodes.
        """
        self._source, self._target = source, target
        self._share = slice(node, None, nodes)
        self.checksums = {}
        self._error: Exception | None = None
        self._thread = Thread(target=self._copy, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether the thread has ended, with success or without."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Waits until the files are on the disk of the run folder.

        Raises:
            OSError: a file could not be read or written; any other error of the thread is raised
                as it is.
        """
        self._thread.join()
        if self._error:
            raise self._error

    def _copy(self) -> None:
        has_own_disk = self._source != self._target
        try:
            files = sorted(file for file in self._source.rglob("*") if file.is_file())
            for file in files:
                copied = self._target / file.relative_to(self._source)
                if has_own_disk:
                    copied.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    shutil.copyfile(file, copied)
                with copied.open("rb") as stream:
                    os.fsync(stream.fileno())
            own = files if has_own_disk else files[self._share]
            names = [str(file.relative_to(self._source)) for file in own]
            with ThreadPoolExecutor(CHECKSUM_THREADS) as pool:
                # Of the files that were written, so that a copy with an error is found too.
                self.checksums = dict(zip(names, pool.map(file_checksum, own), strict=True))
        except Exception as error:  # Any error means that the copy is incomplete; `wait` raises it.
            self._error = error
        if has_own_disk:
            remove_node_folder(self._source)
