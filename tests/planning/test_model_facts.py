"""Tests exact parameter counts from configurations, their cache, and sizes of weight files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from builders import BILLION, CLASSIFY, COMPLETE, Cli, facts, recipe
from hpcft.config import hf_model
from hpcft.core import disk_cache
from hpcft.core.errors import DataError
from hpcft.core.records import DataSpec, ModelFacts, ModelSpec
from hpcft.core.units import GIB
from hpcft.planning import model_facts
from hpcft.tasks.instruction import Instruction

pytestmark = pytest.mark.usefixtures("cache_of_this_module")


# ---------------------------------------------------------------- exact counts


LLAMA = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA_1B = LLAMA | {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
                    "num_hidden_layers": 16, "head_dim": 64,
                    "tie_word_embeddings": True}  # fmt: skip
LLAMA_8B = LLAMA | {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
                    "num_hidden_layers": 32}  # fmt: skip
MISTRAL = LLAMA_8B | {"model_type": "mistral", "vocab_size": 32000}
GEMMA = {"model_type": "gemma", "vocab_size": 256128, "hidden_size": 3072, "num_hidden_layers": 28,
         "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256,
         "intermediate_size": 24576}  # fmt: skip
BERT = {"model_type": "bert"}
DISTIL = {"model_type": "distilbert"}
ROBERTA = {"model_type": "roberta", "vocab_size": 50265, "hidden_size": 1024, "type_vocab_size": 1,
           "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
           "max_position_embeddings": 514}  # fmt: skip
THREE = CLASSIFY | {"labels": ["a", "b", "c"]}
ROBERTA_HEAD = 1024 * 1024 + 1024 + 3 * 1024 + 3


@pytest.mark.parametrize(
    ("config", "task", "method", "total", "trainable", "added"),
    [
        pytest.param(BERT, CLASSIFY, {"name": "full"}, 109_483_778, 109_483_778, 1538, id="bert"),
        pytest.param(DISTIL, CLASSIFY, {"name": "full"}, 66_362_880 + 592_130,
                     66_362_880 + 592_130, 592_130, id="distilbert"),
        pytest.param(ROBERTA, THREE, {"name": "full"}, 355_362_819, 355_362_819, ROBERTA_HEAD,
                     id="roberta-large"),
        # PEFT trains a copy of the head. The first one stays, frozen, and PEFT counts it too.
        pytest.param(ROBERTA, THREE, {"name": "lora", "r": 8, "target_modules": ["query", "value"]},
                     355_362_819 + 1_839_107, 1_839_107, 1_839_107, id="roberta-large-lora"),
        pytest.param(LLAMA_1B, COMPLETE, {"name": "full"}, 1_235_814_400, 1_235_814_400, 0,
                     id="llama-1b"),
        pytest.param(GEMMA, COMPLETE, {"name": "full"}, 786_825_216 + 7_751_248_896,
                     786_825_216 + 7_751_248_896, 0, id="gemma-7b"),
        pytest.param(MISTRAL, COMPLETE, {"name": "full"}, 7_241_732_096, 7_241_732_096, 0,
                     id="mistral-7b"),
        pytest.param(LLAMA_8B, THREE,
                     {"name": "qlora", "r": 64,
                      "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
                     7_504_924_672 + 12_288 + 54_538_240, 54_538_240, 54_538_240,
                     id="llama-8b-qlora"),
    ],
)  # fmt: skip
def test_model_facts_count_parameters_exactly(
    config: dict[str, Any], task: dict[str, Any], method: dict[str, Any], total: int,
    trainable: int, added: int,
) -> None:  # fmt: skip
    made = recipe(model={"path": "x/y", "config": config}, task=task, method=method)
    found = model_facts.compute_model_facts(made.model, made.task, made.method).parameters
    assert (found.total, found.trainable, found.added) == (total, trainable, added)


@pytest.mark.parametrize(
    ("config", "task", "embedding_parameters"),
    [
        pytest.param(LLAMA_8B, COMPLETE, 128256 * 4096, id="untied"),
        pytest.param(LLAMA_1B, COMPLETE, 0, id="tied: the table is the output layer too"),
        pytest.param(BERT, CLASSIFY, (30522 + 512 + 2) * 768, id="bert: words, positions, types"),
    ],
)
def test_model_facts_count_embedding_tables(
    config: dict[str, Any], task: Any, embedding_parameters: int
) -> None:
    made = recipe(model={"path": "x/y", "config": config}, task=task)
    assert (
        model_facts.compute_model_facts(
            made.model, made.task, made.method
        ).parameters.embedding_parameters
        == embedding_parameters
    )


@pytest.mark.parametrize(
    ("config", "task", "quantised"),
    [
        # All linear layers of the blocks; embeddings, norms and head stay out.
        pytest.param(LLAMA_8B, COMPLETE, 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336), id="llama"),
        pytest.param(BERT, CLASSIFY, 12 * (4 * 768**2 + 2 * 768 * 3072) + 768**2, id="bert"),
        pytest.param(ROBERTA, THREE, 24 * (4 * 1024**2 + 2 * 1024 * 4096), id="roberta"),
        pytest.param(DISTIL, CLASSIFY, 6 * (4 * 768**2 + 2 * 768 * 3072), id="distilbert"),
    ],
)  # fmt: skip
def test_model_facts_count_4_bit_weights(
    config: dict[str, Any], task: dict[str, Any], quantised: int
) -> None:
    method = {"name": "qlora", "target_modules": ["q_proj", "query", "q_lin"]}
    made = recipe(model={"path": "x/y", "config": config}, task=task, method=method)
    assert (
        model_facts.compute_model_facts(made.model, made.task, made.method).parameters.quantised
        == quantised
    )


def test_model_facts_count_no_head_as_4_bit(tmp_path: Path) -> None:
    """With the method's options, transformers quantises exactly the weights that were counted."""
    import torch
    from transformers import AutoModelForSequenceClassification, RobertaConfig

    config = {"model_type": "roberta", "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "intermediate_size": 64}  # fmt: skip
    bare = AutoModelForSequenceClassification.from_config(RobertaConfig(**config))
    bare.save_pretrained(tmp_path)
    made = recipe(model={"path": "x/y", "config": config}, method={"name": "qlora", "r": 2})
    options = made.method.load_options("fp32", 0) | {"device_map": {"": "cpu"}}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, **options)
    held = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert not [name for name in held if "classifier" in name]
    shapes = {name: module for name, module in bare.named_modules() if name in held}
    assert all(isinstance(module, torch.nn.Linear) for module in shapes.values())
    counted = model_facts.compute_model_facts(made.model, made.task, made.method).parameters
    assert sum(module.weight.numel() for module in shapes.values()) == counted.quantised


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "nope"}, "no usable configuration"),
        ({"model_type": "bert", "hidden_size": "big"}, "hidden_size"),
        ({"model_type": "bert", "num_attention_heads": 7}, "multiple of the number of attention"),
        ({"model_type": "bert", "hidden_act": "nope"}, "KeyError: 'nope'"),
        ({"model_type": "bert", "num_attention_heads": 0}, "expected a positive number"),
    ],
)
def test_model_facts_of_an_impossible_architecture_name_the_problem(
    config: dict[str, Any], says: str
) -> None:
    made = recipe(model={"path": "x/y", "config": config})
    with pytest.raises(DataError, match=r"^model") as refused:
        model_facts.compute_model_facts(made.model, made.task, made.method)
    assert says in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 2


