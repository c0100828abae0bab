"""What is read from Slurm: states, refusals, tokens and names, from recorded answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders import ROOT
from hpcft.core.errors import ClusterError
from hpcft.core.records import Cluster
from hpcft.jobs import default_cluster
from hpcft.scheduler import slurm, slurm_output
from hpcft.scheduler.job_state import JobState, normalise_state
from hpcft.scheduler.pending_reasons import explain_reason

# ---------------------------------------------------------------- reading Slurm


SQUEUE = """\
101|RUNNING|1-02:03:04|n[1-2]|N/A|None
102|PENDING|0:00||N/A|Resources
103|PENDING|0:00||N/A|(Priority)
104_0|RUNNING|5:06|n3|N/A|None
104_1|PENDING|0:00||N/A|JobArrayTaskLimit
104_10|PENDING|0:00||N/A|Dependency
105|PENDING|0:00||N/A|ReqNodeNotAvail, UnavailableNodes:n[1-2]
106|PENDING|0:00||N/A|Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions
107|CONFIGURING|0:03|n4|N/A|Prolog
108|COMPLETING|0:10|n4|N/A|None
109|NODE_FAIL|2:00|n1|1795266854|NodeDown
110|CANCELLED|0:00||1795266800|None
111|PENDING|0:00||N/A|SomethingNew(1|2)
112|REQUEUE_HOLD|0:00||N/A|launch failed requeued held
999|RUNNING|0:01|n1|N/A|None
"""  # noqa: E501
WANTED = {"101", "102", "103", "104_0", "104_1", "104_10", "105", "106", "107", "108", "109", "110",
          "111", "112", "404"}  # fmt: skip


def test_squeue() -> None:
    found = slurm_output.parse_squeue(SQUEUE, WANTED)
    assert set(found) == WANTED - {"404"}
    assert found["101"] == JobState("RUNNING", "", "n[1-2]", 93784.0)
    assert found["102"].reason == "waiting for nodes to become free (Resources)"
    assert found["103"].reason == "jobs of higher priority are ahead (Priority)"
    assert (found["104_0"].state, found["104_0"].elapsed_s) == ("RUNNING", 306.0)
    assert found["104_1"].reason.startswith("waiting for other points of the sweep")
    assert found["105"].reason == (
        "a node that it needs is down or reserved (ReqNodeNotAvail, UnavailableNodes:n[1-2])"
    )
    assert found["106"].reason.startswith("the nodes that it needs are down, drained or reserved")
    assert found["111"].reason == "SomethingNew(1|2)"
    assert found["112"].reason.startswith("could not start on its node and is held")
    live = {name for name, state in found.items() if state.is_live}
    assert live == WANTED - {"404", "109", "110"}
    assert {name for name, state in found.items() if state.is_over} == {"109", "110"}
    assert found["109"].ended_at == 1795266854.0
    assert found["102"].ended_at is None


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


def test_sacct() -> None:
    wanted = {str(n) for n in (201, 202, 203, 204, 205, 206, 208, 209, 210)}
    wanted |= {f"207_{n}" for n in range(6)} | {"211_0", "211_1"}
    found = slurm_output.parse_sacct(SACCT, wanted)
    assert {name: state.state for name, state in found.items()} == {
        "201": "COMPLETED", "202": "CANCELLED", "203": "CANCELLED", "204": "TIMEOUT",
        "205": "OUT_OF_MEMORY", "206": "NODE_FAIL", "207_0": "FAILED", "207_1": "COMPLETED",
        "207_2": "PENDING", "207_3": "PENDING", "207_5": "PENDING", "208": "PREEMPTED",
        "209": "RUNNING", "210": "FAILED", "211_0": "CANCELLED", "211_1": "CANCELLED",
    }  # fmt: skip
    assert found["202"] == JobState("CANCELLED", "by root", "n[1-4]", 93784.0, "0:15")
    assert found["209"].elapsed_s == 123.0
    assert found["210"].elapsed_s is None
    over = {name for name, state in found.items() if state.is_over}
    assert over == set(found) - {"207_2", "207_3", "207_5", "209"}


@pytest.mark.parametrize(
    ("word", "plain"),
    [("CANCELLED by 1000", "CANCELLED"), ("CANCELLED+", "CANCELLED"), (" running ", "RUNNING"),
     ("OUT_OF_ME+", "OUT_OF_ME"), ("", "UNKNOWN"), ("+", "UNKNOWN")],
)  # fmt: skip
def test_normalised(word: str, plain: str) -> None:
    assert normalise_state(word) == plain


@pytest.mark.parametrize(
    ("reason", "sentence"),
    [
        ("None", ""),
        ("", ""),
        ("(None)", ""),
        ("(Resources)", "waiting for nodes to become free (Resources)"),
        ("PartitionTimeLimit", "asks for more time than the partition allows: lower "
         "resources.time_min (PartitionTimeLimit)"),
        ("Nodes_required_for_job_are_DOWN,_DRAINED", "the nodes that it needs are down, "
         "drained or reserved (Nodes_required_for_job_are_DOWN,_DRAINED)"),
        ("launch_failed_requeued_held", "could not start on its node and is held: scontrol release "
         "(launch_failed_requeued_held)"),
        ("ReqNodeNotAvail(Unavailable:n1)", "a node that it needs is down or reserved "
         "(ReqNodeNotAvail(Unavailable:n1))"),
        ("AssocGrpGRES", "the limit of your account is reached (GPUs): wait for other jobs "
         "(AssocGrpGRES)"),
        ("QOSMaxCpuPerUserLimit", "you have as many cores as the QOS allows: wait for your other "
         "jobs (QOSMaxCpuPerUserLimit)"),
        ("AssocGrpBillingMinutes", "the budget of your account is used up (billing units × "
         "minutes): ask its owner (AssocGrpBillingMinutes)"),
        ("QOSGrpCPURunMinutesLimit", "running jobs hold all that the QOS allows at a time (cores × "
         "minutes) (QOSGrpCPURunMinutesLimit)"),
        ("QOSMaxWallDurationPerJobLimit", "asks for more time per job than the QOS allows: lower "
         "the recipe's resources (QOSMaxWallDurationPerJobLimit)"),
        ("QOSMinGRES", "asks for less than the QOS wants (GPUs): ask for more, or correct the "
         "profile (QOSMinGRES)"),
        ("Unheard", "Unheard"),
    ],
)  # fmt: skip
def test_pending_reasons(reason: str, sentence: str) -> None:
    assert explain_reason(reason) == sentence


def scheduler(monkeypatch: pytest.MonkeyPatch, **answers: str | Exception) -> list[str]:
    """Puts made-up answers where scheduler commands would be; the commands that were called."""
    called: list[str] = []

    def run(*command: str, **_: object) -> str:
        called.append(" ".join(command))
        answer = answers[command[0]]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(slurm, "_run", run)
    return called


AWAY = ClusterError("squeue failed (1): slurm_load_jobs error: Unable to contact slurm controller")
NO_ACCOUNTS = ClusterError("sacct failed (1): Slurm accounting storage is disabled")


def test_states_ask_each_command_once(monkeypatch: pytest.MonkeyPatch) -> None:
    called = scheduler(monkeypatch, squeue=SQUEUE, sacct=SACCT)
    found = slurm.job_states(["101", "104_1", "201", "207_0", "207_1"])
    assert [state.state for state in found.values()] == [
        "RUNNING", "PENDING", "COMPLETED", "FAILED", "COMPLETED",
    ]  # fmt: skip
    assert len(called) == 2
    assert "-j 201,207 " in called[1]
    assert slurm.job_states([]) == {}
    assert len(called) == 2


def test_states_without_the_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    """What accounting calls the end of a job may be that of an earlier start."""
    scheduler(monkeypatch, squeue=AWAY, sacct=SACCT)
    found = slurm.job_states(["101", "201", "204", "205", "206", "208", "209"])
    assert {name: state.state for name, state in found.items()} == {
        "101": "UNKNOWN", "201": "COMPLETED", "204": "UNKNOWN", "205": "OUT_OF_MEMORY",
        "206": "UNKNOWN", "208": "UNKNOWN", "209": "RUNNING",
    }  # fmt: skip
    assert found["101"] == JobState("UNKNOWN", str(AWAY))
    assert found["208"].reason == f"{AWAY}; accounting has it PREEMPTED, but it may be queued again"


def test_a_newer_start_counts_more_than_what_accounting_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler(monkeypatch, squeue="208|PENDING|0:00||N/A|BeginTime\n", sacct=SACCT)
    assert slurm.job_states(["208"])["208"].state == "PENDING"


def test_a_job_that_slurm_has_forgotten_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accounting lags behind, or has lost what became of it."""
    scheduler(monkeypatch, squeue="", sacct=SACCT)
    found = slurm.job_states(["208", "209", "207_2"])
    assert (found["208"].state, found["208"].unknown_to_slurm) == ("PREEMPTED", False)
    for name in ("209", "207_2"):
        assert (found[name].state, found[name].unknown_to_slurm) == ("UNKNOWN", True)
    assert "accounting still has it RUNNING" in found["209"].reason


