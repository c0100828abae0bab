"""Tests of few-shot runs: restarts, sharding and adapters do not change the answers."""

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
from real_runs import is_gone, supervisor_pids, until

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.process]

# ---------------------------------------------------------------- in this process


def read_groups(folder: Path, tokenizer: Any, *overrides: str) -> tuple[FewShot, list[PromptGroup]]:
    """Prepares the prompts of the recipe and reads them, as a run does."""
    (point,) = load_recipe("asked.yaml", list(overrides))
    task = point.recipe.task
    assert isinstance(task, FewShot)
    paths = RunPaths(folder / "run")
    paths.prepared.mkdir(parents=True)
    splits = examples.load_examples(task).splits
    few_shot_prompts.write_prompts(paths, point.recipe, splits, tokenizer)
    return task, few_shot_prompts.read_prompts(paths)


def test_prompts_of_a_group_share_a_prefix(asked: Path, tokenizer: Any) -> None:
    _, groups = read_groups(asked.parent, tokenizer, "task.max_length=200")
    assert len(groups) > 1
    assert sorted(index for group in groups for index in group.examples) == [*range(40)]
    for group in groups:
        assert len(group.prefix) > 20
        for request in group.requests:
            assert request.tokens[: len(group.prefix)] == group.prefix


@pytest.mark.parametrize("answer", ["likelihood", "generation"])
def test_answers_after_a_restart_with_fewer_ranks_are_bit_identical(
    asked: Path, tokenizer: Any, model: Any, answer: str
) -> None:
    """Three ranks, one of which is killed while it writes, then two ranks; compared with one."""
    overrides = ["task.max_length=200", f"task.answer={answer}"]
    overrides += ["task.temperature=1"] if answer == "generation" else []
    task, groups = read_groups(asked.parent, tokenizer, *overrides)
    runner = PromptRunner(model, tokenizer, task, max_tokens=130, seed=1)
    batches = [batch for batch, _ in runner.answer_batches(groups, {}, 0, 1, in_step=False)]
    assert len(batches) >= 12
    expected = {index: found for batch in batches for index, found in batch.items()}
    assert len(expected) == 40

    folder = asked.parent / "answers"
    for rank, count in ((0, 1), (1, 3), (2, 2)):
        with AnswerFile(folder, rank) as file:
            of_rank = runner.answer_batches(groups, {}, rank, 3, in_step=False)
            for batch, _ in islice(of_rank, count):
                file.add(batch)
    with (folder / "1.jsonl").open("a") as stream:
        stream.write("[17, [-1.25")
    known = answer_log.read_answers(folder)
    assert 0 < len(known) < 40
    new: list[int] = []
    for rank in range(2):
        with AnswerFile(folder, rank) as file:
            for batch, tokens in runner.answer_batches(groups, known, rank, 2, in_step=False):
                assert tokens >= len(batch)
                new += batch
                file.add(batch)
    assert sorted(new) == sorted(set(range(40)) - set(known)), "known answers are kept"
    assert answer_log.read_answers(folder) == expected
    assert [*runner.answer_batches(groups, expected, 0, 1, in_step=False)] == []
    metrics = score_answers(task, groups, expected)
    assert 0 <= metrics["accuracy"] <= 1
    assert ("no_answer" in metrics) == (answer == "generation")


def test_answer_batches_repeats_a_batch_with_a_missing_answer(
    asked: Path, tokenizer: Any, model: Any
) -> None:
    task, groups = read_groups(asked.parent, tokenizer)
    runner = PromptRunner(model, tokenizer, task, max_tokens=400, seed=1)
    batch, _ = next(runner.answer_batches(groups, {}, 0, 1, in_step=False))
    assert len(batch) > 3
    known = dict(list(batch.items())[1:])
    again, _ = next(runner.answer_batches(groups, known, 0, 1, in_step=False))
    assert again == batch


def test_answer_batches_in_step_runs_as_many_forward_passes_on_every_rank(
    asked: Path, tokenizer: Any, model: Any
) -> None:
    task, groups = read_groups(asked.parent, tokenizer)
    runner = PromptRunner(model, tokenizer, task, max_tokens=200, seed=1)
    passes, answers = {0: 0, 1: 0, 2: 0}, {}
    for rank in passes:

        def count(*_: Any, rank: int = rank) -> None:
            passes[rank] += 1

        hook = model.get_input_embeddings().register_forward_hook(count)
        for batch, _ in runner.answer_batches(groups, {}, rank, 3, in_step=True):
            assert not answers.keys() & batch.keys(), "each batch is answered by one rank"
            answers |= batch
        hook.remove()
    assert len(answers) == 40
    assert len({*passes.values()}) == 1, passes


def plain_likelihood(model: Any, request: PromptRequest, choice: list[int]) -> float:
    """Computes the log-likelihood of a choice with one forward pass of the whole text."""
    ids = torch.tensor([request.tokens + choice])
    with torch.no_grad():
        log_probabilities = model(input_ids=ids).logits[0].float().log_softmax(-1)
    positions = range(len(request.tokens) - 1, ids.shape[1] - 1)
    return sum(float(log_probabilities[i, ids[0, i + 1]]) for i in positions)


