"""Computes metrics through `evaluate`, without network, and says what each value means.

Every module in `METRICS` defines `METRIC`, which describes its values and computes them.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from hpcft.core.paths import cache_folder
from hpcft.metrics.base import Metric, MetricInfo, Scores
from hpcft.metrics.base import merge_scores as merge_scores

# Every metric module of this package. A new metric is a file and a name here.
METRICS = ("classification", "perplexity", "pretraining", "squad", "text_overlap")
DETAILS = ("intervals", "confusion")


def load_metric(module: str) -> Metric:
    """Returns the metric that a module of this package defines."""
    metric = importlib.import_module(f"{__name__}.{module}").METRIC
    assert isinstance(metric, Metric)
    return metric


def compute_metric(module: str, **inputs: Any) -> Scores:
    """Computes the values of a metric module.

    Args:
        module: its name, for example `squad`.
        inputs: `predictions`, `references` and what else the module's function takes.
    """
    # `evaluate` makes a folder for each metric; the Hugging Face cache may be read-only in a job.
    folder = str(cache_folder() / "evaluate")
    evaluated = _evaluate_class()(config_name=module, keep_in_memory=True, cache_dir=folder)
    scores = evaluated.compute(**inputs)
    assert scores is not None
    return {name: v if name in DETAILS else float(v) for name, v in scores.items()}


@functools.cache
def _evaluate_class() -> Any:
    """Returns the `evaluate.Metric` whose configurations are the metric modules."""
    import datasets
    import evaluate

    class HpcftMetric(evaluate.Metric):  # type: ignore[misc]
        """A metric module of hpcft; `config_name` says which one."""

        def _info(self) -> evaluate.MetricInfo:
            metric = load_metric(self.config_name)
            return evaluate.MetricInfo(
                description=importlib.import_module(metric.compute.__module__).__doc__,
                citation=metric.citation,
                inputs_description=metric.compute.__doc__,
                features=datasets.Features(_datasets_type(metric.inputs)),
            )

        def _compute(self, **inputs: Any) -> Scores:
            return load_metric(self.config_name).compute(**inputs)

    return HpcftMetric


def _datasets_type(type_: Any) -> Any:
    """Returns the `datasets` feature for the name of a type, or for a mapping or list of names."""
    import datasets

    if isinstance(type_, str):
        return datasets.Value(type_)
    if isinstance(type_, list):
        return datasets.Sequence(_datasets_type(type_[0]))
    return {name: _datasets_type(part) for name, part in type_.items()}


def metric_values(scores: Scores) -> dict[str, float]:
    """Returns the values alone, without intervals and confusion matrix."""
    return {name: value for name, value in scores.items() if name not in DETAILS}


# ---------------------------------------------------------------- what values mean


@functools.cache
def metric_infos() -> dict[str, MetricInfo]:
    """Returns what is known of every value, by name; `recall[]` stands for that of each label."""
    infos: dict[str, MetricInfo] = {}
    for module in METRICS:
        for name, info in load_metric(module).infos.items():
            infos.setdefault(name, info)
    return infos


def metric_info(name: str) -> MetricInfo | None:
    """Returns what is known of a value; None for a name that only a report's table has."""
    general, bracket, _ = name.partition("[")
    return metric_infos().get(f"{general}[]" if bracket else name)


def lower_is_better(name: str) -> bool:
    """Returns whether the lowest value is the best; False where that is not known."""
    info = metric_info(name)
    return info is not None and info.higher_is_better is False


def direction_arrow(name: str) -> str:
    """Returns `↑` where higher is better, `↓` where lower is, else nothing."""
    info = metric_info(name)
    if info is None or info.higher_is_better is None:
        return ""
    return "↑" if info.higher_is_better else "↓"
