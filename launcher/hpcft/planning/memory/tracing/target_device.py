"""What the device of a run does otherwise than the meta device: kernels, autocast, scratch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from hpcft.core.records import Precision
from hpcft.methods.base import DTYPES

# Operations that autocast runs in 16 bits (PyTorch, aten/src/ATen/autocast_mode.h, both devices).
LOWER = {
    torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__,
    torch.bmm, torch.Tensor.bmm, torch.mm, torch.Tensor.mm, torch.addmm, torch.baddbmm,
    torch.einsum, torch.conv1d, torch.nn.functional.conv1d,
    torch.nn.functional.scaled_dot_product_attention,
}  # fmt: skip
# Those that it runs in fp32 on CUDA; on a CPU these keep the type of their input.
UPPER_ON_CUDA = {
    torch.nn.functional.layer_norm, torch.layer_norm, torch.nn.functional.softmax, torch.softmax,
    torch.Tensor.softmax, torch.nn.functional.log_softmax, torch.log_softmax,
    torch.Tensor.log_softmax, torch.nn.functional.cross_entropy, torch.nn.functional.nll_loss,
    torch.nn.functional.mse_loss, torch.pow, torch.Tensor.pow, torch.Tensor.__pow__, torch.rsqrt,
    torch.Tensor.rsqrt, torch.exp, torch.Tensor.exp, torch.cumsum, torch.Tensor.cumsum, torch.sum,
    torch.Tensor.sum, torch.logsumexp, torch.Tensor.logsumexp,
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """The device that a run will compute on."""

    accelerator: str
    """`cuda` or `cpu`."""
    precision: Precision
    """Compute precision."""
    flash_attention: bool = False
    """Whether a GPU has flash attention."""
    autocast: bool = False
    """Whether the Trainer runs the forward pass under autocast (16 bits without DeepSpeed)."""

    @property
    def dtype(self) -> torch.dtype:
        """Compute type."""
        return getattr(torch, DTYPES[self.precision])  # type: ignore[no-any-return]


class Autocast(TorchFunctionMode):
    """Autocast's rules on the meta device, which `torch.autocast` does not know.

    As the real one it keeps the casts of trained fp32 weights until the forward pass ends.
    """

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.dtype = target.dtype
        self.upper = UPPER_ON_CUDA if target.accelerator == "cuda" else set()
        self.casts: dict[int, torch.Tensor] | None = {}
        self.off = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Casts the arguments as autocast does."""
        kwargs = kwargs or {}
        if not self.off:
            if func in LOWER:
                args, kwargs = _map(self._lower, args), _map(self._lower, kwargs)
            elif func in self.upper:
                args, kwargs = _map(self._upper, args), _map(self._upper, kwargs)
        return func(*args, **kwargs)

    def end_forward(self) -> None:
        """The casts of weights are dropped, and none are kept while layers are recomputed."""
        self.casts = None

    def _lower(self, value: Any) -> Any:
        if not _is_float(value) or value.dtype == self.dtype or value.dtype == torch.float64:
            return value
        if self.casts is None or not (value.is_leaf and value.requires_grad):
            return value.to(self.dtype)
        if id(value) not in self.casts:
            self.casts[id(value)] = value.to(self.dtype)
        return self.casts[id(value)]

    @staticmethod
    def _upper(value: Any) -> Any:
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
def kernels(target: Target, *, padded: bool, zero_stage: int) -> Iterator[None]:
    """Replaces what depends on the device or on data, for the duration of a trace.

    Args:
        target: whose kernels are meant.
        padded: whether sequences of a batch differ in length, so that attention takes a mask.
        zero_stage: ZeRO-3 brings a linear layer of its own.
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
    before = [(owner, name, getattr(owner, name, None)) for owner, name, _ in patched]
    try:
        for owner, name, value in patched:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


class _ShardedLinear(torch.autograd.Function):
    """DeepSpeed's linear layer (runtime/zero/linear.py): it keeps its input, trained or not."""

    @staticmethod
    def forward(ctx: Any, value: Any, weight: Any, bias: Any = None) -> Any:
        ctx.save_for_backward(value, weight)
        ctx.has_bias = bias is not None and bias.requires_grad
        output = value.matmul(weight.t())
        return output if bias is None else output.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        value, weight = ctx.saved_tensors
        of_value = gradient.matmul(weight) if ctx.needs_input_grad[0] else None
        flat = gradient.reshape(-1, gradient.shape[-1])
        of_weight = of_bias = None
        if ctx.needs_input_grad[1]:
            of_weight = flat.t().matmul(value.reshape(-1, value.shape[-1]))
        if ctx.has_bias:
            of_bias = flat.sum(0)
        return of_value, of_weight, of_bias


def _fused_dropout(
    value: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """CUDA keeps a boolean mask; the meta device, as a CPU, one of the input's type."""
    return torch.native_dropout(value, p, True)[0] if training and p > 0 else value


def _attention(target: Target) -> Any:
    """`scaled_dot_product_attention` by the kernel that the device takes."""
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
        chosen = attention_kernel(target, query, attn_mask, dropout_p)
        if enable_gqa and chosen not in ("cpu", "math"):
            repeats = query.shape[1] // key.shape[1]
            key, value = (t.repeat_interleave(repeats, 1) for t in (key, value))
        if chosen == "cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
        if chosen == "flash":
            return aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale
            )[0]
        if chosen == "efficient":
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
    target: Target, query: torch.Tensor, attn_mask: torch.Tensor | None, dropout_p: float
) -> str:
    """`cpu`, `flash`, `efficient` or `math`: what PyTorch chooses (sdp_utils.cpp of each device).

    Flash attention wants 16 bits, no mask, heads of at most 256 and compute capability 8.0; the
    memory-efficient kernel takes the rest from 5.0 on. The kernel for CPUs has no dropout.
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


def scratch(target: Target, threads: int) -> Any:
    """Bytes that an operation takes and gives back inside itself, by operation.

    Args:
        target: device.
        threads: CPU threads, each of which has its own buffers in the CPU's attention.
    """

    def inside(func: Any, args: Any, out: Any) -> int:
        name = func._opname if hasattr(func, "_opname") else ""
        if name in ("gemm_4bit", "dequantize_4bit"):
            return _four_bit_scratch(name, args, out)
        if name == "_scaled_dot_product_flash_attention_for_cpu":
            return _cpu_attention_scratch(args, threads)
        if name == "logsumexp":  # it takes the exponentials of all (ReduceOps.cpp)
            return int(args[0].nbytes)
        return 0

    return inside


def _four_bit_scratch(name: str, args: Any, out: Any) -> int:
    """The dequantised weight, which bitsandbytes makes inside its matrix product."""
    if name == "dequantize_4bit":
        return 0
    elements = args[2][0] * args[2][1]
    return int(elements * args[0].element_size())


def _cpu_attention_scratch(args: Any, threads: int) -> int:
    """Per thread a block of scores and an output (PyTorch, FlashAttentionKernel.cpp)."""
    query, key = args[0], args[1]
    rows, columns = query.shape[2], key.shape[2]
    split = 256 if rows >= 768 else 64 if rows >= 192 else 32
    rows, columns = min(split, rows), min(512, columns)
    each = 4 * (rows * columns + 2 * rows + rows * query.shape[-1])
    if query.element_size() < 4:
        each += query.element_size() * rows * columns
    return int(threads * each)
