"""Soak test: many short runs on a real Slurm, each with a random fault.

    python benchmarks/soak/run.py [--runs N] [--seed S] [--json FILE] [--markdown FILE]

Three quarters of the runs are one job array, the rest are jobs of their own. Each trains a tiny
classifier on one rank, and has one fault (`faults.py`), drawn by the seed, at a random time of its
first job. Meanwhile `hpcft status --watch` runs as a user would start it. The calls of scheduler
commands are counted: by `status`, by submissions and by the runs themselves.

Exit code 0: every run is listed exactly once, ended as expected, and left nothing behind.
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
from calls import CallCounter  # noqa: E402

from builders import RECIPE, film_rows, write_rows  # noqa: E402
from faults import LONG, WEIGHTS, Agenda, Run, draw_runs  # noqa: E402
from testbed import Testbed  # noqa: E402

SINGLY = 0.25
# Two runs per node, eight at a time; each computes on a core of this machine.
NODE_CPUS = 4
POLL_S = 0.5
LIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD"}
STEPS = 60
COMMON = ["-o", f"train.max_steps={STEPS}", "-o", "train.logging_steps=20",
          "-o", "train.save_strategy=steps", "-o", "train.save_steps=20"]  # fmt: skip
UNFINISHED = (".part", ".tmp", ".new")

PAGE = """# Measured: soak test

Made by `python benchmarks/soak/run.py --runs {runs} --seed {seed} --markdown docs/reference/measured/soak.md`:
{runs} short runs on the testbed's four nodes, three quarters of them one job array, each with one
fault at a random time. `benchmarks/soak/faults.py` describes the faults.

{table}
| | |
| --- | ---: |
{figures}

