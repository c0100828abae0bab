"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from typing import Any, Literal

from hpcft.methods.base import MethodBase


class Full(MethodBase):
    """Train every parameter."""

    name: Literal["full"]
    """`full`."""

    def wrap(self, model: Any, *, causal: bool, checkpointing: bool) -> Any:
        """The model as it is."""
        return model
