"""Controls the ranks of a local run: starts them, and ends all as soon as one has failed."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from submitit.local.local import Controller


class FailFastController(Controller):  # type: ignore[misc]
    """submitit's controller waits for every rank; ranks that wait for a dead one never end."""

    def wait(self, freq: int = 24) -> Sequence[int | None]:
        """Exit codes of the ranks, once all have ended, one has failed, or time is up."""
        deadline = time.monotonic() + self.timeout_s
        while time.monotonic() < deadline:
            exit_codes = [task.poll() for task in self.tasks]
            if None not in exit_codes or any(exit_codes):
                return exit_codes
            time.sleep(1.0 / freq)
        return [task.poll() for task in self.tasks]


if __name__ == "__main__":
    # Local runs take turns: two at once would share the GPUs that each was planned to have alone.
    with open(os.environ["HPCFT_LOCAL_QUEUE"], "a") as queue:
        fcntl.flock(queue, fcntl.LOCK_EX)
        FailFastController(Path(sys.argv[1])).run()
