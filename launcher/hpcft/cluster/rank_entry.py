"""What submitit starts on every rank: importable by name, takes only the run folder's path."""

from __future__ import annotations

import importlib


def start(run_folder: str) -> str:
    """Watches over one rank of the run; the result is in the run folder, not returned."""
    importlib.import_module("hpcft.train.supervisor").main(run_folder)
    return run_folder
