"""`hpcft submit`: check, plan, queue; or show exactly what would be queued."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hpcft.cli.options import ClusterName, Json, Overrides, RecipeName, RunsDir, Uncalibrated
from hpcft.core.errors import ClusterError
from hpcft.core.paths import DEFAULT_RUNS


def add_to(app: typer.Typer) -> None:
    """Registers the verb."""

    @app.command()
    def submit(
        recipe: RecipeName,
        cluster: ClusterName = None,
        override: Overrides = None,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Print exactly what would be submitted.")
        ] = False,
        watch: Annotated[bool, typer.Option("--watch", "-w", help="Watch until it ends.")] = False,
        again: Annotated[
            bool, typer.Option("--again", help="Begin anew what has completed or was interrupted.")
        ] = False,
        uncalibrated: Uncalibrated = False,
        json: Json = False,
        runs_dir: RunsDir = DEFAULT_RUNS,
    ) -> None:
        """Submit a recipe: one job, or one job array for a sweep."""
        from hpcft.cli import console
        from hpcft.cli.watch import watch_until_done
        from hpcft.jobs import prepare
        from hpcft.jobs.submit import dry_run as as_dry_run
        from hpcft.jobs.submit import submit_runs

        site, prepared = prepare.prepare_runs(
            recipe,
            cluster,
            override or [],
            calibrated_by=None if uncalibrated else runs_dir,
            dry=dry_run,
            say=console.say,
        )
        for warning in dict.fromkeys(w for item in prepared for w in item.plan.warnings):
            console.warn(warning)
        if dry_run:
            shown = as_dry_run(site, prepared, runs_dir)
            if json:
                console.as_json(shown)
            else:
                _show_dry_run(shown)
            return
        done = submit_runs(site, prepared, runs_dir, again=again)
        if json and not watch:
            console.as_json([_as_json(entry) for entry in done])
        else:
            _tell(done, prepared)
        left = [entry for entry in done if entry.outcome == "not queued"]
        if watch:
            watch_until_done(runs_dir, [entry.run_id for entry in done if entry not in left])
        if left:
            raise ClusterError(
                f"{len(left)} of {len(done)} runs are not queued: Slurm takes no more jobs of "
                f"yours for now ({left[0].limit}); submit again when some have ended"
            )


def _as_json(entry: Any) -> dict[str, Any]:
    return {**vars(entry), "folder": str(entry.folder)}


def _tell(done: list[Any], prepared: list[Any]) -> None:
    from hpcft.cli import console
    from hpcft.config.sweep import format_point
    from hpcft.core.units import format_bytes
    from hpcft.planning.layouts import describe_layout

    words = {
        "submitted": "submitted as job",
        "running": "is already queued or running as job",
        "completed": "has completed already (--again runs it once more) as job",
        "not queued": "is not queued yet",
    }
    for entry, item in zip(done, prepared, strict=True):
        values = format_point(item.point.values)
        name = f"{item.plan.recipe}/{entry.run_id}"
        on_resume = f"from step {entry.step}" if entry.step else ""
        said = (name, words[entry.outcome], entry.job_id, on_resume, values)
        console.say(" ".join(word for word in said if word))
    plan = prepared[0].plan
    console.say(
        f"  {describe_layout(plan.layout)}, {plan.precision}, {format_bytes(plan.gpu_peak_bytes)} of "
        f"{format_bytes(plan.gpu_capacity_bytes)} predicted"
    )


def _show_dry_run(shown: dict[str, Any]) -> None:
    import json

    from hpcft.cli import console

    for run in shown["runs"]:
        for title in ("recipe", "plan", "ds_config"):
            console.data(f"# ---- {title} of run {run['run_id']}")
            console.data(json.dumps(run[title], indent=2, ensure_ascii=False))
    for job in shown["jobs"]:
        console.data(f"# ---- sbatch script for {len(job['runs'])} run(s)")
        console.data(job["sbatch_script"] or "# local: no script, one process for each rank")
