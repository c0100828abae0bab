"""Prompting: shots, windows and answers by hand; runs that are killed and go on; real runs."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Cli, write_rows
from hpcft import recipe as recipes
from hpcft.errors import DataError, InputError
from hpcft.memory import parameters
from hpcft.paths import RunPaths
from hpcft.prompting.requests import Request
from hpcft.tasks import rows
from hpcft.tasks.base import Example
from hpcft.tasks.prompting import NO_ANSWER, Prompting
from hpcft.train import answers, prompts
from hpcft.train.answers import Answer, AnswerFile
from hpcft.train.model import counted
from hpcft.train.prompting import Asker, scored
from hpcft.train.prompts import Group
from test_local_runs import _ranks, _wait_until_gone
from tiny_models import llama_folder

QUESTION = "Review: {text}\nIt is "


def task_of(**options: Any) -> Prompting:
    made = {"name": "prompting", "prompt": QUESTION, "labels": ["bad", "good"],
            "data": {"files": {"train": "/nowhere.jsonl"}}, **options}  # fmt: skip
    return Prompting.model_validate_json(json.dumps(made))


def film(text: str, label: int, number: int = 1) -> Example:
    prompt = QUESTION.replace("{text}", text)
    return {"prompt": prompt, "label": label, "place": f"test.jsonl:{number}"}


def splits_of(shown: int, asked: int) -> dict[str, list[Example]]:
    """Films of both labels in turn; no film is in two splits."""
    return {
        "train": [film(f"a film, number {n}", n % 2) for n in range(shown)],
        "test": [film(f"a play, number {n}{' indeed' * (n % 7)}", n % 2, n + 1)
                 for n in range(asked)],
    }  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose tokens are bytes."""
    return llama_folder(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models wait for threads longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base).eval()


# ---------------------------------------------------------------- shots


@pytest.mark.parametrize("shots", [0, 1, 4, 5, 8])
def test_shots_are_balanced_and_drawn_by_the_seed(shots: int) -> None:
    splits = splits_of(40, 6)
    task = task_of(shots=shots)
    drawn = {seed: task.chosen_shots(splits, "test", seed) for seed in range(20)}
    for found in drawn.values():
        labels = [example["label"] for example in found]
        assert len(labels) == shots
        assert abs(labels.count(0) - labels.count(1)) == shots % 2
        assert len({example["prompt"] for example in found}) == shots
    assert drawn[3] == task.chosen_shots(splits, "test", 3)
    if shots % 2:  # the odd one is of either label
        assert {sum(e["label"] for e in found) for found in drawn.values()} == {
            shots // 2, shots // 2 + 1,
        }  # fmt: skip
    if shots:
        assert len({json.dumps(found) for found in drawn.values()}) > 15


def test_what_is_asked_is_never_shown() -> None:
    """Not even where the splits overlap, or differ in blanks and case only."""
    asked = [film("The Same", n % 2) for n in range(2)]
    train = [film(" the  same ", n % 2) for n in range(6)] + [film("other", 0), film("another", 1)]
    task = task_of(shots=2)
    for seed in range(10):
        shown = task.chosen_shots({"train": train, "test": asked}, "test", seed)
        assert {example["prompt"] for example in shown} == {
            film("other", 0)["prompt"], film("another", 1)["prompt"],
        }  # fmt: skip
    with pytest.raises(DataError, match=r"4 shots of 2 labels take 2 labelled .*, the train split "
                       r"has 1 beside what is scored; lower task.shots"):  # fmt: skip
        task_of(shots=4).chosen_shots({"train": train, "test": asked}, "test", 0)


# ---------------------------------------------------------------- prompts and their window


def test_a_prompt_is_preamble_shots_and_question(tokenizer: Any) -> None:
    splits = splits_of(8, 3)
    task = task_of(shots=2, preamble="Films.\n\n", separator="\n---\n")
    first, second = task.chosen_shots(splits, "test", 5)
    found = task.prompts(splits, "test", tokenizer, 5)
    for prompt, example in zip(found, splits["test"], strict=True):
        text = (
            f"Films.\n\n{first['prompt']}{task.labels[first['label']]}\n---\n"
            f"{second['prompt']}{task.labels[second['label']]}\n---\n{example['prompt']}"
        )
        assert prompt.shots == 2
        assert tokenizer.decode(prompt.request.tokens) == text.rstrip()
        # The blank that ends the prompt is the answer's.
        assert [tokenizer.decode(c) for c in prompt.request.choices] == [" bad", " good"]


