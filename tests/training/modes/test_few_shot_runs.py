"""Runs of a model that is asked: killed, they go on; sharded, with adapters, they answer alike."""

from __future__ import annotations

import json
import os
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import ASKED, Cli, write_rows
from hpcft.config.recipe import load_recipe
from hpcft.core.paths import RunPaths
from hpcft.planning import model_facts
from hpcft.tasks.data import examples
from hpcft.tasks.few_shot.requests import PromptRequest
from hpcft.tasks.few_shot.task import FewShot
from hpcft.training.data import few_shot_prompts
from hpcft.training.data.few_shot_prompts import PromptGroup
from hpcft.training.modes import answer_log
from hpcft.training.modes.answer_log import Answer, AnswerFile
from hpcft.training.modes.few_shot import PromptRunner, score_answers
from hpcft.training.trainer.model import check_parameter_count
from real_runs import gone, supervisors, until

pytestmark = pytest.mark.usefixtures("one_thread")

# ---------------------------------------------------------------- runs that go on


def groups_of(folder: Path, tokenizer: Any, *overrides: str) -> tuple[FewShot, list[PromptGroup]]:
    """The prompts of the recipe as a run prepares and reads them."""
    (point,) = load_recipe("asked.yaml", list(overrides))
    task = point.recipe.task
    assert isinstance(task, FewShot)
    paths = RunPaths(folder / "run")
    paths.prepared.mkdir(parents=True)
    few_shot_prompts.write_prompts(
        paths, point.recipe, task, examples.load_examples(task).splits, tokenizer, []
    )
    return task, few_shot_prompts.read_prompts(paths)


def test_prompts_of_a_group_begin_alike(asked: Path, tokenizer: Any) -> None:
    _, groups = groups_of(asked.parent, tokenizer, "task.max_length=200")
    assert len(groups) > 1
    assert sorted(index for group in groups for index in group.examples) == [*range(40)]
    for group in groups:
        assert len(group.prefix) > 20
        for request in group.requests:
            assert request.tokens[: len(group.prefix)] == group.prefix


@pytest.mark.parametrize("answer", ["likelihood", "generation"])
def test_a_run_goes_on_with_another_number_of_ranks_bit_by_bit(
    asked: Path, tokenizer: Any, model: Any, answer: str
) -> None:
    """Three ranks, one of which is killed while it writes; then two; the same digits as one."""
    change = ["task.max_length=200", f"task.answer={answer}"]
    change += ["task.temperature=1"] if answer == "generation" else []
    task, groups = groups_of(asked.parent, tokenizer, *change)
    asker = PromptRunner(model, tokenizer, task, max_tokens=130, seed=1)
    alone = [f for f, _ in asker.answers(groups, {}, 0, 1, together=False)]
    assert len(alone) > 12
    expected = {index: found for batch in alone for index, found in batch.items()}
    assert len(expected) == 40

    folder = asked.parent / "answers"
    for rank, batches in ((0, 1), (1, 3), (2, 2)):
        with AnswerFile(folder, rank) as file:
            for found, _ in islice(asker.answers(groups, {}, rank, 3, together=False), batches):
                file.add(found)
    with (folder / "1.jsonl").open("a") as stream:
        stream.write("[17, [-1.25")
    known = answer_log.read_answers(folder)
    assert 0 < len(known) < 40
    asked_again: list[int] = []
    for rank in range(2):
        with AnswerFile(folder, rank) as file:
            for found, tokens in asker.answers(groups, known, rank, 2, together=False):
                assert tokens >= len(found)
                asked_again += found
                file.add(found)
    assert sorted(asked_again) == sorted(set(range(40)) - set(known)), "only what was missing"
    assert answer_log.read_answers(folder) == expected
    assert [*asker.answers(groups, expected, 0, 1, together=False)] == []
    metrics = score_answers(task, groups, expected)
    assert 0 <= metrics["accuracy"] <= 1
    assert ("no_answer" in metrics) == (answer == "generation")


def test_a_batch_of_which_a_line_is_missing_is_asked_again(
    asked: Path, tokenizer: Any, model: Any
) -> None:
    task, groups = groups_of(asked.parent, tokenizer)
    asker = PromptRunner(model, tokenizer, task, max_tokens=400, seed=1)
    first, _ = next(asker.answers(groups, {}, 0, 1, together=False))
    assert len(first) > 3
    part = dict(list(first.items())[1:])
    again, _ = next(asker.answers(groups, part, 0, 1, together=False))
    assert again == first


