"""Methods: exact parameter counts, prompts beside padding, and runs of adapters and features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import Cli, bert_folder, film_rows, write_rows
from hpcft.config.recipe import load_recipe
from hpcft.core.errors import InputError
from hpcft.methods.head_only import HeadOnly
from hpcft.methods.lora import LoRA
from hpcft.methods.prompts import PromptTuning, PTuning
from hpcft.planning import parameter_table

# ---------------------------------------------------------------- parameters

FULL = ["method.name=full"]
LORA8 = ["method.name=lora", "method.r=8"]


def table(name: str, overrides: list[str]) -> dict[str, parameter_table.ModuleGroup]:
    (point,) = load_recipe(name, overrides)
    recipe = point.recipe
    groups = parameter_table.module_groups(recipe.model, recipe.task, recipe.method)
    return {group.name: group for group in [*groups, parameter_table.sum_groups(groups)]}


@pytest.mark.parametrize(
    ("name", "overrides", "total", "trainable", "added"),
    [
        # R2: the bare model has 109,482,240; the head for pairs and words adds the rest.
        ("bert_wikitext2_pretrain", [], 110_106_428, 110_106_428, 0),
        ("bert_sst2", [], 109_483_778, 109_483_778, 1_538),
        ("bert_squadv2", [], 108_893_186, 108_893_186, 1_538),
        # R1
        ("distilbert_imdb", [], 66_362_880 + 592_130, 66_362_880 + 592_130, 592_130),
        ("distilbert_imdb_features", [], 66_362_880, 0, 0),
        ("gemma7b_full", [], 8_537_680_896, 8_537_680_896, 0),
        ("gemma2b_full", [], 2_506_172_416, 2_506_172_416, 0),
        ("mistral7b_imdb_sft", FULL, 7_241_732_096, 7_241_732_096, 0),
        # R3's 4.6 million are LoRA on all linear layers; PEFT's own choice has 1,839,107.
        ("roberta_mnli_full", [], 355_362_819, 355_362_819, 1_052_675),
        ("roberta_mnli_full", LORA8, 355_362_819 + 1_839_107, 1_839_107, 1_839_107),
        ("roberta_mnli_lora", [], 355_362_819 + 4_591_619, 4_591_619, 4_591_619),
        ("roberta_mnli_ptuning", [], 355_362_819 + 1_352_963, 1_352_963, 1_352_963),
        ("llama3_8b_mnli_qlora", [], 7_504_936_960 + 54_538_240, 54_538_240, 54_538_240),
        # R4
        ("llama32_1b_sst2_head", [], 1_235_814_400 + 4_096, 4_096, 4_096),
        ("llama32_1b_squad_head", [], 1_235_814_400 + 4_098, 4_098, 4_098),
        # R5
        ("llama3_8b_winogrande_full", [], 8_030_261_248, 8_030_261_248, 0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parameter_counts_equal_those_of_the_reports(
    name: str, overrides: list[str], total: int, trainable: int, added: int
) -> None:
    all_ = table(name, overrides)["all"]
    assert (all_.total, all_.trainable, all_.added) == (total, trainable, added)
    assert all_.frozen == total - trainable


def test_module_groups_counts_parameters_by_module() -> None:
    bert = table("bert_wikitext2_pretrain", [])
    base = [group for name, group in bert.items() if name.startswith("bert.")]
    assert sum(group.total for group in base) == 109_482_240
    assert bert["bert.encoder.layer × 12"].total == 12 * 7_087_872
    # The report counts a vocabulary of 256,128; the published model has 256,000.
    gemma = table("gemma7b_full", ["model.config.vocab_size=256128"])
    assert gemma["model.embed_tokens"].total == 786_825_216
    assert gemma["model.layers × 28"].total + gemma["model.norm"].total == 7_751_248_896
    prompts = table("roberta_mnli_ptuning", [])
    assert prompts["prompt_encoder"].trainable == 300_288
    assert prompts["classifier.modules_to_save"].trainable == 1_052_675
    assert prompts["roberta.encoder.layer × 24"].trainable == 0


def test_params_prints_a_row_for_each_module(tiny: Path, cli: Cli) -> None:
    said = cli("params", tiny, "-o", "method.name=head_only")
    assert said.code == 0, said.err
    header, *lines = [line.split("\t") for line in said.out.splitlines()]
    assert header == ["module", "total", "trainable", "frozen", "added"]
    assert lines[-2] == ["classifier", "66", "66", "0", "66"]
    assert lines[-1][0] == "all"
    shown = cli("params", tiny, "--json", "-o", "sweep.grid={method.name: [full, lora]}")
    full, lora = shown.json
    assert full[-1]["frozen"] == 0
    assert lora[-1]["trainable"] == lora[-1]["added"] > 66
    assert cli("params", tiny, "-o", "model.config.hidden_sise=1").code == 2


# ---------------------------------------------------------------- refused combinations


def test_head_only_refuses_a_model_without_head(cli: Cli) -> None:
    """A tied output layer is not a parameter of its own, so that nothing would be trained."""
    said = cli("params", "gemma7b_full", "-o", "method.name=head_only")
    assert said.code == 2
    assert "GemmaForCausalLM has no head beside the pretrained model" in said.err
    assert "question_answering" in said.err
    assert "Traceback" not in said.err


def test_features_refuses_a_decoder(cli: Cli) -> None:
    said = cli("params", "llama32_1b_sst2_head", "-o", "method.name=features")
    assert "LlamaForSequenceClassification is not an encoder with a classifier" in said.err


@pytest.mark.parametrize("change", ["save_strategy=epoch", "load_best_model_at_end=true"])
def test_features_refuses_options_that_need_checkpoints(change: str) -> None:
    overrides = ["method.name=features", f"train.{change}"]
    with pytest.raises(InputError, match="the method features saves no checkpoints to resume from"):
        load_recipe("distilbert_imdb_trainer", overrides)


# ---------------------------------------------------------------- one small model of each kind


SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip
DISTIL = {"vocab_size": 50, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
KINDS = {"bert": SMALL, "roberta": SMALL, "distilbert": DISTIL, "llama": SMALL}
PROMPTS = [
    PTuning(name="p_tuning", num_virtual_tokens=4, encoder_hidden_size=16),
    PTuning(name="p_tuning", num_virtual_tokens=4, encoder_hidden_size=16,
            encoder_reparameterization_type="LSTM"),
    PromptTuning(name="prompt_tuning", num_virtual_tokens=4),
]  # fmt: skip


def small(kind: str, auto_class: str, **fields: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **KINDS[kind], **fields)
    config.pad_token_id = 1
    return getattr(transformers, auto_class).from_config(config).eval()


def batch() -> dict[str, torch.Tensor]:
    """Returns two texts, the second padded after six tokens."""
    torch.manual_seed(1)
    ids = torch.randint(3, 50, (2, 10))
    mask = torch.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


CLASSIFIER, SPANS = "AutoModelForSequenceClassification", "AutoModelForQuestionAnswering"


@pytest.mark.parametrize("method", PROMPTS, ids=lambda m: f"{m.name}")
@pytest.mark.parametrize("kind", KINDS)
def test_prompt_outputs_do_not_depend_on_padding(kind: str, method: Any) -> None:
    """PEFT's own forward pass agrees, except that a decoder there depends on the padding."""
    model = method.wrap(small(kind, CLASSIFIER), causal=False, checkpointing=False).eval()
    padded = batch()
    alone = {name: value[1:, :6] for name, value in padded.items()}
    logits = model(**padded).logits
    assert torch.allclose(logits[1], model(**alone).logits[0], atol=1e-6)
    if kind != "llama":
        assert torch.allclose(logits, type(model).forward(model, **padded).logits, atol=1e-6)
    else:
        single = type(model).forward(model, **alone).logits
        assert torch.allclose(logits[1], single[0], atol=1e-6)


