"""Tests of how failures are shown: by `hpcft explain`, in tables, and on the page of classes."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from builders import ROOT, Cli, Runs, run_progress, run_record, write_recovery
from hpcft.scheduler import slurm_output
from hpcft.scheduler.job_state import JobState


@pytest.mark.parametrize(
    ("state", "by"),
    [("CANCELLED by 0", " by root"), ("CANCELLED by 4000000000", " by the user 4000000000"),
     ("CANCELLED", ""), ("CANCELLED+", "")],
)  # fmt: skip
def test_failure_of_a_cancelled_run_names_the_user(state: str, by: str, runs: Runs) -> None:
    job_state = slurm_output.parse_sacct(f"11|{state}|0:15|00:01:00|n1\n", {"11"})["11"]
    runs.add("aaaa0000")
    runs.states = {"11": job_state}
    failure = runs.status_of("aaaa0000").failure
    assert failure is not None
    assert failure.sentence == f"on n1: the job was cancelled{by}"


def test_explain_of_a_failed_run_shows_evidence_recoveries_and_next_step(
    runs: Runs, cli: Cli
) -> None:
    errors = (("OSError", "[Errno 122] Disk quota exceeded: '/home/u/x'\x1b[2J"),)
    paths = runs.add("aaaa0000", errors=errors)
    write_recovery(paths, step=12, evidence="Connection reset by peer")
    runs.states = {"11": JobState("FAILED", nodes="n[1-2]", exit_code="1:0")}
    said = cli("explain", "aaaa")
    assert (said.code, said.err) == (0, "")
    facts = dict(line.split(maxsplit=1) for line in said.out.splitlines())
    assert facts["run"] == "made/aaaa0000, job 11"
    assert facts["state"] == "FAILED on n[1-2]"
    assert facts["class"] == "disk: the file system has no room left"
    assert facts["what"].startswith("rank 0 on n0: OSError: [Errno 122] Disk quota exceeded")
    assert facts["evidence"].endswith("made/aaaa0000/errors/0.json")
    assert facts["recovery"].endswith(
        "rank 1 on n2, nccl: Connection reset by peer; hpcft requeued the job, from step 12"
    )
    assert facts["hpcft"].startswith("stops")
    assert "hpcft resume aaaa0000" in facts["next"]
    assert "\x1b" not in said.out
    (one,) = cli("explain", "aaaa", "--json").json
    assert one["failure"]["class"] == "disk"
    assert one["failure"]["policy"] == "stop"
    assert (one["failure"]["rank"], one["failure"]["node"]) == (0, "n0")
    assert one["recoveries"][0]["cause"] == "nccl"


@pytest.mark.parametrize(
    ("state", "parts", "what"),
    [
        (
            JobState("RUNNING"),
            (run_progress(),),
            "nothing is wrong: the run is running (training, step 30 of 120",
        ),
        (JobState("RUNNING"), (), "nothing is wrong: the run is running"),
        (
            JobState("COMPLETED"),
            (run_record("aaaa0000", f1=1.0),),
            "nothing is wrong: the run has completed",
        ),
        (
            JobState("COMPLETED"),
            (run_record("aaaa0000").model_copy(update={"doubts": ["the training diverged"]}),),
            "the run has completed, but the training diverged",
        ),
        (JobState("PENDING", "waiting for nodes"), (), "the run waits: waiting for nodes"),
        (JobState("UNKNOWN", "squeue is away"), (), "the state of the run is not known"),
    ],
    ids=["running", "started", "completed", "doubted", "pending", "unknown"],
)
def test_explain_of_a_run_without_failure_says_so(
    state: JobState, parts: tuple[Any, ...], what: str, runs: Runs, cli: Cli
) -> None:
    """An old error in the folder does not make a failure of a run that may not have ended."""
    runs.add("aaaa0000", parts=parts, errors=(("KeyError", "'old'"),))
    runs.states = {"11": state}
    said = cli("explain", "made")
    assert said.code == 0
    assert f"what   {what}" in said.out
    (one,) = cli("explain", "made", "--json").json
    assert (one["failure"], one["hpcft_action"]) == (None, "")
    assert one["summary"].startswith(what)


def test_explain_of_several_runs_has_a_row_for_each(runs: Runs, cli: Cli) -> None:
    runs.add("aaaa0000", errors=(("KeyError", "'x'"),))
    runs.add("aaaa0001", job_id="12")
    runs.add("aaaa0002", job_id="13")
    runs.states = {"11": JobState("FAILED"), "12": JobState("RUNNING"),
                   "13": JobState("REQUEUE_HOLD", "launch failed requeued held")}  # fmt: skip
    said = cli("explain", "made")
    header, *lines = (line.split("\t") for line in said.out.splitlines())
    assert header == ["run", "state", "class", "what", "next"]
    assert [line[1:3] for line in lines] == [
        ["FAILED", "user"], ["RUNNING", ""], ["PENDING", "requeue_held"],
    ]  # fmt: skip
    assert "scontrol release" in lines[2][4]
    assert cli("explain", "nobody").code == 2


def test_collect_shows_class_and_sentence_of_a_failure(runs: Runs, cli: Cli) -> None:
    runs.add("aaaa0000", errors=(("KeyError", "'x'"),))
    runs.states = {"11": JobState("FAILED")}
    (row,) = cli("collect", "--json").json
    assert row["note"] == "user: rank 0 on n0: KeyError: 'x'; see hpcft logs RUN --stderr"


def test_page_of_failure_classes_is_up_to_date() -> None:
    file = ROOT / "docs/tables.py"
    spec = importlib.util.spec_from_file_location("tables", file)
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert (ROOT / "docs/reference/failures.md").read_text() == tables.failures_page(), (
        "run `make docs`"
    )