def test_ranks_that_run_together_run_as_often(asked: Path, tokenizer: Any, model: Any) -> None:
    task, groups = groups_of(asked.parent, tokenizer)
    asker = PromptRunner(model, tokenizer, task, max_tokens=200, seed=1)
    runs, found = {0: 0, 1: 0, 2: 0}, {}
    for rank in runs:

        def count(*_: Any, rank: int = rank) -> None:
            runs[rank] += 1

        before = model.get_input_embeddings().register_forward_hook(count)
        for batch, _ in asker.answers(groups, {}, rank, 3, together=True):
            assert not found.keys() & batch.keys(), "of a batch that two ran, one answers"
            found |= batch
        before.remove()
    assert len(found) == 40
    assert len({*runs.values()}) == 1, runs


def plain_likelihood(model: Any, request: PromptRequest, choice: list[int]) -> float:
    """Of a choice, by a forward pass of the whole text."""
    ids = torch.tensor([request.tokens + choice])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0].float().log_softmax(-1)
    at = range(len(request.tokens) - 1, ids.shape[1] - 1)
    return sum(float(logs[i, ids[0, i + 1]]) for i in at)


@pytest.mark.parametrize("four_bit", [False, True])
def test_likelihoods_are_those_of_a_plain_forward_pass(
    asked: Path, base: Path, tokenizer: Any, four_bit: bool
) -> None:
    from transformers import AutoModelForCausalLM

    change = [f"method.load_in_4bit={str(four_bit).lower()}"]
    task, groups = groups_of(asked.parent, tokenizer, *change)
    recipe = load_recipe("asked.yaml", change)[0].recipe
    options = recipe.method.load_options("fp32", 0)
    ready = recipe.method.wrap(
        AutoModelForCausalLM.from_pretrained(base, **options), causal=True, checkpointing=False
    )
    facts = model_facts.compute_model_facts(recipe.model, recipe.task, recipe.method)
    assert check_parameter_count(ready, facts).quantised == (0 if not four_bit else 73_728)
    asker = PromptRunner(ready, tokenizer, task, max_tokens=500, seed=1)
    found: dict[int, Answer] = {}
    for batch, _ in asker.answers(groups, {}, 0, 1, together=False):
        found |= batch
    every = [pair for g in groups for pair in zip(g.examples, g.requests, strict=True)]
    for example, request in every[::7]:
        plain = [plain_likelihood(ready, request, choice) for choice in request.choices]
        assert found[example] == pytest.approx(plain, abs=1e-4)


# ---------------------------------------------------------------- adapters


