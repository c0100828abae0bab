"""Soak: many short runs on a real Slurm, each with a random fault; what became of every one.

    python benchmarks/soak/run.py [--runs N] [--seed S] [--json FILE] [--markdown FILE]

Three quarters of the runs are one job array, the rest are jobs of their own. Each trains a tiny
classifier on one rank, and each meets one fault (`faults.py`), drawn by the seed, at a random
instant of its first job. Beside them `hpcft status --watch` looks on, as a user would; every call
of a scheduler command, by it, by submissions and by the runs themselves, is counted.

Exit code 0: every run is accounted for exactly once, ended as it had to, and left nothing behind.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT / "slurm" / "testbed")]

import psutil  # noqa: E402
from calls import Counted  # noqa: E402

from conftest import RECIPE, film_rows, write_rows  # noqa: E402
from faults import LONG, WEIGHTS, Agenda, Run, drawn  # noqa: E402
from testbed import Testbed  # noqa: E402

SINGLY = 0.25
# Two runs a node, eight at a time: each computes on a core of this machine.
NODE_CPUS = 4
POLL_S = 0.5
LIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD"}
STEPS = 60
COMMON = ["-o", f"train.max_steps={STEPS}", "-o", "train.logging_steps=20",
          "-o", "train.save_strategy=steps", "-o", "train.save_steps=20"]  # fmt: skip
UNFINISHED = (".part", ".tmp", ".new")

PAGE = """# Soak

Made by `python benchmarks/soak/run.py --runs {runs} --seed {seed} --markdown docs/soak.md`: {runs}
short runs on the testbed's four nodes, three quarters of them one job array, each with one fault at
a random instant. What each fault does stands in `benchmarks/soak/faults.py`.

{table}
| | |
| --- | ---: |
{figures}

