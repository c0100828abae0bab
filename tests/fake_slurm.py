"""Recorded output of Slurm's commands, and fake commands that print it."""

from __future__ import annotations

import pytest

from hpcft.core.errors import ClusterError
from hpcft.scheduler import slurm_commands

SQUEUE = """\
101|RUNNING|1-02:03:04|n[1-2]|N/A|hpcft-t|/logs/hpcft-t_submission.sh|None
102|PENDING|0:00||N/A|hpcft-t|/logs/hpcft-t_submission.sh|Resources
103|PENDING|0:00||N/A|hpcft-t|/logs/hpcft-t_submission.sh|(Priority)
104_0|RUNNING|5:06|n3|N/A|hpcft-t|/logs/hpcft-t_submission.sh|None
104_1|PENDING|0:00||N/A|hpcft-t|/logs/hpcft-t_submission.sh|JobArrayTaskLimit
104_10|PENDING|0:00||N/A|hpcft-t|/logs/hpcft-t_submission.sh|Dependency
105|PENDING|0:00||N/A|hpcft-t|/logs/hpcft-t_submission.sh|ReqNodeNotAvail, UnavailableNodes:n[1-2]
106|PENDING|0:00||N/A|hpcft-t|/logs/hpcft-t_submission.sh|Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions
107|CONFIGURING|0:03|n4|N/A|hpcft-t|/logs/hpcft-t_submission.sh|Prolog
108|COMPLETING|0:10|n4|N/A|hpcft-t|/logs/hpcft-t_submission.sh|None
109|NODE_FAIL|2:00|n1|1795266854|hpcft-t|/logs/hpcft-t_submission.sh|NodeDown
110|CANCELLED|0:00||1795266800|hpcft-t|/logs/hpcft-t_submission.sh|None
111|PENDING|0:00||N/A|hpcft-t|/logs/hpcft-t_submission.sh|SomethingNew(1|2)
112|REQUEUE_HOLD|0:00||N/A|hpcft-t|/logs/hpcft-t_submission.sh|launch failed requeued held
999|RUNNING|0:01|n1|N/A|hpcft-t|/logs/hpcft-t_submission.sh|None
"""  # noqa: E501
WANTED = {"101", "102", "103", "104_0", "104_1", "104_10", "105", "106", "107", "108", "109", "110",
          "111", "112", "404"}  # fmt: skip

SACCT = """\
201|COMPLETED|0:0|00:01:02|n1
202|CANCELLED by 0|0:15|1-02:03:04|n[1-4]
203|CANCELLED+|0:0|00:00:00|None assigned
204|TIMEOUT|0:0|01:00:00|n2
205|OUT_OF_MEMORY|0:125|00:02:00|n2
206|NODE_FAIL|1:0|00:00:30|n3
207_0|FAILED|1:0|00:00:10|n1
207_1|COMPLETED|0:0|00:00:11|n1
207_[2-3,5%2]|PENDING|0:0|00:00:00|None assigned
208|PREEMPTED|0:15|00:09:00|n1
209|RUNNING|0:0|02:03.500|n1
210|FAILED|
211|CANCELLED by 0|0:0|00:00:00|None assigned
"""

AWAY = ClusterError("squeue failed (1): slurm_load_jobs error: Unable to contact slurm controller")
NO_ACCOUNTS = ClusterError("sacct failed (1): Slurm accounting storage is disabled")


def fake_commands(monkeypatch: pytest.MonkeyPatch, **outputs: str | Exception) -> list[str]:
    """Has each command of Slurm print a text, or fail; returns the list of calls, which grows."""
    calls: list[str] = []

    def run_command(*command: str, **_: object) -> str:
        calls.append(" ".join(command))
        output = outputs[command[0]]
        if isinstance(output, Exception):
            raise output
        return output

    monkeypatch.setattr(slurm_commands, "run_command", run_command)
    return calls
