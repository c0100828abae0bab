"""AdamW's memory: its states, and what its step holds for a moment."""

from __future__ import annotations

from typing import Any

import torch

from hpcft.planning.memory.tracing.storage_tracker import ACTIVATIONS, STATES, StorageTracker
from hpcft.planning.memory.tracing.target_device import Target


class Optimizer:
    """The optimizer's states, and what its step holds for a moment."""

    def __init__(self, model: Any, optim: str, target: Target, tracker: StorageTracker) -> None:
        self.tracker = tracker
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.on_cpu = target.accelerator == "cpu"
        # The Trainer groups matrices, which decay, before biases and norms, which do not. The order
        # counts: the loop over tensors still holds what it made for the one before.
        matrices = [p for p in self.trained if p.dim() > 1]
        others = [p for p in self.trained if p.dim() <= 1]
        groups = [{"params": group} for group in (matrices, others) if group]
        self.torch = None
        if optim == "adamw_torch":  # on a GPU it goes over all tensors at once
            self.torch = torch.optim.AdamW(groups, foreach=not self.on_cpu)
        # bitsandbytes: small tensors, and by the Trainer's wish embeddings, keep 32-bit states.
        tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        eight = optim in ("adamw_bnb_8bit", "paged_adamw_8bit")
        self.eight_bit = [
            p for p in self.trained if eight and p.numel() >= 4096 and id(p) not in tables
        ]
        self.is_bitsandbytes = eight or optim.startswith("paged")

    def start(self) -> None:
        """Makes the states, as the first step does."""
        if self.torch is None:
            eight = {id(p) for p in self.eight_bit}
            for p in self.trained:
                width = 4 if self.is_bitsandbytes else p.element_size()
                self.tracker.hold(state_bytes(p.numel(), width, id(p) in eight), STATES)
            return
        for p in self.trained:
            p.grad = torch.empty_like(p)
        before, self.tracker.kind = self.tracker.kind, STATES
        self.torch.step()
        self.tracker.kind = before
        self.torch.zero_grad()
        self.tracker.seed((s for v in self.torch.state.values() for s in v.values()), STATES)

    def step(self) -> None:
        """One step with the gradients that are there."""
        if self.torch is not None:
            self.torch.step()
        elif self.is_bitsandbytes and self.on_cpu:
            # Without a kernel bitsandbytes computes in fp32 tensors: two states, a product, a root
            # and a quotient; the states are there already where they are in 32 bits.
            eight = {id(p) for p in self.eight_bit}
            most = max(4 * p.numel() * (5 if id(p) in eight else 3) for p in self.trained)
            self.tracker.hold(most, ACTIVATIONS)
            self.tracker.hold(-most, ACTIVATIONS)


def state_bytes(numel: int, width: int, eight_bit: bool) -> int:
    """AdamW's two moments of a tensor: by its own width, or in 8 bits with a scale for 256."""
    return 2 * (numel + 4 * -(-numel // 256)) if eight_bit else 2 * numel * width
