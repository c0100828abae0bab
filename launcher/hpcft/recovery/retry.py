"""Repeats a command of Slurm until the controller answers, from within a job."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

from hpcft.core.errors import ClusterError

log = logging.getLogger(__name__)
T = TypeVar("T")

RETRY_S = 900.0
"""Seconds for which a job that ends tries to reach the controller. It keeps its nodes meanwhile,
and a controller that restarts, or whose backup takes over, is away for minutes."""
PAUSE_S = 15.0
# What clients print if the controller is away, busy or starting. Other errors are its answer.
_NO_ANSWER = re.compile(
    r"did not answer within|unable to contact|timed out|temporarily|try again|shutting down|"
    r"connection (refused|reset|closed)|connect failure|not responding|authentication credential|"
    r"munge",
    re.IGNORECASE,
)


class Retry:
    """Repeats calls that the controller does not answer, within a time for all of them together."""

    def __init__(self) -> None:
        """Starts the clock."""
        self._deadline = time.monotonic() + RETRY_S

    def __call__(self, call: Callable[[], T]) -> T:
        """Returns what a call returns, once the controller answers.

        Raises:
            ClusterError: the controller has refused the call, or did not answer in time.
        """
        while True:
            try:
                return call()
            except ClusterError as error:
                left_s = self._deadline - time.monotonic()
                if left_s < 0 or not _NO_ANSWER.search(str(error)):
                    raise
                log.warning("Slurm does not answer (%s): trying for %.0f s more", error, left_s)
            time.sleep(PAUSE_S)
