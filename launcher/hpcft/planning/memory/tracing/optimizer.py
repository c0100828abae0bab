"""Traces AdamW: its states, and the temporary tensors of its step."""

from __future__ import annotations

from typing import Any

import torch

from hpcft.planning.memory.tracing.storage_tracker import ACTIVATIONS, STATES, StorageTracker
from hpcft.planning.memory.tracing.target_device import TargetDevice


class MetaOptimizer:
    """AdamW on the meta device: PyTorch's own, or the sizes of bitsandbytes' and fused ones."""

    def __init__(
        self, model: Any, optim: str, target: TargetDevice, tracker: StorageTracker
    ) -> None:
        self.tracker = tracker
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.on_cpu = target.accelerator == "cpu"
        # As in the Trainer the matrices, which decay, come before biases and norms, which do not.
        # The order counts: the loop over tensors still holds the temporary tensors of the last one.
        matrices = [p for p in self.trained if p.dim() > 1]
        others = [p for p in self.trained if p.dim() <= 1]
        groups = [{"params": group} for group in (matrices, others) if group]
        self.torch = None
        if optim == "adamw_torch":  # On a GPU it works on all tensors at once (foreach).
            self.torch = torch.optim.AdamW(groups, foreach=not self.on_cpu)
        # bitsandbytes keeps 32-bit states for small tensors; the Trainer sets them for embeddings.
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        is_8bit = optim in ("adamw_bnb_8bit", "paged_adamw_8bit")
        self.eight_bit = [
            p for p in self.trained if is_8bit and p.numel() >= 4096 and id(p) not in embeddings
        ]
        self.is_bitsandbytes = is_8bit or optim.startswith("paged")

    def create_states(self) -> None:
        """Creates the optimizer states, as the first step does."""
        if self.torch is None:
            eight_bit = {id(p) for p in self.eight_bit}
            for p in self.trained:
                width = 4 if self.is_bitsandbytes else p.element_size()
                self.tracker.hold(state_bytes(p.numel(), width, id(p) in eight_bit), STATES)
            return
        for p in self.trained:
            p.grad = torch.empty_like(p)
        before, self.tracker.kind = self.tracker.kind, STATES
        self.torch.step()
        self.tracker.kind = before
        self.torch.zero_grad()
        self.tracker.seed((s for v in self.torch.state.values() for s in v.values()), STATES)

    def step(self) -> None:
        """Takes one step with the gradients that the parameters hold."""
        if self.torch is not None:
            self.torch.step()
        elif self.is_bitsandbytes and self.on_cpu:
            # Without a kernel bitsandbytes computes in fp32 tensors: two states, a product, a root
            # and a quotient. The two states exist already where they are in 32 bits.
            eight_bit = {id(p) for p in self.eight_bit}
            largest = max(4 * p.numel() * (5 if id(p) in eight_bit else 3) for p in self.trained)
            self.tracker.hold(largest, ACTIVATIONS)
            self.tracker.hold(-largest, ACTIVATIONS)


def state_bytes(numel: int, width: int, eight_bit: bool) -> int:
    """Returns the bytes of AdamW's two moments of a tensor.

    Args:
        numel: elements of the tensor.
        width: bytes of an element of a moment.
        eight_bit: whether moments are in 8 bits, with one fp32 scale per 256 elements.
    """
    return 2 * (numel + 4 * -(-numel // 256)) if eight_bit else 2 * numel * width