def test_model_facts_with_missing_target_modules_name_the_method() -> None:
    made = recipe(model={"path": "x/y", "config": BERT},
                  method={"name": "lora", "target_modules": ["q_proj"]})  # fmt: skip
    with pytest.raises(DataError, match=r"^method\.lora: No modules were targeted"):
        model_facts.compute_model_facts(made.model, made.task, made.method)


# ---------------------------------------------------------------- the cache of counts


SECOND_CALL = """
import json, sys
from hpcft.config.recipe_types import FullRecipe
from hpcft.planning import model_facts
made = FullRecipe.model_validate(json.loads(sys.argv[1]))
print(model_facts.compute_model_facts(made.model, made.task, made.method).parameters.total)
print("torch" in sys.modules, "transformers" in sys.modules, "peft" in sys.modules)
"""


def test_model_facts_are_read_from_the_cache_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiny = {"model_type": "bert", "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 64}  # fmt: skip
    made = recipe(model={"path": "x/y", "config": tiny})
    first = model_facts.compute_model_facts(made.model, made.task, made.method)
    (file,) = (tmp_path / "hpcft" / "facts").iterdir()
    text = json.dumps(made.model_dump(mode="json", exclude_none=True))
    done = subprocess.run([sys.executable, "-c", SECOND_CALL, text], capture_output=True, text=True,
                          timeout=60, check=True)  # fmt: skip
    assert done.stdout.split() == [str(first.parameters.total), "False", "False", "False"]

    marked = first.model_copy(update={"layers": 77})
    file.write_text(marked.model_dump_json())
    disk_cache._in_memory.clear()  # as in a new process
    assert model_facts.compute_model_facts(made.model, made.task, made.method) == marked, (
        "the file is read"
    )
    for damage in ("", "{", '{"model_type": "bert"}', "\x00\xff"):
        file.write_bytes(damage.encode("latin-1"))
        disk_cache._in_memory.clear()
        assert model_facts.compute_model_facts(made.model, made.task, made.method) == first
        assert ModelFacts.model_validate_json(file.read_text()) == first


def test_model_facts_are_computed_where_the_cache_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hpcft").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = recipe(model={"path": "x/y", "config": {"model_type": "distilbert", "n_layers": 1}})
    assert model_facts.compute_model_facts(made.model, made.task, made.method).layers == 1


# ---------------------------------------------------------------- weight files


def test_largest_weight_file_bytes_of_a_folder_and_of_a_hub_model(tmp_path: Path) -> None:
    for name, size in (("model-1.safetensors", 10), ("model-2.safetensors", 30)):
        (tmp_path / name).write_bytes(bytes(size))
    local = recipe(model={"path": str(tmp_path)}).model
    assert model_facts.largest_weight_file_bytes(local, facts()) == 30
    hub = recipe().model
    assert model_facts.largest_weight_file_bytes(hub, facts(BILLION)) == 4 * BILLION
    assert model_facts.largest_weight_file_bytes(hub, facts(70 * BILLION)) == 5 * GIB


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("hidden_sizee=64", "model.config.hidden_sizee: unknown key of a bert model; did you mean"),
        ("num_hidden_layers=-1", "model.config.num_hidden_layers: expected a positive number"),
        ("model_type=fooo", "Unrecognized model identifier"),
    ],
)
def test_plan_checks_a_described_architecture(cli: Cli, tiny: Path, change: str, text: str) -> None:
    """`transformers` ignores a misspelt field, and a model of another size would be trained."""
    refused = cli("plan", tiny, "-c", "local", "-o", f"model.config.{change}")
    assert refused.code == 2
    assert text in refused.err
    assert "Traceback" not in refused.err


@pytest.mark.process
def test_run_does_not_build_a_hub_model_from_its_description() -> None:
    """A recipe describes a hub model for planning only; fields that it omits would be defaults."""
    described = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    spec = ModelSpec(path="nobody/not-in-the-cache", config=described)
    task = Instruction(
        name="instruction", data=DataSpec(files={"train": "x"}), prompt="{a}", completion="{b}"
    )
    assert hf_model.build_model_config(spec, task, to_plan=True).hidden_size == 64
    with pytest.raises(DataError, match="no usable configuration of nobody/not-in-the-cache"):
        hf_model.build_model_config(spec, task)
