"""Imitates a run's device on the meta device: kernels, autocast and scratch memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from hpcft.core.records import Precision
from hpcft.methods.base import DTYPES

# Operations that autocast runs in 16 bits (PyTorch, aten/src/ATen/autocast_mode.h, both devices).
HALF_PRECISION = {
    torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__,
    torch.bmm, torch.Tensor.bmm, torch.mm, torch.Tensor.mm, torch.addmm, torch.baddbmm,
    torch.einsum, torch.conv1d, torch.nn.functional.conv1d,
    torch.nn.functional.scaled_dot_product_attention,
}  # fmt: skip
# Operations that autocast runs in fp32 on CUDA; on a CPU they keep the type of their input.
FP32_ON_CUDA = {
    torch.nn.functional.layer_norm, torch.layer_norm, torch.nn.functional.softmax, torch.softmax,
    torch.Tensor.softmax, torch.nn.functional.log_softmax, torch.log_softmax,
    torch.Tensor.log_softmax, torch.nn.functional.cross_entropy, torch.nn.functional.nll_loss,
    torch.nn.functional.mse_loss, torch.pow, torch.Tensor.pow, torch.Tensor.__pow__, torch.rsqrt,
    torch.Tensor.rsqrt, torch.exp, torch.Tensor.exp, torch.cumsum, torch.Tensor.cumsum, torch.sum,
    torch.Tensor.sum, torch.logsumexp, torch.Tensor.logsumexp,
}  # fmt: skip


@dataclass(frozen=True)
class TargetDevice:
    """The device that a run computes on."""

    accelerator: str
    """`cuda` or `cpu`."""
    precision: Precision
    """Compute precision."""
    flash_attention: bool = False
    """Whether the GPU has flash attention."""
    autocast: bool = False
    """Whether the Trainer runs the forward pass under autocast (16 bits without DeepSpeed)."""

    @property
    def dtype(self) -> torch.dtype:
        """Compute type, as a `torch.dtype`."""
        return getattr(torch, DTYPES[self.precision])  # type: ignore[no-any-return]


class MetaAutocast(TorchFunctionMode):
    """Applies autocast's rules on the meta device, which `torch.autocast` does not support.

    Like the real autocast it caches the casts of trained fp32 weights until the forward pass ends.
    While `disabled` is above 0, nothing is cast.
    """

    def __init__(self, target: TargetDevice) -> None:
        super().__init__()
        self.dtype = target.dtype
        self.fp32 = FP32_ON_CUDA if target.accelerator == "cuda" else set()
        self.cached_casts: dict[int, torch.Tensor] | None = {}
        self.disabled = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation with its arguments cast as autocast does."""
        kwargs = kwargs or {}
        if not self.disabled:
            if func in HALF_PRECISION:
                args, kwargs = _map(self._to_half, args), _map(self._to_half, kwargs)
            elif func in self.fp32:
                args, kwargs = _map(self._to_fp32, args), _map(self._to_fp32, kwargs)
        return func(*args, **kwargs)

    def start_caching(self) -> None:
        """Caches the casts of weights from now on, as in a forward pass with gradients."""
        self.cached_casts = {}

    def stop_caching(self) -> None:
        """Frees the cached casts, as at the end of a forward pass, and caches no more."""
        self.cached_casts = None

    def _to_half(self, value: Any) -> Any:
        if not _is_float(value) or value.dtype == self.dtype or value.dtype == torch.float64:
            return value
        if self.cached_casts is None or not (value.is_leaf and value.requires_grad):
            return value.to(self.dtype)
        if id(value) not in self.cached_casts:
            self.cached_casts[id(value)] = value.to(self.dtype)
        return self.cached_casts[id(value)]

    @staticmethod
    def _to_fp32(value: Any) -> Any:
        return value.float() if _is_float(value) and value.dtype.itemsize < 4 else value


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _map(cast: Any, values: Any) -> Any:
    if isinstance(values, dict):
        return {key: cast(value) for key, value in values.items()}
    return tuple(
        [cast(v) for v in value] if isinstance(value, list) else cast(value) for value in values
    )


@contextlib.contextmanager
def patched_kernels(target: TargetDevice, *, padded: bool, zero_stage: int) -> Iterator[None]:
    """Replaces functions that depend on the device or on data, inside the block.

    Args:
        target: device whose kernels are imitated.
        padded: whether sequences of a batch differ in length, so that attention takes a mask.
        zero_stage: DeepSpeed ZeRO stage; 3 replaces the linear layer by DeepSpeed's own.
    """
    import transformers.masking_utils as masking

    functional = torch.nn.functional
    patched: list[tuple[Any, str, Any]] = [
        (masking, "fast_all", lambda _: not padded),
        (masking, "find_packed_sequence_indices", lambda _: None),
        (functional, "scaled_dot_product_attention", _attention(target)),
    ]
    if target.accelerator == "cuda":
        patched.append((functional, "dropout", _fused_dropout))
    if zero_stage == 3:
        patched.append((functional, "linear", _ShardedLinear.apply))
    originals = [(owner, name, getattr(owner, name, None)) for owner, name, _ in patched]
    try:
        for owner, name, value in patched:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)


