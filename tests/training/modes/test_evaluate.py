"""Tests of evaluating a finished model or adapter: its scores are those of its training run.

A sweep can score the adapters of several tasks over one base model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builders import Cli, bert_folder, film_rows, llama_folder, write_rows
from hpcft.config.recipe import load_recipe

pytestmark = pytest.mark.process

TRAIN = {"global_batch_size": 12, "max_steps": 20, "learning_rate": 1e-2}
RUN = {"nodes": 1, "gpus_per_node": 1, "zero_stage": 0, "time_min": 10}
LORA = {"name": "lora", "r": 4, "target_modules": "all-linear"}
CLASSIFICATION = {"name": "classification", "labels": ["bad", "good"], "max_length": 32}
INSTRUCTION = {
    "name": "instruction", "prompt": "{text}. It is", "completion": " {label}",
    "choices": [" bad", " good"], "max_length": 48,
}  # fmt: skip

PROMPTING = {
    "name": "prompting", "prompt": "{text}. It is", "labels": ["bad", "good"],
    "choices": [" bad", " good"], "max_length": 48,
}  # fmt: skip


def write(name: str, task: dict[str, Any], method: dict[str, Any], **more: Any) -> Path:
    """Writes a recipe for the model in `base`, and its data; returns the recipe's file."""
    rows = film_rows(18)
    data = {"files": {"test": str(write_rows(Path("test.jsonl"), rows[1:]))}}
    if method["name"] != "frozen":
        data["files"]["train"] = str(write_rows(Path("train.jsonl"), rows))
    recipe = {
        "name": name, "model": {"path": "base"}, "task": {**task, "data": data}, "method": method,
        "train": TRAIN, "resources": RUN, **more,
    }  # fmt: skip
    file = Path(f"{name}.yaml")
    file.write_text(json.dumps(recipe))  # JSON is YAML.
    return file


def run(cli: Cli, name: str, *arguments: Any, **recipe: Any) -> list[Path]:
    """Submits a recipe and waits; returns its run folders."""
    done = cli("submit", write(name, **recipe), "-c", "local", "--watch", *arguments)
    assert done.code == 0, done.err
    return sorted(Path("runs", name).glob("*"))


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


def scores(folder: Path) -> Any:
    return read(folder, "result")["metrics"]


def assert_same_scores(again: Path, trained: Path) -> None:
    """The scores agree to the last digit, and nothing was trained or saved."""
    assert scores(again) == scores(trained)
    assert not (again / "model").exists()
    record = read(again, "result")
    assert record["parameters"]["trainable"] == 0
    assert record["measured"]["peak_memory_bytes"] < record["predicted_memory_bytes"]


def assert_pipeline_scores_the_same(model: Path, accuracy: float) -> None:
    """Plain transformers load the folder, and name the labels as the recipe does."""
    from transformers import pipeline

    classify = pipeline("text-classification", model=str(model), tokenizer=str(model))
    rows = film_rows(18)[1:]
    answers = [answer["label"] for answer in classify([row["text"] for row in rows])]
    right = sum(answer == row["label"] for answer, row in zip(answers, rows, strict=True))
    assert right / len(rows) == pytest.approx(accuracy, abs=1e-6)
    assert f"| accuracy | {accuracy:.4f} |" in (model / "README.md").read_text()


def test_an_adapter_has_the_scores_of_its_training_run(workplace: Path, cli: Cli) -> None:
    bert_folder(workplace / "base", layers=4)
    (trained,) = run(cli, "trained", task=CLASSIFICATION, method=LORA)
    method = {"name": "frozen", "adapter_path": str(trained / "model")}
    assert scores(trained)["accuracy"] > 0.9, "an untrained model would score less"
    (again,) = run(cli, "again", task=CLASSIFICATION, method=method)
    assert_same_scores(again, trained)
    assert_pipeline_scores_the_same(trained / "model", scores(trained)["accuracy"])


@pytest.mark.slow
def test_a_sweep_scores_adapters_of_several_tasks_over_one_base(workplace: Path, cli: Cli) -> None:
    bert_folder(workplace / "base", layers=4)
    task, other = CLASSIFICATION, {**CLASSIFICATION, "labels": ["good", "bad"]}
    (first,) = run(cli, "first", task=task, method=LORA)
    (second,) = run(cli, "second", task=other, method={"name": "p_tuning", "num_virtual_tokens": 4})
    together = {
        "method.adapter_path": [str(folder / "model") for folder in (first, second)],
        "task.labels": [task["labels"], other["labels"]],
    }
    folders = run(cli, "together", task=task, method={"name": "frozen"}, sweep={"zip": together})
    again = {read(folder, "recipe")["method"]["adapter_path"]: folder for folder in folders}
    for trained in (first, second):
        assert_same_scores(again[str((trained / "model").absolute())], trained)
    rows = [row for row in cli("collect", "--json").json if row["recipe"] == "together"]
    assert [row["state"] for row in rows] == ["COMPLETED", "COMPLETED"]


@pytest.mark.slow
def test_a_finished_model_on_two_ranks_has_the_scores_of_its_training_run(
    workplace: Path, cli: Cli
) -> None:
    llama_folder(workplace / "base")
    (trained,) = run(cli, "trained", task=INSTRUCTION, method={"name": "full"})
    layout = ("-o", f"model.path={trained}/model", "-o", "resources.gpus_per_node=2")
    (again,) = run(cli, "again", *layout, task=INSTRUCTION, method={"name": "frozen"})
    assert scores(again) == pytest.approx(scores(trained), abs=1e-6)


def plan_error(cli: Cli, *arguments: Any, task: dict[str, Any]) -> str:
    method = {"name": "frozen"}
    said = cli("plan", write("asked", task, method), "-c", "local", *arguments)
    assert said.code == 2
    assert "Traceback" not in said.err
    return said.err


def test_plan_refuses_a_model_without_a_trained_head(workplace: Path, cli: Cli) -> None:
    bert_folder(workplace / "base")
    headless = bert_folder(workplace / "bare", head=False)
    said = plan_error(cli, "-o", f"model.path={headless}", task=CLASSIFICATION)
    assert "no file has weights of classifier" in said
    said = plan_error(cli, task={**CLASSIFICATION, "labels": ["good", "bad"]})
    assert "has them in another order; use [bad, good]" in said


@pytest.mark.parametrize("task", [INSTRUCTION, PROMPTING], ids=lambda task: task["name"])
def test_plan_of_an_adapter_traces_fewer_layers_than_the_adapter_has(
    workplace: Path, cli: Cli, task: dict[str, Any]
) -> None:
    """The traced model has a few of the layers, and the adapter's file has all."""
    from transformers import AutoModelForCausalLM

    base = llama_folder(workplace / "base", layers=6)
    (trained,) = load_recipe(write("trained", INSTRUCTION, LORA), [])
    model = AutoModelForCausalLM.from_pretrained(base)
    trained.recipe.method.wrap(model, causal=True, checkpointing=False).save_pretrained("adapter")
    planned = cli("plan", write("asked", task, {"name": "frozen", "adapter_path": "adapter"}))
    assert planned.code == 0, planned.err
    assert "0 trained" in planned.err
    assert "24,576" in cli("params", "asked.yaml").out.splitlines()[-1]
