"""What a person reads of a run's failure: explained, in the tables, and on the page of classes."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from builders import ROOT, Cli, Runs, recovered_from, run_progress, run_record
from hpcft.scheduler import slurm
from hpcft.scheduler.job_state import JobState


@pytest.mark.parametrize(
    ("state", "who"),
    [("CANCELLED by 0", "by root"), ("CANCELLED by 4000000000", "by the user 4000000000"),
     ("CANCELLED", ""), ("CANCELLED+", "")],
)  # fmt: skip
def test_who_cancelled_it_is_told(state: str, who: str, runs: Runs) -> None:
    known = slurm.parse_sacct(f"11|{state}|0:15|00:01:00|n1\n", {"11"})["11"]
    runs.add("aaaa0000")
    runs.states = {"11": known}
    view = runs.view("aaaa0000")
    assert view.failure is not None
    assert view.failure.sentence == f"on n1: it was cancelled{' ' * bool(who)}{who}"


def test_explain_tells_all_of_a_failed_run(runs: Runs, cli: Cli) -> None:
    errors = (("OSError", "[Errno 122] Disk quota exceeded: '/home/u/x'\x1b[2J"),)
    paths = runs.add("aaaa0000", errors=errors)
    recovered_from(paths, step=12, evidence="Connection reset by peer")
    runs.states = {"11": JobState("FAILED", nodes="n[1-2]", exit_code="1:0")}
    said = cli("explain", "aaaa")
    assert (said.code, said.err) == (0, "")
    lines = [line.split(maxsplit=1) for line in said.out.splitlines()]
    told = {title: text for title, text in lines if title != "so"}
    assert told["run"] == "made/aaaa0000, job 11"
    assert told["state"] == "FAILED on n[1-2]"
    assert told["class"] == "disk: there is no room left to write to"
    assert told["what"].startswith("rank 0 on n0: OSError: [Errno 122] Disk quota exceeded")
    assert told["evidence"].endswith("made/aaaa0000/errors/0.json")
    assert told["hpcft"].startswith("stops")
    assert told["next"].startswith("make room")
    assert "rank 1 on n2, nccl: Connection reset by peer; requeued, from step 12" in said.out
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
            "nothing is wrong: it runs (training, step 30 of 120",
        ),
        (JobState("RUNNING"), (), "nothing is wrong: it runs"),
        (
            JobState("COMPLETED"),
            (run_record("aaaa0000", f1=1.0),),
            "nothing is wrong: it has completed",
        ),
        (JobState("PENDING", "waiting for nodes"), (), "it waits: waiting for nodes"),
        (JobState("UNKNOWN", "squeue is away"), (), "nobody can say now whether it runs"),
    ],
    ids=["running", "started", "completed", "pending", "unknown"],
)
def test_explain_says_of_a_healthy_run_that_it_is(
    state: JobState, parts: tuple[Any, ...], what: str, runs: Runs, cli: Cli
) -> None:
    """An old error in the folder makes no failure of a run that is not known to have ended."""
    runs.add("aaaa0000", parts=parts, errors=(("KeyError", "'old'"),))
    runs.states = {"11": state}
    said = cli("explain", "made")
    assert said.code == 0
    assert f"what   {what}" in said.out
    (one,) = cli("explain", "made", "--json").json
    assert (one["failure"], one["does"]) == (None, "")


def test_explain_of_several_runs_has_a_line_each(runs: Runs, cli: Cli) -> None:
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


def test_collect_shows_class_and_sentence(runs: Runs, cli: Cli) -> None:
    runs.add("aaaa0000", errors=(("KeyError", "'x'"),))
    runs.states = {"11": JobState("FAILED")}
    (row,) = cli("collect", "--json").json
    assert row["note"] == "user: rank 0 on n0: KeyError: 'x'; see hpcft logs --stderr"


def test_the_page_of_classes_is_up_to_date() -> None:
    file = ROOT / "docs/tables.py"
    found = importlib.util.spec_from_file_location("tables", file)
    assert found is not None
    assert found.loader is not None
    tables = importlib.util.module_from_spec(found)
    found.loader.exec_module(tables)
    assert (ROOT / "docs/failures.md").read_text() == tables.failures_page(), "run `make docs`"
