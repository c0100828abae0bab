"""DeepSpeed's compiled operators: built by one process before any rank needs them.

DeepSpeed compiles at first use, under a lock file. A process that is killed meanwhile leaves the
file, and every later job waits for it, silently and for ever. Here a build holds a lock of the
operating system too, which ends with its process: a lock file found under it has no owner.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from pathlib import Path

from hpcft.records import Plan
from hpcft.train.start import extensions_folder

log = logging.getLogger(__name__)


def build(plan: Plan) -> None:
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

    folder = extensions_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "hpcft.lock").open("a") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        remove_stale_locks(folder)
        for name in names:
            begun = time.monotonic()
            get_accelerator().get_op_builder(name)().load(verbose=False)
            if time.monotonic() - begun > 5:
                log.info("built %s in %.0f s", name, time.monotonic() - begun)


def remove_stale_locks(folder: Path) -> None:
    """Removes lock files of builds that died; call it holding the folder's own lock."""
    for lock in folder.glob("*/lock"):
        log.warning("removing %s: the build that made it is dead", lock)
        lock.unlink(missing_ok=True)


if __name__ == "__main__":  # `make setup` builds ahead what a run on a CPU needs
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_folder())
    build_named(["ShareMemCommBuilder"])
