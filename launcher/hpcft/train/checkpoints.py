"""Which checkpoint a run that starts again goes on from."""

from __future__ import annotations

from pathlib import Path

from hpcft.paths import RunPaths


def latest(paths: RunPaths, world_size: int) -> Path | None:
    """The newest checkpoint that was written whole; None where there is none.

    The Trainer writes its own state last; random states are written by each rank.
    """
    names = ["rng_state.pth"] if world_size == 1 else [
        f"rng_state_{rank}.pth" for rank in range(world_size)
    ]  # fmt: skip
    whole = [
        folder
        for folder in paths.checkpoints.glob("checkpoint-*")
        if all((folder / name).is_file() for name in ("trainer_state.json", *names))
    ]
    return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
