"""The model of a run, loaded as its method and plan ask: sharded as it loads, or in 4 bits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import set_seed

from hpcft.config.hf_model import auto_model_class, build_model_config
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.errors import DataError
from hpcft.core.paths import RunPaths
from hpcft.core.records import ModelFacts, ParameterCount, Plan
from hpcft.tasks import packing


def load_model(paths: RunPaths, recipe: FullRecipe, plan: Plan, tokenizer: Any) -> Any:
    """The model, ready to be trained.

    Under ZeRO-3 the DeepSpeed configuration has to be alive (in `TrainingArguments`) by now:
    `from_pretrained` then shards each weight as it loads, and no rank holds the whole model.
    """
    config = build_model_config(recipe.model, recipe.task)
    config.pad_token_id = tokenizer.pad_token_id
    config.use_cache = False
    source: str | Path = recipe.model.path or paths.prepared / "model"
    set_seed(recipe.train.seed)  # a new head is drawn alike on every rank
    try:
        model, found = auto_model_class(recipe.task).from_pretrained(
            source,
            config=config,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=packing.register_attention()
            if recipe.packs(plan.facts.model_type)
            else recipe.model.attn_implementation,
            **recipe.method.load_options(plan.precision, plan.layout.zero_stage),
        )
    except OSError as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"model: {source} cannot be loaded: {first}") from None
    recipe.method.check_loaded(found["missing_keys"])
    if plan.layout.zero_stage == 3 and not all(hasattr(p, "ds_id") for p in model.parameters()):
        raise RuntimeError("the model was not sharded while it was loaded")
    checkpointing = plan.layout.gradient_checkpointing
    return recipe.method.wrap(model, causal=recipe.task.causal, checkpointing=checkpointing)


@contextlib.contextmanager
def inference_model(
    paths: RunPaths, recipe: FullRecipe, plan: Plan, tokenizer: Any
) -> Iterator[Any]:
    """The model on this rank's device, for forward passes alone."""
    if plan.ds_config is None:
        model = load_model(paths, recipe, plan, tokenizer).eval()
        # 4-bit weights are made where they are to be.
        yield model if recipe.method.loads_on_device else model.to(plan.accelerator)
        return
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    alive = HfDeepSpeedConfig(plan.ds_config)  # `from_pretrained` looks for one
    model = load_model(paths, recipe, plan, tokenizer).eval()
    del alive
    # Without an optimizer the engine only gathers weights, by hooks on the modules.
    engine, *_ = deepspeed.initialize(model=model, config=plan.ds_config)
    yield engine.module
    engine.destroy()


def check_parameter_count(model: Any, facts: ModelFacts) -> ParameterCount:
    """Parameters of the model as loaded, under ZeRO-3 and in 4 bits too.

    Raises:
        DataError: they are not those that were planned with.
    """
    total = trainable = 0
    for parameter in model.parameters():
        # ZeRO-3 leaves an empty stub and keeps the size beside; 4-bit storage is packed.
        size = int(getattr(parameter, "ds_numel", parameter.numel()))
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            size = int(state.shape.numel())
        total += size
        trainable += size if parameter.requires_grad else 0
    planned = facts.parameters
    if (total, trainable) != (planned.total, planned.trainable):
        raise DataError(
            f"the model has {total:,} parameters, {trainable:,} of them trained, but was planned "
            f"with {planned.total:,} and {planned.trainable:,}: correct model.config"
        )
    return planned
