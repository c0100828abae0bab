"""Writes the generated pages on failures, on which recipe fits where, and on scale."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

from hpcft.cli.plan_tables import scale_table
from hpcft.cli.table_formats import as_markdown
from hpcft.config import cluster_profile, recipe
from hpcft.config.cluster_profile import Profile
from hpcft.config.recipe_types import SweepPoint
from hpcft.core.errors import DoesNotFit
from hpcft.core.records import StepTime
from hpcft.jobs.what_fits import FitResult, fit_matrix, fit_on_gpus, plan_run
from hpcft.recovery.diagnosis import KNOWN, POLICIES

REFERENCE = Path(__file__).parent / "reference"
COUNTS = (8, 64, 512, 1024)
WINOGRANDE_L = 10_234  # rows of its training split (the data set's card)
PARTS = (("compute", "#4878a8"), ("communication", "#e0a030"), ("offload", "#b04a5a"))


def say(text: str) -> None:
    """Prints progress to stderr."""
    print(text, file=sys.stderr)


def site(title: str, name: str, *, gpus: int | None = None, nodes: int | None = None) -> Profile:
    """Returns a shipped profile under the title of a column, with fewer GPUs or nodes."""
    profile = cluster_profile.load_profile(name)
    cluster = profile.cluster
    update = {
        "name": title,
        "gpus_per_node": gpus or cluster.gpus_per_node,
        "max_nodes": nodes or cluster.max_nodes,
    }
    return replace(profile, cluster=cluster.model_copy(update=update))


def shared_t4() -> Profile:
    """Returns report R5's GPU of 14.74 GiB, of which other processes held 14.69."""
    return cluster_profile.with_gpu_memory(site("R5's shared T4", "t4-16"), "14.74GiB", "14.69GiB")


def columns() -> list[Profile]:
    """Returns the machines of the reports and the nodes of a cluster, one for each column."""
    return [
        site("T4", "t4-16"),
        site("P100", "p100-16"),
        site("2 × T4", "t4-16-x2"),
        site("A100 40", "a100-40", gpus=1, nodes=1),
        site("4 × A100 80", "a100-80", nodes=1),
        site("2 × 4 × A100 80", "a100-80", nodes=2),
        shared_t4(),
    ]


def first_run(name: str, overrides: list[str] | None = None) -> SweepPoint:
    """Returns the first run of a recipe."""
    return recipe.load_recipe(name, overrides)[0]


def does_not_fit(name: str, profile: Profile) -> str:
    """Returns the error of `hpcft plan` for a recipe that does not fit."""
    try:
        plan = plan_run(first_run(name), profile)
    except DoesNotFit as error:
        return str(error)
    return f"{name} fits {profile.cluster.name}: {FitResult(plan).short}"


# ---------------------------------------------------------------- which recipe fits where


def fits_page() -> str:
    """Returns the page on which recipe fits where, with three failures of the reports."""
    sites = columns()
    names = [path.stem for path in recipe.list_recipes()]
    rows = fit_matrix(names, sites, say=say)
    header = ["recipe", *(profile.cluster.name for profile in sites)]
    cells = [[row, *(result.short for result in results)] for row, results in rows.items()]
    gemma = "gemma7b_full"
    return f"""# Reference: what fits where

Made by `make docs`. Every shipped recipe on the machines of the reports and on a cluster's nodes.
A cell is the cheapest layout that fits, as `hpcft plan` predicts it: GPUs, sharding, peak memory of
a GPU; or what is missing. `hpcft plan recipes/*.yaml --clusters all` shows all profiles.

{as_markdown(header, cells)}

## Three failures of the reports, by number

**Gemma 7B on a T4 or a P100.** {gemma_arithmetic(gemma)}

```
{does_not_fit(gemma, site("T4", "t4-16"))}

{does_not_fit(gemma, site("P100", "p100-16"))}
```

**Llama-3-8B on a shared GPU.** Three processes held 4.65, 4.64 and 5.40 GiB of a GPU of 14.74 GiB.
What was left is less than a process takes before its first tensor, and no batch is small enough:
`hpcft plan llama3_8b_winogrande_qlora -c t4-16 --gpu-memory 14.74GiB --other-processes 14.69GiB`

```
{does_not_fit("llama3_8b_winogrande_qlora", shared_t4())}
```

**Eleven hours for an epoch.** Winogrande-L has {WINOGRANDE_L:,} rows. Predicted time of an epoch
with the report's settings (global batch 8): with sequences of 256 tokens, which hold the prompts,
and padded to 2,048, as the report may have done: it does not state the length that it padded to.

{epoch_table()}
"""


