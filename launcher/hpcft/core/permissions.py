"""Finds out whether another user could put files into the place of a folder, as a job reads them.

Whoever may write to a parent of a run folder may rename the run folder and put another one in its
place. So a folder is safe only if all folders on the way to it are.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from hpcft.core.errors import StoreError

MAX_LINKS = 40  # as Linux: path_resolution(7)
_OVERFLOW_USER = 65534  # the owner of what a user namespace does not map: user_namespaces(7)


TRUSTED = "HPCFT_TRUSTED_FOLDERS"
"""Environment variable with folders, separated by colons, in which others may replace folders."""
RUNS_ELSEWHERE = "choose a runs folder below a folder of your own with --runs-dir"


def check_private(folder: Path, elsewhere: str = RUNS_ELSEWHERE) -> None:
    """Refuses a folder that others may write to or replace: jobs run its content in your name.

    Args:
        folder: the folder.
        elsewhere: how the user has another folder used.

    Raises:
        StoreError: others may write to the folder or to one above it, or it is missing.
    """
    try:
        info = folder.stat()
        if info.st_uid not in (os.getuid(), 0) or stat.S_IMODE(info.st_mode) & 0o022:
            raise StoreError(
                f"{folder}: others may write to it; chmod 700 it if its content is yours"
            )
        trusted = _trusted_folders()
        for parent, its_info in _on_the_way_to(folder):
            if parent not in trusted and (who := _who_may_replace(its_info)):
                cure = _cure(parent, its_info, who, elsewhere)
                raise StoreError(
                    f"{folder}: {who} may write to {parent}, and so put another folder in its "
                    f"place, whose content your jobs would run in your name; {cure}"
                )
    except OSError as error:
        raise StoreError(f"{error.filename or folder}: {error.strerror}") from None


def other_owner(path: Path) -> str:
    """Returns the name of the user that a file belongs to; empty if it is this user or unknown."""
    try:
        owner = path.stat().st_uid
    except OSError:
        return ""
    return "" if owner == os.getuid() else _name_of(owner)


def _on_the_way_to(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yields each folder and symbolic link that is read to find a path, from `/` on."""
    current = Path("/")
    yield current, current.lstat()
    missing = [*reversed(path.absolute().parts[1:])]
    links = 0
    while missing:
        part = missing.pop()
        if part == "..":
            current = current.parent
            continue
        info = (current / part).lstat()
        yield current / part, info
        if not stat.S_ISLNK(info.st_mode):
            current /= part
            continue
        links += 1
        if links > MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = Path(os.readlink(current / part))
        current = Path("/") if target.is_absolute() else current
        missing += reversed([part for part in target.parts if part != "/"])


def _who_may_replace(info: os.stat_result) -> str:
    """Returns who may rename what a folder holds, other than its user and root; empty if nobody.

    Args:
        info: of the folder, or of a symbolic link, which only its owner can replace.
    """
    if info.st_uid not in (os.getuid(), 0) and not _hides_root(info.st_uid):
        return f"user {_name_of(info.st_uid)}"
    # In a folder with the sticky bit only the owner of a file may rename it.
    if stat.S_ISLNK(info.st_mode) or info.st_mode & stat.S_ISVTX:
        return ""
    if info.st_mode & stat.S_IWOTH:
        return "every user"
    if info.st_mode & stat.S_IWGRP and not _is_own_group(info.st_gid):
        return f"group {_group_name(info.st_gid)}"
    return ""


def _trusted_folders() -> set[Path]:
    """Returns the folders whose writers the user trusts, such as a project's; jobs inherit them."""
    return {Path(name) for name in os.environ.get(TRUSTED, "").split(":") if name}


def _cure(parent: Path, info: os.stat_result, who: str, elsewhere: str) -> str:
    if info.st_uid == os.getuid():
        return f"chmod go-w {parent}"
    trust = f"or, if you trust {who}, export {TRUSTED}={parent}"
    if who.startswith("user "):
        return f"{elsewhere}, {trust}"
    owner = _name_of(info.st_uid)
    return f"{elsewhere}, or ask {owner} for the sticky bit (chmod +t {parent}), {trust}"


def _is_own_group(gid: int) -> bool:
    """Returns whether a group has this user as its only member, as many distributions set it up."""
    try:
        user = pwd.getpwuid(os.getuid())
        group = grp.getgrgid(gid)
    except KeyError:  # A compute node may know no names.
        return gid == os.getgid() == os.getuid()
    is_named_after_user = gid == user.pw_gid and group.gr_name == user.pw_name
    return is_named_after_user and {*group.gr_mem} <= {user.pw_name}


def _hides_root(uid: int) -> bool:
    """Returns whether this process is in a container that shows root's files as nobody's."""
    if uid != _OVERFLOW_USER:
        return False
    try:
        ranges = [
            line.split()
            for line in Path("/proc/self/uid_map").read_text(encoding="utf-8").splitlines()
        ]
    except OSError:
        return False
    # Each range: first id inside, first id outside, number of ids.
    return not any(int(outside) == 0 for _, outside, _ in ranges)


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
