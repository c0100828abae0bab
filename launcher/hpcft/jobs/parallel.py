"""Work on several cores: processes that end with the work, however it ends."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from hpcft.core.errors import HpcftError

T = TypeVar("T")
R = TypeVar("R")

# Each loads torch, in about 0.6 GiB: no more than a login node bears.
MAX_PROCESSES = 4


def parallel_map(work: Callable[[T], R], items: Sequence[T], *, fewest: int = 4) -> Iterator[R]:
    """What `work` gives for each item, in their order, computed on several cores where it pays.

    A process is split off only while that is safe and cheap: before there are threads, and before
    PyTorch is loaded. Else this process does the work.

    Args:
        work: can be pickled, and so can what it takes and gives.
        items: what to do.
        fewest: with fewer items this process does them.

    Raises:
        HpcftError: a process was ended from outside.
    """
    count = min(MAX_PROCESSES, len(os.sched_getaffinity(0)), len(items))
    if count < 2 or len(items) < fewest or threading.active_count() > 1 or "torch" in sys.modules:
        return map(work, items)
    return _split(work, items, count)


def _split(work: Callable[[T], R], items: Sequence[T], count: int) -> Iterator[R]:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    with ProcessPoolExecutor(
        count, mp_context=multiprocessing.get_context("fork"), initializer=_start
    ) as pool:
        running = pool.map(work, items)
        ours = multiprocessing.active_children()
        try:
            yield from running
        except BrokenProcessPool:
            raise HpcftError(
                "a process that planned was ended from outside, as for lack of memory; "
                "name fewer recipes, or use a machine with more memory"
            ) from None
        finally:
            for process in ours:  # Ctrl-C, or whoever asked wants no more
                process.terminate()


def _start() -> None:
    """Leaves Ctrl-C to the process that waits, which ends all."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
