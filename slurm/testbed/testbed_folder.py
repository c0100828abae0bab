"""A testbed cluster's folder: its shape, where each file lies, and which folders will do."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

# A Unix socket's path holds 107 characters at most (unix(7)); the longest below the folder is a job
# step's, `/spool/n200/n200_1234567.4294967291`.
MAX_FOLDER_CHARS = 70


class TestbedError(Exception):
    """A testbed cannot do what was asked; the message is for its user."""

    __test__ = False  # pytest would take the name for a test class


@dataclass(frozen=True)
class Shape:
    """What a cluster looks like: it is written to the folder, so that a later call finds it."""

    nodes: int = 4
    gpus: int = 4
    """Fake GPUs on each node."""
    cpus: int = 8
    """CPUs that each node claims, however few the machine has."""
    memory_mb: int = 12000
    """Memory that each node claims."""
    accounting: bool = True
    """Whether slurmdbd and its database run, for sacct and accounts."""

    def problem(self) -> str | None:
        """What is wrong with these numbers, or None."""
        bounds = {"nodes": (1, 200), "gpus": (0, 64), "cpus": (1, 1024), "memory_mb": (100, 10**8)}
        for name, (low, high) in bounds.items():
            got = getattr(self, name)
            if not low <= got <= high:
                return f"{name}: expected a number from {low} to {high}, got {got}"
        return None

    @property
    def node_names(self) -> list[str]:
        """The nodes' names, `n1` first."""
        return [f"n{i}" for i in range(1, self.nodes + 1)]


@dataclass(frozen=True)
class Layout:
    """Names every file of a cluster's folder."""

    root: Path

    @property
    def slurm_conf(self) -> Path:
        """What SLURM_CONF names; Slurm looks for its other configuration files beside it."""
        return self.root / "slurm.conf"

    @property
    def gres_conf(self) -> Path:
        """The GPUs of each node."""
        return self.root / "gres.conf"

    @property
    def slurmdbd_conf(self) -> Path:
        """The accounting daemon's configuration, with the database's password."""
        return self.root / "slurmdbd.conf"

    @property
    def record(self) -> Path:
        """Shape, port and processes of the cluster."""
        return self.root / "testbed.json"

    @property
    def lock(self) -> Path:
        """Locked while a start or stop is under way."""
        return self.root / "lock"

    @property
    def munge_key(self) -> Path:
        """The cluster's secret."""
        return self.root / "key" / "munge.key"

    @property
    def munge_socket(self) -> Path:
        """Where munged listens."""
        return self.root / "run" / "munge.socket"

    @property
    def database(self) -> Path:
        """The database's data folder."""
        return self.root / "db"

    @property
    def database_temporary(self) -> Path:
        """The database's temporary tables."""
        return self.root / "dbtmp"

    @property
    def database_socket(self) -> Path:
        """Where the database listens for local clients."""
        return self.root / "run" / "db.socket"

    @property
    def database_setup(self) -> Path:
        """SQL that the database runs at each start."""
        return self.root / "key" / "setup.sql"

    def log(self, daemon: str) -> Path:
        """What a daemon logs; what it prints lies beside it, with the suffix `.out`."""
        return self.root / "log" / f"{daemon}.log"

    def gpu(self, index: int) -> Path:
        """The device file of one fake GPU; all nodes share it."""
        return self.root / "dev" / f"fakegpu{index}"

    def make_folders(self) -> None:
        """Creates the folder and those inside it, whatever the umask."""
        # Readable by others, so that they too can submit; the secrets' folders are not.
        for mode, names in (
            (0o755, (".", "run", "spool", "log", "dev")),
            (0o700, ("key", "state", "dbtmp")),
        ):
            for folder in (self.root / name for name in names):
                folder.mkdir(mode=mode, parents=True, exist_ok=True)
                folder.chmod(mode)


def default_folder() -> Path:
    """Where a cluster lives when nobody says otherwise: one for each user."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    parent = Path(base) if base and Path(base).is_dir() else Path(tempfile.gettempdir())
    return parent / f"hpcft-testbed-{os.getuid()}"


def folder_problem(root: Path) -> str | None:
    """Why a cluster cannot live in a folder, or None."""
    if len(str(root)) > MAX_FOLDER_CHARS:
        return (
            f"{root}: the path has {len(str(root))} characters, and the sockets in it allow "
            f"{MAX_FOLDER_CHARS}; choose a shorter one with --dir"
        )
    if not re.fullmatch(r"[A-Za-z0-9_./+-]+", str(root)):
        return f"{root}: Slurm's files take only letters, digits and _ . / + - in a path"
    # munged trusts a socket only where no stranger can replace a folder above it.
    for folder in (root, *root.parents):
        if not folder.exists():
            continue
        if not folder.is_dir():
            return f"{folder}: is not a folder"
        seen = folder.stat()
        if folder == root and seen.st_uid != os.getuid():
            return f"{folder}: belongs to another user"
        if seen.st_uid not in {0, os.getuid()}:
            return f"{folder}: belongs to another user, so munge would not trust it"
        if seen.st_mode & 0o022 and not seen.st_mode & stat.S_ISVTX and folder != root:
            return f"{folder}: others may write to it, so munge would not trust it"
    return None


def write_private(path: Path, text: str | bytes) -> None:
    """Writes a file that only its owner can read, from its first byte on."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(text.encode() if isinstance(text, str) else text)


def make_fake_gpus(layout: Layout, count: int) -> None:
    """Makes the device files: regular files would leave CUDA_VISIBLE_DEVICES empty."""
    for index in range(count):
        path = layout.gpu(index)
        path.unlink(missing_ok=True)
        try:
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # what /dev/null is
            path.chmod(0o666)
            path.open("rb").close()  # a folder mounted nodev shows it only here
        except OSError:
            # Without the right to make devices, borrow some whose names end in the same number.
            path.unlink(missing_ok=True)
            terminal = Path(f"/dev/tty{index}")
            if not terminal.is_char_device():
                raise TestbedError(
                    f"no fake GPU {index}: this user may not make device files, and there is no "
                    f"{terminal} to stand in for one; run as root, or with --gpus {index}"
                ) from None
            path.symlink_to(terminal)
