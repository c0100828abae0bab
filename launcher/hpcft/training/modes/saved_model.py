"""Saves the trained model so that transformers and PEFT load it from its folder alone.

A whole model is saved with its configuration and label names. An adapter is saved without its base
model, which PEFT and transformers load from the name in `adapter_config.json`, with the
configuration that they find there. That one knows neither the labels nor their number. So the
folder of an adapter with a head also gets a configuration with labels and links to the base model's
files:

- `AutoModelFor…` and `pipeline` take a folder with configuration, weights and adapter as a whole
  (of those adapters that transformers knows: `needs_peft_to_load`).
- `AutoPeftModelFor…` loads the folder `base`, whose files are links too.

A copy that follows links (`cp -rL`) needs the base model no more. Other adapters name the base by
its hub name and commit, or by its folder.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from hpcft.config.hf_model import build_model_config
from hpcft.core.files import read_record_if_exists
from hpcft.core.paths import RunPaths
from hpcft.core.records import Staged, StagedInputs
from hpcft.training.context import WorkerContext
from hpcft.training.modes.model_card import model_card
from hpcft.training.modes.result import ModeResult

BASE_FOLDER = "base"
"""Folder of the base model in the folder of an adapter with a head."""


def save_model(context: WorkerContext, trainer: Any, tokenizer: Any, result: ModeResult) -> None:
    """Saves the final weights, or the adapter, as safetensors; renames the folder when complete.

    Args:
        context: the training process; all ranks take part.
        trainer: the run's Trainer.
        tokenizer: the run's tokenizer.
        result: what the card says of the model.
    """
    paths, method = context.paths, context.recipe.method
    partial = paths.folder / "model.part"
    trainer.save_model(str(partial))
    if not context.rank.is_first:
        return
    tokenizer.save_pretrained(partial)
    # A pickle, which is unsafe to load; recipe.json has the same values.
    (partial / "training_args.bin").unlink(missing_ok=True)
    base = staged_base(paths)
    if not method.saves_adapter:
        _restore_cache_use(partial / "config.json", context)
    elif not method.extracts_features:
        _complete_adapter(partial, context, base, trainer.model, tokenizer)
    card = model_card(paths, context.recipe, result, base)
    (partial / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(paths.model, ignore_errors=True)  # An earlier attempt may have saved one.
    os.replace(partial, paths.model)


def staged_base(paths: RunPaths) -> Staged | None:
    """Returns the hub model that the run started from; None if it is a local or a new one."""
    staged = read_record_if_exists(paths.staged, StagedInputs)
    return staged.inputs.get("model.path") if staged else None


def _restore_cache_use(file: Path, context: WorkerContext) -> None:
    """Lets a saved model use its cache of keys and values, which training turns off."""
    before = build_model_config(context.recipe.model, context.recipe.task).to_dict()
    content = json.loads(file.read_text(encoding="utf-8"))
    if "use_cache" in content:
        content["use_cache"] = before.get("use_cache", True)
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _complete_adapter(
    folder: Path, context: WorkerContext, base: Staged | None, model: Any, tokenizer: Any
) -> None:
    """Adds to an adapter what it needs to be loaded: labels, and the place of its base model."""
    recipe, paths = context.recipe, context.paths
    source = Path(recipe.model.path or paths.prepared / "model").absolute()
    config_file = folder / "adapter_config.json"
    adapter = json.loads(config_file.read_text(encoding="utf-8"))
    if recipe.task.head().config:
        config = build_model_config(recipe.model, recipe.task)
        config.pad_token_id = tokenizer.pad_token_id
        config.architectures = [type(model.get_base_model()).__name__]
        config.save_pretrained(folder)
        _link_weights(source, folder)
        adapter["base_model_name_or_path"] = str(paths.model.absolute() / BASE_FOLDER)
    elif base:
        adapter |= {"base_model_name_or_path": base.name, "revision": base.commit}
    else:
        adapter["base_model_name_or_path"] = str(source)
    text = json.dumps(adapter, indent=2, sort_keys=True) + "\n"
    config_file.write_text(text, encoding="utf-8")


def _link_weights(source: Path, folder: Path) -> None:
    """Links the base model's weights into an adapter's folder, and all of them into `base`."""
    inner = folder / BASE_FOLDER
    inner.mkdir()
    for file in sorted(source.glob("model*.safetensors*")):
        (folder / file.name).symlink_to(file)
        (inner / file.name).symlink_to(Path("..", file.name))
    (inner / "config.json").symlink_to(Path("..", "config.json"))
