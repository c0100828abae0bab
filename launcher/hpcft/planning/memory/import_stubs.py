"""Imports torch and transformers without compilers and scipy, to trace shapes faster.

A plan needs the shapes of a model and computes nothing, so that parts of the libraries that only
compute need not be loaded. This saves a third of the time of a plan that is not in the cache.
`meta_imports` is the one switch for all of it.
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


@contextlib.contextmanager
def meta_imports() -> Iterator[None]:
    """Speeds up the imports of torch and transformers inside the block, and silences them.

    Modules in `_stub_modules` are stubs, scipy and compilation are off, and garbage collection
    pauses. Everything is restored at the end; a real module loads on first use of more than its
    stub has.
    """
    with gc_paused():
        import torch

        # At its import transformers reads the files of all its models. It caches the listing of 128
        # of their 500 folders, and so would read them again for the first model.
        with _patched(functools, "lru_cache", _unbounded_lru_cache):
            from transformers import utils
        # It warns about kernels that this machine lacks.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        with (
            # Only the losses of object detection use scipy, only sharded tensors use DTensor.
            _patched(utils, "is_scipy_available", _never),
            _patched(utils, "is_torch_distributed_available", _never),
            _patched(utils.import_utils, "is_torch_distributed_available", _never),
            # bitsandbytes compiles the functions that it computes with on a CPU.
            _patched(torch, "compile", identity),
            stubbed(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", FutureWarning)
            yield


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Pauses Python's garbage collection inside the block.

    It takes a sixth of the time of importing the libraries. During a trace it would also free
    tensors at moments of its own.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def _patched(module: Any, name: str, value: Any) -> Iterator[None]:
    """Replaces an attribute of a module inside the block, if this version has the attribute."""
    original = getattr(module, name, None)
    if original is None:
        yield
        return
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


_lru_cache = functools.lru_cache


def _unbounded_lru_cache(maxsize: Any = 128, typed: bool = False) -> Any:
    """Replaces `functools.lru_cache`: unbounded where the caller names no size."""
    if callable(maxsize):
        return _lru_cache(maxsize=None)(maxsize)
    return _lru_cache(maxsize, typed)


def _never() -> bool:
    return False


# ---------------------------------------------------------------- stub modules

COMPILER = "torch._dynamo"
MASK_MODULE = f"{COMPILER}._trace_wrapped_higher_order_op"


class StubDTensor:
    """Replaces `DTensor`: no tensor is an instance of it."""


class _StubModule(ModuleType):
    """Stub of a module with a few names; using any other name imports the real module."""

    def __init__(self, name: str, names: dict[str, Any]) -> None:
        super().__init__(name)
        vars(self).update(names, __path__=[])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # The import system looks for these.
            raise AttributeError(name)
        return getattr(_import_real(self.__name__), name)


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the real package when a submodule of a stub is imported."""

    def find_spec(self, name: str, *_: Any) -> Any:
        if isinstance(sys.modules.get(name.rpartition(".")[0]), _StubModule):
            return importlib.util.spec_from_loader(name, self)
        return None

    def create_module(self, spec: Any) -> Any:
        return _import_real(spec.name)

    def exec_module(self, module: Any) -> None:
        """Does nothing: `create_module` has imported the module already."""


@contextlib.contextmanager
def stubbed() -> Iterator[None]:
    """Replaces modules that are not imported yet by stubs inside the block.

    Using a name that a stub lacks imports the real modules in place of all stubs.
    """
    finder = _StubFinder()
    sys.meta_path.insert(0, finder)
    try:
        for name, names in _stub_modules().items():
            if name not in sys.modules:
                sys.modules[name] = module = _StubModule(name, names)
                parent, _, last = name.rpartition(".")
                setattr(sys.modules[parent], last, module)
        yield
    finally:
        _remove_stubs()
        sys.meta_path.remove(finder)


def identity(function: Any = None, *_: Any, **__: Any) -> Any:
    """Returns the function itself, as a decorator with or without arguments."""
    return function or identity


def _stub_modules() -> dict[str, dict[str, Any]]:
    """Returns the stubbed modules with the names of each stub; parents come first."""
    decorators = ("disable", "allow_in_graph", "assume_constant_result")
    return {
        COMPILER: {name: identity for name in decorators},
        # Gradient checkpointing reads it.
        f"{COMPILER}.config": {"error_on_nested_fx_trace": True},
        MASK_MODULE: {
            "TransformGetItemToIndex": lambda: _import_real(MASK_MODULE).TransformGetItemToIndex()
        },
        "torch.distributed.tensor": {"DTensor": StubDTensor},
    }


def _import_real(name: str) -> Any:
    """Removes all stubs and imports the real module of this name."""
    _remove_stubs()
    return importlib.import_module(name)


def _remove_stubs() -> None:
    for name in reversed(_stub_modules()):
        module = sys.modules.get(name)
        if isinstance(module, _StubModule):
            del sys.modules[name]
            parent, _, last = name.rpartition(".")
            if vars(sys.modules[parent]).get(last) is module:
                delattr(sys.modules[parent], last)
