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
    from hpcft.cli.submit import as_json, describe_outcome, raise_for_rest
    from hpcft.cli.watch import watch_until_done
    from hpcft.jobs.resume import resume_runs

    selected = select_runs(runs_dir, runs)
    ended = [run for run in selected if override or not (run.is_live or run.is_completed)]
    if not ended:
        raise UsageError(
            "there is nothing to resume: all of these runs are queued, running or complete already"
        )
    said: set[str] = set()

    def say_once(text: str) -> None:
        """Says what many runs have in common once."""
        if text not in said:
            said.add(text)
            console.say(text)

    submitted = resume_runs(
        ended, cluster_name=cluster, overrides=override or [], root=runs_dir, say=say_once
    )
    if json and not watch:
        console.as_json([as_json(entry) for entry in submitted])
    else:
        for run, entry in zip(ended, submitted, strict=True):
            name = f"{run.job.recipe}/{entry.run_id}"
            start = f"step {entry.step:,}" if entry.step else "the beginning"
            is_queued = entry.outcome == "submitted"
            how = f"resumes from {start} as job {entry.job_id}" if is_queued else ""
            console.say(f"{name} {how or describe_outcome(entry)}")
    if watch:
        queued = [entry for entry in submitted if entry.outcome != "not queued"]
        watch_until_done(runs_dir, [entry.run_id for entry in queued])
    raise_for_rest(submitted)
