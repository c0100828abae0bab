"""Recipes are loaded with extends, overrides and paths, and every problem is reported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from builders import RECIPE, Cli, load_one, recipe_problems, write_file, write_rows

# ---------------------------------------------------------------- extends


@pytest.mark.usefixtures("tiny")
def test_extends_lays_a_chain_of_recipes_over_one_another() -> None:
    write_file("a.yaml", "extends: tiny.yaml\nname: a\ntrain: {seed: 1, learning_rate: 1e-3}\n")
    write_file("deep/b.yaml", "extends: ../a.yaml\nname: b\ntrain:\n  seed: 2\n")
    recipe = load_one(name="deep/b.yaml")
    assert (recipe.name, recipe.train.seed, recipe.train.learning_rate) == ("b", 2, 1e-3)
    assert recipe.train.max_steps == 3
    assert recipe.task.data.files == {
        "train": str(Path("train.jsonl").resolve()),  # from the folder that says so
        "test": str(Path("test.jsonl").resolve()),
    }


@pytest.mark.usefixtures("tiny")
def test_extends_with_another_method_drops_the_options_of_the_old_one() -> None:
    write_file("a.yaml", "extends: tiny.yaml\nmethod: {name: lora, r: 4}\n")
    write_file("b.yaml", "extends: a.yaml\nmethod: {name: qlora}\n")
    assert load_one(name="b.yaml").method.model_dump()["r"] == 16
    write_file("c.yaml", "extends: a.yaml\nmethod: {r: 8}\n")
    assert load_one(name="c.yaml").method.model_dump()["r"] == 8
    assert load_one("method.name=full", name="a.yaml").method.name == "full"


@pytest.mark.usefixtures("workplace")
def test_extends_finds_a_shipped_recipe_by_name() -> None:
    write_file("mine.yaml", "extends: quickstart\ntrain: {seed: 3}\n")
    recipe = load_one(name="mine.yaml")
    assert (recipe.name, recipe.train.seed) == ("quickstart", 3)


@pytest.mark.parametrize(
    ("files", "where", "what"),
    [
        ({"a": "extends: a.yaml"}, "a.yaml:1", "circle"),
        ({"a": "name: a\nextends: b.yaml", "b": "\n\nextends: a.yaml"}, "b.yaml:3", "circle"),
        ({"a": "name: a\nextends: ./../work/a.yaml"}, "a.yaml:2", "circle"),
        ({"a": "extends: nosuch"}, "a.yaml:1", "no recipe 'nosuch'"),
        ({"a": "extends: ../../etc/passwd"}, "a.yaml:1", "no recipe"),
        ({"a": "extends: [b]"}, "a.yaml:1", "expected a recipe's file"),
        ({"a": "extends: " + "x" * 5000}, "a.yaml:1", "no recipe"),
        ({"a": "extends: ~nosuchuser/b.yaml"}, "a.yaml:1", "no recipe"),
        ({"a": "extends: b.yaml", "b": "- 1"}, "b.yaml:1", "expected a mapping"),
        ({"a": "extends: b.yaml", "b": ""}, "b.yaml:1", "expected a mapping"),
        ({"a": "extends: b.yaml", "b": "x: 1\nx: 2"}, "b.yaml:2", "duplicate key"),
        ({"a": "- 1"}, "a.yaml:1", "expected a mapping"),
        ({"a": ""}, "a.yaml:1", "expected a mapping"),
        ({chr(97 + n): f"extends: {chr(98 + n)}.yaml" for n in range(12)}, "i.yaml:1", "chain"),
    ],
)
@pytest.mark.usefixtures("workplace")
def test_extends_of_something_else_is_refused_with_its_line(
    files: dict[str, str], where: str, what: str
) -> None:
    for name, text in files.items():
        write_file(f"{name}.yaml", text)
    (problem,) = recipe_problems("train.seed=1", name="a.yaml")
    assert problem.startswith(where), problem
    assert what in problem


@pytest.mark.usefixtures("workplace")
def test_extends_does_not_look_in_the_current_folder() -> None:
    write_file("base.yaml", RECIPE)
    write_file("deep/a.yaml", "extends: base.yaml")
    (problem,) = recipe_problems(name="deep/a.yaml")
    assert "no recipe 'base.yaml'" in problem


# ---------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "section", "meant"),
    [
        ("train.learning_rate=1e-4", ("train", "learning_rate"), 1e-4),
        ("task.labels=[a, 'b c', no]", ("task", "labels"), ["a", "b c", "no"]),
        ("task={max_length: 16}", ("task", "max_length"), 16),
        ("resources={nodes: 1, time_min: 5}", ("resources", "time_min"), 5),
        ("resources=auto", ("resources", "nodes"), "auto"),
        ("train.eval_steps=", ("train", "eval_steps"), None),
        ("task.data.sample={train: 0.5}", ("task", "data", "sample"), {"train": 0.5}),
        ("description=a=b=c", ("description",), "a=b=c"),
        ("description=", None, None),
        ("model.config.hidden_size=64", ("model", "config", "hidden_size"), 64),
        ("model.config={hidden_act: relu}", ("model", "config", "vocab_size"), 400),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_override_value_is_parsed_as_yaml(
    override: str, section: tuple[str, ...] | None, meant: Any
) -> None:
    if section is None:
        assert recipe_problems(override) == [f"-o {override} description: expected text, got null"]
        return
    value: Any = load_one(override).model_dump()
    for key in section:
        value = value[key]
    assert value == meant


@pytest.mark.usefixtures("tiny")
def test_later_overrides_win_and_earlier_ones_are_kept() -> None:
    recipe = load_one("train.seed=1", "train={seed: 2}", "train.max_steps=7", "train.seed=3")
    assert (recipe.train.seed, recipe.train.max_steps) == (3, 7)


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("train.seed", "expected dotted.field=value"),
        ("=1", "expected dotted.field=value"),
        ("train..seed=1", "expected dotted.field=value"),
        ("train.seed =1", "expected dotted.field=value"),
        ("train.sed=1", "did you mean seed"),
        ("train.seed=one", 'expected a whole number, got "one"'),
        ("train.seed=[", "is not valid YAML"),
        ("train={seed: 1, seed: 2}", "duplicate key"),
        ("train.seed=!!int 1", "tags"),
        ("train={seed: x}", 'train.seed: expected a whole number, got "x"'),
        ("name.x=1", "name: expected text"),
        ("extends=quickstart", "extends: unknown key"),
        ("task.data.files.train=nosuch.jsonl", "there is no file"),
        ("task.name=clasification", "expected one of 'classification', 'instruction'"),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_wrong_override_is_named_in_its_error(override: str, what: str) -> None:
    (problem,) = recipe_problems(override)
    assert problem.startswith(f"-o {override}")
    assert what in problem


@pytest.mark.usefixtures("tiny")
def test_override_with_line_breaks_is_shown_in_one_line() -> None:
    (problem,) = recipe_problems("train.seed=\n\x1b[31m\n")
    assert problem.startswith("-o 'train.seed=\\n\\x1b[31m\\n'")
    assert problem.isprintable()


@pytest.mark.usefixtures("tiny")
def test_missing_field_names_the_section_of_the_file_not_an_override() -> None:
    text = RECIPE.replace("  labels: [bad, good]\n", "")
    write_file("tiny.yaml", text)
    assert recipe_problems("task.max_length=16") == [
        "tiny.yaml:12 task.labels: is required; add it"
    ]


# ---------------------------------------------------------------- paths


def test_relative_path_starts_at_its_file_or_for_an_override_at_the_current_folder(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    write_rows(other / "mine.jsonl", [{"text": "a", "label": "bad"}])
    monkeypatch.chdir(other)
    files = load_one("task.data.files.test=mine.jsonl", name=str(tiny)).task.data.files
    assert files == {"train": str(tiny.parent / "train.jsonl"), "test": str(other / "mine.jsonl")}
    assert load_one("task.data.files={test: mine.jsonl}", name=str(tiny)).task.data.files == files
    (problem,) = recipe_problems("task.data.files.test=test.jsonl", name=str(tiny))
    assert f"there is no file {other}/test.jsonl" in problem


def test_tilde_in_a_path_is_the_home_folder(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny.parent))
    files = load_one("task.data.files.test=~/test.jsonl").task.data.files
    assert files is not None
    assert files["test"] == str(tiny.parent / "test.jsonl")


def test_model_name_is_a_folder_if_it_exists_else_a_hub_name(tiny: Path) -> None:
    assert load_one("model.tokenizer=org/name").model.tokenizer == "org/name"
    folder = tiny.parent / "org" / "name"
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    assert load_one("model.tokenizer=org/name").model.tokenizer == str(folder)


# ---------------------------------------------------------------- problems


@pytest.mark.parametrize(
    ("override", "suggested"),
    [
        ("modle.path=x", "model"),
        ("model.pat=x", "path"),
        ("model={tokenizer: {vocab_sise: 999}}", "vocab_size"),
        ("task.lables=[a, b]", "labels"),
        ("task.data.drop_emty=true", "drop_empty"),
        ("task={name: instruction, prompt: a, completion: b, choises: [], data: {files: {train: "
         "train.jsonl, test: test.jsonl}}}", "choices"),
        ("method={name: qlora, lora_alfa: 3}", "lora_alpha"),
        ("train.learning_rat=1", "learning_rate"),
        ("evaluation.splt=test", "split"),
        ("resources.gpu_per_node=1", "gpus_per_node"),
        ("sweep.gird={}", "grid"),
        ("baseline={source: x, metricss: {}}", "metrics"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("tiny")
def test_unknown_key_suggests_the_nearest_valid_one(override: str, suggested: str) -> None:
    (problem,) = recipe_problems(override)
    assert "unknown key; did you mean " in problem
    assert suggested in problem.split("did you mean")[1]


@pytest.mark.usefixtures("tiny")
def test_unknown_key_without_a_near_one_lists_the_known_keys() -> None:
    (problem,) = recipe_problems("evaluation.zzzz=1")
    assert problem.endswith("known here: before, per_device_eval_batch_size, split")
    (problem,) = recipe_problems("method.r=1")  # `full` has no rank; `lora` has
    assert problem.endswith("known here: name")


def test_all_problems_are_reported_at_once_each_with_its_line(tiny: Path) -> None:
    tiny.write_text(
        """\
