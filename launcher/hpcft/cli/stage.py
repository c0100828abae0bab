"""`hpcft stage`: downloads models and data into the shared cache, and checks them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hpcft.cli.options import ClusterName, Json, Overrides, RecipeNames

if TYPE_CHECKING:
    from hpcft.staging.stage import StageResult


def stage(
    recipe: RecipeNames,
    cluster: ClusterName = None,
    override: Overrides = None,
    json: Json = False,
) -> None:
    """Download the models and data of recipes.

    They come from the Hugging Face hub and are checked, so that compute nodes need no network. The
    files go into the Hugging Face cache (HF_HOME of the profile or of your environment), which the
    compute nodes have to see. Files that are there already are kept, and an interrupted download
    continues.
    """
    # Imported here, so that `hpcft --help` is quick.
    from hpcft.cli import console
    from hpcft.config.cluster_profile import load_profile
    from hpcft.config.recipe import load_recipe
    from hpcft.jobs.default_cluster import detect_cluster

    points = [point for name in recipe for point in load_recipe(name, override)]
    site = load_profile(cluster or detect_cluster())
    has_bars = console.on_terminal(sys.stderr)
    _set_environment(site.cluster.environment, has_bars=has_bars)
    # The Hugging Face libraries read the environment when they are imported, so only now.
    from hpcft.staging.stage import stage_inputs
    from hpcft.staging.staged_inputs import hub_cache_folder

    results = stage_inputs(points, hub_cache_folder(os.environ), console.say, bars=has_bars)
    if json:
        console.as_json([_as_json(result) for result in results])
    elif results:
        _show(results)
    else:
        console.say("nothing to download: the recipes need no file of the hub")


def _set_environment(profile: Mapping[str, str], *, has_bars: bool) -> None:
    """Sets the profile's variables of the Hugging Face libraries: jobs read the same cache."""
    for_jobs_only = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    os.environ.update(
        {k: v for k, v in profile.items() if k.startswith("HF_") and k not in for_jobs_only}
    )
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if not has_bars:
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"


def _as_json(result: StageResult) -> dict[str, object]:
    staged = result.staged
    return {
        **staged.model_dump(mode="json", exclude={"files"}),
        "files": sorted(staged.files),
        "size_bytes": staged.size_bytes,
        "fetched_bytes": result.fetched_bytes,
        "recipes": result.recipes,
    }


def _show(results: Sequence[StageResult]) -> None:
    from hpcft.cli import console
    from hpcft.core.units import format_bytes

    header = ["what", "name", "revision", "commit", "size", "fetched", "recipes"]
    cells = [
        [
            result.staged.kind,
            " ".join(filter(None, (result.staged.name, result.staged.config_name))),
            result.staged.revision,
            result.staged.commit[:12],
            format_bytes(result.staged.size_bytes),
            format_bytes(result.fetched_bytes) if result.fetched_bytes else "",
            ", ".join(result.recipes),
        ]
        for result in results
    ]
    console.table(header, cells, right={"size", "fetched"})
