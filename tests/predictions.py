"""Predicts all shipped recipes × profiles; `python tests/predictions.py` renews the record.

`tests/planning/test_predictions.py` compares: a change that is not meant to change plans changes no
number of the record.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from hpcft.config.cluster_profile import list_profiles, load_profile
from hpcft.config.recipe import list_recipes
from hpcft.jobs.what_fits import FitResult, fit_matrix

FILE = Path(__file__).parent / "data" / "predictions.json"
# Without the profile of this machine, whose numbers are the machine's.
SITES = sorted({path.stem for path in list_profiles()} - {"local"})
RECIPES = sorted(path.stem for path in list_recipes())
CELLS = [f"{name} @ {site}" for name in RECIPES for site in SITES]
FIELDS = (
    "layout", "precision", "optim", "per_device_eval_batch_size", "gpu_capacity_bytes",
    "host_capacity_bytes", "cpus_per_task", "mem_mib", "time_min", "time", "node_disk_bytes",
    "partition", "ds_config",
)  # fmt: skip


def predict() -> dict[str, FitResult]:
    """Returns the plan of each recipe on each profile, or the reason why it does not fit."""
    rows = fit_matrix(RECIPES, [load_profile(site) for site in SITES])
    return {f"{name} @ {site}": result for name, row in rows.items()
            for site, result in zip(SITES, row, strict=True)}  # fmt: skip


def numbers_of_plan(plan: dict[str, Any]) -> dict[str, Any]:
    """Returns the numbers of a plan's JSON, without its sentences."""
    kept = {name: plan[name] for name in FIELDS}
    for name in ("gpu_memory", "host_memory", "disk"):
        kept[name] = {item["name"]: item["bytes"] for item in plan[name]}
    kept["next_best"] = plan["next_best"] and {
        name: plan["next_best"][name] for name in ("layout", "step", "gpu_peak_bytes")
    }
    return kept


def numbers_of(result: FitResult) -> dict[str, Any]:
    """Returns the numbers of a plan, or those in the reason for a refusal, in their order."""
    if result.plan is None:
        return {"refused": re.findall(r"\d[\d,]*(?:\.\d+)?", result.reason)}
    return numbers_of_plan(result.plan.model_dump(mode="json"))


def write(predictions: dict[str, Any]) -> None:
    """Writes the record, a line a recipe and profile."""
    lines = (f"{json.dumps(cell)}: {json.dumps(predictions[cell])}" for cell in CELLS)
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write({cell: numbers_of(result) for cell, result in predict().items()})