name: Tiny Model
model:
  path: [a]
  config: bert
  tokenizer: { lowercase: maybe, vocab_size: 400 }
task:
  name: classification
  data:
    files: { train: 5, dev: x.jsonl }
    seed: 1.5
  labels: [no, 1, true]
method: { name: full }
train:
  learning_rate: fast
  bf16: no
  num_train_epochs: -1
  sed: 3
resources: { nodes: two }
"""
    )
    assert [
        re.sub(r"[;,] (it has|got|known|did|quote).*", "", line) for line in recipe_problems()
    ] == [
        "tiny.yaml:1 name: has characters that are not allowed here",
        "tiny.yaml:3 model.path: expected text",
        "tiny.yaml:4 model.config: expected a mapping",
        "tiny.yaml:5 model.tokenizer.lowercase: expected true or false",
        "tiny.yaml:9 task.data.files.train: expected text",
        "tiny.yaml:9 task.data.files.dev: unknown key",
        "tiny.yaml:10 task.data.seed: expected a whole number",
        "tiny.yaml:11 task.labels.1: expected text",
        "tiny.yaml:11 task.labels.2: expected text",
        "tiny.yaml:14 train.learning_rate: expected a number",
        "tiny.yaml:15 train.bf16: expected true or false or 'auto'",
        "tiny.yaml:16 train.num_train_epochs: expected a number greater than 0",
        "tiny.yaml:17 train.sed: unknown key",
        "tiny.yaml:18 resources.nodes: expected a whole number or 'auto'",
    ]


@pytest.mark.usefixtures("tiny")
def test_label_no_is_read_as_text() -> None:
    recipe = load_one("task.labels=[no, yes]")
    assert recipe.task.model_dump()["labels"] == ["no", "yes"]


@pytest.mark.parametrize(
    ("override", "field", "what"),
    [
        ("model.config={model_type: 5}", "model.config", "needs `model_type`"),
        ("model={config: null}", "model", "needs `path` or `config`"),
        ("model.tokenizer=null", "model.tokenizer", "is required for a new model"),
        ("model.tokenizer='a b'", "model.tokenizer", "expected a hub name or a folder"),
        ("model.tokenizer=./nosuch", "model.tokenizer", "there is no folder"),
        (
            "task.data.path=imdb",
            "task.data",
            "needs either `path` (a hub data set or a folder) or `files`, got both",
        ),
        ("task.data={files: null, path: a b}", "task.data.path", "expected a hub name"),
        ("task.data.files.test=tiny.yaml", "task.data.files.test", "expected .csv"),
        ("task.data.fractions={train: 0.9, test: 0.2}", "task.data.fractions", "sum of at most 1"),
        ("task.data.fractions={test: 0.5}", "task.data", "no train split"),
        ("task.data.fractions={train: 0}", "task.data.fractions.train", "greater than 0"),
        (
            "task.data.limits={validation: 5}",
            "task.data.limits.validation",
            "no such split; use one of test, train",
        ),
        (
            "task.data.sample={validation: 0.5}",
            "task.data.sample.validation",
            "no such split; use one of test, train",
        ),
        ("evaluation.split=validation", "evaluation.split", "no validation split"),
        ("train={bf16: true, fp16: true}", "train.fp16", "exclude each other"),
        ("train.per_device_train_batch_size=3", "train.per_device_train_batch_size", "divide"),
        ("train.load_best_model_at_end=true", "train.load_best_model_at_end", "validation split"),
        ("task.labels=[a]", "task.labels", "expected at least 2 items, got"),
        ("task.labels=[a, b, a]", "task.labels", "a is listed more than once"),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_fields_that_contradict_each_other_are_refused(
    override: str, field: str, what: str
) -> None:
    problems = recipe_problems(override)
    assert any(f" {field}: " in line and what in line for line in problems), problems


@pytest.mark.usefixtures("tiny")
def test_resources_auto_stands_for_all_defaults() -> None:
    resources = load_one("resources=auto").resources
    assert resources.model_dump(exclude_none=True, exclude_defaults=True) == {}
    assert load_one("resources=auto", "resources.nodes=2").resources.nodes == 2


def test_name_that_is_no_recipe_is_refused(workplace: Path) -> None:
    for name in ("nosuch", "nosuch.yaml", "x" * 5000, "~nosuchuser/x", str(workplace), "local"):
        (problem,) = recipe_problems(name=name)
        assert "there is no such file" in problem or "is a folder" in problem


def test_metric_for_best_model_must_be_one_of_the_task(tiny: Path, cli: Cli) -> None:
    refused = cli("plan", tiny, "-c", "local", "-o", "train.metric_for_best_model=acuracy")
    assert refused.code == 2
    assert "train.metric_for_best_model: the task has no metric 'acuracy'" in refused.err
    assert "recall[good]" in refused.err
    allowed = cli("plan", tiny, "-c", "local", "-o", "train.metric_for_best_model=recall[good]")
    assert allowed.code == 0


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"path": "a/b"}, {"train": "train", "validation": "validation", "test": "test"}),
        (
            {"path": "a/b", "splits": {"test": "v", "train": "train"}},
            {"train": "train", "test": "v"},
        ),
        ({"path": "a/b", "fractions": {"train": 0.5, "test": 0.5}}, {"train": "train"}),
        ({"files": {"test": "t.csv", "train": "x.csv"}}, {"train": "x.csv", "test": "t.csv"}),
    ],
)
def test_split_sources_follow_files_splits_and_fractions(
    data: dict[str, Any], expected: dict[str, str]
) -> None:
    from hpcft.core.records import DataSpec
    from hpcft.tasks.data.examples import split_sources

    assert split_sources(DataSpec(**data)) == expected
