"""`hpcft explain`: explains why a run failed or waits, what hpcft did, and what to do."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from hpcft.cli.options import Json, RunName, RunsDir
from hpcft.core.paths import DEFAULT_RUNS

if TYPE_CHECKING:
    from hpcft.core.records import Recovery
    from hpcft.jobs.status import RunStatus

_ACTIONS = {
    "retry_step": "hpcft retried the step in the same processes",
    "restart": "hpcft restarted all ranks within the job",
    "requeue": "hpcft requeued the job",
    "resubmit": "hpcft submitted another job for the run",
    "resume": "the run was resumed on request",
}


def explain(run: RunName, json: Json = False, runs_dir: RunsDir = DEFAULT_RUNS) -> None:
    """Explain why a run failed or waits.

    It shows the class of the failure with its evidence, what hpcft did about earlier failures, and
    the next step.
    """
    # Imported here, so that `hpcft --help` is quick.
    from hpcft.cli import console
    from hpcft.cli.status import select_runs

    statuses = select_runs(runs_dir, [run])
    if json:
        console.as_json([as_json(status) for status in statuses])
    elif len(statuses) == 1:
        facts = rows(statuses[0])
        width = max(len(title) for title, _ in facts)
        console.data("\n".join(f"{title:{width}}  {text}" for title, text in facts))
    else:
        header = ["run", "state", "class", "what", "next"]
        console.table(header, [_table_row(status) for status in statuses])


def rows(run: RunStatus) -> list[tuple[str, str]]:
    """Returns the explanation of a run as rows of a title and a text."""
    from hpcft.recovery.diagnosis import KNOWN

    job = f", job {run.job_id}" if run.job_id else ""
    facts = [
        ("run", f"{run.job.recipe}/{run.job.run_id}{job}"),
        ("state", f"{run.state}{f' on {run.nodes}' if run.nodes else ''}"),
    ]
    failure = run.failure
    if failure is None:
        facts.append(("what", summary(run)))
    else:
        known = KNOWN.get(failure.name)
        meaning = f": {known.means}" if known else ""
        facts += [("class", f"{failure.name}{meaning}"), ("what", failure.sentence)]
        facts += [("evidence", failure.source or "the scheduler's state of the job")]
    facts += [("recovery", _describe(recovery)) for recovery in run.recoveries]
    facts += [("hpcft", action)] if (action := hpcft_action(run)) else []
    facts += [("next", _next_step(run))] if failure else []
    return [(title, " ".join(text.split())) for title, text in facts]


def summary(run: RunStatus) -> str:
    """Describes the state of a run in a sentence."""
    if run.failure:
        return run.failure.sentence
    progress = run.progress
    if run.state == "COMPLETED" and run.record and run.record.doubts:
        return f"the run has completed, but {'; '.join(run.record.doubts)}"
    if run.state == "COMPLETED":
        return "nothing is wrong: the run has completed"
    if run.state == "UNKNOWN":
        return f"the state of the run is not known, which does not mean that it failed: {run.note}"
    if run.state == "PENDING":
        return f"the run waits: {run.note or 'the scheduler gives no reason yet'}"
    if run.is_live and progress:
        total = progress.total_steps
        step = f", step {progress.step:,} of {total:,}" if total else ""
        note = f"; {run.note}" if run.note else ""
        return f"nothing is wrong: the run is running ({progress.phase}{step}){note}"
    return run.note or "nothing is wrong: the run is running"


def hpcft_action(run: RunStatus) -> str:
    """Describes what hpcft does or did about a run by itself; empty if it does nothing."""
    from hpcft.recovery.diagnosis import POLICIES

    if run.failure is None:
        last = run.recoveries[-1] if run.is_live and run.recoveries else None
        return f"{_ACTIONS[last.action]}, {_from(last)}" if last else ""
    action = POLICIES[run.failure.policy]
    if run.failure.policy == "stop" or run.is_live:
        return action
    return f"{action}; not for this run any more, because it has ended"


def as_json(run: RunStatus) -> dict[str, object]:
    """Returns the explanation of a run for programs: its status, and a summary."""
    from hpcft.jobs.status import status_as_json

    return {**status_as_json(run), "summary": summary(run), "hpcft_action": hpcft_action(run)}


def _next_step(run: RunStatus) -> str:
    """Returns what a person can do about a failure, with this run in the place of `RUN`."""
    return run.failure.next_step.replace(" RUN", f" {run.job.run_id}") if run.failure else ""


def _describe(recovery: Recovery) -> str:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(recovery.at))
    node = f" on {recovery.node}" if recovery.node else ""
    change = f" with {recovery.change}" if recovery.change else ""
    excluded = f", without {', '.join(recovery.excluded)}" if recovery.excluded else ""
    return (
        f"{at} rank {recovery.rank}{node}, {recovery.cause}: {recovery.evidence}; "
        f"{_ACTIONS[recovery.action]}{change}{excluded}, {_from(recovery)}"
    )


def _from(recovery: Recovery) -> str:
    return f"from step {recovery.step:,}" if recovery.step else "from the beginning"


def _table_row(run: RunStatus) -> list[str]:
    failure = run.failure
    return [
        f"{run.job.recipe}/{run.job.run_id}",
        run.state,
        failure.name if failure else "",
        summary(run),
        _next_step(run),
    ]
