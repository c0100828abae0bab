"""Head-only training: freezes the pretrained model and trains the task's new head."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from hpcft.methods.base import MethodBase
from hpcft.methods.heads import head_modules, train_in_fp32


class HeadOnly(MethodBase):
    """Trains the task's head (`score`, `classifier`, `qa_outputs`, …) and nothing else."""

    freezes_base: ClassVar[bool] = True

    name: Literal["head_only"]
    """`head_only`."""

    def wrap(self, model: Any, *, causal: bool, checkpointing: bool) -> Any:
        """Returns the model with everything but the head frozen.

        Raises:
            ValueError: the task adds no head. The output layer of a language model is pretrained,
                and if it is tied to the embeddings, the optimizer would have no parameters.
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