{trouble}
"""


def hpcft(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a user types it."""
    command = [sys.executable, "-m", "hpcft", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def asked(*arguments: str) -> Any:
    """What the command answers, as data.

    Raises:
        SystemExit: it failed.
    """
    done = hpcft(*arguments, "--json")
    if done.returncode not in (0, 1):
        raise SystemExit(f"hpcft {' '.join(arguments)}: {done.stderr}")
    return json.loads(done.stdout)


# ---------------------------------------------------------------- the runs


def submit(in_array: list[Run], singly: list[Run]) -> None:
    """Submits the array and the single runs; each knows its folder and job afterwards."""
    seeds = ", ".join(str(number) for number in range(1, len(in_array) + 1))
    found = asked("submit", "tiny.yaml", *COMMON, "-o", f"sweep.seeds=[{seeds}]")
    for number, run in enumerate(singly):
        more = LONG if run.fault == "time_limit" else []
        found += asked("submit", "tiny.yaml", *COMMON, *more, "-o", f"train.seed={1000 + number}")
    for run, said in zip([*in_array, *singly], found, strict=True):
        run.folder = Path(said["folder"]).absolute()
        job = json.loads((run.folder / "job.json").read_text())
        run.job_id = job["attempts"][0]["job_id"]


def spoil(runs: list[Run], agenda: Agenda, squeue: str, limit_s: float) -> None:
    """Does each run its fault once its job has started, until no job is left."""
    waiting = {run.job_id: run for run in runs}
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        lines = subprocess.run(
            [squeue, "-h", "-r", "-t", "all", "-o", "%i %T"],
            capture_output=True, text=True, timeout=60, check=False,
        ).stdout.splitlines()  # fmt: skip
        states = dict(line.split() for line in lines)
        for job_id in [j for j in waiting if states.get(j, "PENDING") not in ("PENDING", "")]:
            agenda.add(waiting.pop(job_id))
        agenda.work()
        if not waiting and not agenda.due and not LIVE & set(states.values()):
            return
        time.sleep(POLL_S)
    print(f"not done after {limit_s:.0f} s", file=sys.stderr)


# ---------------------------------------------------------------- what became of them


def account(runs: list[Run]) -> dict[str, list[str]]:
    """Runs that are in no row of the table, or in several, and those that ended otherwise."""
    views = {view["run_id"]: view for view in asked("status")}
    rows = Counter(run_id for row in asked("collect") for run_id in row["run_ids"])
    for run in runs:
        view = views.get(run.folder.name, {"state": "LOST", "note": ""})
        taken = sorted(run.folder.glob("recoveries/*.json"))
        run.facts = {"state": view["state"], "note": view["note"], "recoveries": len(taken)}
    return {
        "not accounted for once": [r.folder.name for r in runs if rows[r.folder.name] != 1],
        "of nobody": sorted({*views, *rows} - {run.folder.name for run in runs}),
        "ended otherwise": [
            f"{r.folder.name} {r.fault} after {r.after_s:.1f} s: {r.facts['state']}: "
            f"{r.facts['note']}"
            for r in runs if r.facts["state"] != r.expected
        ],
    }  # fmt: skip


def ports() -> set[int]:
    """The ports on which somebody of this machine listens."""
    return {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}


def left(folder: Path, before: set[int]) -> dict[str, list[str]]:
    """Processes, ports and unfinished files that should be gone."""
    mark = str(folder / "runs")
    commands = {p.pid: " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])}
    return {
        "processes": [f"{pid} {text}" for pid, text in commands.items() if mark in text],
        "ports": [str(port) for port in sorted(ports() - before)],
        "files": [str(f) for f in (folder / "runs").rglob("*") if f.suffix in UNFINISHED],
    }


# ---------------------------------------------------------------- the figures


def table(runs: list[Run]) -> str:
    """A line for each fault, as Markdown."""
    lines = ["| fault | runs | met in time | completed | cancelled | otherwise | recoveries |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for fault in WEIGHTS:
        found = [run for run in runs if run.fault == fault]
        states = Counter(run.facts["state"] for run in found)
        done, cancelled = states["COMPLETED"], states["CANCELLED"]
        recoveries = sum(run.facts["recoveries"] for run in found)
        lines.append(
            f"| {fault} | {len(found)} | {sum(run.hit for run in found)} | {done} | {cancelled} | "
            f"{len(found) - done - cancelled} | {recoveries} |"
        )
    return "\n".join(lines) + "\n"


def soak(folder: Path, count: int, seed: int, limit_s: float) -> dict[str, Any]:
    """Runs them all and returns the figures."""
    singly = drawn(round(count * SINGLY), seed, singly=True)
    in_array = drawn(count - len(singly), seed + 1, singly=False)
    rows = film_rows(12)
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "test.jsonl", rows[:8])
    (folder / "tiny.yaml").write_text(RECIPE)
    os.chdir(folder)
    with Testbed(folder / "testbed", cpus=NODE_CPUS) as testbed:
        os.environ.update(testbed.env)
        counted = Counted(folder / "bin")
        path = os.environ["PATH"]
        before, began = ports(), time.monotonic()
        os.environ["PATH"] = f"{counted.folder}:{path}"
        submit(in_array, singly)
        watching = [sys.executable, "-m", "hpcft", "status", "--watch"]
        user = subprocess.Popen(watching, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.environ["PATH"] = path  # what is done here is not the product's
        runs = in_array + singly
        try:
            spoil(runs, Agenda(testbed), "squeue", limit_s)
            wall_s = time.monotonic() - began
        finally:
            user.terminate()
            user.wait()
        trouble = account(runs) | left(folder, before)
        return {
            "runs": count, "seed": seed, "wall_s": round(wall_s), "calls": counted.figures(),
            "trouble": trouble, "table": table(runs),
            "each": [{"run": r.folder.name, "job": r.job_id, "fault": r.fault, "hit": r.hit,
                      "after_s": round(r.after_s, 1), **r.facts} for r in runs],
        }  # fmt: skip


def lines_of(found: dict[str, Any]) -> str:
    """The figures beside the table, as lines of Markdown."""
    calls = found["calls"]
    figures = {
        "wall time, minutes": f"{found['wall_s'] / 60:.1f}",
        "scheduler calls a minute, on average": f"{calls['per_minute']:.1f}",
        "scheduler calls a minute, at most": str(calls["most_per_minute"]),
    } | {what: str(len(which)) for what, which in found["trouble"].items()}
    return "\n".join(f"| {what} | {figure} |" for what, figure in figures.items())


def main() -> int:
    """Soaks, prints the figures, and returns 1 where something was lost or left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit-min", type=float, default=90, help="give up after that")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the cluster is ended then, too
    outputs = [file.absolute() if file else None for file in (options.json, options.markdown)]
    with tempfile.TemporaryDirectory(prefix="hpcft-soak-") as made:
        found = soak(Path(made), options.runs, options.seed, options.limit_min * 60)
        os.chdir(ROOT)
    trouble = [f"- {what}: {line}" for what, which in found["trouble"].items() for line in which]
    page = PAGE.format(
        table=found["table"],
        figures=lines_of(found),
        trouble="\n".join(trouble) or "Nothing was lost, and nothing is left.",
        runs=found["runs"],
        seed=found["seed"],
    )
    print(page)
    for file, text in zip(outputs, (json.dumps(found, indent=1) + "\n", page), strict=True):
        if file:
            file.write_text(text)
    return 1 if any(found["trouble"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
