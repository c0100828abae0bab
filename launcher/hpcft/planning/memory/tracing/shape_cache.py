"""Operations without data: what an operation returns, computed once for each kind of arguments.

PyTorch tells the shape of most results by Python code of a tenth of a millisecond. A step repeats
the same few operations on the same few shapes in every layer and layout, so they are remembered.
"""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten

_INDEX_PUTS = (
    aten._index_put_impl_.default,
    aten.index_put_.default,
    aten.index_put.default,
)
_MOST_KNOWN = 100_000

Made = tuple[tuple[Any, Any, torch.dtype], ...] | None
"""Shape, stride and type of each new tensor of a result; None where the operation has to run."""

_makes_new: dict[Any, bool] = {}
_known: dict[Any, Made] = {}


def run(func: Any, args: Any, kwargs: dict[str, Any], labelled: int) -> Any:
    """What the operation returns, or its shape where the result depends on data that is not there.

    Args:
        func: the operation.
        args: its arguments.
        kwargs: those by name.
        labelled: elements that a mask of labels picks.
    """
    if func is aten._local_scalar_dense.default and args[0].is_meta:
        return 1
    if func is aten.index.Tensor and args[0].is_meta and _mask(args[1]) is not None:
        behind = args[0].shape[_mask(args[1]).dim() :]
        return args[0].new_empty((labelled, *behind))
    if func is aten.nonzero.default and args[0].is_meta:
        return args[0].new_empty((labelled, args[0].dim()), dtype=torch.long)
    if func in _INDEX_PUTS and args[0].is_meta:
        return args[0]  # the backward of indexing writes in place, but not while it is dispatched
    if func is aten.add.Tensor and _adds_up(args, kwargs):
        return args[0]
    return _remembered(func, args, kwargs) if _is_functional(func) else func(*args, **kwargs)


def _adds_up(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the backward pass adds up gradients of one tensor, of which the first is its alone.

    Then it does so in place (autograd/input_buffer.cpp), but not while it is dispatched.
    """
    first, second = args[:2]
    return (
        torch._C._current_graph_task_id() >= 0
        and not torch.is_grad_enabled()
        and not kwargs
        and isinstance(second, torch.Tensor)
        and (first.shape, first.dtype) == (second.shape, second.dtype)
        and first.is_meta
        # One is this look's own.
        and torch._C._storage_Use_Count(first.untyped_storage()._cdata) <= 2
    )


def _mask(indices: Any) -> Any:
    first = indices[0] if indices else None
    return first if first is not None and first.dtype == torch.bool else None


def _is_functional(func: Any) -> bool:
    """Whether the operation declares that it makes tensors and neither writes nor shares any."""
    known = _makes_new.get(func)
    if known is None:
        schema = func._schema
        known = _makes_new[func] = bool(schema.returns) and not any(
            argument.alias_info for argument in (*schema.arguments, *schema.returns)
        )
    return known


def _remembered(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors: list[torch.Tensor] = []
    try:
        key = (func, _kind_of(args, tensors), _kind_of(tuple(kwargs.items()), tensors))
        made = _known.get(key)
        is_new = made is None and key not in _known
    except TypeError:  # an argument of a kind that is not compared
        return func(*args, **kwargs)
    if made is not None:
        out = tuple([torch.empty_strided(*one[:2], dtype=one[2], device="meta") for one in made])
        return out[0] if len(out) == 1 else out
    result = func(*args, **kwargs)
    if is_new and len(_known) < _MOST_KNOWN:
        _known[key] = _made(result, tensors) if all(t.is_meta for t in tensors) else None
    return result


def _kind_of(value: Any, tensors: list[torch.Tensor]) -> Any:
    """All of an argument that a result without data depends on."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.device.type
    if isinstance(value, tuple | list):
        return tuple([_kind_of(one, tensors) for one in value])
    return type(value), value


def _made(result: Any, given: list[torch.Tensor]) -> Made:
    """How to make the result anew; None unless it is tensors with storages of their own."""
    if isinstance(result, torch.Tensor):
        result = (result,)
    elif not isinstance(result, tuple) or len(result) < 2:
        return None
    if not all(isinstance(one, torch.Tensor) and one.is_meta for one in result):
        return None
    storages = [tensor.untyped_storage() for tensor in (*result, *given)]
    own = {storage._cdata for storage in storages[: len(result)]}
    if len(own) < len(result) or own & {storage._cdata for storage in storages[len(result) :]}:
        return None
    made = tuple((tuple(one.shape), one.stride(), one.dtype) for one in result)
    for (shape, stride, dtype), storage in zip(made, storages, strict=False):
        again = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        if again.untyped_storage().nbytes() != storage.nbytes():
            return None
    return made
