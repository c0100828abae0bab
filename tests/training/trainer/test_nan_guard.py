"""A loss that is not a number stops the run, and says so: by its callback, and in a real run."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from builders import Cli
from hpcft.core.paths import RunPaths
from hpcft.training.trainer.nan_guard import FP16_IN_A_ROW, NanGuard

NAN, INF = math.nan, math.inf


def logged(finite: NanGuard, *losses: float, every: int = 10, end: float | None = None) -> None:
    """Logs losses as the Trainer does, one each so many steps, and the one at the end."""
    finite.on_train_begin(None, SimpleNamespace(global_step=0), None)
    step = 0
    for step in range(every, every * len(losses) + 1, every):
        values = {"loss": losses[step // every - 1], "learning_rate": 0.1}
        finite.on_log(None, SimpleNamespace(global_step=step), None, logs=values)
        finite.on_log(None, SimpleNamespace(global_step=step), None, logs={"eval_loss": NAN})
    if end is not None:
        finite.on_log(None, SimpleNamespace(global_step=step + 5), None, logs={"train_loss": end})


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_the_first_loss_that_is_none_stops_the_run(
    precision: str, bad: float, tmp_path: Path
) -> None:
    logged(NanGuard(RunPaths(tmp_path), precision), 1.0, 0.5, 0.25, end=0.5)
    message = rf"the loss is {bad} \(steps 21 to 30, learning rate 0.1\); there is no checkpoint"
    with pytest.raises(FloatingPointError, match=message):
        logged(NanGuard(RunPaths(tmp_path), precision), 1.0, 0.5, bad, 0.25)
    with pytest.raises(FloatingPointError, match=r"\(steps 21 to 25\)"):
        logged(NanGuard(RunPaths(tmp_path), precision), 1.0, 0.5, end=bad)


def test_fp16_may_overflow_now_and_then(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    few = [NAN] * (FP16_IN_A_ROW - 1)
    logged(NanGuard(paths, "fp16"), 1.0, *few, 0.5, *few, 0.25, end=NAN)
    with pytest.raises(FloatingPointError, match=r"steps 11 to 40"):
        logged(NanGuard(paths, "fp16"), 1.0, *few, NAN, 0.5)
    with pytest.raises(FloatingPointError, match=r"steps 11 to 35"):
        logged(NanGuard(paths, "fp16"), 1.0, *few, end=NAN)
    with pytest.raises(FloatingPointError, match=r"steps 1 to 5\)"):
        logged(NanGuard(paths, "fp16"), end=NAN)


def test_the_last_checkpoint_from_before_is_named(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    for step in (10, 15, 20, 25):
        (paths.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
    with pytest.raises(FloatingPointError, match=r"is that of step 15 \(remove the newer ones"):
        logged(NanGuard(paths, "bf16"), 1.0, 1.0, NAN)


@pytest.mark.slow
def test_a_real_run_that_diverges_says_so(tiny: Path, cli: Cli) -> None:
    """Weights that grow past what 32 bits hold within a few steps."""
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