@pytest.mark.parametrize("four_bit", [False, True])
def test_likelihoods_equal_those_of_a_plain_forward_pass(
    asked: Path, base: Path, tokenizer: Any, four_bit: bool
) -> None:
    from transformers import AutoModelForCausalLM

    overrides = [f"method.load_in_4bit={str(four_bit).lower()}"]
    task, groups = read_groups(asked.parent, tokenizer, *overrides)
    recipe = load_recipe("asked.yaml", overrides)[0].recipe
    options = recipe.method.load_options("fp32", 0)
    model = recipe.method.wrap(
        AutoModelForCausalLM.from_pretrained(base, **options), causal=True, checkpointing=False
    )
    facts = model_facts.compute_model_facts(recipe.model, recipe.task, recipe.method)
    assert check_parameter_count(model, facts).quantised == (0 if not four_bit else 73_728)
    runner = PromptRunner(model, tokenizer, task, max_tokens=500, seed=1)
    answers: dict[int, Answer] = {}
    for batch, _ in runner.answer_batches(groups, {}, 0, 1, in_step=False):
        answers |= batch
    requests = [pair for g in groups for pair in zip(g.examples, g.requests, strict=True)]
    for example, request in requests[::7]:
        plain = [plain_likelihood(model, request, choice) for choice in request.choices]
        assert answers[example] == pytest.approx(plain, abs=1e-4)


# ---------------------------------------------------------------- adapters


def adapter(folder: Path, base: Path, **options: Any) -> Path:
    """Saves a LoRA adapter whose answers differ from those of its base."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(len(folder.name))
    config = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear",
                        task_type="CAUSAL_LM", **options)  # fmt: skip
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_sweep_compares_adapters_of_one_base(asked: Path, base: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    for name in ("first", "second one"):
        adapter(asked.parent / name, base)
    task, groups = read_groups(asked.parent, tokenizer, "task.shots=1")
    grid = "sweep.grid={method.adapter_path: [first, second one, null]}"
    batches = []
    for point in load_recipe("asked.yaml", ["task.shots=1", grid]):
        recipe = point.recipe
        facts = model_facts.compute_model_facts(recipe.model, recipe.task, recipe.method)
        model = recipe.method.wrap(
            AutoModelForCausalLM.from_pretrained(base), causal=True, checkpointing=False
        )
        assert check_parameter_count(model, facts).trainable == 0
        runner = PromptRunner(model, tokenizer, task, max_tokens=500, seed=1)
        batch, _ = next(runner.answer_batches(groups, {}, 0, 1, in_step=False))
        batches.append(batch)
        (request,) = (r for g in groups for e, r in zip(g.examples, g.requests, strict=True)
                      if e == min(batch))  # fmt: skip
        plain = plain_likelihood(model, request, request.choices[0])
        assert batch[min(batch)][0] == pytest.approx(plain, abs=1e-4)
    assert batches[0] != batches[1] != batches[2] != batches[0]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_plan_refuses_an_adapter_of_another_model(asked: Path, base: Path, cli: Cli) -> None:
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


def count_answers(folder: Path) -> int:
    return sum(file.read_text().count("\n") for file in (folder / "answers").glob("*.jsonl"))


def test_a_killed_run_resumes_after_its_answers(asked: Path, cli: Cli) -> None:
    """One of two ranks is killed; submitted again, the run keeps the answers that it has."""
    rows = [{"text": f"a play, number {n}", "label": n % 2} for n in range(3000)]
    write_rows(asked.parent / "test.jsonl", rows)
    said = cli("submit", asked, "-c", "local", "--json")
    assert said.code == 0, said.err
    folder = Path(said.json[0]["folder"])
    until(lambda: count_answers(folder) >= 60)
    os.kill(supervisor_pids(folder)[1], signal.SIGKILL)
    until(lambda: is_gone(folder), 20)
    before = {file.name: file.read_text() for file in (folder / "answers").glob("*.jsonl")}
    assert 60 <= count_answers(folder) < 3000
    assert not (folder / "result.json").exists()
    done = cli("submit", asked, "-c", "local", "--watch")
    assert done.code == 0, done.err
    for name, text in before.items():
        now = (folder / "answers" / name).read_text()
        assert now.startswith(text)
        indices = [json.loads(line)[0] for line in now.splitlines() if line.endswith("]")]
        assert len(indices) == len({*indices})
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
def test_a_sharded_model_gives_the_answers_of_the_whole_model(
    asked: Path, cli: Cli, tokenizer: Any, model: Any, answer: str
) -> None:
    """ZeRO-3 on two ranks with an odd number of batches, compared with this process."""
    length = 190 if answer == "likelihood" else 177
    overrides = ["resources.zero_stage=3", f"task.max_length={length}", f"task.answer={answer}"]
    overrides += ["evaluation.per_device_eval_batch_size=1"]
    overrides += ["task.temperature=1"] if answer == "generation" else []
    done = cli(
        "submit", asked, "-c", "local", *(x for o in overrides for x in ("-o", o)), "--watch"
    )
    assert done.code == 0, done.err
    (folder,) = (asked.parent / "runs/asked").glob("*")
    task, groups = read_groups(asked.parent, tokenizer, *overrides)
    runner = PromptRunner(model, tokenizer, task, max_tokens=length, seed=42)
    batches = [batch for batch, _ in runner.answer_batches(groups, {}, 0, 1, in_step=False)]
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
