"""Tests of who could put another folder into the place of a run folder."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpcft.core import files, permissions
from hpcft.core.errors import StoreError
from hpcft.core.paths import RunPaths
from hpcft.core.permissions import check_private
from hpcft.core.records import Job
from hpcft.core.run_index import list_runs

SECOND_USER = "nobody"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder, `tmp_path/group/runs/x/0123`."""
    folder = tmp_path / "group" / "runs" / "x" / "0123"
    folder.mkdir(parents=True, mode=0o700)
    for parent in (tmp_path / "group", tmp_path / "group/runs", tmp_path / "group/runs/x"):
        parent.chmod(0o755)
    return folder


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize(("mode", "who"), [(0o777, "every user"), (0o775, "group")])
def test_check_private_below_a_folder_that_others_may_write_to_is_refused(
    mode: int, who: str, depth: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(permissions, "_is_own_group", lambda _: False)
    parent = run.parents[depth]
    parent.chmod(mode)
    with pytest.raises(StoreError, match=f"{run}: {who}.* may write to {parent}, .*; chmod go-w"):
        check_private(run)
    parent.chmod(mode | 0o1000)  # With the sticky bit nobody else may rename what is inside.
    check_private(run)


def test_check_private_below_a_folder_that_the_user_trusts_is_accepted(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(permissions, "_is_own_group", lambda _: False)
    run.parents[2].chmod(0o775)
    monkeypatch.setenv(permissions.TRUSTED, f"/elsewhere:{run.parents[2]}")
    check_private(run)
    run.parents[1].chmod(0o775)
    with pytest.raises(StoreError, match=f"may write to {run.parents[1]},"):
        check_private(run)


def test_check_private_below_a_folder_of_the_users_own_group_is_accepted(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a umask of 002 and a group of one's own, all folders are writable to that group."""
    run.parent.chmod(0o775)
    own = run.stat().st_gid
    group = ("me", "x", own, [])
    monkeypatch.setattr(permissions.pwd, "getpwuid", lambda uid: pwd.struct_passwd(
        ("me", "x", uid, own, "", "/", "/bin/sh")))  # fmt: skip
    monkeypatch.setattr(permissions.grp, "getgrgid", lambda _: permissions.grp.struct_group(group))
    check_private(run)
    group = ("me", "x", own, ["me", "friend"])
    with pytest.raises(StoreError, match="group me may write"):
        check_private(run)


@pytest.mark.parametrize("target", ["absolute", "relative"])
def test_check_private_follows_links_on_the_way(
    target: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(permissions, "_is_own_group", lambda _: False)
    link = tmp_path / "link"
    link.symlink_to(run.parents[1] if target == "absolute" else Path("below/../group/runs"))
    (tmp_path / "below").mkdir(mode=0o755)
    check_private(link / "x" / "0123")
    run.parents[2].chmod(0o777)
    with pytest.raises(StoreError, match=f"may write to {run.parents[2]}"):
        check_private(link / "x" / "0123")


def test_check_private_reports_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(StoreError, match="Too many levels of symbolic links"):
        check_private(tmp_path / "a" / "x")


# ---------------------------------------------------------------- a real second user


def _second_user() -> str:
    """Why no second user is at hand; empty if one is."""
    if os.getuid() != 0:
        return "only root can act as a second user"
    if shutil.which("setpriv") is None:
        return "no setpriv (util-linux) on this machine"
    return ""


as_second_user = pytest.mark.skipif(bool(_second_user()), reason=_second_user())


def second_user(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command as another user."""
    account = pwd.getpwnam(SECOND_USER)
    return subprocess.run(
        ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups",
         *command],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.fixture
def open_run(run: Path, tmp_path: Path) -> Iterator[Path]:
    """The run folder, which a second user can reach: pytest's own folders are closed to others."""
    closed = [folder for folder in run.parents if folder.stat().st_mode & 0o001 == 0]
    modes = {folder: folder.stat().st_mode & 0o7777 for folder in closed}
    for folder in closed:
        folder.chmod(0o755)
    yield run
    for folder, mode in modes.items():
        folder.chmod(mode)


@as_second_user
def test_check_private_refuses_exactly_what_a_second_user_can_replace(open_run: Path) -> None:
    group = open_run.parents[2]
    account = pwd.getpwnam(SECOND_USER)
    os.chown(group, 0, account.pw_gid)
    away, runs = group / "away", group / "runs"
    for mode in (0o755, 0o775, 0o1775, 0o777, 0o1777, 0o700):
        group.chmod(mode)
        renamed = second_user("mv", str(runs), str(away)).returncode == 0
        if renamed:
            away.rename(runs)
            with pytest.raises(StoreError, match="may write to"):
                check_private(open_run)
        else:
            check_private(open_run)
        assert renamed == (mode in (0o775, 0o777))


@as_second_user
def test_check_private_below_a_folder_of_a_second_user_is_refused(open_run: Path) -> None:
    """Its owner can open it at any time."""
    group = open_run.parents[2]
    os.chown(group, pwd.getpwnam(SECOND_USER).pw_uid, -1)
    group.chmod(0o1755)
    with pytest.raises(StoreError, match=f"user {SECOND_USER} may write to {group}.*--runs-dir"):
        check_private(open_run)


@as_second_user
def test_check_private_through_a_link_of_a_second_user_is_refused(open_run: Path) -> None:
    shared = open_run.parents[2]
    shared.chmod(0o1777)
    link = shared / "link"
    assert second_user("ln", "-s", str(open_run), str(link)).returncode == 0
    with pytest.raises(StoreError, match=f"user {SECOND_USER} may write to {link}"):
        check_private(link)


def as_second_user_in_a_fork(work: Callable[[], object]) -> str:
    """Runs a function as the second user, in a process of its own; returns what it returned."""
    account = pwd.getpwnam(SECOND_USER)
    here, there = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(account.pw_gid)
            os.setuid(account.pw_uid)
            try:
                said = str(work())
            except StoreError as error:
                said = f"StoreError: {error}"
            os.write(there, said.encode())
        finally:
            os._exit(0)
    os.close(there)
    with os.fdopen(here) as stream:
        said = stream.read()
    os.waitpid(pid, 0)
    return said


@as_second_user
def test_a_second_user_reads_runs_that_were_opened_and_submits_none(open_run: Path) -> None:
    root = open_run.parents[1]
    job = Job(run_id="0123", recipe="x", cluster="local", scheduler="local", point={})
    files.write_record(RunPaths(open_run).job, job)
    open_run.parent.chmod(0o700)

    def listed() -> str:
        reported: list[str] = []
        runs = [run.job.run_id for run in list_runs(root, reported.append) if not run.damage]
        return " ".join([*runs, *reported])

    def locked() -> str:
        with files.lock_folder(root):
            return "locked"

    said = as_second_user_in_a_fork(listed)
    assert "Permission denied; `chmod -R go+rX" in said
    assert "by user root lets others read it" in said
    subprocess.run(["chmod", "-R", "go+rX", str(open_run.parent)], check=True)
    assert as_second_user_in_a_fork(listed) == "0123"
    said = as_second_user_in_a_fork(locked)
    assert said.startswith(f"StoreError: {root}: belongs to user root: its runs can be read, but")
    assert "choose one with --runs-dir" in said


@as_second_user
def test_check_private_as_a_second_user_accepts_what_is_roots(open_run: Path) -> None:
    """The checks run as the user on a cluster, whose parent folders are root's."""
    run, account = open_run, pwd.getpwnam(SECOND_USER)
    os.chown(run, account.pw_uid, account.pw_gid)
    assert as_second_user_in_a_fork(lambda: check_private(run)) == "None"
    run.parent.chmod(0o777)
    assert "every user may write to" in as_second_user_in_a_fork(lambda: check_private(run))
