"""Libraries as whoever plans uses them: for the shapes of a model alone.

Nothing is computed, so that what they load only to compute is left out: a third of the time of a
plan that is not known yet.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def for_shapes() -> Iterator[None]:
    """Libraries that are imported in here leave compilers and scipy out, and keep quiet."""
    import torch
    from transformers import utils

    skipped: list[tuple[Any, str, Any]] = [
        # Of use to the losses of object detection.
        (utils, "is_scipy_available", lambda: False),
        # What bitsandbytes computes with on a CPU, which takes all of PyTorch's compiler.
        (torch, "compile", _as_it_is),
    ]
    before = [(library, name, getattr(library, name)) for library, name, _ in skipped]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels it lacks
    try:
        for library, name, value in skipped:
            setattr(library, name, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for library, name, value in before:
            setattr(library, name, value)


def _as_it_is(function: Any = None, **_: Any) -> Any:
    """A function that is not compiled."""
    return function or _as_it_is
