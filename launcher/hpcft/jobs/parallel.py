"""Computes a function of many items on several cores."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from hpcft.core.errors import HpcftError

T = TypeVar("T")
R = TypeVar("R")

MAX_PROCESSES = 4
"""Most processes at a time. Each loads torch into about 0.6 GiB of a login node."""
MIN_ITEMS = 4
"""Fewest items for which other processes are worth their start."""


def parallel_map(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Yields a function's value for each item, in their order, on several cores if that pays.

    Processes are forked only while this is safe and cheap: before this process has threads, and
    before it has loaded PyTorch. Otherwise this process computes all values.

    Args:
        function: the function; it, its argument and its value can be pickled.
        items: the items.

    Raises:
        HpcftError: a process was killed.
    """
    count = min(MAX_PROCESSES, len(os.sched_getaffinity(0)), len(items))
    if (
        count < 2
        or len(items) < MIN_ITEMS
        or threading.active_count() > 1
        or "torch" in sys.modules
    ):
        return map(function, items)
    return _forked_map(function, items, count)


def _forked_map(function: Callable[[T], R], items: Sequence[T], count: int) -> Iterator[R]:
    # Imported here: most commands start no process.
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    with ProcessPoolExecutor(
        count, mp_context=multiprocessing.get_context("fork"), initializer=_ignore_interrupts
    ) as pool:
        values = pool.map(function, items)
        processes = multiprocessing.active_children()
        try:
            yield from values
        except BrokenProcessPool:
            raise HpcftError(
                "a planning process was killed, probably because memory ran out; name fewer "
                "recipes, or use a machine with more memory"
            ) from None
        finally:
            for process in processes:  # After Ctrl-C, or if the caller wants no more values.
                process.terminate()


def _ignore_interrupts() -> None:
    """Leaves Ctrl-C to the parent process, which ends the others."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