def adapter(folder: Path, base: Path, **options: Any) -> Path:
    """A LoRA adapter that says something else than its base."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(len(folder.name))
    config = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear",
                        task_type="CAUSAL_LM", **options)  # fmt: skip
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_over_one_base_are_compared_by_a_sweep(
    asked: Path, base: Path, tokenizer: Any, model: Any
) -> None:
    from transformers import AutoModelForCausalLM

    for name in ("first", "second one"):
        adapter(asked.parent / name, base)
    task, groups = groups_of(asked.parent, tokenizer, "task.shots=1")
    grid = "sweep.grid={method.adapter_path: [first, second one, null]}"
    found = []
    for point in load_recipe("asked.yaml", ["task.shots=1", grid]):
        recipe = point.recipe
        facts = model_facts.compute_model_facts(recipe.model, recipe.task, recipe.method)
        ready = recipe.method.wrap(
            AutoModelForCausalLM.from_pretrained(base), causal=True, checkpointing=False
        )
        assert check_parameter_count(ready, facts).trainable == 0
        asker = PromptRunner(ready, tokenizer, task, max_tokens=500, seed=1)
        batch, _ = next(asker.answers(groups, {}, 0, 1, together=False))
        found.append(batch)
        (request,) = (r for g in groups for e, r in zip(g.examples, g.requests, strict=True)
                      if e == min(batch))  # fmt: skip
        plain = plain_likelihood(ready, request, request.choices[0])
        assert batch[min(batch)][0] == pytest.approx(plain, abs=1e-4)
    assert found[0] != found[1] != found[2] != found[0]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_of_another_model_is_refused(asked: Path, base: Path, cli: Cli) -> None:
    adapter(asked.parent / "mine", base)
    config = json.loads((base / "config.json").read_text())
    shape = {key: config[key] for key in ("model_type", "vocab_size", "hidden_size",
                                          "num_hidden_layers", "num_attention_heads")}  # fmt: skip
    asked.write_text(ASKED.replace("{ path: base }", json.dumps({
        "config": {**shape, "hidden_size": 32, "intermediate_size": 64}, "tokenizer": str(base),
    })))  # fmt: skip
    said = cli("plan", asked, "-c", "local", "-o", "method.adapter_path=mine")
    assert said.code == 2
    assert "mine was trained over another model: " in said.err
    assert "Traceback" not in said.err
    said = cli("plan", asked, "-c", "local", "-o", "method.adapter_path=nowhere")
    assert "method.adapter_path: " in said.err
    assert "has no adapter_model.safetensors; name the folder of a saved adapter" in said.err


# ---------------------------------------------------------------- real runs


def _answers_so_far(folder: Path) -> int:
    return sum(file.read_text().count("\n") for file in (folder / "answers").glob("*.jsonl"))


def test_a_killed_run_goes_on_where_it_was(asked: Path, cli: Cli) -> None:
    """Two ranks, one of which is killed; submitted again, what was answered is not asked again."""
    rows_of = [{"text": f"a play, number {n}", "label": n % 2} for n in range(3000)]
    write_rows(asked.parent / "test.jsonl", rows_of)
    said = cli("submit", asked, "-c", "local", "--json")
    assert said.code == 0, said.err
    folder = Path(said.json[0]["folder"])
    until(lambda: _answers_so_far(folder) >= 60)
    os.kill(supervisors(folder)[1], signal.SIGKILL)
    until(lambda: gone(folder), 20)
    before = {file.name: file.read_text() for file in (folder / "answers").glob("*.jsonl")}
    assert 60 <= _answers_so_far(folder) < 3000
    assert not (folder / "result.json").exists()
    done = cli("submit", asked, "-c", "local", "--watch")
    assert done.code == 0, done.err
    for name, text in before.items():
        now = (folder / "answers" / name).read_text()
        assert now.startswith(text)
        lines = [json.loads(line)[0] for line in now.splitlines() if line.endswith("]")]
        assert len(lines) == len({*lines})
    assert len(answer_log.read_answers(folder / "answers")) == 3000
    (row,) = cli("collect", "--json").json
    assert row["state"] == "COMPLETED"
    assert row["metrics"]["accuracy"]["mean"] > 0
    assert row["trainable_parameters"] == 0
    assert any(note.startswith("4-shot, shots drawn by seed 42") for note in row["notes"])
    (view,) = cli("status", "--json").json
    assert view["progress"]["step"] == view["progress"]["total_steps"] == 3000
    assert view["progress"]["tokens_per_s"] > 0


SLOW = pytest.param("generation", marks=pytest.mark.slow)


@pytest.mark.parametrize("answer", ["likelihood", SLOW])
def test_a_sharded_model_answers_alike(
    asked: Path, cli: Cli, tokenizer: Any, model: Any, answer: str
) -> None:
    """ZeRO-3 on two ranks, an odd number of batches: what a whole model answers in this process."""
    length = 190 if answer == "likelihood" else 185
    change = ["resources.zero_stage=3", f"task.max_length={length}", f"task.answer={answer}"]
    change += ["evaluation.per_device_eval_batch_size=1"]
    change += ["task.temperature=1"] if answer == "generation" else []
    done = cli("submit", asked, "-c", "local", *(x for o in change for x in ("-o", o)), "--watch")
    assert done.code == 0, done.err
    (folder,) = (asked.parent / "runs/asked").glob("*")
    task, groups = groups_of(asked.parent, tokenizer, *change)
    asker = PromptRunner(model, tokenizer, task, max_tokens=length, seed=42)
    batches = [f for f, _ in asker.answers(groups, {}, 0, 1, together=False)]
    assert len(batches) % 2
    plain = {index: found for batch in batches for index, found in batch.items()}
    sharded = answer_log.read_answers(folder / "answers")
    assert sharded.keys() == plain.keys() == set(range(40))
    for index, found in plain.items():
        same = found if isinstance(found, str) else pytest.approx(found, abs=1e-4)
        assert sharded[index] == same
    record = json.loads((folder / "result.json").read_text())
    assert record["metrics"]["accuracy"] == score_answers(task, groups, plain)["accuracy"]
    assert ("no_answer" in record["metrics"]) == (answer == "generation")
