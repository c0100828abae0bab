"""Names the files of a testbed cluster's folder, and checks whether a folder can hold one."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

# A Unix socket's path holds 107 characters at most (unix(7)); the longest in the folder is that of
# a job step, `/spool/n200/n200_1234567.4294967291`.
MAX_FOLDER_CHARS = 70


class TestbedError(Exception):
    """A request that the testbed cannot carry out; the message is for its user."""

    __test__ = False  # pytest would take the name for a test class.


@dataclass(frozen=True)
class Shape:
    """Size of a cluster."""

    nodes: int = 4
    """Number of nodes."""
    gpus: int = 4
    """Fake GPUs on each node."""
    cpus: int = 8
    """CPUs that each node claims; the machine may have fewer."""
    memory_mb: int = 12000
    """Memory in MB that each node claims."""
    accounting: bool = True
    """Whether slurmdbd and its database run, for sacct and accounts."""

    def problem(self) -> str | None:
        """Returns what is wrong with these numbers; None if nothing is."""
        bounds = {"nodes": (1, 200), "gpus": (0, 64), "cpus": (1, 1024), "memory_mb": (100, 10**8)}
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                return f"{name}: expected a number from {low} to {high}, got {value}"
        return None

    @property
    def node_names(self) -> list[str]:
        """Names of the nodes, `n1` first."""
        return [f"n{i}" for i in range(1, self.nodes + 1)]


@dataclass(frozen=True)
class Layout:
    """Paths of the files in a cluster's folder."""

    root: Path
    """The folder."""

    @property
    def slurm_conf(self) -> Path:
        """Configuration of Slurm, for SLURM_CONF; the other configuration files are next to it."""
        return self.root / "slurm.conf"

    @property
    def gres_conf(self) -> Path:
        """Configuration of the GPUs of each node."""
        return self.root / "gres.conf"

    @property
    def slurmdbd_conf(self) -> Path:
        """Configuration of slurmdbd, with the password of the database."""
        return self.root / "slurmdbd.conf"

    @property
    def record(self) -> Path:
        """Record of the cluster: size, ports and processes."""
        return self.root / "testbed.json"

    @property
    def lock(self) -> Path:
        """File that is locked while the cluster starts or stops."""
        return self.root / "lock"

    @property
    def munge_key(self) -> Path:
        """Secret key of munge."""
        return self.root / "key" / "munge.key"

    @property
    def munge_socket(self) -> Path:
        """Socket of munged."""
        return self.root / "run" / "munge.socket"

    @property
    def database(self) -> Path:
        """Data folder of the database."""
        return self.root / "db"

    @property
    def database_temporary(self) -> Path:
        """Folder for the temporary tables of the database."""
        return self.root / "dbtmp"

    @property
    def database_socket(self) -> Path:
        """Socket of the database."""
        return self.root / "run" / "db.socket"

    @property
    def database_setup(self) -> Path:
        """File with the SQL that the database runs at each start."""
        return self.root / "key" / "setup.sql"

    def log(self, daemon: str) -> Path:
        """Returns the log of a daemon; its output is next to it, with the suffix `.out`."""
        return self.root / "log" / f"{daemon}.log"

    def gpu(self, index: int) -> Path:
        """Returns the device file of one fake GPU, which all nodes share."""
        return self.root / "dev" / f"fakegpu{index}"

    def make_folders(self) -> None:
        """Creates the folder and those inside it, with fixed modes."""
        # Other users may read most folders, so that they can submit, but not those with secrets.
        for mode, names in (
            (0o755, (".", "run", "spool", "log", "dev")),
            (0o700, ("key", "state", "dbtmp")),
        ):
            for folder in (self.root / name for name in names):
                folder.mkdir(mode=mode, parents=True, exist_ok=True)
                folder.chmod(mode)


def default_folder() -> Path:
    """Returns the folder that is used without `--dir`: one per user."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    parent = Path(base) if base and Path(base).is_dir() else Path(tempfile.gettempdir())
    return parent / f"hpcft-testbed-{os.getuid()}"


def folder_problem(root: Path) -> str | None:
    """Returns why a folder cannot hold a cluster; None if it can."""
    if len(str(root)) > MAX_FOLDER_CHARS:
        return (
            f"{root}: the path has {len(str(root))} characters, but the sockets in it allow only "
            f"{MAX_FOLDER_CHARS}; choose a shorter one with --dir"
        )
    if not re.fullmatch(r"[A-Za-z0-9_./+-]+", str(root)):
        return f"{root}: the path may hold only letters, digits and _ . / + -, because of Slurm"
    # munged trusts a socket only if no other user can replace a folder above it.
    for folder in (root, *root.parents):
        if not folder.exists():
            continue
        if not folder.is_dir():
            return f"{folder}: is not a folder"
        info = folder.stat()
        if folder == root and info.st_uid != os.getuid():
            return f"{folder}: belongs to another user"
        if info.st_uid not in {0, os.getuid()}:
            return f"{folder}: belongs to another user, so munge would not trust it"
        if info.st_mode & 0o022 and not info.st_mode & stat.S_ISVTX and folder != root:
            return f"{folder}: others may write to it, so munge would not trust it"
    return None


def write_private(path: Path, text: str | bytes) -> None:
    """Writes a file that only its owner can read, at no moment anyone else."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(text.encode() if isinstance(text, str) else text)


def make_fake_gpus(layout: Layout, count: int) -> None:
    """Creates the device files: with regular files CUDA_VISIBLE_DEVICES would be empty."""
    for index in range(count):
        path = layout.gpu(index)
        path.unlink(missing_ok=True)
        try:
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # The device of /dev/null.
            path.chmod(0o666)
            path.open("rb").close()  # Fails on a file system that is mounted with nodev.
        except OSError:
            # Without the right to create devices, use terminals whose names end in the same number.
            path.unlink(missing_ok=True)
            terminal = Path(f"/dev/tty{index}")
            if not terminal.is_char_device():
                raise TestbedError(
                    f"no fake GPU {index}: this user may not create device files, and there is no "
                    f"{terminal} to use instead; run as root, or with --gpus {index}"
                ) from None
            path.symlink_to(terminal)