def test_too_long_a_prompt_loses_whole_shots_the_last_first(tokenizer: Any) -> None:
    splits = splits_of(20, 6)
    splits["test"][1] = film("long " * 25, 0)
    splits["test"][4] = film("longer " * 25, 1)
    window = 240
    task = task_of(shots=6, max_length=window)
    shots = task.chosen_shots(splits, "test", 0)
    found = task.prompts(splits, "test", tokenizer, 0)
    kept = [prompt.shots for prompt in found]
    assert kept[4] < kept[1] < kept[0] < 6
    for prompt, example in zip(found, splits["test"], strict=True):
        text = tokenizer.decode(prompt.request.tokens)
        assert text.endswith(example["prompt"].rstrip()), "the question is never cut"
        shown = [s["prompt"] + task.labels[s["label"]] for s in shots[: prompt.shots + 1]]
        assert text.startswith("\n\n".join(shown[: prompt.shots]))
        one_more = len(prompt.request.tokens) + len("\n\n" + shown[-1]) + len(" good")
        assert len(prompt.request.tokens) + len(" good") <= window < one_more
    (way, fewer) = task.notes(found, 0)
    assert way.startswith("6-shot, shots drawn by seed 0, the likeliest choice counts")
    counts = ", ".join(f"{kept.count(n)} with {n}" for n in sorted(set(kept), reverse=True))
    assert fewer == (
        f"6 of 6 prompts exceed max_length {window} with 6 shots and show fewer: {counts}"
    )


def test_a_question_that_does_not_fit_alone_is_told_with_its_row(tokenizer: Any) -> None:
    splits = splits_of(4, 3)
    splits["test"][1] = film("very " * 30 + "long", 0, number=2)
    with pytest.raises(InputError) as error:
        task_of(max_length=100).prompts(splits, "test", tokenizer, 0)
    (problem,) = error.value.problems
    assert str(problem) == (
        "test.jsonl:2 text: the question alone takes 173 tokens with its answer, the window is "
        "100; raise task.max_length as far as the model allows, or leave the row out"
    )  # fmt: skip


