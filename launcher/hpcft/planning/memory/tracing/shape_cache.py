"""Runs operations on the meta device and caches the shapes of their results.

PyTorch computes the shape of most results by Python code that takes a tenth of a millisecond. A
step repeats the same few operations on the same few shapes in every layer and layout.
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
_MAX_ENTRIES = 100_000

NewTensors = tuple[tuple[Any, Any, torch.dtype], ...] | None
"""Shape, stride and type of each new tensor of a result; None where the operation has to run."""

_functional: dict[Any, bool] = {}
_cache: dict[Any, NewTensors] = {}


def run_operation(func: Any, args: Any, kwargs: dict[str, Any], labelled: int) -> Any:
    """Returns the result of an operation, computed once per kind of arguments.

    Where a shape depends on data, which the meta device has none of, the result has the shape that
    `labelled` implies.

    Args:
        func: operation.
        args: positional arguments.
        kwargs: keyword arguments.
        labelled: elements that a mask of labels selects.
    """
    if func is aten._local_scalar_dense.default and args[0].is_meta:
        return 1
    if func is aten.index.Tensor and args[0].is_meta and _mask(args[1]) is not None:
        behind = args[0].shape[_mask(args[1]).dim() :]
        return args[0].new_empty((labelled, *behind))
    if func is aten.nonzero.default and args[0].is_meta:
        return args[0].new_empty((labelled, args[0].dim()), dtype=torch.long)
    if func in _INDEX_PUTS and args[0].is_meta:
        # The backward pass of indexing writes in place, but not under a dispatch mode.
        return args[0]
    if func is aten.add.Tensor and _is_gradient_sum(args, kwargs):
        return args[0]
    return _run_cached(func, args, kwargs) if _is_functional(func) else func(*args, **kwargs)


def _is_gradient_sum(args: Any, kwargs: dict[str, Any]) -> bool:
    """Returns whether autograd adds two gradients of a tensor and owns the first alone.

    It then adds in place (autograd/input_buffer.cpp), but not under a dispatch mode.
    """
    first, second = args[:2]
    return (
        torch._C._current_graph_task_id() >= 0
        and not torch.is_grad_enabled()
        and not kwargs
        and isinstance(second, torch.Tensor)
        and (first.shape, first.dtype) == (second.shape, second.dtype)
        and first.is_meta
        # The storage object made by this call is the second reference.
        and torch._C._storage_Use_Count(first.untyped_storage()._cdata) <= 2
    )


def _mask(indices: Any) -> Any:
    first = indices[0] if indices else None
    return first if first is not None and first.dtype == torch.bool else None


def _is_functional(func: Any) -> bool:
    """Returns whether the operation makes new tensors and neither writes nor shares any."""
    is_functional = _functional.get(func)
    if is_functional is None:
        schema = func._schema
        is_functional = _functional[func] = bool(schema.returns) and not any(
            argument.alias_info for argument in (*schema.arguments, *schema.returns)
        )
    return is_functional


def _run_cached(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors: list[torch.Tensor] = []
    try:
        key = (func, _signature(args, tensors), _signature(tuple(kwargs.items()), tensors))
        new_tensors = _cache.get(key)
        is_unknown = new_tensors is None and key not in _cache
    except TypeError:  # An argument is not hashable.
        return func(*args, **kwargs)
    if new_tensors is not None:
        out = tuple(
            [torch.empty_strided(*one[:2], dtype=one[2], device="meta") for one in new_tensors]
        )
        return out[0] if len(out) == 1 else out
    result = func(*args, **kwargs)
    if is_unknown and len(_cache) < _MAX_ENTRIES:
        _cache[key] = _describe(result, tensors) if all(t.is_meta for t in tensors) else None
    return result


def _signature(value: Any, tensors: list[torch.Tensor]) -> Any:
    """Returns all of an argument that a result without data depends on; collects its tensors."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.device.type
    if isinstance(value, tuple | list):
        return tuple([_signature(one, tensors) for one in value])
    return type(value), value


def _describe(result: Any, arguments: list[torch.Tensor]) -> NewTensors:
    """Returns how to make the result again; None unless its tensors own their storages."""
    if isinstance(result, torch.Tensor):
        result = (result,)
    elif not isinstance(result, tuple) or len(result) < 2:
        return None
    if not all(isinstance(one, torch.Tensor) and one.is_meta for one in result):
        return None
    storages = [tensor.untyped_storage() for tensor in (*result, *arguments)]
    own = {storage._cdata for storage in storages[: len(result)]}
    if len(own) < len(result) or own & {storage._cdata for storage in storages[len(result) :]}:
        return None
    new_tensors = tuple((tuple(one.shape), one.stride(), one.dtype) for one in result)
    for (shape, stride, dtype), storage in zip(new_tensors, storages, strict=False):
        copy = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        if copy.untyped_storage().nbytes() != storage.nbytes():
            return None
    return new_tensors
