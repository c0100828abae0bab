"""Compares loss, gradients and scores in chunks with those at once, and their memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import ModelSpec
from hpcft.planning import model_facts
from hpcft.planning.memory.trace_types import KINDS, TracedStep
from hpcft.planning.memory.tracing.output_layer import loss_can_be_chunked
from hpcft.planning.memory.tracing.run import trace_depths
from hpcft.tasks.base import IGNORE_INDEX
from hpcft.tasks.chunked_loss import make_loss

TASK = {"name": "instruction", "prompt": "{q}", "completion": "{a}", "max_length": 64,
        "data": {"path": "x/y"}}  # fmt: skip
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 211,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
GEMMA2 = {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 3.0}
PHI = {"model_type": "phi", "num_key_value_heads": 4}  # the output layer has a bias
CHUNKS = 8


def recipe(method: str = "full", **options: Any) -> FullRecipe:
    made = {"name": "made", "model": {"path": "x/y"}, "task": TASK,
            "method": {"name": method, **options}}  # fmt: skip
    return FullRecipe.model_validate(made)


INSTRUCTION = recipe().task


def config_of(model_type: str, **more: Any) -> Any:
    return AutoConfig.for_model(model_type, **(SHAPE | more))


def model_of(made: FullRecipe, **config: Any) -> Any:
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(**config), attn_implementation="eager")
    wrapped = made.method.wrap(model, causal=True, checkpointing=False)
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # zero at first, and then nothing would flow into lora_A
            torch.nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return wrapped.train()


def batch() -> tuple[dict[str, Any], Any]:
    ids = torch.randint(1, 200, (3, 17), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[0, :5], labels[1, :], labels[2, 9:] = IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


def loss_and_gradients(
    model: Any, chunks: int, labels: Any, *, smoothing: float = 0.0, autocast: bool = False
) -> tuple[float, dict[str, Any]]:
    """Returns loss and gradients of a micro-batch, with autocast around the model alone."""
    model = copy.deepcopy(model)
    task_loss = make_loss(INSTRUCTION, model, chunks)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        outputs = model(**batch()[0])
    loss = task_loss(outputs, labels, torch.tensor(40), smoothing)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------- the same numbers


@pytest.mark.process
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"model_type": "llama", "tie_word_embeddings": False}, recipe()),
        ({"model_type": "llama", "tie_word_embeddings": True}, recipe()),
        (GEMMA2, recipe()),
        (PHI, recipe()),
        ({"model_type": "llama"}, recipe("lora", r=4)),
        ({"model_type": "llama"}, recipe("lora", r=4, target_modules=["lm_head", "q_proj"])),
        ({"model_type": "llama"}, recipe("prompt_tuning", num_virtual_tokens=3)),
    ],
    ids=["untied", "tied", "soft cap", "bias", "lora", "lora on the output layer", "prompt"],
)
def test_chunked_loss_equals_whole_loss_and_gradients(
    config: dict[str, Any], method: FullRecipe, smoothing: float
) -> None:
    model, labels = model_of(method, **config), batch()[1]
    whole, gradients = loss_and_gradients(model, 1, labels, smoothing=smoothing)
    chunked, chunked_gradients = loss_and_gradients(model, CHUNKS, labels, smoothing=smoothing)
    assert chunked == pytest.approx(whole, rel=1e-6)
    assert chunked_gradients.keys() == gradients.keys()
    # A gradient that is the remainder of a cancelling sum shows rounding, how much depends on the
    # CPU. The second term allows a tenth of float32's rounding of the whole gradient.
    whole_norm = torch.norm(torch.stack([torch.norm(g) for g in gradients.values()]))
    for name, gradient in gradients.items():
        error = torch.norm(chunked_gradients[name] - gradient)
        assert error <= 1e-6 * torch.norm(gradient) + 6e-9 * whole_norm, name


def test_chunked_loss_under_autocast_computes_in_same_types() -> None:
    model, labels = model_of(recipe(), model_type="llama"), batch()[1]
    exact, _ = loss_and_gradients(model, 1, labels)
    whole, gradients = loss_and_gradients(model, 1, labels, autocast=True)
    chunked, chunked_gradients = loss_and_gradients(model, CHUNKS, labels, autocast=True)
    assert whole != exact
    assert chunked == pytest.approx(whole, rel=1e-6)
    for name, gradient in gradients.items():
        assert chunked_gradients[name].dtype == gradient.dtype == torch.float32
        assert torch.norm(chunked_gradients[name] - gradient) <= 0.01 * torch.norm(gradient), name


@pytest.mark.parametrize("labelled", [0, 1, 3])
def test_chunked_loss_with_fewer_labels_than_chunks(labelled: int) -> None:
    """Every parameter still has a gradient, as the other ranks expect."""
    model, labels = model_of(recipe(), model_type="llama"), batch()[1]
    labels[:] = IGNORE_INDEX
    labels[0, 1 : 1 + labelled] = 7
    whole, gradients = loss_and_gradients(model, 1, labels)
    chunked, chunked_gradients = loss_and_gradients(model, CHUNKS, labels)
    assert chunked == pytest.approx(whole, rel=1e-6)
    assert (chunked == 0) == (labelled == 0)
    for name, gradient in gradients.items():
        assert torch.norm(chunked_gradients[name] - gradient) <= 1e-6 * torch.norm(gradient), name


@pytest.mark.parametrize("config", [{"model_type": "llama"}, GEMMA2], ids=["llama", "soft cap"])
def test_reduce_logits_chunked_equals_whole(config: dict[str, Any]) -> None:
    model, (inputs, labels) = model_of(recipe(), **config).eval(), batch()
    found = []
    for chunks in (1, CHUNKS):
        scored = copy.deepcopy(model)
        task_loss = make_loss(INSTRUCTION, scored, chunks)
        with torch.no_grad():
            outputs = scored(**inputs)
            loss = task_loss(outputs, labels, None, 0.1)
            # Across ranks the Trainer pads the labels after the loss.
            padded = torch.nn.functional.pad(labels, (0, 4 * (chunks > 1)), value=IGNORE_INDEX)
            found.append((loss, task_loss.reduce_logits((outputs["logits"],), padded)))
    (whole, scores), (parts, others) = found
    assert float(parts) == pytest.approx(float(whole), rel=1e-6)
    assert others.shape == (3, 2)
    assert torch.allclose(others, scores, rtol=1e-5)


def test_chunked_loss_alternates_training_and_scoring() -> None:
    model, (inputs, labels) = model_of(recipe(), model_type="llama"), batch()
    task_loss = make_loss(INSTRUCTION, model, CHUNKS)
    for _ in range(2):
        task_loss(model.train()(**inputs), labels, None, 0.0).backward()
        with torch.no_grad():
            outputs = model.eval()(**inputs)
            task_loss(outputs, labels, None, 0.0)
            assert task_loss.reduce_logits(outputs["logits"], labels)[1].tolist() == [0.0, 0.0]


# ---------------------------------------------------------------- which models


@pytest.mark.parametrize(
    ("config", "can"),
    [
        ({"model_type": "llama"}, True),
        (PHI, True),
        (GEMMA2, True),
        ({"model_type": "gemma3_text", "head_dim": 8}, True),
        ({"model_type": "mixtral"}, True),
        ({"model_type": "granite", "logits_scaling": 4.0}, False),
        ({"model_type": "cohere"}, False),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_loss_can_be_chunked_refuses_models_that_scale_logits(
    config: dict[str, Any], can: bool
) -> None:
    assert loss_can_be_chunked(config_of(**config), INSTRUCTION) is can


def test_supports_chunked_loss_only_for_next_tokens(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = ModelSpec(config={"model_type": "llama", **SHAPE})
    labels = {"name": "classification", "labels": ["a", "b"], "data": {"path": "x/y"}}
    made = recipe()
    classify = FullRecipe.model_validate({"name": "made", "model": {"path": "x/y"}, "task": labels,
                                          "method": {"name": "full"}})  # fmt: skip
    assert model_facts.compute_model_facts(model, made.task, made.method).supports_chunked_loss
    assert not model_facts.compute_model_facts(
        model, classify.task, classify.method
    ).supports_chunked_loss


# ---------------------------------------------------------------- less memory


LOGITS = KINDS.index("logits and loss")


def test_trace_depths_holds_one_chunk_of_logits() -> None:
    made = recipe("lora")
    wide = ModelSpec(config={"model_type": "llama", **SHAPE, "vocab_size": 50_000})
    most = []
    for chunks in (1, CHUNKS):
        step = TracedStep(
            model=wide,
            task=made.task,
            method=made.method,
            precision="fp32",
            optim="adamw_torch",
            zero_stage=0,
            checkpointing=False,
            single_example=False,
            padded=False,
            accelerator="cpu",
            loss_chunks=chunks,
        )
        parts = trace_depths(step).segments[2, 2]
        for name in ("backward head", "evaluation head"):
            most.append(max(sizes[LOGITS] for sizes, _ in parts[name]))
    (whole, scored), (parts_of, scored_parts) = most[:2], most[2:]
    logits = 2 * 64 * 50_000 * 4  # B · S · V in fp32; 63 labels are rounded up to 8 parts of 8
    assert whole >= 2 * logits
    assert parts_of <= 3.1 * logits / CHUNKS
    assert scored_parts <= 3.1 * logits / CHUNKS < scored
