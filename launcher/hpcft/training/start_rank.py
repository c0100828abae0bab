"""Starts a rank of the run that was submitted, whatever stands in the folder of the logs by then.

submitit itself would load a pickle from that folder, and so run what somebody may have put there.
Here the script of the job, which Slurm keeps from the submission on, holds the digest of the list
of run folders.

    python -m hpcft.training.start_rank LOGS RUNS_FILE DIGEST
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from hpcft.training import entry
from hpcft.training.distributed.stop_signal import STOP_SIGNALS


def main(logs: str, runs_file: str, digest: str) -> None:
    """Supervises this process's rank of its run.

    Args:
        logs: folder of the logs.
        runs_file: JSON list with the run folder of each element of the job array.
        digest: SHA-256 of that file in hexadecimal digits, as it was submitted.

    Raises:
        StoreError: others may write to a folder or replace it, or the list is another one.
    """
    from submitit import JobEnvironment

    for signum in STOP_SIGNALS:  # The supervisor handles them as soon as it is loaded.
        signal.signal(signum, signal.SIG_IGN)
    os.environ["SUBMITIT_FOLDER"] = logs
    environment = JobEnvironment()
    sys.stdout.write(f"hpcft: {environment}\n")  # job, node and rank, for the reader of the log
    sys.stdout.flush()
    index = int(environment.array_task_id or 0)
    entry.start(str(entry.submitted_run(Path(runs_file), digest, index)))


if __name__ == "__main__":
    main(*sys.argv[1:])
