"""Builds DeepSpeed's compiled operators, in one process before any rank needs them.

torch compiles and loads extensions under a lock file: other processes wait until it is removed. A
process that is killed leaves the file behind, and every later job waits for ever. This module uses
a lock of the operating system instead, which ends with its process, on other nodes of a network
file system too. If a living process holds it for too long, the error names that process.
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
from hpcft.core.files import make_folder, this_process
from hpcft.core.host import wait_until
from hpcft.core.paths import cache_folder
from hpcft.core.permissions import check_private
from hpcft.core.records import Plan

log = logging.getLogger(__name__)

# The slowest operator compiles for some minutes.
MAX_WAIT_S = 20 * 60.0
WARN_AFTER_S = 5.0
POLL_S = 0.2
# A file system without locks. Two builds at the same time are unlikely, since only rank 0 builds.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def extensions_folder() -> Path:
    """Returns the folder of compiled operators, by torch, Python, processor and environment.

    The environment's path is among the compiler's options: two environments with one folder would
    compile each other's operators again at every start. Operators are compiled for the very
    processor (`-march=native`): on another one they would end with SIGILL.
    """
    python = f"py{sys.version_info[0]}{sys.version_info[1]}"
    torch = importlib.metadata.version("torch")
    environment = f"{zlib.crc32(sys.prefix.encode()):08x}"
    name = f"{python}-torch{torch}-{platform.machine()}-{_processor()}-{environment}"
    return cache_folder() / "torch_extensions" / name


def _processor() -> str:
    """Returns a name of this machine's kind of processor: a hash of what it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    # `flags` on x86, `Features` on Arm.
    abilities = next((line for line in lines if line.lower().startswith(("flags", "feat"))), "")
    return f"{zlib.crc32(' '.join(sorted(abilities.split())).encode()):08x}"


def path_with_own_ninja() -> str:
    """Returns the PATH with the environment's ninja first.

    A ninja of another version, which a module or the system brings, takes what this one has built
    for outdated: it would compile every operator again, inside the job and beyond its memory.
    """
    import ninja

    return os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", os.defpath)])


class OperatorLock:
    """File lock that ends with its process; it has the methods of torch's `FileBaton`."""

    def __init__(self, lock_file_path: str, *_: object, **__: object) -> None:
        """Takes the path of torch's lock file, and uses another file in the same folder."""
        self.path = Path(lock_file_path).with_name("hpcft.lock")
        self._handle: int | None = None

    def try_acquire(self) -> bool:
        """Waits for the lock; returns True, upon which torch builds what is not yet built.

        Raises:
            DataError: a living process has held the lock for too long.
        """
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._wait(handle)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        os.truncate(handle, 0)
        os.write(handle, this_process().encode())
        return True

    def _wait(self, handle: int) -> None:
        warn_s = min(WARN_AFTER_S, MAX_WAIT_S)
        if wait_until(lambda: _try_lock(handle), warn_s, POLL_S):
            return
        log.warning("%s: waiting for %s, which builds an operator", self.path, self._owner())
        if not wait_until(lambda: _try_lock(handle), MAX_WAIT_S - warn_s, POLL_S):
            raise DataError(
                f"{self.path}: the build lock of a DeepSpeed operator is still held by "
                f"{self._owner()} after {MAX_WAIT_S:.0f} s; end that process"
            )

    def _owner(self) -> str:
        return self.path.read_text(encoding="utf-8").strip()[:400] or "another process"

    def release(self) -> None:
        """Releases the lock; its file stays, because another process may wait with it open."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _try_lock(handle: int) -> bool:
    """Tries to lock an open file; returns whether this process holds the lock now."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("the file system of %s has no locks", extensions_folder())
    return True


def use_own_lock() -> None:
    """Makes torch build and load operators of this process under an `OperatorLock`."""
    from torch.utils import cpp_extension

    # setattr, because mypy knows only the names that the module exports.
    setattr(cpp_extension, "FileBaton", OperatorLock)  # noqa: B010


def build_operators(plan: Plan) -> None:
    """Builds the operators that the plan's ranks use, so that the ranks only load them."""
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
    """Builds operators by the names of their builder classes; one process builds at a time.

    Raises:
        StoreError: others could put libraries into the folder of the compiled operators.
    """
    from deepspeed.accelerator import get_accelerator

    make_folder(extensions_folder())
    # The libraries in it are loaded into every rank.
    check_private(extensions_folder(), "set XDG_CACHE_HOME to a folder of your own")
    for name in names:
        started = time.monotonic()
        builder = get_accelerator().get_op_builder(name)()
        if not any(extensions_folder().glob(f"{builder.name}/*.so")):
            log.warning(
                "%s is not built for this kind of node yet: it is compiled now, which takes "
                "minutes and some GiB; to do it ahead, on such a node: python -m %s",
                name,
                "hpcft.training.distributed.torch_extensions",
            )
        builder.load(verbose=False)
        took_s = time.monotonic() - started
        if took_s > WARN_AFTER_S:
            log.info("built %s in %.0f s", name, took_s)


if __name__ == "__main__":  # `make setup` builds the operators of CPU runs ahead of time.
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_folder())
    os.environ["PATH"] = path_with_own_ninja()
    use_own_lock()
    build_named(["ShareMemCommBuilder"])
