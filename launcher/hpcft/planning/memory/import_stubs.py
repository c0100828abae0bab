"""Libraries as whoever plans uses them: for the shapes of a model alone.

Nothing is computed, so that what they load only to compute is left out: with what is read twice, a
third of the time of a plan that is not known yet.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from hpcft.planning.memory.stand_ins import as_it_is, standing_in

Replaced = tuple[Any, str, Any]
"""A module, the name of something in it, and what stands there instead."""


@contextlib.contextmanager
def for_shapes() -> Iterator[None]:
    """Libraries that are imported in here leave compilers and scipy out, and keep quiet."""
    import torch

    # It reads the files of all its models as it is imported, remembers what is in 128 of their 500
    # folders, and so reads them again for the first model.
    with _replacing((functools, "lru_cache", _remembering_all)):
        from transformers import utils
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels it lacks
    with (
        # Of use to the losses of object detection; to tensors that are themselves sharded.
        _replacing((utils, "is_scipy_available", _never)),
        _replacing((utils, "is_torch_distributed_available", _never)),
        _replacing((utils.import_utils, "is_torch_distributed_available", _never)),
        _replacing((torch, "compile", as_it_is)),  # what bitsandbytes computes with on a CPU
        standing_in(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", FutureWarning)
        yield


@contextlib.contextmanager
def _replacing(replaced: Replaced) -> Iterator[None]:
    """Something else stands there, if there is such a thing in these versions."""
    module, name, value = replaced
    before = getattr(module, name, None)
    if before is None:
        yield
        return
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


_lru_cache = functools.lru_cache


def _remembering_all(maxsize: Any = 128, typed: bool = False) -> Any:
    """`functools.lru_cache` without a limit where none is named."""
    if callable(maxsize):
        return _lru_cache(maxsize=None)(maxsize)
    return _lru_cache(maxsize, typed)


def _never() -> bool:
    return False
