"""What every method answers: how the model is loaded, what it trains, what it needs in memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

from hpcft.core.records import Method, Precision

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
COMPUTE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


class MethodBase(Method):
    """A method with its behaviour."""

    trains: ClassVar[bool] = True
    """Whether there is anything to train; if not, the model is only scored."""
    adapter: ClassVar[bool] = False
    """Whether the weights that come out are an adapter beside the base model."""
    frozen_base: ClassVar[bool] = False
    """Whether the pretrained weights stay as they are."""
    can_resume: ClassVar[bool] = True
    """Whether training can go on from what it saves."""

    extracts_features: ClassVar[bool] = False
    """Whether a regression is fitted on the model's hidden states instead of gradient training."""

    def regression_options(self) -> dict[str, Any]:
        """Returns scikit-learn's options of the regression, where `extracts_features`."""
        return {}

    @property
    def adapter_folder(self) -> str | None:
        """Folder of the adapter that is loaded over the model."""
        return None

    @property
    def double_quantises(self) -> bool:
        """Whether the scales of 4-bit weights are quantised too."""
        return True

    @property
    def zero_stages(self) -> tuple[int, ...]:
        """ZeRO stages that it works with; the planner tries no others."""
        return (0, 1, 2, 3)

    @property
    def loads_on_device(self) -> bool:
        """Whether weights go to the GPU as they are read, not through host memory as a whole."""
        return False

    @property
    def extra_tokens(self) -> int:
        """Tokens that the method adds to every text; with the text they have to fit the model."""
        return 0

    def load_options(self, precision: Precision, zero_stage: int) -> dict[str, Any]:
        """Arguments of `from_pretrained`. Imports torch."""
        import torch

        return {"dtype": getattr(torch, self.load_dtype(precision, zero_stage))}

    def load_dtype(self, precision: Precision, zero_stage: int) -> str:
        """Torch's name of the type that weights are loaded in."""
        # With plain data parallelism in mixed precision the weights stay fp32 and autocast casts;
        # DeepSpeed keeps its own fp32 master copy, so the model itself is in the compute type.
        return DTYPES[precision] if zero_stage > 0 or self.frozen_base else "float32"

    def check_saved(self, model: Any, folder: str | None) -> None:
        """Refuses saved weights that do not go together; by default all do.

        Args:
            model: what `wrap` made, on the meta device.
            folder: of the base model's weights; None where that is not known.

        Raises:
            DataError: they do not.
        """

    def check_loaded(self, missing: Iterable[str]) -> None:
        """Refuses weights that no file had, drawn at random; by default training begins with them.

        Args:
            missing: names of parameters of the base model.

        Raises:
            DataError: the model would be scored with them.
        """

    @abstractmethod
    def wrap(self, model: Any, *, causal: bool, checkpointing: bool) -> Any:
        """The model with adapters added and the rest frozen, as this method asks."""

    def frozen_bytes(self, precision: Precision, zero_stage: int) -> int:
        """Bytes of a weight that is neither trained nor quantised."""
        return COMPUTE_BYTES[precision]

    def quantised_parameters(self, model: Any) -> int:
        """Weights that are held in 4 bits; `model` may be on the meta device."""
        return 0
