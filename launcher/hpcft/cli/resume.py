"""`hpcft resume`: resumes ended runs from their last checkpoint."""

from __future__ import annotations

from hpcft.cli.options import ClusterName, Json, Overrides, RunNames, RunsDir, Watch
from hpcft.core.errors import UsageError
from hpcft.core.paths import DEFAULT_RUNS


def resume(
    runs: RunNames,
    cluster: ClusterName = None,
    override: Overrides = None,
    watch: Watch = False,
    json: Json = False,
    runs_dir: RunsDir = DEFAULT_RUNS,
) -> None:
    """Resume ended runs from their last checkpoint.

    With -o and -c the resources may change, because they do not change the result. With more epochs
    or steps, a completed run continues as a new run.
    """
    # Imported here, so that `hpcft --help` is quick.
    from hpcft.cli import console
    from hpcft.cli.status import select_runs
    from hpcft.cli.submit import as_json
    from hpcft.cli.watch import watch_until_done
    from hpcft.jobs.resume import prepare_resume
    from hpcft.jobs.submit import submit_runs

    selected = select_runs(runs_dir, runs)
    ended = [run for run in selected if override or not (run.is_live or run.record)]
    if not ended:
        raise UsageError(
            "there is nothing to resume: all of these runs are queued, running or complete already"
        )
    submitted = []
    for run in ended:
        site, item = prepare_resume(
            run,
            cluster_name=cluster,
            overrides=override or [],
            root=runs_dir,
            say=console.say,
        )
        (entry,) = submit_runs(site, [item], runs_dir, again=False)
        submitted.append(entry)
        start = f"step {entry.step:,}" if entry.step else "the beginning"
        name = f"{run.job.recipe}/{entry.run_id}"
        console.say(f"{name} resumes from {start} as job {entry.job_id}")
    if json and not watch:
        console.as_json([as_json(entry) for entry in submitted])
    if watch:
        watch_until_done(runs_dir, [entry.run_id for entry in submitted])