def test_states_without_accounting(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler(monkeypatch, squeue=SQUEUE, sacct=NO_ACCOUNTS)
    found = slurm.job_states(["101", "204"])
    assert found["101"].state == "RUNNING"
    assert found["204"] == JobState("UNKNOWN", str(NO_ACCOUNTS), unknown_to_slurm=True)


def test_states_without_either(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler(monkeypatch, squeue=AWAY, sacct=NO_ACCOUNTS)
    found = slurm.job_states(["101", "204"])
    assert {state.state for state in found.values()} == {"UNKNOWN"}
    assert {state.reason for state in found.values()} == {f"{AWAY}; {NO_ACCOUNTS}"}
    assert not any(state.is_over or state.is_live for state in found.values())


def test_states_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler(monkeypatch, squeue="", sacct="")
    (state,) = slurm.job_states(["77"]).values()
    assert state == JobState(
        "UNKNOWN", "neither squeue nor sacct knows the job", unknown_to_slurm=True
    )


def test_a_job_is_found_by_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "5|hpcft-a\n6_0|hpcft-b\n6_1|hpcft-b\n6_11|hpcft-b\n7|\n"
    scheduler(monkeypatch, squeue=lines)
    assert slurm.find_by_token("hpcft-a") == "5"
    assert slurm.find_by_token("hpcft-b", 1) == "6_1"
    assert slurm.find_by_token("hpcft-b", 11) == "6_11"
    assert slurm.find_by_token("hpcft-c") is None


@pytest.mark.parametrize(
    ("body", "says"),
    [("exit 3", r"failed \(3\)"), ("echo no luck >&2; exit 1", "no luck"),
     ("echo only out; exit 1", "only out"), ("sleep 30", "did not answer within 1 s")],
)  # fmt: skip
def test_a_scheduler_command_that_fails(
    body: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "squeue"
    command.write_text(f"#!/bin/sh\n{body.replace('sleep', 'exec sleep')}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(ClusterError, match=f"squeue .*{says}"):
        slurm._run("squeue", timeout_s=1)


def test_what_a_user_sets_for_himself_hides_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "squeue"
    command.write_text("#!/bin/sh\nenv\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    said = slurm._run("squeue").splitlines()
    assert "SLURM_TIME_FORMAT=%s" in said
    assert not [line for line in said if line.startswith("SQUEUE_")]


def test_a_scheduler_command_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ClusterError, match="squeue is not on PATH: is this a Slurm login node"):
        slurm.find_by_token("x")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("reason", "key"),
    [
        ("Invalid account or account/partition combination specified", "account"),
        ("Invalid partition name specified", "partition"),
        ("User's group not permitted to use this partition", "partition"),
        ("Invalid qos specification", "qos"),
        ("Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
         "qos"),
        ("Invalid feature specification", "constraint"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "time_limit_min"),
        ("Memory required by task is not available", "host_memory_gib"),
        ("Requested node configuration is not available", "gpus_per_node"),
        ("Node count specification invalid", "max_nodes"),
        ("More processors requested than permitted", "cores_per_node"),
        ("CPU count per node can not be satisfied", "cores_per_node"),
        ("Invalid generic resource (gres) specification", "gpu_request"),
        ("Invalid Trackable RESource (TRES) specification", "gpu_request"),
        ("Something that nobody has seen", "name"),
    ],
)  # fmt: skip
def test_refusals_name_the_field_to_blame(
    reason: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ClusterError(f"sbatch failed (1): sbatch: error: x\nallocation failure: {reason}")
    scheduler(monkeypatch, sbatch=error, sinfo="")
    text = (ROOT / "tests/golden/sbatch-single.sh").read_text()
    with pytest.raises(slurm.Refused) as refused:
        slurm.check_script(text)
    assert refused.value.key == key
    assert key in Cluster.model_fields
    assert refused.value.reason.startswith(f"{reason}, asked for --cpus-per-task=12 ")
    assert "--partition=gpu" in refused.value.reason


def test_a_limit_on_jobs_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    said = (
        "sbatch failed (1): sbatch: error: AssocMaxSubmitJobLimit\nallocation failure: Job "
        "violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
    )
    scheduler(monkeypatch, sbatch=ClusterError(said))
    with pytest.raises(slurm.TooManyJobs, match=r"^AssocMaxSubmitJobLimit$"):
        slurm.check_script("#!/bin/sh\n")


@pytest.mark.parametrize(
    ("config", "most"),
    [("MaxArraySize            = 1001\n", 1001), ("MaxArraySize = 0\n", 1), ("x", None),
     (AWAY, None)],
)  # fmt: skip
def test_array_size(
    config: str | Exception, most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler(monkeypatch, scontrol=config)
    assert slurm.max_array_size() == most


def test_an_absent_controller_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "sbatch failed (1): allocation failure: Unable to contact slurm controller"
    scheduler(monkeypatch, sbatch=ClusterError(said))
    with pytest.raises(ClusterError, match="Unable to contact"):
        slurm.check_script("#!/bin/sh\n")


# ---------------------------------------------------------------- which cluster is here


@pytest.mark.parametrize(
    ("config", "name"),
    [("Configuration data\nClusterName             = campus\nX = y\n", "campus"), ("Nothing", None),
     (ClusterError("scontrol failed (1): Could not establish a configuration source"), None)],
)  # fmt: skip
def test_cluster_name(
    config: str | Exception, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda command: f"/usr/bin/{command}")
    scheduler(monkeypatch, scontrol=config)
    assert slurm.cluster_name() == name
    monkeypatch.setattr("shutil.which", lambda command: None)
    assert slurm.cluster_name() is None
    assert default_cluster.detect_cluster() == "local"


def test_node_address(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.7 NodeHostName=n1 Port=0\n"
    scheduler(monkeypatch, scontrol=answer)
    assert slurm.node_address("n1") == "10.0.0.7"
    scheduler(monkeypatch, scontrol="NodeName=n1\n")
    with pytest.raises(ClusterError, match="no NodeAddr of node n1"):
        slurm.node_address("n1")
