"""Full fine-tuning: trains every parameter."""

from __future__ import annotations

from typing import Any, Literal

from hpcft.methods.base import MethodBase


class Full(MethodBase):
    """Trains every parameter."""

    name: Literal["full"]
    """`full`."""

    def wrap(self, model: Any, *, causal: bool, checkpointing: bool) -> Any:
        """Returns the model unchanged."""
        return model
