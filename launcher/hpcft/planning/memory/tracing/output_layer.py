"""Whether a model's logits are what its output layer gives, so that the loss may apply the layer.

A forward pass on the meta device tells: between the output layer and the end nothing is computed,
or a soft cap alone. Others scale their logits in ways of their own (Cohere, Granite, Falcon-H1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hpcft.config.hf_model import auto_model_class
from hpcft.planning.memory.tracing.model import with_depth
from hpcft.planning.memory.tracing.target_device import Target, kernels
from hpcft.tasks.base import TaskBase
from hpcft.tasks.chunked_loss import soft_cap

SOFT_CAP = ["div", "tanh", "mul"]
LAYERS = 2  # what follows the last of them does not depend on how many there are


def loss_can_be_chunked(config: Any, task: TaskBase) -> bool:
    """Whether `tasks.chunked_loss` computes the same loss as the model's own logits would.

    Args:
        config: of the model. One that cannot run on the meta device has no such loss.
        task: one whose outputs are the vocabulary's.
    """
    after = _Operations()
    try:
        with torch.device("meta"):
            # In 16 bits, which the products of some experts are made for.
            model = auto_model_class(task).from_config(
                with_depth(config, LAYERS), dtype=torch.bfloat16
            )
            ids = torch.zeros((1, 2), dtype=torch.long)
        model.get_output_embeddings().register_forward_hook(lambda *_: after.begin())
        with torch.no_grad(), kernels(Target("cpu", "fp32"), padded=False, zero_stage=0), after:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except Exception:  # a stranger's module: anything is raised
        return False
    return after.names == ([] if soft_cap(config) is None else SOFT_CAP)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The names of the operations since it was told to begin, but for casts: None if never."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] | None = None

    def begin(self) -> None:
        """The output layer is done; a model that applies it twice begins anew."""
        self.names = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and keeps its name."""
        if self.names is not None and func is not torch.ops.aten._to_copy.default:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
