"""`hpcft explain`: why a run is where it is, what was tried, and what to do."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpcft.cli.options import Json, RunsDir
from hpcft.core.paths import DEFAULT_RUNS

if TYPE_CHECKING:  # `hpcft --help` reads this file: what is costly to import waits
    from hpcft.core.records import Recovery
    from hpcft.jobs.status import RunStatus


def add_to(app: typer.Typer) -> None:
    """Registers the verb."""

    @app.command()
    def explain(
        run: Annotated[str, typer.Argument(help="Run id, recipe, sweep or job id.", metavar="RUN")],
        json: Json = False,
        runs_dir: RunsDir = DEFAULT_RUNS,
    ) -> None:
        """Say why a run failed or waits: evidence, what was tried, and what to do."""
        from hpcft.cli import console
        from hpcft.cli.status import chosen

        views = chosen(runs_dir, [run])
        if json:
            console.as_json([as_json(view) for view in views])
        elif len(views) == 1:
            facts = told(views[0])
            longest = max(len(title) for title, _ in facts)
            console.data("\n".join(f"{title:{longest}}  {text}" for title, text in facts))
        else:
            header = ["run", "state", "class", "what", "next"]
            console.table(header, [_in_a_line(view) for view in views])


def told(view: RunStatus) -> list[tuple[str, str]]:
    """What is to be said of a run: titles and texts."""
    from hpcft.recovery.diagnosis import KNOWN

    job = f", job {view.job_id}" if view.job_id else ""
    facts = [
        ("run", f"{view.job.recipe}/{view.job.run_id}{job}"),
        ("state", f"{view.state}{f' on {view.nodes}' if view.nodes else ''}"),
    ]
    failure = view.failure
    if failure is None:
        facts.append(("what", verdict(view)))
    else:
        known = KNOWN.get(failure.name)
        means = f": {known.means}" if known else ""
        facts += [("class", f"{failure.name}{means}"), ("what", failure.sentence)]
        facts += [("evidence", failure.source or "the scheduler's state of the job")]
    facts += [("so far", _in_words(recovery)) for recovery in view.recoveries]
    facts += [("hpcft", does(view))] if does(view) else []
    facts += [("next", failure.next_step)] if failure else []
    return [(title, " ".join(text.split())) for title, text in facts]


def verdict(view: RunStatus) -> str:
    """What is the matter with a run, in a sentence."""
    if view.failure:
        return view.failure.sentence
    progress = view.progress
    if view.state == "COMPLETED":
        return "nothing is wrong: it has completed"
    if view.state == "UNKNOWN":
        return (
            f"nobody can say now whether it runs, which does not mean that it failed: {view.note}"
        )
    if view.state == "PENDING":
        return f"it waits: {view.note or 'the scheduler gives no reason yet'}"
    if view.is_live and progress:
        done = (
            f", step {progress.step:,} of {progress.total_steps:,}" if progress.total_steps else ""
        )
        note = f"; {view.note}" if view.note else ""
        return f"nothing is wrong: it runs ({progress.phase}{done}){note}"
    return view.note or "nothing is wrong: it runs"


def does(view: RunStatus) -> str:
    """What hpcft does about a run by itself, or did; empty where there is nothing to do."""
    from hpcft.recovery.diagnosis import POLICIES

    last = view.recoveries[-1] if view.recoveries else None
    if view.is_live and view.failure is None:
        return f"had it go on by itself ({last.action}), {_from(last)}" if last else ""
    if view.failure is None:
        return ""
    does = POLICIES[view.failure.policy]
    if view.failure.policy == "stop" or view.is_live:
        return does
    return f"{does}; this run has ended, it does so no more"


def as_json(view: RunStatus) -> dict[str, Any]:
    """An explanation for programs."""
    from hpcft.jobs import status

    return {**status.status_as_json(view), "verdict": verdict(view), "does": does(view)}


def _in_words(recovery: Recovery) -> str:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(recovery.at))
    where = f" on {recovery.node}" if recovery.node else ""
    change = f" with {recovery.change}" if recovery.change else ""
    away = f", away from {', '.join(recovery.excluded)}" if recovery.excluded else ""
    return (
        f"{at} rank {recovery.rank}{where}, {recovery.cause}: {recovery.evidence}; "
        f"{recovery.action}{change}{away}, {_from(recovery)}"
    )


def _from(recovery: Recovery) -> str:
    return f"from step {recovery.step:,}" if recovery.step else "from the beginning"


def _in_a_line(view: RunStatus) -> list[str]:
    failure = view.failure
    return [
        f"{view.job.recipe}/{view.job.run_id}",
        view.state,
        failure.name if failure else "",
        verdict(view),
        failure.next_step if failure else "",
    ]
