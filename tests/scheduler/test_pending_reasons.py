"""Pending reasons in plain words."""

from __future__ import annotations

import pytest

from hpcft.scheduler.pending_reasons import explain_reason


@pytest.mark.parametrize(
    ("reason", "sentence"),
    [
        ("None", ""),
        ("", ""),
        ("(None)", ""),
        ("(Resources)", "waiting for nodes to become free (Resources)"),
        ("PartitionTimeLimit", "requests more time than the partition allows: lower "
         "resources.time_min (PartitionTimeLimit)"),
        ("Nodes_required_for_job_are_DOWN,_DRAINED", "the nodes that it needs are down, "
         "drained or reserved (Nodes_required_for_job_are_DOWN,_DRAINED)"),
        ("launch_failed_requeued_held", "could not start on its node, and is held now: scontrol "
         "release (launch_failed_requeued_held)"),
        ("ReqNodeNotAvail(Unavailable:n1)", "a node that it needs is down or reserved "
         "(ReqNodeNotAvail(Unavailable:n1))"),
        ("AssocGrpGRES", "the limit of your account is reached (GPUs): wait for other jobs "
         "(AssocGrpGRES)"),
        ("QOSMaxCpuPerUserLimit", "you have as many cores as the QOS allows: wait for your other "
         "jobs (QOSMaxCpuPerUserLimit)"),
        ("AssocGrpBillingMinutes", "the budget of your account is used up (billing units × "
         "minutes): ask whoever grants it (AssocGrpBillingMinutes)"),
        ("QOSGrpCPURunMinutesLimit", "running jobs hold all that the QOS allows at a time (cores × "
         "minutes) (QOSGrpCPURunMinutesLimit)"),
        ("QOSMaxWallDurationPerJobLimit", "requests more time per job than the QOS allows: lower "
         "the recipe's resources (QOSMaxWallDurationPerJobLimit)"),
        ("QOSMinGRES", "requests less than the QOS demands (GPUs): request more, or correct the "
         "profile (QOSMinGRES)"),
        ("Unheard", "Unheard"),
    ],
)  # fmt: skip
def test_explain_reason_says_what_to_wait_for_or_to_change(reason: str, sentence: str) -> None:
    assert explain_reason(reason) == sentence
