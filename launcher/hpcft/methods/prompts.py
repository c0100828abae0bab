"""P-tuning and prompt tuning: train virtual tokens in front of a frozen model, with PEFT.

Shapes: B examples, S tokens of text, N virtual tokens, H the model's width.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from hpcft.methods.base import MethodBase
from hpcft.methods.heads import head_modules, task_type, train_in_fp32

OUTPUTS_PER_TOKEN = ("start_logits", "end_logits")


class Prompts(MethodBase):
    """Trains N virtual tokens and the task's head; fields as in PEFT's `PromptLearningConfig`."""

    saves_adapter: ClassVar[bool] = True
    freezes_base: ClassVar[bool] = True

    num_virtual_tokens: Annotated[int, Field(ge=1, le=1000)] = 20
    """Virtual tokens in front of every text; they count against the model's window."""

    @property
    def zero_stages(self) -> tuple[int, ...]:
        """Not 3: to save the prompt, PEFT computes it on one rank, which needs whole weights."""
        return (0, 1, 2)

    @property
    def virtual_tokens(self) -> int:
        """Number of virtual tokens in front of every text."""
        return self.num_virtual_tokens

    @property
    def needs_peft_to_load(self) -> bool:
        """True: transformers refuses adapters that are prompts."""
        return True

    @abstractmethod
    def _config(self, **common: Any) -> Any:
        """Returns PEFT's configuration, made of `common` and the method's own options."""

    def wrap(self, model: Any, *, causal: bool, checkpointing: bool) -> Any:
        """Returns the frozen model with a trainable prompt in front and a trainable head."""
        from peft import get_peft_model

        shape = model.config.get_text_config()
        config = self._config(
            token_dim=shape.hidden_size,
            num_layers=shape.num_hidden_layers,
            num_attention_heads=shape.num_attention_heads,
            task_type=task_type(model, causal=causal),
            num_virtual_tokens=self.num_virtual_tokens,
            modules_to_save=head_modules(model) or None,
        )
        model.requires_grad_(False)
        on_meta = next(model.parameters()).is_meta
        wrapped = get_peft_model(model, config, low_cpu_mem_usage=on_meta)
        train_in_fp32(wrapped)
        wrapped.forward = _PromptForward(wrapped, self.num_virtual_tokens, per_token=causal)
        return wrapped


class PTuning(Prompts):
    """Trains virtual tokens through a small network (Liu et al. 2021, arXiv:2103.10385).

    The network starts from random weights and needs a learning rate of about 1e-3. With the 2e-5 of
    full fine-tuning the prompt stays noise; an encoder's head reads its first virtual token.
    """

    name: Literal["p_tuning"]
    """`p_tuning`."""
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    """Kind of the network that computes the virtual tokens."""
    encoder_hidden_size: Annotated[int, Field(ge=1, le=65_536)] = 128
    """Width of that network."""

    def _config(self, **common: Any) -> Any:
        from peft import PromptEncoderConfig

        return PromptEncoderConfig(
            encoder_reparameterization_type=self.encoder_reparameterization_type,
            encoder_hidden_size=self.encoder_hidden_size,
            **common,
        )


class PromptTuning(Prompts):
    """Trains virtual tokens directly (Lester et al. 2021, arXiv:2104.08691)."""

    name: Literal["prompt_tuning"]
    """`prompt_tuning`."""
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB"] = "SAMPLE_VOCAB"
    """Start from embeddings of random tokens (SAMPLE_VOCAB) or from random numbers (RANDOM)."""

    def _config(self, **common: Any) -> Any:
        from peft import PromptTuningConfig

        return PromptTuningConfig(prompt_tuning_init=self.prompt_tuning_init, **common)


class _PromptForward:
    """Forward pass of a PEFT model that passes token ids to the model instead of embeddings.

    PEFT's own forward passes embeddings. Then a decoder cannot tell padding from text and
    classifies by its output at the padding, and outputs per token are N longer than their labels.
    Here the first N ids are placeholders whose embeddings the prompt replaces, and outputs per
    token are those of the text alone.
    """

    def __init__(self, model: Any, tokens: int, *, per_token: bool) -> None:
        self.model = model
        self.tokens = tokens
        self.cut = (*OUTPUTS_PER_TOKEN, *(("logits",) if per_token else ()))

    def __call__(self, input_ids: Any, attention_mask: Any, **rest: Any) -> Any:
        """Returns the outputs for ids (B, S), of S tokens, computed with the prompt in front."""
        import torch

        count = self.tokens
        batch = len(input_ids)
        prompt = self.model.get_prompt(batch_size=batch)  # (B, N, H)

        def put_prompt(_module: Any, _inputs: Any, embedded: Any) -> Any:
            return torch.cat([prompt.to(embedded.dtype), embedded[:, count:]], dim=1)

        if rest.get("token_type_ids") is not None:
            kinds = rest["token_type_ids"]
            rest["token_type_ids"] = torch.cat([kinds.new_zeros(batch, count), kinds], dim=1)
        placeholders = input_ids[:, :1].expand(batch, count)  # a first token is never padding
        handle = self.model.word_embeddings.register_forward_hook(put_prompt)
        try:
            outputs = self.model.base_model(
                input_ids=torch.cat([placeholders, input_ids], dim=1),
                attention_mask=torch.cat(
                    [attention_mask.new_ones(batch, count), attention_mask], dim=1
                ),
                **rest,
            )
        finally:
            handle.remove()
        for name in self.cut:
            if name in outputs:
                outputs[name] = outputs[name][:, count:]
        return outputs
