"""Feature extraction: the pretrained model as it is, and a logistic regression on top."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from hpcft.core.records.base import PositiveInt
from hpcft.methods.base import MethodBase
from hpcft.methods.heads import head_modules


class Features(MethodBase):
    """Fit scikit-learn's logistic regression on the last hidden state of the first token, [CLS].

    Nothing is trained by gradient; of `train` only the seed counts. The option names are those of
    `sklearn.linear_model.LogisticRegression`.
    """

    adapter: ClassVar[bool] = True
    frozen_base: ClassVar[bool] = True
    can_resume: ClassVar[bool] = False
    extracts_features: ClassVar[bool] = True

    name: Literal["features"]
    """`features`."""
    C: Annotated[float, Field(gt=0)] = 1.0
    """Inverse of the regularisation's strength."""
    max_iter: PositiveInt = 1000
    """Most iterations of the solver."""

    @property
    def zero_stages(self) -> tuple[int, ...]:
        """There is nothing to shard."""
        return (0,)

    def regression_options(self) -> dict[str, Any]:
        """Returns the options of scikit-learn's `LogisticRegression`."""
        return {"C": self.C, "max_iter": self.max_iter}

    def wrap(self, model: Any, *, causal: bool, checkpointing: bool) -> Any:
        """The model without the task's head.

        Raises:
            ValueError: it does not classify, or reads from left to right: then the first token
            knows nothing of the text.
        """
        if not any("classifier" in name for name in head_modules(model)):
            raise ValueError(
                f"{type(model).__name__} is no encoder with a classifier; use task classification "
                "with a model such as BERT, or another method"
            )
        model.requires_grad_(False)
        return model.base_model