def gemma_arithmetic(name: str) -> str:
    """Returns a sentence that compares weights and states with the memory of one GPU."""
    plan = plan_run(first_run(name), cluster_profile.load_profile("a100-80"))
    p, gib = plan.facts.parameters.total, 2**30
    logits = first_run(name).recipe.task.max_length * plan.facts.logits_width * 4
    return (
        f"{p:,} parameters are {2 * p / gib:.1f} GiB in 16 bits, as much as the whole GPU before "
        f"anything is computed; full fine-tuning takes 18 bytes for each, {18 * p / gib:.0f} GiB; "
        f"and with {plan.facts.vocab_size:,} tokens in the vocabulary the fp32 logits of a single "
        f"sequence take another {logits / gib:.2f} GiB."
    )


def epoch_table() -> str:
    """Returns the table of hours for an epoch of Winogrande-L by GPU and sequence length."""
    steps = math.ceil(WINOGRANDE_L / 8)
    cells = []
    for title, name, gpus in (
        ("1 × T4", "t4-16", 1), ("2 × T4", "t4-16-x2", 2), ("1 × A100 40", "a100-40", 1),
        ("4 × A100 40", "a100-40", 4), ("8 × A100 40", "a100-40", 8),
    ):  # fmt: skip
        line = [title]
        for length in (256, 2048):
            point = first_run("llama3_8b_winogrande_qlora", [f"task.max_length={length}"])
            plan = fit_on_gpus(point, cluster_profile.load_profile(name), gpus).plan
            hours = plan.time.step.total_s * steps / 3600 if plan and plan.time else math.nan
            line.append(f"{hours:.2g} h" if plan else "does not fit")
        cells.append(line)
    return as_markdown(["GPUs", "256 tokens", "2,048 tokens"], cells)


# ---------------------------------------------------------------- scale on paper


def scale_page() -> str:
    """Returns the page on scale and writes its figure, `scale.svg`."""
    sections, bars = [], []
    for name, cluster in (
        ("llama3_8b", "a100-80"), ("llama3_8b", "h100-80"), ("llama3_70b", "h100-80"),
    ):  # fmt: skip
        point = first_run(str(REFERENCE / "scale" / f"{name}.yaml"))
        profile = cluster_profile.load_profile(cluster)
        say(f"scaling {name} on {cluster}")
        results = {count: fit_on_gpus(point, profile, count) for count in COUNTS}
        counts = ",".join(map(str, COUNTS))
        sections.append(
            f"## {name} on {cluster}\n\n`hpcft plan docs/reference/scale/{name}.yaml -c {cluster} "
            f"--scale {counts}`\n\n{as_markdown(*scale_table(point, results))}\n"
        )
        bars.append(
            (f"{name}, {cluster}",
             {n: r.plan.time.step for n, r in results.items() if r.plan and r.plan.time})
        )  # fmt: skip
    (REFERENCE / "scale.svg").write_text(figure(bars))
    return f"""# Reference: predicted scaling

Made by `make docs`. Predicted time of an optimizer step on 8 to 1,024 GPUs at a fixed global batch
of 2,048 sequences of 2,048 tokens, full fine-tuning, with the cheapest layout for each number.
Compute is FLOPs over a stated efficiency, communication the bytes of ZeRO over the profile's stated
bandwidth, offload bytes over PCIe and CPU Adam; none of them is taken to overlap
(`launcher/hpcft/planning/step_time.py`, `launcher/hpcft/planning/hardware.py`).

![GPU hours of 1,000 steps by number of GPUs](scale.svg)

Bars of equal height would be perfect scaling.

{chr(10).join(sections)}"""


