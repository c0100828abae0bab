"""Loads the model of a run as its method and plan require: sharded, or in 4 bits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import set_seed

from hpcft.config.hf_model import auto_model_class, build_model_config
from hpcft.core.errors import DataError, first_line
from hpcft.core.records import ModelFacts, ParameterCount
from hpcft.methods.heads import head_modules
from hpcft.planning.memory.meta_model import build_on_meta
from hpcft.tasks import packing
from hpcft.training.context import WorkerContext


def load_model(context: WorkerContext, tokenizer: Any) -> Any:
    """Loads the model, ready to be trained.

    Under ZeRO-3 the DeepSpeed configuration has to be alive by now, in `TrainingArguments`:
    `from_pretrained` then shards each weight as it loads, and no rank holds the whole model.

    Args:
        context: the training process.
        tokenizer: the run's tokenizer.

    Raises:
        DataError: the model's files cannot be loaded.
    """
    recipe, plan = context.recipe, context.plan
    config = build_model_config(recipe.model, recipe.task)
    config.pad_token_id = tokenizer.pad_token_id
    config.use_cache = False
    source: str | Path = recipe.model.path or context.paths.prepared / "model"
    set_seed(recipe.train.seed)  # A new head gets the same weights on every rank.
    # The head's names are read from a model without weights, before any weight is quantised.
    is_quantised = recipe.method.loads_on_device
    heads = head_modules(build_on_meta(recipe.model, recipe.task)) if is_quantised else ()
    try:
        model, loading_info = auto_model_class(recipe.task).from_pretrained(
            source,
            config=config,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=packing.register_attention()
            if recipe.packs(plan.facts.model_type)
            else recipe.model.attn_implementation,
            **recipe.method.load_options(plan.precision, plan.layout.zero_stage, heads),
        )
    except OSError as error:
        raise DataError(f"model: {source} cannot be loaded: {first_line(error)}") from None
    recipe.method.check_missing_weights(loading_info["missing_keys"])
    if plan.layout.zero_stage == 3 and not all(hasattr(p, "ds_id") for p in model.parameters()):
        raise RuntimeError("the model was not sharded while it was loaded")
    checkpointing = plan.layout.gradient_checkpointing
    return recipe.method.wrap(model, causal=recipe.task.causal, checkpointing=checkpointing)


@contextlib.contextmanager
def inference_model(context: WorkerContext, tokenizer: Any) -> Iterator[Any]:
    """Loads the model onto this rank's device, for forward passes alone.

    Args:
        context: the training process.
        tokenizer: the run's tokenizer.
    """
    plan = context.plan
    if plan.ds_config is None:
        model = load_model(context, tokenizer).eval()
        # 4-bit weights cannot be moved: they are loaded onto the device.
        is_on_device = context.recipe.method.loads_on_device
        yield model if is_on_device else model.to(plan.accelerator)
        return
    import deepspeed  # imported here, because it takes seconds, and most runs do without it
    from transformers.integrations import HfDeepSpeedConfig

    # `from_pretrained` shards the model while an object of this class is alive.
    ds_config = HfDeepSpeedConfig(plan.ds_config)
    model = load_model(context, tokenizer).eval()
    del ds_config
    # Without an optimizer the engine only gathers weights, by hooks on the modules.
    engine, *_ = deepspeed.initialize(model=model, config=plan.ds_config)
    yield engine.module
    engine.destroy()


def check_parameter_count(model: Any, facts: ModelFacts) -> ParameterCount:
    """Counts the parameters of the loaded model, under ZeRO-3 and in 4 bits too.

    Raises:
        DataError: the numbers are not those of the plan.
    """
    total = trainable = 0
    for parameter in model.parameters():
        # ZeRO-3 leaves an empty tensor with the size as an attribute; 4-bit storage is packed.
        size = int(getattr(parameter, "ds_numel", parameter.numel()))
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            size = int(state.shape.numel())
        total += size
        trainable += size if parameter.requires_grad else 0
    planned = facts.parameters
    if (total, trainable) != (planned.total, planned.trainable):
        raise DataError(
            f"the loaded model has {total:,} parameters, {trainable:,} of them trained, but the "
            f"plan counts {planned.total:,} and {planned.trainable:,}: correct model.config in the "
            "recipe, then hpcft submit"
        )
    return planned
