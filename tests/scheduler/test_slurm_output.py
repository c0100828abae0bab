"""Parsing of what Slurm's commands print."""

from __future__ import annotations

import pytest

from fake_slurm import SACCT, SQUEUE, WANTED
from hpcft.core.records import Cluster
from hpcft.scheduler.job_state import JobState
from hpcft.scheduler.protocol import TooManyJobs
from hpcft.scheduler.slurm_output import (
    parse_refusal,
    parse_sacct,
    parse_squeue,
    parse_submitted,
)

ALL = ["account", "partition", "qos", "constraint", "gpus-per-node"]

# ---------------------------------------------------------------- states


def test_parse_squeue_reads_every_kind_of_line() -> None:
    states = parse_squeue(SQUEUE, WANTED)
    assert set(states) == WANTED - {"404"}
    assert states["101"] == JobState(
        "RUNNING", "", nodes="n[1-2]", elapsed_s=93784.0,
        origin="hpcft-t /logs/hpcft-t_submission.sh",
    )  # fmt: skip
    assert states["102"].reason == "waiting for nodes to become free (Resources)"
    assert states["103"].reason == "jobs of higher priority are ahead (Priority)"
    assert (states["104_0"].state, states["104_0"].elapsed_s) == ("RUNNING", 306.0)
    assert states["104_1"].reason.startswith("waiting for other points of the sweep")
    assert states["105"].reason == (
        "a node that it needs is down or reserved (ReqNodeNotAvail, UnavailableNodes:n[1-2])"
    )
    assert states["106"].reason.startswith("the nodes that it needs are down, drained or reserved")
    assert states["111"].reason == "SomethingNew(1|2)"
    assert states["112"].reason.startswith("could not start on its node, and is held now")
    live = {name for name, state in states.items() if state.is_live}
    assert live == WANTED - {"404", "109", "110"}
    assert {name for name, state in states.items() if state.is_over} == {"109", "110"}
    assert states["109"].ended_at == 1795266854.0
    assert states["102"].ended_at is None


def test_parse_sacct_reads_every_kind_of_line() -> None:
    wanted = {str(n) for n in (201, 202, 203, 204, 205, 206, 208, 209, 210)}
    wanted |= {f"207_{n}" for n in range(6)} | {"211_0", "211_1"}
    states = parse_sacct(SACCT, wanted)
    assert {name: state.state for name, state in states.items()} == {
        "201": "COMPLETED", "202": "CANCELLED", "203": "CANCELLED", "204": "TIMEOUT",
        "205": "OUT_OF_MEMORY", "206": "NODE_FAIL", "207_0": "FAILED", "207_1": "COMPLETED",
        "207_2": "PENDING", "207_3": "PENDING", "207_5": "PENDING", "208": "PREEMPTED",
        "209": "RUNNING", "210": "FAILED", "211_0": "CANCELLED", "211_1": "CANCELLED",
    }  # fmt: skip
    assert states["202"] == JobState(
        "CANCELLED", "by root", nodes="n[1-4]", elapsed_s=93784.0, exit_code="0:15"
    )
    assert states["209"].elapsed_s == 123.0
    assert states["210"].elapsed_s is None
    over = {name for name, state in states.items() if state.is_over}
    assert over == set(states) - {"207_2", "207_3", "207_5", "209"}


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
        ("Something that nobody has seen", ""),
    ],
)  # fmt: skip
def test_parse_refusal_names_the_field_of_the_profile(reason: str, key: str) -> None:
    refusal = parse_refusal(f"sbatch: error: x\nallocation failure: {reason}", "--nodes=2", ALL)
    assert refusal is not None
    assert (str(refusal), refusal.key) == (f"x; {reason}", key)
    assert refusal.reason == f"x; {reason}; it requested --nodes=2"
    assert not key or key in Cluster.model_fields


@pytest.mark.parametrize(
    ("reason", "options", "key"),
    [
        ("Invalid feature specification", ["partition"], ""),
        ("Invalid account or account/partition combination specified", ["qos"], ""),
        ("Job violates accounting/QOS policy", ["account"], "account"),
        ("Requested node configuration is not available", [], "cores_per_node"),
        ("Invalid generic resource (gres) specification", [], ""),
    ],
)
def test_parse_refusal_does_not_blame_a_field_that_is_not_set(
    reason: str, options: list[str], key: str
) -> None:
    refusal = parse_refusal(f"Batch job submission failed: {reason}", "", options)
    assert refusal is not None
    assert refusal.key == key


def test_parse_refusal_shows_the_words_of_the_site() -> None:
    """What a site's job_submit.lua says stands in lines before Slurm's reason."""
    output = (
        "sbatch failed (1): sbatch: error: Your project has no hours left;\n"
        "sbatch: error: please contact help@example.org\n"
        "sbatch: error: Batch job submission failed: Unspecified error"
    )
    refusal = parse_refusal(output, "it", [])
    assert refusal is not None
    assert str(refusal) == (
        "Your project has no hours left;; please contact help@example.org; Unspecified error"
    )
    assert refusal.key == ""


def test_parse_refusal_by_a_filter_of_the_site() -> None:
    output = "sbatch: error: no jobs on Sundays\nsbatch: error: cli_filter plugin terminated"
    refusal = parse_refusal(output, "", [])
    assert str(refusal) == "no jobs on Sundays; cli_filter plugin terminated"


def test_parse_refusal_of_a_job_limit_is_too_many_jobs() -> None:
    refusal = parse_refusal(
        "sbatch: error: AssocMaxSubmitJobLimit\nallocation failure: Job violates accounting/QOS "
        "policy (job submit limit, user's size and/or time limits)",
        "",
        ALL,
    )
    assert isinstance(refusal, TooManyJobs)
    assert str(refusal) == "AssocMaxSubmitJobLimit"


@pytest.mark.parametrize(
    "output", ["allocation failure: Unable to contact slurm controller", "sbatch: error: no shell"]
)
def test_parse_refusal_of_another_failure_is_none(output: str) -> None:
    assert parse_refusal(output, "", ALL) is None


# ---------------------------------------------------------------- submissions


@pytest.mark.parametrize(
    ("output", "job_id"),
    [
        ("Submitted batch job 12\n", "12"),
        ("Submitted batch job 12 on cluster east\n", "12"),
        ("You have used 3 job slots\nyour last job 7 failed\nSubmitted batch job 12\n", "12"),
        ("12\n", "12"),
        ("Welcome, 2 jobs left\n12;east\n", "12"),
        ("no job 7 today\n", None),
        ("", None),
    ],
)
def test_parse_submitted_finds_the_id_among_other_lines(output: str, job_id: str | None) -> None:
    assert parse_submitted(output) == job_id
