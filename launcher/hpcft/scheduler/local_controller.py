"""Controls the ranks of a local run: starts them, and ends all as soon as one has failed."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from submitit.local.local import Controller

from hpcft.core.paths import RunPaths
from hpcft.core.rank_errors import rank_error_file, write_rank_error
from hpcft.core.records import RankError


class FailFastController(Controller):  # type: ignore[misc]
    """submitit's controller waits for every rank; ranks that wait for a dead one never end."""

    def wait(self, freq: int = 24) -> Sequence[int | None]:
        """Exit codes of the ranks, once all have ended, one has failed, or time is up."""
        deadline = time.monotonic() + self.timeout_s
        while time.monotonic() < deadline:
            exit_codes = [task.poll() for task in self.tasks]
            if None not in exit_codes or any(exit_codes):
                self._note_killed(exit_codes)
                return exit_codes
            time.sleep(1.0 / freq)
        return [task.poll() for task in self.tasks]

    def _note_killed(self, exit_codes: Sequence[int | None]) -> None:
        """Says for a rank that was killed why it ended; the others only know that they are told."""
        paths = RunPaths(self.folder.parent)
        for rank, code in enumerate(exit_codes):
            if code is None or code >= 0 or rank_error_file(paths, rank).exists():
                continue
            message = f"its supervisor was ended by {signal.Signals(-code).name}"
            error = RankError.now(rank, "Killed", message, job_id=self.pid, failure="rank_died")
            write_rank_error(paths, error)


def main(folder: str) -> None:
    """Waits for its turn and runs the ranks of one local run.

    Args:
        folder: submitit's folder of the run.
    """
    # Local runs take turns: two at once would share the GPUs that each was planned to have alone.
    with open(os.environ["HPCFT_LOCAL_QUEUE"], "a") as queue:
        fcntl.flock(queue, fcntl.LOCK_EX)
        FailFastController(Path(folder)).run()


if __name__ == "__main__":
    main(sys.argv[1])
