"""Tests of saved models: each loads by transformers and PEFT alone, and answers as in the run."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import bert_folder, layout, llama_folder, recipe, run_plan, worker_context
from hpcft.core.files import write_record
from hpcft.core.records import ParameterCount, Staged, StagedInputs
from hpcft.training.context import WorkerContext
from hpcft.training.data.prepare import DataSummary
from hpcft.training.modes.model_card import how_to_load
from hpcft.training.modes.result import ModeResult
from hpcft.training.modes.saved_model import save_model
from hpcft.training.trainer.model import load_model

LABELS = ["dull", "fine", "<b>great</b>"]
DATA = {"files": {"train": "/secret/train.jsonl", "test": "/secret/test.jsonl"}}
TASKS: dict[str, dict[str, Any]] = {
    "classification": {"name": "classification", "labels": LABELS, "max_length": 32, "data": DATA},
    "question_answering": {"name": "question_answering", "max_length": 64, "doc_stride": 8,
                           "max_query_length": 16, "data": DATA},
    "instruction": {"name": "instruction", "prompt": "{q}", "completion": "{a}", "max_length": 32,
                    "data": DATA},
    "pretraining": {"name": "pretraining", "max_length": 32, "data": DATA},
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "head_only": {"name": "head_only"},
    "lora": {"name": "lora", "r": 2, "target_modules": "all-linear"},
    "dora": {"name": "lora", "r": 2, "target_modules": "all-linear", "use_dora": True},
    "qlora": {"name": "qlora", "r": 2, "target_modules": "all-linear"},
    "p_tuning": {"name": "p_tuning", "num_virtual_tokens": 3},
    "prompt_tuning": {"name": "prompt_tuning", "num_virtual_tokens": 3},
}
ENCODERS = [("classification", name) for name in METHODS]
ENCODERS += [("question_answering", name) for name in METHODS]
DECODERS = [("instruction", name) for name in METHODS if name != "head_only"]
DECODERS += [("classification", name) for name in METHODS]
CASES = [("bert", *case) for case in ENCODERS] + [("llama", *case) for case in DECODERS]
CASES += [("bert", "pretraining", "full")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny base models without a head."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        "bert": bert_folder(folder / "bert", head=False),
        "llama": llama_folder(folder / "llama"),
    }


class _Saver:
    """What `save_model` needs of a Trainer."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def save_model(self, folder: str) -> None:
        self.model.save_pretrained(folder)


def context_of(folder: Path, base: Path, task: str, method: str, **more: Any) -> WorkerContext:
    """The context of a run of one rank on a CPU."""
    made = recipe(
        name="film_stars", model={"path": str(base)}, task=TASKS[task], method=METHODS[method],
        description="how good a film is <script>alert(1)</script>", **more,
    )  # fmt: skip
    plan = run_plan(layout=layout(0), precision="fp32", accelerator="cpu", ds_config=None)
    folder.mkdir(parents=True)
    context = worker_context(folder, made, plan)
    write_record(context.paths.recipe, made)
    return context


