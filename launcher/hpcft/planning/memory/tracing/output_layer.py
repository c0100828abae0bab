"""Checks whether a model's logits are the plain result of its output layer.

Only then may the loss apply the layer itself, chunk by chunk. A forward pass on the meta device
shows it: between the output layer and the end the model computes nothing, or a soft cap alone. Some
models scale their logits in other ways (Cohere, Granite, Falcon-H1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hpcft.config.hf_model import auto_model_class
from hpcft.planning.memory.tracing.model import with_depth
from hpcft.planning.memory.tracing.target_device import TargetDevice, patched_kernels
from hpcft.tasks.base import TaskBase
from hpcft.tasks.chunked_loss import logit_soft_cap

SOFT_CAP = ["div", "tanh", "mul"]
LAYERS = 2  # What follows the last layer does not depend on their number.


def loss_can_be_chunked(config: Any, task: TaskBase) -> bool:
    """Returns whether `tasks.chunked_loss` computes the same loss as the model's own logits.

    Args:
        config: `transformers` configuration. The result is False if it cannot run on the meta
            device.
        task: a task whose outputs are the vocabulary's logits.
    """
    after = _OperationRecorder()
    try:
        with torch.device("meta"):
            # The matrix products of some mixtures of experts work in 16 bits only.
            model = auto_model_class(task).from_config(
                with_depth(config, LAYERS), dtype=torch.bfloat16
            )
            ids = torch.zeros((1, 2), dtype=torch.long)
        model.get_output_embeddings().register_forward_hook(lambda *_: after.begin())
        target = TargetDevice("cpu", "fp32")
        with torch.no_grad(), patched_kernels(target, padded=False, zero_stage=0), after:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except Exception:  # A model's code may raise anything.
        return False
    return after.names == ([] if logit_soft_cap(config) is None else SOFT_CAP)


class _OperationRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the names of operations, except casts, since `begin`; `names` is None before it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] | None = None

    def begin(self) -> None:
        """Starts recording; a model that applies its output layer twice starts it again."""
        self.names = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and records its name."""
        if self.names is not None and func is not torch.ops.aten._to_copy.default:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
