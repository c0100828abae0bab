"""Head-only training: the pretrained model stays as it is, the task's new head is trained."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from hpcft.methods.base import MethodBase
from hpcft.methods.heads import head_modules, train_in_fp32


class HeadOnly(MethodBase):
    """Train the task's head (`score`, `classifier`, `qa_outputs`, …) and nothing else."""

    frozen_base: ClassVar[bool] = True

    name: Literal["head_only"]
    """`head_only`."""

    def wrap(self, model: Any, *, causal: bool, checkpointing: bool) -> Any:
        """The model with all frozen but the head.

        Raises:
            ValueError: the task puts no head on it. (An output layer that is tied to the embeddings
            is not even among the named parameters: the optimizer would be empty.)
        """
        heads = head_modules(model)
        if not heads:
            raise ValueError(
                f"{type(model).__name__} has no head beside the pretrained model; "
                "use another method, or a task that adds one (classification, question_answering)"
            )
        model.requires_grad_(False)
        for name in heads:
            model.get_submodule(name).requires_grad_(True)
        train_in_fp32(model)
        return model
