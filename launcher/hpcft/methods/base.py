"""Defines the interface of methods: loading, trained weights, and needs of memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from hpcft.core.records import Method, Precision

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
COMPUTE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


class MethodBase(Method):
    """Base of the methods; subclasses add their options as fields."""

    trains: ClassVar[bool] = True
    """Whether the method trains; if not, the model is only scored."""
    saves_adapter: ClassVar[bool] = False
    """Whether an adapter is saved instead of the whole model."""
    freezes_base: ClassVar[bool] = False
    """Whether the pretrained weights are frozen."""
    can_resume: ClassVar[bool] = True
    """Whether training can resume from its checkpoints."""
    extracts_features: ClassVar[bool] = False
    """Whether a regression is fitted on the model's hidden states instead of gradient training."""

    def regression_options(self) -> dict[str, Any]:
        """Returns the options of scikit-learn's regression, if `extracts_features`."""
        return {}

    @property
    def adapter_folder(self) -> str | None:
        """Folder of a trained adapter to load over the model; None for no adapter."""
        return None

    @property
    def double_quantises(self) -> bool:
        """Whether the scales of 4-bit weights are quantised too."""
        return True

    @property
    def four_bit_change(self) -> dict[str, object]:
        """Fields with which it holds frozen weights in 4 bits; empty if it cannot, or does so."""
        return {}

    @property
    def zero_stages(self) -> tuple[int, ...]:
        """ZeRO stages that the method works with; the planner tries no others."""
        return (0, 1, 2, 3)

    @property
    def loads_on_device(self) -> bool:
        """Whether weights go to the GPU while they are read, not through host memory as a whole."""
        return False

    @property
    def virtual_tokens(self) -> int:
        """Number of virtual tokens in front of every text, which the model's window must hold."""
        return 0

    @property
    def needs_peft_to_load(self) -> bool:
        """Whether the saved adapter gives right answers only if PEFT loads it.

        transformers' own Auto classes load most adapters, but not all, and do not always say so.
        """
        return False

    def load_options(
        self, precision: Precision, zero_stage: int, heads: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Returns arguments of `from_pretrained`. Imports torch.

        Args:
            precision: compute type of the run.
            zero_stage: ZeRO stage of the layout; 0 for plain data parallelism.
            heads: modules of the task's head, which are not quantised.
        """
        import torch

        return {"dtype": getattr(torch, self.load_dtype(precision, zero_stage))}

    def load_dtype(self, precision: Precision, zero_stage: int) -> str:
        """Returns torch's name of the type that weights are loaded in."""
        # With plain data parallelism in mixed precision the weights stay fp32 and autocast casts;
        # DeepSpeed keeps its own fp32 master copy, so the model itself is in the compute type.
        return DTYPES[precision] if zero_stage > 0 or self.freezes_base else "float32"

    def check_saved_weights(self, model: Any, folder: str | None) -> None:
        """Checks that saved weights fit the model; by default they always do.

        Args:
            model: the wrapped model, on the meta device.
            folder: folder of the base model's weights; None if that is not known.

        Raises:
            DataError: they do not fit.
        """

    def check_missing_weights(self, missing: Iterable[str]) -> None:
        """Checks weights that no file had and that are random; by default training starts there.

        Args:
            missing: names of parameters of the base model.

        Raises:
            DataError: the model would be scored with random weights.
        """

    @abstractmethod
    def wrap(self, model: Any, *, causal: bool, checkpointing: bool) -> Any:
        """Returns the model as the method trains it: with adapters added and the rest frozen.

        Args:
            model: the loaded model, or one on the meta device.
            causal: whether the task is of a causal language model.
            checkpointing: whether gradient checkpointing is on.

        Raises:
            ValueError: the method does not work with this model.
        """

    def frozen_bytes(self, precision: Precision, zero_stage: int) -> int:
        """Returns the bytes of a weight that is neither trained nor quantised."""
        return COMPUTE_BYTES[precision]

    def quantised_parameters(self, model: Any) -> int:
        """Returns the number of weights held in 4 bits; `model` may be on the meta device."""
        return 0
