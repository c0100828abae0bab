"""Writes the card of a trained model: its origin, its metrics, its limits, and how to load it."""

from __future__ import annotations

import importlib.metadata
import io
import json
from pathlib import Path
from typing import Any

from hpcft.config.recipe import local_path_fields, value_at
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.files import read_record
from hpcft.core.markdown import plain_text, table
from hpcft.core.paths import RunPaths
from hpcft.core.records import Staged
from hpcft.core.units import format_count
from hpcft.metrics import metric_info, metric_values
from hpcft.training.modes.result import VERSIONS, ModeResult

# How to load each kind of model, run in the folder that `model` lies in. A task's Auto class says
# which kind it is.
_LOADING = {
    "AutoModelForSequenceClassification": (
        "text-classification",
        """\
from transformers import pipeline

classify = pipeline("text-classification", model="model", tokenizer="model")
print(classify({inputs}))
""",
    ),
    "AutoModelForQuestionAnswering": (
        "question-answering",
        """\
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("model")
model = AutoModelForQuestionAnswering.from_pretrained("model").eval()
inputs = tokenizer({inputs}, return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
first, last = (int(scores.argmax()) for scores in (outputs.start_logits, outputs.end_logits))
print(tokenizer.decode(inputs["input_ids"][0, first : last + 1]))
""",
    ),
    "AutoModelForCausalLM": (
        "text-generation",
        """\
from transformers import pipeline

complete = pipeline("text-generation", model="model", tokenizer="model")
print(complete({inputs}, max_new_tokens=20, return_full_text=False))
""",
    ),
    "AutoModelForPreTraining": (
        "fill-mask",
        """\
from transformers import pipeline

fill = pipeline("fill-mask", model="model", tokenizer="model")
print(fill(f"a text with a {{fill.tokenizer.mask_token}} in it"))
""",
    ),
}

_LOADING_BY_PEFT = """\
import torch
from peft import AutoPeft{auto_class} as AutoPeftModel
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("model")
model = AutoPeftModel.from_pretrained("model").eval()
inputs = tokenizer({inputs}, return_tensors="pt")
with torch.no_grad():
{use}"""
_USING_BY_PEFT = {
    "AutoModelForSequenceClassification": """\
    logits = model(**inputs).logits
print(model.config.id2label[int(logits.argmax())])
""",
    "AutoModelForQuestionAnswering": """\
    outputs = model(**inputs)
scores = (outputs.start_logits[0, {virtual}:], outputs.end_logits[0, {virtual}:])
first, last = (int(score.argmax()) for score in scores)
print(tokenizer.decode(inputs["input_ids"][0, first : last + 1]))
""",
    "AutoModelForCausalLM": """\
    (tokens,) = model.generate(**inputs, max_new_tokens=20)
print(tokenizer.decode(tokens, skip_special_tokens=True))
""",
}

_LOADING_FEATURES = """\
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("model")
encoder = AutoModel.from_pretrained({base!r}).eval()
with safe_open("model/logistic_regression.safetensors", "pt") as file:
    coef, intercept, classes = map(file.get_tensor, ("coef", "intercept", "classes"))
labels = {labels!r}
inputs = tokenizer({inputs}, return_tensors="pt", truncation=True, max_length={max_length})
with torch.no_grad():
    hidden = encoder(**inputs).last_hidden_state[:, 0]
scores = hidden.double() @ coef.T.double() + intercept
best = scores.argmax(-1) if len(classes) > 2 else (scores[:, 0] > 0).long()
print([labels[index] for index in classes[best].tolist()])
"""


def model_card(paths: RunPaths, recipe: FullRecipe, result: ModeResult, base: Staged | None) -> str:
    """Returns the text of a model's `README.md`.

    Args:
        paths: the run's files.
        recipe: the recipe, with the folders of staged inputs.
        result: metrics and measurements of the run.
        base: the hub model that was trained; None for a local or a new one.
    """
    written = read_record(paths.recipe, FullRecipe)
    sections = [
        _front_matter(recipe, base),
        f"# {plain_text(recipe.name)}",
        table(("", ""), _facts(paths, written, result, base)),
        f"## Metrics\n\n{_metrics(recipe, result)}",
        f"## How to load it\n\n{how_to_load(recipe, base)}",
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(recipe, result, base)),
        f"## Recipe\n\n```json\n{_shareable(written)}\n```",
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _front_matter(recipe: FullRecipe, base: Staged | None) -> str:
    """Returns the YAML head by which the hub and its libraries find out what the model is."""
    from ruamel.yaml import YAML  # imported here, because only this function needs it in a job

    is_adapter = recipe.method.saves_adapter and not recipe.method.extracts_features
    content: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": _LOADING[recipe.task.head().auto_class][0],
        **({"base_model": base.name} if base else {}),
        "tags": ["hpcft", recipe.task.name, recipe.method.name],
    }
    stream = io.StringIO()
    YAML().dump(content, stream)
    return f"---\n{stream.getvalue()}---"


