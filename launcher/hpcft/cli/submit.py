"""`hpcft submit`: checks, plans and submits a recipe, or shows what it would submit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpcft.cli.options import ClusterName, Json, Overrides, RecipeName, RunsDir, Uncalibrated, Watch
from hpcft.core.errors import ClusterError
from hpcft.core.paths import DEFAULT_RUNS

if TYPE_CHECKING:
    from hpcft.config.cluster_profile import Profile
    from hpcft.jobs.prepare import PreparedRun
    from hpcft.jobs.submit import SubmittedRun

SHOWN_RUNS = 10
"""Most runs of a sweep of which a line is printed; the others are counted."""
SHOWN_JOBS = 5
"""Most jobs of a sweep that a dry run describes."""
NO_SCRIPT = "# local: no script, one process for each rank"

_OUTCOME_WORDS = {
    "submitted": "submitted",
    "running": "queued or running already",
    "completed": "completed already",
    "not queued": "not queued yet",
}


def submit(
    recipe: RecipeName,
    cluster: ClusterName = None,
    override: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print exactly what would be submitted.")
    ] = False,
    watch: Watch = False,
    again: Annotated[
        bool,
        typer.Option(
            "--again",
            help="Start from the beginning even if the run has completed or could resume.",
        ),
    ] = False,
    uncalibrated: Uncalibrated = False,
    json: Json = False,
    runs_dir: RunsDir = DEFAULT_RUNS,
) -> None:
    """Submit a recipe: one job, or a job array for a sweep.

    A run that was submitted before is not submitted twice: if it is queued, running or complete,
    hpcft says so; if it was interrupted, it resumes from its last checkpoint.
    """
    # Imported here, so that `hpcft --help` is quick.
    from hpcft.cli import console
    from hpcft.cli.watch import watch_until_done
    from hpcft.jobs.prepare import prepare_runs
    from hpcft.jobs.submit import submit_runs

    site, prepared = prepare_runs(
        recipe,
        cluster_name=cluster,
        overrides=override or [],
        calibrated_by=None if uncalibrated else runs_dir,
        dry_run=dry_run,
        say=console.say,
    )
    for warning in dict.fromkeys(w for item in prepared for w in item.plan.warnings):
        console.warn(warning)
    if dry_run:
        _show_dry_run(site, prepared, runs_dir, json=json)
        return
    submitted = submit_runs(site, prepared, runs_dir, again=again)
    if json and not watch:
        console.as_json([as_json(run) for run in submitted])
    else:
        _say_outcomes(submitted, prepared, is_watched=watch)
    if watch:
        queued = [run.run_id for run in submitted if run.outcome != "not queued"]
        watch_until_done(runs_dir, queued)
    raise_for_rest(submitted)


def raise_for_rest(submitted: Sequence[SubmittedRun]) -> None:
    """Raises an error if some runs are not queued.

    Raises:
        ClusterError: some are not queued.
    """
    rest = [run for run in submitted if run.outcome == "not queued"]
    if rest:
        raise ClusterError(
            f"{len(rest)} of {len(submitted)} runs are not queued, because Slurm accepts no more "
            f"jobs of yours now ({rest[0].limit}); when some have ended, run this command again"
        )


def as_json(run: SubmittedRun) -> dict[str, object]:
    """Returns the outcome of submitting a run for programs."""
    return {**vars(run), "folder": str(run.folder)}


def _say_outcomes(
    submitted: Sequence[SubmittedRun], prepared: Sequence[PreparedRun], *, is_watched: bool
) -> None:
    from hpcft.cli import console
    from hpcft.config.sweep import format_point
    from hpcft.core.units import format_bytes
    from hpcft.planning.layouts import describe_layout

    plan = prepared[0].plan
    for run, item in list(zip(submitted, prepared, strict=True))[:SHOWN_RUNS]:
        point = format_point(item.point.values)
        name = f"{item.plan.recipe}/{run.run_id}" + (f" ({point})" if point else "")
        console.say(f"{name} {describe_outcome(run)}")
    if len(submitted) > SHOWN_RUNS:
        counts = ", ".join(
            f"{count:,} {outcome}"
            for outcome, count in Counter(_OUTCOME_WORDS[run.outcome] for run in submitted).items()
        )
        arrays = {run.job_id.partition("_")[0]: None for run in submitted if run.job_id}
        jobs = ", ".join(list(arrays)[:SHOWN_RUNS]) + ", …" * (len(arrays) > SHOWN_RUNS)
        console.say(
            f"… {len(submitted):,} runs in all: {counts}" + (f" (jobs {jobs})" if jobs else "")
        )
    console.say(
        f"  {describe_layout(plan.layout)}, {plan.precision}, {format_bytes(plan.gpu_peak_bytes)} "
        f"of {format_bytes(plan.gpu_capacity_bytes)} predicted"
    )
    if not is_watched:
        is_done = all(run.outcome == "completed" for run in submitted)
        command = f"collect {plan.recipe}" if is_done else f"status {plan.recipe} --watch"
        console.say(f"to see {'the results' if is_done else 'the progress'}: hpcft {command}")


def describe_outcome(run: SubmittedRun) -> str:
    """Describes the outcome of submitting a run: `was submitted as job 12`."""
    resumes = f"; it resumes from step {run.step:,}" if run.step else ""
    return {
        "submitted": f"was submitted as job {run.job_id}{resumes}",
        "running": f"is already queued or running as job {run.job_id}",
        "completed": f"has completed already as job {run.job_id} (--again runs it once more)",
        "not queued": "is not queued yet",
    }[run.outcome]


def _show_dry_run(
    site: Profile, prepared: list[PreparedRun], runs_dir: Path, *, json: bool
) -> None:
    from json import dumps

    from hpcft.cli import console
    from hpcft.jobs.submit import dry_run

    if len(prepared) > 1 and not json:
        _show_sweep(site, prepared, runs_dir)
        return
    shown = dry_run(site, prepared, runs_dir)
    if json:
        console.as_json(shown)
        return
    (run,), (job,) = shown["runs"], shown["jobs"]
    for title in ("recipe", "plan", "ds_config"):
        console.data(f"# ---- {title} of run {run['run_id']}")
        console.data(dumps(run[title], indent=2, ensure_ascii=False))
    console.data("# ---- sbatch script")
    console.data(job["sbatch_script"] or NO_SCRIPT)


def _show_sweep(site: Profile, prepared: list[PreparedRun], runs_dir: Path) -> None:
    """Shows on a screen what a sweep would submit: its values, and the job array of each layout."""
    from hpcft.cli import console
    from hpcft.core.units import format_bytes
    from hpcft.jobs.submit import jobs_of
    from hpcft.planning.layouts import describe_layout

    jobs = jobs_of(site, prepared, runs_dir)
    console.data(f"# {len(prepared):,} runs in {len(jobs)} job(s); --json prints all of each run")
    for key in prepared[0].point.values:
        values = list(dict.fromkeys(str(run.point.values.get(key)) for run in prepared))
        console.data(f"#   {key}: {_shortened(values)}")
    for group, _ in jobs[:SHOWN_JOBS]:
        plan = group[0].plan
        console.data(
            f"# ---- {len(group):,} runs: {describe_layout(plan.layout)}, {plan.precision}, "
            f"{format_bytes(plan.gpu_peak_bytes)} of {format_bytes(plan.gpu_capacity_bytes)} "
            "predicted"
        )
    if len(jobs) > SHOWN_JOBS:
        console.data(f"# … and {len(jobs) - SHOWN_JOBS} more jobs")
    console.data(f"# ---- sbatch script of the first {len(jobs[0][0]):,} runs")
    console.data(jobs[0][1] or NO_SCRIPT)


def _shortened(texts: list[str]) -> str:
    """Returns texts in a line: all if they are few, else the first ones and the last."""
    if len(texts) <= SHOWN_RUNS:
        return ", ".join(texts)
    first = ", ".join(texts[: SHOWN_RUNS - 2])
    return f"{first}, … {len(texts) - SHOWN_RUNS + 1:,} more …, {texts[-1]}"
