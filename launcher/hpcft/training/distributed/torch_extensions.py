"""DeepSpeed's compiled operators: built by one process before any rank needs them.

Torch compiles and loads them under a lock file, whose absence is the sign to go on. A process that
is killed meanwhile leaves it, and every later job waits for it, silently and for ever. Here a lock
of the operating system stands in its place: it ends with its process, also on another node of a
network file system. What an owner left behind holds nobody up, and of one that lives but does not
come to an end it is told after a while.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import logging
import os
import platform
import sys
import time
import zlib
from pathlib import Path

from hpcft.core.errors import DataError
from hpcft.core.paths import cache_folder
from hpcft.core.records import Plan

log = logging.getLogger(__name__)

# The slowest of them takes some minutes to compile.
MOST_WAIT_S = 20 * 60.0
POLL_S = 0.2
# A file system that knows no locks: two builds at once are unlikely, since rank 0 builds alone.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def extensions_folder() -> Path:
    """Where DeepSpeed's compiled operators are kept: apart for each torch, Python and processor.

    And for each environment: its path is in the compiler's options, and two environments that
    shared a folder would compile each other's operators again at every start.
    """
    python = f"py{sys.version_info[0]}{sys.version_info[1]}"
    torch = importlib.metadata.version("torch")
    environment = f"{zlib.crc32(sys.prefix.encode()):08x}"
    name = f"{python}-torch{torch}-{platform.machine()}-{environment}"
    return cache_folder() / "torch_extensions" / name


class OperatorLock:
    """A lock that ends with its owner; it has the methods of torch's `FileBaton`."""

    def __init__(self, lock_file_path: str, *_: object, **__: object) -> None:
        """A lock beside torch's own, for which nobody waits any more."""
        self.path = Path(lock_file_path).with_name("hpcft.lock")
        self._handle: int | None = None

    def try_acquire(self) -> bool:
        """Waits for the lock; True, so that what an owner left half built is built.

        Raises:
            DataError: its owner lives and has not given it back for too long.
        """
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._wait(handle)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        os.truncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {os.uname().nodename}".encode())
        return True

    def _wait(self, handle: int) -> None:
        begun = time.monotonic()
        told = False
        while not _is_locked(handle):
            owner = self.path.read_text().strip()[:200] or "another process"
            waited_s = time.monotonic() - begun
            if waited_s > MOST_WAIT_S:
                raise DataError(
                    f"{self.path}: the build lock of a DeepSpeed operator is still held by {owner} "
                    f"after {waited_s:.0f} s; end that process"
                )
            if not told and waited_s > 5:
                log.warning("%s: waits for %s, which builds an operator", self.path, owner)
                told = True
            time.sleep(POLL_S)

    def release(self) -> None:
        """Gives it back; the file stays, since another may wait with it open."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _is_locked(handle: int) -> bool:
    """Whether this process has the lock of a file now."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("the file system of the operators' folder knows no locks")
    return True


def use_own_lock() -> None:
    """Lets torch build and load operators of this process under a lock that ends with its owner."""
    from torch.utils import cpp_extension

    setattr(cpp_extension, "FileBaton", OperatorLock)  # noqa: B010  it is not exported


def build_operators(plan: Plan) -> None:
    """Builds what the plan's ranks will use, so that they only load it."""
    if plan.ds_config is None:
        return
    layout = plan.layout
    names = ["ShareMemCommBuilder"] if plan.accelerator == "cpu" else []
    names += ["CPUAdamBuilder"] if layout.offload_optimizer != "none" else []
    names += (
        ["AsyncIOBuilder"] if "nvme" in (layout.offload_optimizer, layout.offload_param) else []
    )
    build_named(names)


def build_named(names: list[str]) -> None:
    """Builds operators by the name of their builder class; one process of all at a time."""
    from deepspeed.accelerator import get_accelerator

    extensions_folder().mkdir(parents=True, exist_ok=True)
    for name in names:
        begun = time.monotonic()
        get_accelerator().get_op_builder(name)().load(verbose=False)
        if time.monotonic() - begun > 5:
            log.info("built %s in %.0f s", name, time.monotonic() - begun)


if __name__ == "__main__":  # `make setup` builds ahead what a run on a CPU needs
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_folder())
    use_own_lock()
    build_named(["ShareMemCommBuilder"])
