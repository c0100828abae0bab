"""Tests of NanGuard: by its callbacks, and in a real run whose loss is not a number."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from builders import Cli
from hpcft.core.paths import RunPaths
from hpcft.training.trainer.nan_guard import FP16_LIMIT, NanGuard

NAN, INF = math.nan, math.inf


def log_losses(guard: NanGuard, *losses: float, every: int = 10, end: float | None = None) -> None:
    """Logs losses as the Trainer does.

    Args:
        guard: the callback to test.
        losses: one for each log.
        every: steps between two logs.
        end: mean loss that is logged at the end of training; None: training does not end.
    """
    guard.on_train_begin(None, SimpleNamespace(global_step=0), None)
    step = 0
    for step in range(every, every * len(losses) + 1, every):
        values = {"loss": losses[step // every - 1], "learning_rate": 0.1}
        guard.on_log(None, SimpleNamespace(global_step=step), None, logs=values)
        guard.on_log(None, SimpleNamespace(global_step=step), None, logs={"eval_loss": NAN})
    if end is not None:
        guard.on_log(None, SimpleNamespace(global_step=step + 5), None, logs={"train_loss": end})


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_on_log_loss_not_finite_raises_at_the_first_one(
    precision: str, bad: float, tmp_path: Path
) -> None:
    log_losses(NanGuard(RunPaths(tmp_path), precision), 1.0, 0.5, 0.25, end=0.5)
    message = rf"the loss is {bad} \(steps 21 to 30, learning rate 0.1\); there is no checkpoint"
    with pytest.raises(FloatingPointError, match=message):
        log_losses(NanGuard(RunPaths(tmp_path), precision), 1.0, 0.5, bad, 0.25)
    with pytest.raises(FloatingPointError, match=r"\(steps 21 to 25\)"):
        log_losses(NanGuard(RunPaths(tmp_path), precision), 1.0, 0.5, end=bad)


def test_on_log_fp16_raises_only_after_several_in_a_row(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    few = [NAN] * (FP16_LIMIT - 1)
    log_losses(NanGuard(paths, "fp16"), 1.0, *few, 0.5, *few, 0.25, end=NAN)
    with pytest.raises(FloatingPointError, match=r"steps 11 to 40"):
        log_losses(NanGuard(paths, "fp16"), 1.0, *few, NAN, 0.5)
    with pytest.raises(FloatingPointError, match=r"steps 11 to 35"):
        log_losses(NanGuard(paths, "fp16"), 1.0, *few, end=NAN)
    with pytest.raises(FloatingPointError, match=r"steps 1 to 5\)"):
        log_losses(NanGuard(paths, "fp16"), end=NAN)


def test_on_log_loss_not_finite_names_last_good_checkpoint(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    for step in (10, 15, 20, 25):
        (paths.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
    with pytest.raises(
        FloatingPointError, match=r"is that of step 15 \(to resume from it, remove the newer ones"
    ):
        log_losses(NanGuard(paths, "bf16"), 1.0, 1.0, NAN)


@pytest.mark.slow
def test_submit_diverging_run_fails_with_class_nan(tiny: Path, cli: Cli) -> None:
    """The weights grow beyond 32 bits within a few steps."""
    said = cli("submit", tiny, "-c", "local", "--watch", "-o", "train.learning_rate=9.9",
               "-o", "train.weight_decay=9.9", "-o", "train.max_steps=40",
               "-o", "train.logging_steps=2", "-o", "train.lr_scheduler_type=constant")  # fmt: skip
    assert said.code == 1
    (view,) = cli("explain", "tiny", "--json").json
    assert view["failure"]["class"] == "nan", view
    assert view["failure"]["policy"] == "stop"
    assert "FloatingPointError: the loss is nan (step" in view["failure"]["evidence"]
    assert view["recoveries"] == []
    assert "lower train.learning_rate" in said.err