def trained_and_saved(context: WorkerContext) -> tuple[Any, Any]:
    """A model with other weights than its base wherever it is trained; it is saved."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(context.recipe.model.path)
    tokenizer.mask_token = tokenizer.eos_token  # any of its tokens
    model = load_model(context, tokenizer).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    count = ParameterCount(total=9, trainable=9, added=0, largest_layer=0,
                           quantised=int(context.recipe.method.name == "qlora"))  # fmt: skip
    scores = {"accuracy": 0.9, "intervals": {"accuracy": (0.85, 0.94)}}
    summary = DataSummary(examples={"train": 70, "test": 40}, tokens={}, notes=["3 texts | cut"])
    save_model(context, _Saver(model), tokenizer, ModeResult(summary, count, scores))
    return model, tokenizer


def outputs_of(model: Any, inputs: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    names = ("logits", "start_logits", "end_logits", "prediction_logits", "seq_relationship_logits")
    return [outputs[name].float() for name in names if outputs.get(name) is not None]


def peft_class(task: str) -> Any:
    import peft

    kinds = {"classification": "SequenceClassification", "question_answering": "QuestionAnswering"}
    return getattr(peft, f"AutoPeftModelFor{kinds.get(task, 'CausalLM')}")


@pytest.mark.parametrize(("kind", "task", "method"), CASES)
def test_a_saved_model_answers_as_the_trained_one(
    kind: str, task: str, method: str, bases: dict[str, Path], workplace: Path
) -> None:
    """The Auto classes of transformers and PEFT load it with its labels from the folder alone."""
    import transformers

    context = context_of(workplace / "run", bases[kind], task, method)
    model, tokenizer = trained_and_saved(context)
    saved = context.paths.model
    inputs = tokenizer("a fine film", return_tensors="pt")
    wanted = outputs_of(model, inputs)
    is_adapter = context.recipe.method.saves_adapter
    is_prompt = context.recipe.method.virtual_tokens > 0
    loaders = [peft_class(task)] if is_adapter else []
    if not context.recipe.method.needs_peft_to_load:
        loaders.append(getattr(transformers, context.recipe.task.head().auto_class))
    for loader in loaders:
        loaded = loader.from_pretrained(saved)
        if task == "classification":
            assert loaded.config.id2label == dict(enumerate(LABELS)), loader
        got = outputs_of(loaded, inputs)
        if is_prompt and task != "classification":  # PEFT gives outputs of the virtual tokens too.
            got = [part[:, -wanted[0].shape[1] :] for part in got]
        # A base in 4 bits is loaded whole, so that the answers are near those of the run.
        tolerance = 2.0 if method == "qlora" else 1e-5
        for ours, theirs in zip(wanted, got, strict=True):
            assert torch.allclose(ours, theirs, atol=tolerance), (
                loader,
                (ours - theirs).abs().max(),
            )
    assert not list(saved.rglob("*.bin"))


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_pipeline_of_a_saved_classifier_names_the_labels(
    method: str, bases: dict[str, Path], workplace: Path
) -> None:
    from transformers import pipeline

    context = context_of(workplace / "run", bases["bert"], "classification", method)
    model, tokenizer = trained_and_saved(context)
    classify = pipeline("text-classification", model=str(context.paths.model))
    ((best, *_),) = classify(["a fine film"], top_k=None)
    logits = outputs_of(model, tokenizer("a fine film", return_tensors="pt"))[0][0]
    assert best["label"] == LABELS[int(logits.argmax())]
    assert best["score"] == pytest.approx(float(logits.softmax(-1).max()), abs=0.2)


def test_a_copy_that_follows_links_needs_the_base_no_more(
    bases: dict[str, Path], workplace: Path
) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    base = shutil.copytree(bases["bert"], workplace / "base")
    context = context_of(workplace / "run", base, "classification", "lora")
    model, tokenizer = trained_and_saved(context)
    copy = shutil.copytree(context.paths.model, workplace / "copy", symlinks=False)
    shutil.rmtree(base)
    shutil.rmtree(context.paths.folder)
    inputs = tokenizer("a fine film", return_tensors="pt")
    loaded = AutoModelForSequenceClassification.from_pretrained(copy)
    assert torch.allclose(outputs_of(loaded, inputs)[0], outputs_of(model, inputs)[0], atol=1e-5)
    assert AutoConfig.from_pretrained(copy).id2label == dict(enumerate(LABELS))


def test_an_adapter_of_a_staged_model_names_it_as_on_the_hub(
    bases: dict[str, Path], workplace: Path
) -> None:
    context = context_of(workplace / "run", bases["llama"], "instruction", "lora")
    staged = Staged(
        kind="model", name="us/tiny", revision="main", commit="c" * 40, folder=str(bases["llama"]),
        files={}, fingerprint="", staged_at=1.0,
    )  # fmt: skip
    write_record(context.paths.staged, StagedInputs(inputs={"model.path": staged}))
    trained_and_saved(context)
    adapter = json.loads((context.paths.model / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("us/tiny", "c" * 40)
    card = (context.paths.model / "README.md").read_text()
    assert "base_model: us/tiny\n" in card
    assert f"us/tiny at commit {'c' * 40}" in card


def test_a_saved_whole_model_uses_its_cache(bases: dict[str, Path], workplace: Path) -> None:
    """Training turns the cache of keys and values off; without it, generation is slow."""
    from transformers import AutoModelForCausalLM

    context = context_of(workplace / "run", bases["llama"], "instruction", "full")
    trained_and_saved(context)
    loaded = AutoModelForCausalLM.from_pretrained(context.paths.model)
    assert loaded.config.use_cache
    assert loaded.generation_config.use_cache is not False


# ---------------------------------------------------------------- the card


@pytest.mark.parametrize(
    ("kind", "task", "method", "printed"),
    [
        ("bert", "classification", "lora", "'label': '"),
        ("bert", "classification", "p_tuning", "\n"),
        ("bert", "question_answering", "dora", "\n"),
        ("bert", "question_answering", "p_tuning", "\n"),
        ("bert", "question_answering", "full", "\n"),
        ("llama", "instruction", "prompt_tuning", "\n"),
        ("bert", "pretraining", "full", "token_str"),
        ("llama", "instruction", "lora", "generated_text"),
    ],
)
def test_code_of_the_card_runs(
    kind: str,
    task: str,
    method: str,
    printed: str,
    bases: dict[str, Path],
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    context = context_of(workplace / "run", bases[kind], task, method)
    trained_and_saved(context)
    card = (context.paths.model / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(context.paths.folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT's, of position ids that it replaces
        exec(code, {})
    assert printed in capfd.readouterr().out


@pytest.mark.parametrize("number", [2, 3])
def test_code_of_the_card_of_a_regression_runs(
    number: int, bases: dict[str, Path], workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With two labels, the regression has one row of coefficients."""
    from safetensors.torch import save_file

    task = {**TASKS["classification"], "labels": LABELS[:number]}
    made = recipe(model={"path": str(bases["bert"])}, task=task, method={"name": "features"})
    saved = shutil.copytree(bases["bert"], workplace / "model")
    rows = 1 if number == 2 else number
    intercept = torch.zeros(rows)
    intercept[-1] = 1e6  # decides for the last label
    regression = {"coef": torch.ones(rows, 32), "intercept": intercept,
                  "classes": torch.arange(number)}  # fmt: skip
    save_file(regression, saved / "logistic_regression.safetensors")
    (code,) = re.findall(r"```python\n(.*?)```", how_to_load(made, None), re.DOTALL)
    exec(code, {})
    assert capfd.readouterr().out.strip() == repr([LABELS[number - 1]])


