"""Feature extraction: fits a logistic regression on the frozen model's hidden states."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from hpcft.core.records.base import PositiveInt
from hpcft.methods.base import MethodBase
from hpcft.methods.heads import head_modules


class Features(MethodBase):
    """Fits scikit-learn's logistic regression on the last hidden state of [CLS].

    [CLS] is the first token. Nothing is trained by gradient, so that of `train` only the seed
    counts. Options have the names of `sklearn.linear_model.LogisticRegression`.
    """

    saves_adapter: ClassVar[bool] = True
    freezes_base: ClassVar[bool] = True
    can_resume: ClassVar[bool] = False
    extracts_features: ClassVar[bool] = True

    name: Literal["features"]
    """`features`."""
    C: Annotated[float, Field(gt=0)] = 1.0
    """Inverse of the regularisation strength."""
    max_iter: PositiveInt = 1000
    """Maximum number of solver iterations."""

    @property
    def zero_stages(self) -> tuple[int, ...]:
        """Only 0: nothing is trained that ZeRO could shard."""
        return (0,)

    def regression_options(self) -> dict[str, Any]:
        """Returns the options of scikit-learn's `LogisticRegression`."""
        return {"C": self.C, "max_iter": self.max_iter}

    def wrap(self, model: Any, *, causal: bool, checkpointing: bool) -> Any:
        """Returns the frozen model without the task's head.

        Raises:
            ValueError: it is not an encoder that classifies; in a decoder, the first token's hidden
                state does not depend on the text.
        """
        if not any("classifier" in name for name in head_modules(model)):
            raise ValueError(
                f"{type(model).__name__} is not an encoder with a classifier; use the task "
                "classification with a model such as BERT, or another method"
            )
        model.requires_grad_(False)
        return model.base_model