class _ShardedLinear(torch.autograd.Function):
    """DeepSpeed's linear layer (runtime/zero/linear.py), which always saves its input."""

    @staticmethod
    def forward(ctx: Any, value: Any, weight: Any, bias: Any = None) -> Any:
        ctx.save_for_backward(value, weight)
        ctx.has_bias = bias is not None and bias.requires_grad
        output = value.matmul(weight.t())
        return output if bias is None else output.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        value, weight = ctx.saved_tensors
        value_grad = gradient.matmul(weight) if ctx.needs_input_grad[0] else None
        flat = gradient.reshape(-1, gradient.shape[-1])
        weight_grad = bias_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = flat.t().matmul(value.reshape(-1, value.shape[-1]))
        if ctx.has_bias:
            bias_grad = flat.sum(0)
        return value_grad, weight_grad, bias_grad


def _fused_dropout(
    value: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """Applies dropout like CUDA, which saves a boolean mask.

    The meta device, like a CPU, saves a mask of the input's type.
    """
    return torch.native_dropout(value, p, True)[0] if training and p > 0 else value


def _attention(target: TargetDevice) -> Any:
    """Returns `scaled_dot_product_attention` with the kernel that the device would use."""
    plain = torch.nn.functional.scaled_dot_product_attention
    aten = torch.ops.aten

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if target.autocast and query.dtype != target.dtype:
            query, key, value = (t.to(target.dtype) for t in (query, key, value))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            # The fused kernels take an additive mask of the query's type.
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        kernel = attention_kernel(target, query, attn_mask, dropout_p)
        if enable_gqa and kernel not in ("cpu", "math"):
            repeats = query.shape[1] // key.shape[1]
            key, value = (t.repeat_interleave(repeats, 1) for t in (key, value))
        if kernel == "cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
        if kernel == "flash":
            return aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale
            )[0]
        if kernel == "efficient":
            bias = None
            if attn_mask is not None:
                b, h, s, t = query.shape[0], query.shape[1], query.shape[2], key.shape[2]
                bias = attn_mask.expand(b, h, s, t)
            return aten._scaled_dot_product_efficient_attention(
                query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
            )[0]
        return plain(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal,
            scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip

    return attention


def attention_kernel(
    target: TargetDevice, query: torch.Tensor, attn_mask: torch.Tensor | None, dropout_p: float
) -> str:
    """Returns the attention kernel that PyTorch chooses (sdp_utils.cpp of each device).

    Flash attention needs 16 bits, no mask, heads of at most 256 and compute capability 8.0; the
    memory-efficient kernel does the rest, from capability 5.0 on. The kernel for CPUs has no
    dropout.

    Returns:
        `cpu`, `flash`, `efficient` or `math`.
    """
    if target.accelerator == "cpu":
        return "cpu" if dropout_p == 0.0 else "math"
    if (
        attn_mask is None
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= 256
        and target.flash_attention
    ):
        return "flash"
    return "efficient"


def scratch_estimator(threads: int) -> Callable[[Any, Any], int]:
    """Returns a function that estimates the bytes an operation takes and frees inside itself.

    Args:
        threads: CPU threads, each of which has its own buffers in the CPU's attention.
    """

    def scratch_bytes(func: Any, args: Any) -> int:
        name = getattr(func, "_opname", "")
        if name == "gemm_4bit":
            return _four_bit_scratch(args)
        if name == "_scaled_dot_product_flash_attention_for_cpu":
            return _cpu_attention_scratch(args, threads)
        if name == "logsumexp":
            # It computes the exponentials of all elements (ReduceOps.cpp).
            return int(args[0].nbytes)
        return 0

    return scratch_bytes


def _four_bit_scratch(args: Any) -> int:
    """Returns the bytes of the weight that bitsandbytes dequantises inside its matrix product."""
    elements = args[2][0] * args[2][1]
    return int(elements * args[0].element_size())


def _cpu_attention_scratch(args: Any, threads: int) -> int:
    """Returns the bytes of the threads' blocks of scores and outputs.

    Source: PyTorch, FlashAttentionKernel.cpp.
    """
    query, key = args[0], args[1]
    rows, columns = query.shape[2], key.shape[2]
    split = 256 if rows >= 768 else 64 if rows >= 192 else 32
    rows, columns = min(split, rows), min(512, columns)
    per_thread = 4 * (rows * columns + 2 * rows + rows * query.shape[-1])
    if query.element_size() < 4:
        per_thread += query.element_size() * rows * columns
    return int(threads * per_thread)
