"""Libraries as whoever plans uses them: for the shapes of a model alone.

Nothing is computed, so that what they load only to compute is left out: with what is read twice, a
third of the time of a plan that is not known yet.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.abc
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

Replaced = tuple[Any, str, Any]
"""A module, the name of something in it, and what stands there instead."""


@contextlib.contextmanager
def meta_imports() -> Iterator[None]:
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
        _replacing((torch, "compile", identity)),  # what bitsandbytes computes with on a CPU
        stubbed(),
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


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Without Python's collector, which takes a sixth of the time in which libraries are imported.

    While a step is traced it would end tensors at moments of its own, besides.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# ---------------------------------------------------------------- stub modules

COMPILER = "torch._dynamo"
MASKS = f"{COMPILER}._trace_wrapped_higher_order_op"


class Sharded:
    """Stands for `DTensor`: nothing is one."""


class _StandIn(ModuleType):
    """A module with a few names; any other brings the real one."""

    def __init__(self, name: str, names: dict[str, Any]) -> None:
        super().__init__(name)
        vars(self).update(names, __path__=[])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # questions of the import system
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Another part of a package that something stands for: the real one, with all of it."""

    def find_spec(self, name: str, *_: Any) -> Any:
        if isinstance(sys.modules.get(name.rpartition(".")[0]), _StandIn):
            return importlib.util.spec_from_loader(name, self)
        return None

    def create_module(self, spec: Any) -> Any:
        return _real(spec.name)

    def exec_module(self, module: Any) -> None:
        """It is imported already."""


@contextlib.contextmanager
def stubbed() -> Iterator[None]:
    """In here the modules are imported only if something is asked that is not known without."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        for name, names in _known().items():
            if name not in sys.modules:
                sys.modules[name] = module = _StandIn(name, names)
                parent, _, last = name.rpartition(".")
                setattr(sys.modules[parent], last, module)
        yield
    finally:
        _forget()
        sys.meta_path.remove(finder)


def identity(function: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator, with arguments or without, that leaves a function alone."""
    return function or identity


def _known() -> dict[str, dict[str, Any]]:
    """Modules, the outer ones first, and what is known of them."""
    marks = ("disable", "allow_in_graph", "assume_constant_result")
    return {
        COMPILER: {name: identity for name in marks},
        f"{COMPILER}.config": {"error_on_nested_fx_trace": True},  # where layers are recomputed
        MASKS: {"TransformGetItemToIndex": lambda: _real(MASKS).TransformGetItemToIndex()},
        "torch.distributed.tensor": {"DTensor": Sharded},
    }


def _real(name: str) -> Any:
    """The module of this name, imported in the place of what stands for it."""
    _forget()
    return importlib.import_module(name)


def _forget() -> None:
    for name in reversed(_known()):
        module = sys.modules.get(name)
        if isinstance(module, _StandIn):
            del sys.modules[name]
            parent, _, last = name.rpartition(".")
            if vars(sys.modules[parent]).get(last) is module:
                delattr(sys.modules[parent], last)
