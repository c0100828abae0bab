"""Tests of the limits on restarts."""

from __future__ import annotations

import pytest

from builders import layout
from hpcft.core.records import Recovery
from hpcft.recovery.limits import restart_limit_reason
from hpcft.recovery.log import Action


def recovery(cause: str, step: int, action: Action = "requeue", change: str = "") -> Recovery:
    return Recovery(
        number=1, at=1.0, job_id="1", cause=cause, evidence="", action=action, step=step,
        change=change, layout=layout(0), per_device_eval_batch_size=1,
    )  # fmt: skip


TWO_AT_STEP_40 = [recovery("rank_died", 40), recovery("rank_died", 40)]


@pytest.mark.parametrize(
    ("recoveries", "cause", "step", "reason"),
    [
        ([], "rank_died", 0, ""),
        ([], "timeout", 0, "no progress past step 0"),
        ([], "timeout", 10, ""),
        ([recovery("timeout", 10)], "timeout", 10, "no progress past step 10"),
        ([recovery("timeout", 10)], "timeout", 11, ""),
        ([recovery("rank_died", 40)], "rank_died", 40, ""),
        (TWO_AT_STEP_40, "rank_died", 40, "no progress past step 40 after 2 restarts"),
        (TWO_AT_STEP_40, "preempted", 40, ""),
        ([*TWO_AT_STEP_40, recovery("interrupted", 40)], "rank_died", 40,
         "no progress past step 40 after 2 restarts"),
        ([recovery("interrupted", 0)] * 2, "interrupted", 0, ""),
        ([recovery("preempted", 0)] * 19, "preempted", 0, ""),
        ([recovery("preempted", 0)] * 10 + [recovery("interrupted", 0)] * 10, "preempted", 0,
         "no progress past step 0 after 20 restarts"),
        ([recovery("interrupted", 0)] * 9, "rank_died", 0, ""),
        (TWO_AT_STEP_40, "rank_died", 41, ""),
        ([*TWO_AT_STEP_40, recovery("resumed", 40, "resume")], "rank_died", 40, ""),
        ([*TWO_AT_STEP_40, recovery("out_of_memory", 40, "restart", "micro-batch 2 → 1")],
         "rank_died", 40, "no progress past step 40 after 2 restarts"),
        ([recovery("bad_node", n) for n in range(20)], "bad_node", 90,
         "the run has restarted 20 times after failures of this class"),
        ([recovery("preempted", n) for n in range(99)], "preempted", 199, ""),
        ([recovery("interrupted", n) for n in range(99)], "interrupted", 199, ""),
        ([recovery("node_failed", n) for n in range(99)], "node_failed", 199, ""),
    ],
)  # fmt: skip
def test_restart_limit_reason_counts_restarts_without_progress(
    recoveries: list[Recovery], cause: str, step: int, reason: str
) -> None:
    assert restart_limit_reason(recoveries, cause, step) == reason