{trouble}
"""  # noqa: E501


def hpcft(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of hpcft, as a user types it."""
    command = [sys.executable, "-m", "hpcft", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def hpcft_json(*arguments: str) -> Any:
    """Runs a command of hpcft; returns its JSON output.

    Raises:
        SystemExit: it failed.
    """
    done = hpcft(*arguments, "--json")
    if done.returncode not in (0, 1):
        raise SystemExit(f"hpcft {' '.join(arguments)}: {done.stderr}")
    return json.loads(done.stdout)


# ---------------------------------------------------------------- the runs


def submit(in_array: list[Run], singly: list[Run]) -> None:
    """Submits the array and the single runs; sets their folders and job ids."""
    seeds = ", ".join(str(number) for number in range(1, len(in_array) + 1))
    rows = hpcft_json("submit", "tiny.yaml", *COMMON, "-o", f"sweep.seeds=[{seeds}]")
    for number, run in enumerate(singly):
        more = LONG if run.fault == "time_limit" else []
        rows += hpcft_json(
            "submit", "tiny.yaml", *COMMON, *more, "-o", f"train.seed={1000 + number}"
        )
    for run, row in zip([*in_array, *singly], rows, strict=True):
        run.folder = Path(row["folder"]).absolute()
        job = json.loads((run.folder / "job.json").read_text())
        run.job_id = job["attempts"][0]["job_id"]


def inject_faults(runs: list[Run], agenda: Agenda, squeue: str, limit_s: float) -> None:
    """Injects each run's fault after its job has started, until no job is left."""
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


# ---------------------------------------------------------------- results


def account(runs: list[Run]) -> dict[str, list[str]]:
    """Returns the runs that are not in exactly one row of the table, or ended unexpectedly."""
    views = {view["run_id"]: view for view in hpcft_json("status")}
    rows = Counter(run_id for row in hpcft_json("collect") for run_id in row["run_ids"])
    for run in runs:
        view = views.get(run.folder.name, {"state": "LOST", "note": ""})
        recoveries = sorted(run.folder.glob("recoveries/*.json"))
        run.facts = {"state": view["state"], "note": view["note"], "recoveries": len(recoveries)}
    return {
        "not in exactly one row": [r.folder.name for r in runs if rows[r.folder.name] != 1],
        "unknown runs": sorted({*views, *rows} - {run.folder.name for run in runs}),
        "ended unexpectedly": [
            f"{r.folder.name} {r.fault} after {r.after_s:.1f} s: {r.facts['state']}: "
            f"{r.facts['note']}"
            for r in runs if r.facts["state"] != r.expected_state
        ],
    }  # fmt: skip


def ports() -> set[int]:
    """Returns the TCP ports on which a process of this machine listens."""
    return {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}


def find_leftovers(folder: Path, before: set[int]) -> dict[str, list[str]]:
    """Returns processes, ports and unfinished files that should be gone."""
    mark = str(folder / "runs")
    commands = {p.pid: " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])}
    return {
        "processes": [f"{pid} {text}" for pid, text in commands.items() if mark in text],
        "ports": [str(port) for port in sorted(ports() - before)],
        "files": [str(f) for f in (folder / "runs").rglob("*") if f.suffix in UNFINISHED],
    }


# ---------------------------------------------------------------- figures


def table(runs: list[Run]) -> str:
    """Returns a Markdown table with a row per fault."""
    lines = ["| fault | runs | hit in time | completed | cancelled | otherwise | recoveries |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for fault in WEIGHTS:
        chosen = [run for run in runs if run.fault == fault]
        states = Counter(run.facts["state"] for run in chosen)
        done, cancelled = states["COMPLETED"], states["CANCELLED"]
        recoveries = sum(run.facts["recoveries"] for run in chosen)
        lines.append(
            f"| {fault} | {len(chosen)} | {sum(run.hit for run in chosen)} | {done} | {cancelled} "
            f"| {len(chosen) - done - cancelled} | {recoveries} |"
        )
    return "\n".join(lines) + "\n"


def soak(folder: Path, count: int, seed: int, limit_s: float) -> dict[str, Any]:
    """Runs everything; returns the figures."""
    singly = draw_runs(round(count * SINGLY), seed, singly=True)
    in_array = draw_runs(count - len(singly), seed + 1, singly=False)
    rows = film_rows(12)
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "test.jsonl", rows[:8])
    (folder / "tiny.yaml").write_text(RECIPE)
    os.chdir(folder)
    with Testbed(folder / "testbed", cpus=NODE_CPUS) as testbed:
        os.environ.update(testbed.env)
        counter = CallCounter(folder / "bin")
        path = os.environ["PATH"]
        before, started = ports(), time.monotonic()
        os.environ["PATH"] = f"{counter.folder}:{path}"
        submit(in_array, singly)
        watching = [sys.executable, "-m", "hpcft", "status", "--watch"]
        user = subprocess.Popen(watching, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.environ["PATH"] = path  # Calls of this script are not counted.
        runs = in_array + singly
        try:
            inject_faults(runs, Agenda(testbed), "squeue", limit_s)
            wall_s = time.monotonic() - started
        finally:
            user.terminate()
            user.wait()
        trouble = account(runs) | find_leftovers(folder, before)
        return {
            "runs": count, "seed": seed, "wall_s": round(wall_s), "calls": counter.figures(),
            "trouble": trouble, "table": table(runs),
            "each": [{"run": r.folder.name, "job": r.job_id, "fault": r.fault, "hit": r.hit,
                      "after_s": round(r.after_s, 1), **r.facts} for r in runs],
        }  # fmt: skip


def figure_rows(result: dict[str, Any]) -> str:
    """Returns the other figures as rows of a Markdown table."""
    calls = result["calls"]
    figures = {
        "wall time, minutes": f"{result['wall_s'] / 60:.1f}",
        "scheduler calls per minute, on average": f"{calls['per_minute']:.1f}",
        "scheduler calls per minute, at most": str(calls["most_per_minute"]),
    } | {kind: str(len(lines)) for kind, lines in result["trouble"].items()}
    return "\n".join(f"| {name} | {figure} |" for name, figure in figures.items())


def main() -> int:
    """Runs the soak test, prints the figures; returns 1 if a run was lost or left something."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit-min", type=float, default=90, help="give up after that")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # This also ends the cluster.
    outputs = [file.absolute() if file else None for file in (options.json, options.markdown)]
    with tempfile.TemporaryDirectory(prefix="hpcft-soak-") as folder:
        result = soak(Path(folder), options.runs, options.seed, options.limit_min * 60)
        os.chdir(ROOT)
    trouble = [f"- {kind}: {line}" for kind, lines in result["trouble"].items() for line in lines]
    page = PAGE.format(
        table=result["table"],
        figures=figure_rows(result),
        trouble="\n".join(trouble) or "No run was lost, and none left anything behind.",
        runs=result["runs"],
        seed=result["seed"],
    )
    print(page)
    for file, text in zip(outputs, (json.dumps(result, indent=1) + "\n", page), strict=True):
        if file:
            file.write_text(text)
    return 1 if any(result["trouble"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
