"""Keeps the caches of a rank in its run folder, where the user's own cannot be written.

On some sites the home is read-only on the compute nodes, or is not there at all.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from hpcft.core.paths import RunPaths, cache_folder

log = logging.getLogger(__name__)


def use_run_folder_if_needed(paths: RunPaths) -> None:
    """Points the cache variables of this process, and of those that it starts, to the run folder.

    Args:
        paths: the run's files.
    """
    if is_writable(cache_folder()):
        return
    before = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    caches = paths.folder / "caches"
    # Models and data that were staged are read from where they are.
    os.environ.setdefault("HF_HOME", str(Path(before) / "huggingface"))
    os.environ.update(
        XDG_CACHE_HOME=str(caches),
        HF_DATASETS_CACHE=str(caches / "datasets"),
        HF_ASSETS_CACHE=str(caches / "assets"),
        TRITON_HOME=str(caches),
        TRITON_CACHE_DIR=str(caches / "triton"),
        TORCHINDUCTOR_CACHE_DIR=str(caches / "inductor"),
        CUDA_CACHE_PATH=str(caches / "cuda"),
        MPLCONFIGDIR=str(caches / "matplotlib"),
    )
    log.warning("%s cannot be written here, so caches lie in %s", before, caches)


def is_writable(folder: Path) -> bool:
    """Returns whether this process can create files in a folder, which is created if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