def _facts(
    paths: RunPaths, recipe: FullRecipe, result: ModeResult, base: Staged | None
) -> list[tuple[str, str]]:
    """Returns what the model is and what it comes from, as rows of two cells."""
    data, parameters = recipe.task.data, result.parameters
    examples = ", ".join(f"{count:,} {split}" for split, count in result.summary.examples.items())
    names = [data.path or "", data.name or "", *(data.files or {}).values()]
    files = ", ".join(dict.fromkeys(Path(n).name if n.startswith("/") else n for n in names if n))
    labels = recipe.task.head().config.get("id2label", {})
    options = recipe.method.model_dump(mode="json", exclude={"name", "adapter_path"})
    method = ", ".join([recipe.method.name, *(f"{k} {v}" for k, v in options.items())])
    rows = [
        ("what", recipe.description),
        ("task", recipe.task.name),
        ("labels", ", ".join(map(str, labels.values()))),
        ("base model", f"{base.name} at commit {base.commit}" if base else _local_base(recipe)),
        ("method", method),
        ("trained", f"{format_count(parameters.trainable)} of {format_count(parameters.total)} "
                    "parameters"),
        ("data", f"{files}: {examples}"),
        ("made by", f"run {paths.folder.name} with " + ", ".join(
            f"{package} {importlib.metadata.version(package)}" for package in VERSIONS)),
    ]  # fmt: skip
    return [(name, text) for name, text in rows if text]


def _local_base(recipe: FullRecipe) -> str:
    path = recipe.model.path
    return f"the local folder {Path(path).name}" if path else "none: the weights are new"


def _metrics(recipe: FullRecipe, result: ModeResult) -> str:
    """Returns the metrics of the scored split as a table, with what each means."""
    split = recipe.evaluation.split
    values, before = metric_values(result.metrics), metric_values(result.before)
    intervals = result.metrics.get("intervals", {})
    header = ["metric", "value", "95 % interval", *(["before training"] if before else []), "is"]
    lines = []
    for name, value in values.items():
        low_high = [f"{end:.4f}" for end in intervals.get(name, ())]
        info = metric_info(name)
        lines.append(
            [
                name,
                f"{value:.4f}",
                " to ".join(low_high),
                *([f"{before[name]:.4f}" if name in before else ""] if before else []),
                info.description if info else "",
            ]
        )
    count = result.summary.examples.get(split, 0)
    return f"Of the split `{split}`, n = {count:,} examples.\n\n{table(header, lines)}"


def how_to_load(recipe: FullRecipe, base: Staged | None) -> str:
    """Returns code that loads the model, to be run in the folder that `model` lies in."""
    auto_class = recipe.task.head().auto_class
    is_pair = bool(getattr(recipe.task, "text_pair", None))
    needs_two = is_pair or auto_class == "AutoModelForQuestionAnswering"
    inputs = '"a text", "another text"' if needs_two else '"a text"'
    if recipe.method.extracts_features:
        labels = [*recipe.task.head().config["id2label"].values()]
        name = base.name if base else recipe.model.path or "BASE"
        code = _LOADING_FEATURES.format(
            base=name, labels=labels, inputs=inputs, max_length=recipe.task.max_length
        )
    elif recipe.method.needs_peft_to_load:
        use = _USING_BY_PEFT[auto_class].format(virtual=recipe.method.virtual_tokens)
        model_class = auto_class.removeprefix("Auto")
        code = _LOADING_BY_PEFT.format(auto_class=model_class, inputs=inputs, use=use)
    else:
        pair = '{"text": "a text", "text_pair": "another text"}'
        kind, code = _LOADING[auto_class]
        code = code.format(inputs=pair if is_pair and kind == "text-classification" else inputs)
    return f"In the folder that this folder `model` lies in:\n\n```python\n{code}```"


def _limits(recipe: FullRecipe, result: ModeResult, base: Staged | None) -> list[str]:
    """Returns what the metrics do not say, and what the model needs."""
    split = recipe.evaluation.split
    lines = [
        f"The metrics are of texts like those of the split `{split}`; other texts may give others. "
        "An interval tells how far a metric would move with other examples of that kind, not with "
        "another seed of training.",
        f"It was trained and scored with at most {recipe.task.max_length} tokens of a text.",
    ]
    method = recipe.method
    if method.saves_adapter:
        name = plain_text(base.name if base else _local_base(recipe))
        lines.append(
            f"These files hold what was trained alone and need the base model ({name}). If it is "
            "elsewhere: `PeftModel.from_pretrained(base_model, folder)`, or correct "
            "`base_model_name_or_path` in `adapter_config.json`."
            if not method.extracts_features
            else f"These files hold the regression alone; its features are those of {name}."
        )
        if recipe.task.head().config and not method.extracts_features:
            lines.append(
                "The other weights here are links to the base model's files: copy this folder with "
                "`cp -rL` to take them along."
            )
    if method.needs_peft_to_load:
        lines.append(
            "Load it by PEFT, as above: `AutoModel…` and `pipeline` of transformers do not know "
            "this kind of adapter, and may leave a part of it out and not say so."
        )
    if method.virtual_tokens:
        lines.append(
            f"{method.virtual_tokens} virtual tokens stand in front of every text. Score texts one "
            "by one: in a decoder PEFT takes padding for text. Outputs per token begin with those "
            "of the virtual tokens."
        )
    if result.parameters.quantised:
        lines.append(
            "It was trained over a base model in 4 bits. Over one in 16 or 32 bits, as it is "
            "loaded above, its answers differ a little."
        )
    return lines + [plain_text(note) for note in result.summary.notes]


def _shareable(recipe: FullRecipe) -> str:
    """Returns the recipe as JSON, with the names of local files and folders without their place."""
    content = recipe.model_dump(mode="json", exclude_defaults=True)
    for loc in local_path_fields(content):
        text = value_at(content, loc)
        if isinstance(text, str) and text.startswith("/"):
            value_at(content, loc[:-1])[loc[-1]] = Path(text).name
    return json.dumps(content, indent=2, ensure_ascii=False)