def test_card_tells_recipe_data_metrics_and_limits(bases: dict[str, Path], workplace: Path) -> None:
    context = context_of(workplace / "run", bases["bert"], "classification", "lora")
    trained_and_saved(context)
    card = (context.paths.model / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\npipeline_tag: text-classification\n")
    assert "| accuracy | 0.9000 | 0.8500 to 0.9400 |" in card
    assert "n = 40" in card
    assert "train.jsonl, test.jsonl: 70 train, 40 test" in card
    assert "- 3 texts \\| cut" in card
    (written,) = re.findall(r"```json\n(.*?)\n```", card, re.DOTALL)
    assert json.loads(written)["task"]["labels"] == LABELS
    assert "/secret" not in card, "paths of the user's machine are nobody else's business"
    assert str(bases["bert"]) not in card
    shown = card[: card.index("## Recipe")]
    assert "<script>" not in shown
    assert "<b>" not in shown


def test_transformers_alone_leaves_a_part_of_dora_out(
    bases: dict[str, Path], workplace: Path
) -> None:
    """Once this fails, `needs_peft_to_load` of LoRA can go."""
    from transformers import AutoModelForCausalLM

    context = context_of(workplace / "run", bases["llama"], "instruction", "dora")
    model, tokenizer = trained_and_saved(context)
    inputs = tokenizer("a fine film", return_tensors="pt")
    loaded = AutoModelForCausalLM.from_pretrained(context.paths.model)
    assert not torch.allclose(outputs_of(loaded, inputs)[0], outputs_of(model, inputs)[0], atol=0.1)
