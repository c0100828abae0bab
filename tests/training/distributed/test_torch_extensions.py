"""Tests of the locks under which DeepSpeed's operators are built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcft.core.errors import DataError, StoreError
from hpcft.core.records import RankError
from hpcft.recovery.diagnosis import classify
from hpcft.training.distributed import torch_extensions
from hpcft.training.distributed.torch_extensions import OperatorLock, extensions_folder

HOLDS = """
import sys, time
from hpcft.training.distributed.torch_extensions import OperatorLock
OperatorLock(sys.argv[1]).try_acquire()
print("locked", flush=True)
time.sleep(600)
"""

LOADS = """
import os
from hpcft.training.distributed import torch_extensions
folder = torch_extensions.extensions_folder()
os.environ.update(DS_ACCELERATOR="cpu", TORCH_EXTENSIONS_DIR=str(folder))
torch_extensions.use_own_lock()
torch_extensions.build_named(["ShareMemCommBuilder"])
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Starts a process that holds the lock of a build."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, tmp_path / "lock"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_try_acquire_names_a_living_owner_at_its_timeout(
    tmp_path: Path, owner: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_extensions, "MAX_WAIT_S", 0.3)
    with pytest.raises(DataError) as raised:
        OperatorLock(str(tmp_path / "lock")).try_acquire()
    assert str(raised.value).startswith(f"{tmp_path}/hpcft.lock: the build lock of a DeepSpeed ")
    assert f"(process {owner.pid} of " in str(raised.value)
    assert f" on {os.uname().nodename}, since " in str(raised.value)
    failure = classify(RankError.now(0, "DataError", str(raised.value)))
    assert failure is not None
    assert failure.name == "stale_build_lock"


def test_try_acquire_does_not_wait_for_a_dead_owner(
    tmp_path: Path, owner: subprocess.Popen[str]
) -> None:
    """It ignores torch's own lock file, which a killed process leaves behind, too."""
    (tmp_path / "lock").touch()
    owner.kill()
    owner.wait()
    started = time.monotonic()
    first = OperatorLock(str(tmp_path / "lock"))
    assert first.try_acquire()
    first.release()
    assert OperatorLock(str(tmp_path / "lock")).try_acquire(), "the first lock was released"
    assert time.monotonic() - started < 1


@pytest.mark.slow
def test_build_named_loads_an_operator_despite_a_stale_lock_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loads an operator of DeepSpeed from a copied cache; torch would wait for ever."""
    built = extensions_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if built.is_dir():  # Otherwise the operator is built here, which takes longer.
        shutil.copytree(built, extensions_folder())
    operator = extensions_folder() / "deepspeed_shm_comm"
    operator.mkdir(parents=True, exist_ok=True)
    (operator / "lock").touch()
    subprocess.run([sys.executable, "-c", LOADS], check=True, capture_output=True, timeout=120)
    assert (operator / "deepspeed_shm_comm.so").exists()


def test_path_with_own_ninja_prefers_the_one_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ninja of another version would compile all operators again."""
    (tmp_path / "ninja").write_text("#!/bin/sh\necho 0.1\n")
    (tmp_path / "ninja").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = shutil.which("ninja", path=torch_extensions.path_with_own_ninja())
    assert found is not None
    assert Path(found).parent != tmp_path


def test_build_named_in_a_folder_that_others_may_write_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank loads the libraries in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared" / "cache"))
    torch_extensions.build_named([])
    (tmp_path / "shared").chmod(0o777)
    with pytest.raises(StoreError, match=r"every user may write to .*shared, "):
        torch_extensions.build_named([])