# ---------------------------------------------------------------- wrong data and recipes


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        ({"text": "a", "label": "ugly"}, {}, "test.jsonl:2 label: expected one of bad, good"),
        (
            {"text": "a", "label": -1},
            {},
            "test.jsonl:2 label: the row has no label (-1, as in GLUE",
        ),
        ({"text": " ", "label": 1}, {}, "test.jsonl:2 text: the text is empty"),
        ({"text": "a"}, {}, "test.jsonl:2 label: there is no such column; the row has: text"),
        ({}, {"prompt": "{txt}?"}, "test.jsonl:1 txt: there is no such column"),
        ({"text": "a", "label": 1}, {"shots": 6}, "6 shots of 2 labels take 3 labelled"),
    ],
)
def test_rows_that_cannot_be_asked(
    tmp_path: Path, row: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    good = {"text": "fine", "label": "good"}
    train = [{"text": f"film {n}", "label": n % 2} for n in range(4)]
    files = {"train": str(write_rows(tmp_path / "train.jsonl", train)),
             "test": str(write_rows(tmp_path / "test.jsonl", [good, row or good]))}  # fmt: skip
    with pytest.raises((InputError, DataError)) as error:
        rows.check_local_data(task_of(data={"files": files}, **options), "test")
    assert said in str(error.value)


RECIPE = """\
name: asked
model: { path: base }
task:
  name: prompting
  data: { files: { train: train.jsonl, test: test.jsonl } }
  prompt: "Review: {text}\\nIt is "
  labels: [bad, good]
  shots: 4
  max_length: 250
method: { name: frozen }
evaluation: { per_device_eval_batch_size: 1 }
resources: { nodes: 1, gpus_per_node: 2, zero_stage: 0, time_min: 10 }
"""


@pytest.fixture
def asked(workplace: Path, base: Path) -> Path:
    """A recipe of a tiny model that is asked, with its data beside it."""
    (workplace / "base").symlink_to(base)
    splits = {"train": [("film", 24)], "test": [("play", 40)]}
    for split, ((noun, count),) in splits.items():
        write_rows(workplace / f"{split}.jsonl",
                   [{"text": f"a {noun}, number {n}{' indeed' * (n % 7)}", "label": n % 2}
                    for n in range(count)])  # fmt: skip
    path = workplace / "asked.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.name=lora", "method.name: the task prompting trains nothing, lora does; use"),
        ("task.prompt=What?", "task.prompt: names no {column}"),
        ("task.prompt='{text'", "task.prompt: the template is malformed"),
        ("task.choices=[yes, no, maybe]", "task.choices: expected one for each of 2 labels, got 3"),
        ("task={answer: generation, choices: [Yes, 'yes ']}", "task.choices: differ in blanks or"),
        ("task={answer: generation, length_normalised: true}", "task.length_normalised: is of"),
        ("task.temperature=0.5", "task.temperature: is of answer: generation"),
        ("evaluation.before=true", "evaluation.before: nothing is trained"),
        ("task.data={files: , path: a/b, splits: {test: test}}", "task.data: has no train split"),
    ],
)
@pytest.mark.usefixtures("asked")
def test_fields_that_do_not_go_together(override: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        recipes.load("asked.yaml", [override])
    assert said in str(error.value)


@pytest.mark.usefixtures("asked")
def test_without_shots_there_need_not_be_a_train_split(asked: Path) -> None:
    asked.write_text(RECIPE.replace("train: train.jsonl, ", ""))
    (point,) = recipes.load("asked.yaml", ["task.shots=0"])
    assert point.recipe.task.needed_splits == ()
    grid = recipes.load(str(asked), ["task.data.files.train=train.jsonl",
                                     "sweep.grid={task.shots: [0, 1, 4, 8]}"])  # fmt: skip
    assert [point.recipe.task.model_dump()["shots"] for point in grid] == [0, 1, 4, 8]


def test_frozen_trains_no_other_task(tiny: Path) -> None:
    with pytest.raises(InputError, match="frozen trains nothing, which the task classification"):
        recipes.load(str(tiny), ["method.name=frozen"])


# ---------------------------------------------------------------- answers


def test_a_generated_answer_is_the_choice_that_it_begins_with() -> None:
    task = task_of(labels=["e", "n", "c"], choices=["yes", "no", "not sure"], answer="generation")
    said = {" Yes, it does": 0, "no": 1, "NO.": 1, "not sure\n\nPremise:": 2, "nothing": NO_ANSWER,
            "": NO_ANSWER, "well, yes": NO_ANSWER, "yes\n\nno": 0, "not": NO_ANSWER}  # fmt: skip
    assert {text: task.answered(text) for text in said} == said
    metrics = task.metrics([0, 1, NO_ANSWER, NO_ANSWER], [0, 1, 2, 0], [])
    assert metrics["accuracy"] == 0.5
    assert metrics["no_answer"] == 0.5
    assert metrics["recall[c]"] == 0
    assert set(task.metric_names()) >= {"no_answer", "accuracy", "recall[e]"}


def test_the_likeliest_choice_with_and_without_normalising() -> None:
    scores, tokens = [-2.0, -3.0], [1, 3]
    assert task_of().likeliest(scores, tokens) == 0
    assert task_of(length_normalised=True).likeliest(scores, tokens) == 1
    assert task_of().likeliest([-1.0, -1.0], tokens) == 0, "of equals the first"


# ---------------------------------------------------------------- runs that go on


def groups_of(folder: Path, tokenizer: Any, *overrides: str) -> tuple[Prompting, list[Group]]:
    """The prompts of the recipe as a run prepares and reads them."""
    (point,) = recipes.load("asked.yaml", list(overrides))
    task = point.recipe.task
    assert isinstance(task, Prompting)
    paths = RunPaths(folder / "run")
    paths.prepared.mkdir(parents=True)
    prompts.prepare(paths, point.recipe, task, rows.load(task).splits, tokenizer, [])
    return task, prompts.load(paths)


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
    asker = Asker(model, tokenizer, task, max_tokens=130, seed=1)
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
    known = answers.read(folder)
    assert 0 < len(known) < 40
    asked_again: list[int] = []
    for rank in range(2):
        with AnswerFile(folder, rank) as file:
            for found, tokens in asker.answers(groups, known, rank, 2, together=False):
                assert tokens >= len(found)
                asked_again += found
                file.add(found)
    assert sorted(asked_again) == sorted(set(range(40)) - set(known)), "only what was missing"
    assert answers.read(folder) == expected
    assert [*asker.answers(groups, expected, 0, 1, together=False)] == []
    metrics = scored(task, groups, expected)
    assert 0 <= metrics["accuracy"] <= 1
    assert ("no_answer" in metrics) == (answer == "generation")


def test_a_batch_of_which_a_line_is_missing_is_asked_again(
    asked: Path, tokenizer: Any, model: Any
) -> None:
    task, groups = groups_of(asked.parent, tokenizer)
    asker = Asker(model, tokenizer, task, max_tokens=400, seed=1)
    first, _ = next(asker.answers(groups, {}, 0, 1, together=False))
    assert len(first) > 3
    part = dict(list(first.items())[1:])
    again, _ = next(asker.answers(groups, part, 0, 1, together=False))
    assert again == first


def test_ranks_that_run_together_run_as_often(asked: Path, tokenizer: Any, model: Any) -> None:
    task, groups = groups_of(asked.parent, tokenizer)
    asker = Asker(model, tokenizer, task, max_tokens=200, seed=1)
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


def plain_likelihood(model: Any, request: Request, choice: list[int]) -> float:
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
    recipe = recipes.load("asked.yaml", change)[0].recipe
    options = recipe.method.load_options("fp32", 0)
    ready = recipe.method.wrap(
        AutoModelForCausalLM.from_pretrained(base, **options), causal=True, checkpointing=False
    )
    facts = parameters.facts(recipe.model, recipe.task, recipe.method)
    assert counted(ready, facts).quantised == (0 if not four_bit else 73_728)
    asker = Asker(ready, tokenizer, task, max_tokens=500, seed=1)
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
    for point in recipes.load("asked.yaml", ["task.shots=1", grid]):
        recipe = point.recipe
        facts = parameters.facts(recipe.model, recipe.task, recipe.method)
        ready = recipe.method.wrap(
            AutoModelForCausalLM.from_pretrained(base), causal=True, checkpointing=False
        )
        assert counted(ready, facts).trainable == 0
        asker = Asker(ready, tokenizer, task, max_tokens=500, seed=1)
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
    asked.write_text(RECIPE.replace("{ path: base }", json.dumps({
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
    deadline = time.monotonic() + 120
    while _answers_so_far(folder) < 60:
        assert time.monotonic() < deadline, cli("logs", "asked").out
        time.sleep(0.02)
    os.kill(_ranks(folder)[-1], signal.SIGKILL)
    _wait_until_gone(folder, 20)
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
    assert len(answers.read(folder / "answers")) == 3000
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
    asker = Asker(model, tokenizer, task, max_tokens=length, seed=42)
    batches = [f for f, _ in asker.answers(groups, {}, 0, 1, together=False)]
    assert len(batches) % 2
    plain = {index: found for batch in batches for index, found in batch.items()}
    sharded = answers.read(folder / "answers")
    assert sharded.keys() == plain.keys() == set(range(40))
    for index, found in plain.items():
        same = found if isinstance(found, str) else pytest.approx(found, abs=1e-4)
        assert sharded[index] == same
    record = json.loads((folder / "result.json").read_text())
    assert record["metrics"]["accuracy"] == scored(task, groups, plain)["accuracy"]
    assert ("no_answer" in record["metrics"]) == (answer == "generation")
