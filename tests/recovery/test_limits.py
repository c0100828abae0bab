"""How often a run may start again, and what it goes on from."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders import layout
from hpcft.core.paths import RunPaths
from hpcft.core.records import Recovery
from hpcft.recovery import limits, log


def met(cause: str, step: int, action: log.Action = "requeue", change: str = "") -> Recovery:
    return Recovery(number=1, at=1.0, job_id="1", cause=cause, evidence="", action=action, step=step,
                    change=change, layout=layout(0), per_device_eval_batch_size=1)  # fmt: skip


TWICE = [met("rank_died", 40), met("rank_died", 40)]


@pytest.mark.parametrize(
    ("taken", "cause", "step", "may"),
    [
        ([], "rank_died", 0, True),
        ([], "timeout", 0, False),
        ([], "timeout", 10, True),
        ([met("timeout", 10)], "timeout", 10, False),
        ([met("timeout", 10)], "timeout", 11, True),
        ([met("rank_died", 40)], "rank_died", 40, True),
        (TWICE, "rank_died", 40, False),
        (TWICE, "preempted", 40, False),
        (TWICE, "rank_died", 41, True),
        ([*TWICE, met("resumed", 40, "resume")], "rank_died", 40, True),
        ([*TWICE, met("out_of_memory", 40, "restart", "micro-batch 2 → 1")],
         "rank_died", 40, False),
        ([met("bad_node", n) for n in range(20)], "bad_node", 90, False),
        ([met("preempted", n) for n in range(99)], "preempted", 199, True),
    ],
)  # fmt: skip
def test_a_run_that_comes_no_further_stops(
    taken: list[Recovery], cause: str, step: int, may: bool
) -> None:
    assert (limits.restart_limit_reason(taken, cause, step) == "") is may


def test_without_a_complete_checkpoint_it_goes_on_from_its_beginning(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    assert log.saved_step(paths) == 0
    (paths.checkpoints / "checkpoint-10").mkdir(parents=True)
    assert log.saved_step(paths) == 0


def test_answers_are_counted(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.answers.mkdir()
    for rank, count in enumerate((3, 2)):
        (paths.answers / f"{rank}.jsonl").write_text('[1, "a"]\n' * count + "[7, ")
    assert log.saved_step(paths) == 5