def figure(groups: list[tuple[str, dict[int, StepTime]]]) -> str:
    """Returns an SVG of GPU hours per 1,000 steps, stacked by compute, communication, offload."""
    wide, tall, top, left = 230, 300, 50, 40  # of a group of bars and of the margins, in pixels
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + wide * len(groups)}" '
        f'height="{top + tall + 60}" font-family="sans-serif" font-size="11">',
        f'<rect width="{left + wide * len(groups)}" height="{top + tall + 60}" fill="white"/>',
    ]
    for i, (name, colour) in enumerate(PARTS):
        x = left + 130 * i
        parts.append(f'<rect x="{x}" y="12" width="11" height="11" fill="{colour}"/>')
        parts.append(f'<text x="{x + 16}" y="22">{name}</text>')
    for g, (title, steps) in enumerate(groups):
        x0 = left + g * wide
        highest = max(count * step.total_s for count, step in steps.items())
        parts.append(f'<text x="{x0}" y="{top + tall + 45}" font-weight="bold">{title}</text>')
        for b, (count, step) in enumerate(steps.items()):
            x, y = x0 + 50 * b, float(top + tall)
            seconds = (step.compute_s, step.communication_s, step.offload_s)
            for value, (_, colour) in zip(seconds, PARTS, strict=True):
                height = (tall - 20) * count * value / highest
                y -= height
                parts.append(
                    f'<rect x="{x}" y="{y:.1f}" width="40" height="{height:.1f}" fill="{colour}"/>'
                )
            hours = count * step.total_s / 3.6
            parts.append(
                f'<text x="{x + 20}" y="{y - 4:.1f}" text-anchor="middle">{hours:,.0f} h</text>'
            )
            parts.append(
                f'<text x="{x + 20}" y="{top + tall + 14}" text-anchor="middle">{count:,}</text>'
            )
            parts.append(
                f'<text x="{x + 20}" y="{top + tall + 28}" text-anchor="middle" fill="#666">'
                f"{step.total_s:.3g} s</text>"
            )
    return "\n".join([*parts, "</svg>", ""])


# ---------------------------------------------------------------- how runs fail


def failures_page() -> str:
    """Returns the page on the classes of failures."""
    header = ["class", "what has happened", "Slurm's state", "hpcft", "what you can do"]
    cells = [
        [f"`{row.name}`", row.means, ", ".join(row.states), row.policy, row.next_step]
        for row in sorted(KNOWN.values(), key=lambda row: row.name)
    ]
    policies = "\n".join(f"- **{name}**: it {words}." for name, words in POLICIES.items())
    return f"""# Reference: failures

Made by `make docs` from `launcher/hpcft/recovery/diagnosis/classes.py`, which also holds the text
patterns of each class. `hpcft explain RUN` names the class of a run's failure, with the line that
shows it, the rank, its node and the file with that line; `hpcft status` and `hpcft collect` show
the class and a sentence.

{as_markdown(header, cells)}

{policies}

Evidence counts in this order: what a rank itself found out (whose memory ran out, which rank was
late, which fallbacks were tried), the errors that ranks wrote, their logs, and Slurm's state. A
cause counts before the errors that follow from it. A run whose state is unknown has not failed.
"""


if __name__ == "__main__":
    (REFERENCE / "failures.md").write_text(failures_page())
    (REFERENCE / "fits.md").write_text(fits_page())
    (REFERENCE / "scale.md").write_text(scale_page())
