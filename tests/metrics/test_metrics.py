"""The registry of metric modules: what each value means, and how modules are computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcft.core.records import DataSpec
from hpcft.metrics import (
    METRICS,
    compute_metric,
    direction_arrow,
    load_metric,
    lower_is_better,
    merge_scores,
    metric_info,
    metric_infos,
)
from hpcft.tasks.classification import Classification
from hpcft.tasks.few_shot.task import FewShot
from hpcft.tasks.instruction import Instruction
from hpcft.tasks.pretraining import Pretraining
from hpcft.tasks.question_answering import QuestionAnswering

DATA = DataSpec(files={"train": "x.jsonl"})


def test_every_value_of_every_task_is_described() -> None:
    template = {"prompt": "{text}", "completion": "{label}"}
    tasks = [
        Classification(name="classification", data=DATA, labels=["a", "b"]),
        QuestionAnswering(name="question_answering", data=DATA, version_2_with_negative=True),
        Pretraining(name="pretraining", data=DATA),
        Instruction(name="instruction", data=DATA, choices=["a", "b"], **template),
        FewShot(name="prompting", data=DATA, prompt="{text}", labels=["a", "b"],
                  answer="generation"),
    ]  # fmt: skip
    names = {name for task in tasks for name in task.metric_names()}
    assert [name for name in names if metric_info(name) is None] == []
    general = {name.split("[")[0] + "[]" if "[" in name else name for name in names}
    assert set(metric_infos()) == general | {"loss"}


def test_modules_agree_on_direction_and_scale_of_a_name() -> None:
    for module in METRICS:
        for name, info in load_metric(module).infos.items():
            known = metric_info(name)
            assert known is not None
            assert (info.higher_is_better, info.scale) == (known.higher_is_better, known.scale)


def test_every_module_of_the_package_is_registered() -> None:
    package = Path(load_metric("squad").compute.__code__.co_filename).parent
    modules = {file.stem for file in package.glob("*.py")}
    assert modules - {"__init__", "base", "bootstrap", "doubts"} == set(METRICS)


def test_direction_of_known_and_unknown_names() -> None:
    assert [lower_is_better(name) for name in ("loss", "perplexity", "accuracy", "odd")] == [
        True, True, False, False
    ]  # fmt: skip
    assert [direction_arrow(name) for name in ("recall[a]", "no_answer", "majority", "recipe")] == [
        "↑", "↓", "", ""
    ]  # fmt: skip


def test_merge_scores_keeps_all_values_and_intervals() -> None:
    one, other = {"x": 1.0, "intervals": {"x": (0, 1)}}, {"y": 2.0, "intervals": {"y": (1, 2)}}
    assert merge_scores(one, other) == {"x": 1.0, "y": 2.0, "intervals": {"x": (0, 1), "y": (1, 2)}}


def test_compute_metric_writes_nothing_to_the_hugging_face_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache may be read-only on compute nodes."""
    import evaluate

    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")
    compute_metric("perplexity", predictions=[1.0], references=[1], loss="loss")
    assert [*tmp_path.iterdir()] == []


def test_compute_metric_refuses_inputs_of_another_type() -> None:
    with pytest.raises(ValueError, match="expected format"):
        compute_metric("text_overlap", predictions=[["a"]], references=[["a"]])