def test_prompt_outputs_per_token_are_as_long_as_the_text() -> None:
    method = PROMPTS[0]
    spans = method.wrap(small("bert", SPANS), causal=False, checkpointing=False)(**batch())
    assert spans.start_logits.shape == spans.end_logits.shape == (2, 10)
    causal = method.wrap(small("llama", "AutoModelForCausalLM"), causal=True, checkpointing=True)
    assert causal(**batch()).logits.shape == (2, 10, 50)


@pytest.mark.process
@pytest.mark.parametrize(
    "method",
    [
        *PROMPTS,
        HeadOnly(name="head_only"),
        LoRA(name="lora", r=2, target_modules="all-linear"),
        LoRA(name="lora", r=2, target_modules="all-linear", use_dora=True),
    ],
    ids=lambda m: m.name + ("-dora" if getattr(m, "use_dora", False) else ""),
)
@pytest.mark.parametrize("kind", KINDS)
def test_training_changes_the_trainable_parameters_and_no_others(kind: str, method: Any) -> None:
    model = method.wrap(
        small(kind, CLASSIFIER).to(torch.bfloat16), causal=False, checkpointing=False
    )
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trained.values())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(2):  # LoRA's A has no gradient before B has moved
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**batch()).logits
        torch.nn.functional.cross_entropy(logits.float(), torch.tensor([0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(trained)
    head = {"roberta": "out_proj", "llama": "score"}.get(kind, "classifier")
    assert any(head in name for name in moved)
    if getattr(method, "use_dora", False):
        assert any("magnitude" in name for name in moved)


# ---------------------------------------------------------------- real runs


def _recipe(folder: Path, method: str, **resources: int) -> Path:
    rows = film_rows(24)
    write_rows(folder / "d.jsonl", rows)
    write_rows(folder / "t.jsonl", rows)
    path = folder / "m.yaml"
    layout = {"gpus_per_node": 2, "time_min": 10, **resources}
    path.write_text(f"""\
name: tuned
model: {{ path: base }}
task:
  name: classification
  data: {{ files: {{ train: d.jsonl, test: t.jsonl }} }}
  labels: [bad, good]
  max_length: 32
method: {method}
train: {{ global_batch_size: 16, max_steps: 100, learning_rate: 1e-2, seed: 0 }}
resources: {json.dumps(layout)}
""")
    return path


def _trained_bert(folder: Path) -> None:
    """Writes a BERT that is trained to tell good from bad, and its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    bert_folder(folder, layers=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).train()
    inputs = tokenizer([row["text"] for row in film_rows(24)], padding=True, return_tensors="pt")
    truth = torch.tensor([row["label"] == "good" for row in film_rows(24)]).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        torch.nn.functional.cross_entropy(model(**inputs).logits, truth).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def _result(folder: Path) -> tuple[Path, dict[str, Any]]:
    (run,) = (folder / "runs/tuned").glob("*")
    return run, json.loads((run / "result.json").read_text())


def _encoded(run: Path) -> tuple[dict[str, torch.Tensor], list[int]]:
    from transformers import AutoTokenizer

    rows = film_rows(24)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    encoded = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    return dict(encoded), [["bad", "good"].index(row["label"]) for row in rows]


@pytest.mark.process
def test_saved_p_tuning_adapter_scores_as_the_run_did(workplace: Path, cli: Cli) -> None:
    """Trains P-tuning on two ranks with ZeRO-2, then loads the adapter with PEFT alone."""
    from peft import AutoPeftModelForSequenceClassification

    _trained_bert(workplace / "base")
    recipe = _recipe(workplace, "{ name: p_tuning, num_virtual_tokens: 4 }", zero_stage=2)
    done = cli("submit", recipe, "-c", "local", "--watch")
    assert done.code == 0, done.err
    run, record = _result(workplace)
    assert record["metrics"]["accuracy"] > 0.9
    model = AutoPeftModelForSequenceClassification.from_pretrained(run / "model").eval()
    inputs, truth = _encoded(run)
    answers = model(**inputs).logits.argmax(-1).tolist()
    right = sum(a == t for a, t in zip(answers, truth, strict=True))
    assert right / len(truth) == pytest.approx(record["metrics"]["accuracy"], abs=1e-6)


@pytest.mark.process
def test_features_fits_the_regression_on_the_first_token(workplace: Path, cli: Cli) -> None:
    """A run on two ranks has the coefficients of the same regression fitted here."""
    from safetensors.numpy import load_file
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoModel

    _trained_bert(workplace / "base")
    recipe = _recipe(workplace, "{ name: features, C: 2.0 }")
    done = cli("submit", recipe, "-c", "local", "--watch")
    assert done.code == 0, done.err
    run, record = _result(workplace)
    assert record["parameters"]["trainable"] == 0
    saved = load_file(run / "model/logistic_regression.safetensors")
    inputs, truth = _encoded(run)
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(workplace / "base").eval()(**inputs).last_hidden_state
    fitted = LogisticRegression(C=2.0, max_iter=1000).fit(hidden[:, 0].numpy(), truth)
    assert saved["coef"] == pytest.approx(fitted.coef_, abs=1e-3)
    accuracy = fitted.score(hidden[:, 0].numpy(), truth)
    assert record["metrics"]["accuracy"] == pytest.approx(accuracy)
    assert accuracy > 0.9
