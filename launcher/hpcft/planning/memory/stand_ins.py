"""What stands for modules that whoever plans imports, but does not use.

PyTorch's compiler and its sharded tensors take a second to import. Functions say of themselves that
the compiler shall leave them alone, and others ask whether a tensor is sharded; the answers are
known without. Whatever else is asked of such a module brings the real one.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

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
def standing_in() -> Iterator[None]:
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


def as_it_is(function: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator, with arguments or without, that leaves a function alone."""
    return function or as_it_is


def _known() -> dict[str, dict[str, Any]]:
    """Modules, the outer ones first, and what is known of them."""
    marks = ("disable", "allow_in_graph", "assume_constant_result")
    return {
        COMPILER: {name: as_it_is for name in marks},
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
