"""Starts the ranks of a local run, and ends all of them as soon as one has failed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from submitit.local.local import Controller

from hpcft.core.host import wait_until
from hpcft.core.paths import RunPaths
from hpcft.core.rank_errors import rank_error_file, write_rank_error
from hpcft.core.records import RankError

CANCEL_S = 15.0
"""Seconds in which the ranks of a cancelled run may save and end before they are killed."""


class FailFastController(Controller):  # type: ignore[misc]
    """submitit's controller, but one failed rank ends the others, which would wait for it."""

    is_cancelled = False
    """Whether `hpcft cancel` ends the run."""

    def cancel(self, *_: object) -> NoReturn:
        """Ends the run; handler of SIGINT."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.is_cancelled = True
        raise KeyboardInterrupt

    def kill_tasks(self) -> None:
        """Ends the ranks; if the run is cancelled, they have time to end by themselves."""
        if self.is_cancelled:
            self._forward_signal(signal.SIGINT)
            wait_until(lambda: all(task.poll() is not None for task in self.tasks), CANCEL_S, 0.05)
        super().kill_tasks()

    def wait(self, freq: int = 24) -> Sequence[int | None]:
        """Waits until all ranks have ended, one has failed, or time is up.

        Args:
            freq: checks per second.

        Returns:
            The exit code of each rank; None for a rank that still runs.
        """
        deadline = time.monotonic() + self.timeout_s
        while time.monotonic() < deadline:
            exit_codes = [task.poll() for task in self.tasks]
            if None not in exit_codes or any(exit_codes):
                self._record_killed_ranks(exit_codes)
                return exit_codes
            time.sleep(1.0 / freq)
        return [task.poll() for task in self.tasks]

    def _record_killed_ranks(self, exit_codes: Sequence[int | None]) -> None:
        """Writes the error of each rank that a signal killed: the rank itself could not."""
        paths = RunPaths(self.folder.parent)
        for rank, code in enumerate(exit_codes):
            if code is None or code >= 0 or rank_error_file(paths, rank).exists():
                continue
            message = f"its supervisor was ended by {signal.Signals(-code).name}"
            error = RankError.now(rank, "Killed", message, job_id=self.pid, failure="rank_died")
            write_rank_error(paths, error)


def main(folder: str) -> None:
    """Waits until no other local run trains, then runs the ranks of one run.

    Args:
        folder: submitit's folder of the run.
    """
    # Two runs at once would share the GPUs that each was planned to have alone.
    with (
        open(os.environ["HPCFT_LOCAL_QUEUE"], "a", encoding="utf-8") as queue,
        contextlib.suppress(KeyboardInterrupt),
    ):
        fcntl.flock(queue, fcntl.LOCK_EX)
        queue.truncate(0)
        queue.write(str(os.getpid()))  # `hpcft status` shows whose turn it is.
        queue.flush()
        controller = FailFastController(Path(folder))
        signal.signal(signal.SIGINT, controller.cancel)
        controller.run()


if __name__ == "__main__":
    main(sys.argv[1])
