"""Counts the scheduler calls of commands on many runs, and times them, on the testbed's Slurm.

    python benchmarks/control/run.py [--finished 10000] [--points 1000] [--few 200]
        [--markdown FILE]

Each command is a process of its own, as a user starts it; programs of the names of Slurm's commands
are first on PATH, and log each call. A job that holds all nodes keeps the others pending. Beside
hpcft stands submitit's own way: `map_array`, `Job.state` and `Job.cancel`, as its documentation
shows them.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks" / "soak"), str(ROOT / "slurm" / "testbed")]

from calls import CallCounter  # noqa: E402
from folders import forget_pages, write_finished_runs  # noqa: E402

from testbed import Testbed  # noqa: E402

RECIPE = """\
name: {name}
model:
  config: {{ model_type: bert, vocab_size: 400, hidden_size: 32, num_hidden_layers: 1,
            num_attention_heads: 2, intermediate_size: 64, max_position_embeddings: 64 }}
  tokenizer: {{ vocab_size: 400 }}
task:
  name: classification
  data: {{ files: {{ train: train.jsonl, test: test.jsonl }} }}
  labels: [bad, good]
  max_length: 32
method: {{ name: full }}
train: {{ global_batch_size: 4, max_steps: 3 }}
resources: {{ nodes: 1, gpus_per_node: 1, time_min: 10 }}
sweep:
  grid:
    train.learning_rate: [{rates}]
    train.seed: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
"""

SUBMITIT = """\
import sys, submitit
executor = submitit.AutoExecutor("submitit-logs")
executor.update_parameters(timeout_min=10, slurm_partition="main", slurm_array_parallelism=256)
count, action = int(sys.argv[1]), sys.argv[2]
jobs = executor.map_array(abs, range(count))
if action == "state":
    print(len({job.state for job in jobs}))
for job in jobs if action == "cancel" else ():
    job.cancel()
"""

PAGE = """# Measured: load on the scheduler

Made by `python benchmarks/control/run.py --markdown docs/reference/measured/control.md`, with
{finished:,} finished runs, sweeps of {points:,} and {few} points, and the testbed's Slurm.

Calls are those of Slurm's commands, counted by programs of their names on PATH. Seconds are of the
whole command, in a process of its own, and depend on what else the machine does; CPU seconds are of
the command and the processes that it starts. The memory is its largest resident set. A bar is the
most that an action may take. submitit's way is its `map_array`, `Job.state` and `Job.cancel`; it
records nothing by which a second submission would know the first one, and has no table of results.

{table}
{notes}
Machine: {machine}, {cores} cores, load {load:.1f} at the start.
"""


@dataclass
class Figures:
    """What one command took."""

    seconds: float
    """Time of the whole process, in seconds."""
    cpu_s: float
    """CPU time of the process and those that it started, in seconds."""
    memory_mb: float
    """Largest resident set, in 10⁶ bytes."""
    calls: Counter[str] = field(default_factory=Counter)
    """Calls of each command of Slurm."""
    lines: int = 0
    """Lines that it printed."""


class Bench:
    """A folder with recipes, and a Slurm whose commands are counted."""

    def __init__(self, folder: Path, counter: CallCounter, env: dict[str, str]) -> None:
        """Starts without results.

        Args:
            folder: folder of the recipes and runs.
            counter: counts the calls.
            env: environment of the cluster.
        """
        self.folder = folder
        self.counter = counter
        path = f"{counter.folder}:{os.environ['PATH']}"
        # Of this checkout, whichever hpcft is installed.
        self.env = {**os.environ, **env, "PATH": path, "PYTHONPATH": str(ROOT / "launcher")}
        self.rows: list[str] = []

    def hpcft(self, *arguments: str, limit_s: float | None = None) -> Figures:
        """Runs `hpcft …`."""
        return self.process([sys.executable, "-m", "hpcft", *arguments], limit_s)

    def process(self, command: list[str], limit_s: float | None = None) -> Figures:
        """Runs a command, and returns what it took.

        Args:
            command: program and arguments.
            limit_s: seconds after which it is interrupted; None for no limit.
        """
        before = Counter(line.split()[1] for line in self.counter.log.read_text().splitlines())
        output = self.folder / "output.txt"
        begun = time.perf_counter()
        with output.open("w") as stream:
            started = subprocess.Popen(
                command, cwd=self.folder, env=self.env, stdout=stream, stderr=subprocess.STDOUT
            )
            if limit_s:
                time.sleep(limit_s)
                started.terminate()
            _, status, usage = os.wait4(started.pid, 0)
        seconds = time.perf_counter() - begun
        if status and not limit_s:
            raise SystemExit(f"{' '.join(command)}: {output.read_text()[-2000:]}")
        after = Counter(line.split()[1] for line in self.counter.log.read_text().splitlines())
        lines = len(output.read_text(errors="replace").splitlines())
        cpu_s = usage.ru_utime + usage.ru_stime
        return Figures(seconds, cpu_s, usage.ru_maxrss * 1024 / 1e6, after - before, lines)

    def row(self, action: str, figures: Figures, bar: str, other: Figures | None = None) -> None:
        """Adds a row to the table, and prints it."""
        beside = f"{_calls(other)} | {other.seconds:.1f}" if other else "– | –"
        row = (
            f"| {action} | {_calls(figures)} | {figures.seconds:.1f} | {figures.cpu_s:.1f} | "
            f"{figures.memory_mb:.0f} | "
            f"{figures.lines:,} | {bar} | {beside} |"
        )
        self.rows.append(row)
        print(row, flush=True)


def _calls(figures: Figures) -> str:
    kinds = ", ".join(f"{count:,} {name}" for name, count in sorted(figures.calls.items()))
    return f"{sum(figures.calls.values()):,}" + (f" ({kinds})" if kinds else "")


def write_recipes(folder: Path, points: int, few: int) -> None:
    """Writes the data, a large sweep and a small one."""
    rows = [f'{{"text": "film number {i}", "label": "{"bad" if i % 2 else "good"}"}}\n' for i in range(24)]  # fmt: skip # noqa: E501
    (folder / "train.jsonl").write_text("".join(rows[:16]))
    (folder / "test.jsonl").write_text("".join(rows[16:]))
    for name, count in (("large", points), ("small", few)):
        rates = ", ".join(f"{1 + i}e-5" for i in range(max(1, count // 10)))
        (folder / f"{name}.yaml").write_text(RECIPE.format(name=name, rates=rates))
    (folder / "with_submitit.py").write_text(SUBMITIT)


def measure(bench: Bench, options: argparse.Namespace) -> None:
    """Runs all commands."""
    python, script = sys.executable, "with_submitit.py"
    points, few, site = str(options.points), str(options.few), ("-c", "testbed")
    bench.hpcft("plan", "small.yaml", *site, "-o", "sweep.grid={}")  # counts the model once
    one = f"submit a sweep of {options.points:,}"
    own = bench.process([python, script, points, "none"])
    bench.row(one, bench.hpcft("submit", "large.yaml", *site), "3 s", own)
    bench.row("… again, while it is pending", bench.hpcft("submit", "large.yaml", *site),
              "2 calls, 3 s")  # fmt: skip
    bench.row("dry run of it", bench.hpcft("submit", "large.yaml", *site, "--dry-run"), "a screen")
    states = bench.process([python, script, points, "state"])
    bench.row("status of it", bench.hpcft("status", "large"), "", states)
    watched = bench.hpcft("status", "large", "--watch", limit_s=60)
    bench.row("status --watch of it for a minute", watched, "10 s between two looks")
    bench.hpcft("submit", "small.yaml", *site)
    cancelled = bench.process([python, script, few, "cancel"])
    bench.row(f"cancel {few} points", bench.hpcft("cancel", "small"), "1 scancel", cancelled)
    time.sleep(2)  # Until none of them is completing.
    again = bench.process([python, script, few, "none"])
    bench.row(f"submit {few} cancelled points again", bench.hpcft("submit", "small.yaml", *site),
              "3 calls to find them", again)  # fmt: skip
    bench.hpcft("cancel", "small")
    time.sleep(2)
    bench.row(f"resume {few} points", bench.hpcft("resume", "small"), "one array, 6 calls", again)
    submitted = next(path.parent for path in sorted(bench.folder.glob("runs/large/*/job.json")))
    many = bench.folder / "many"
    write_finished_runs(many, submitted, options.finished)
    runs = ("--runs-dir", str(many))
    name = f"of {options.finished:,} finished runs"
    forget_pages(many)
    bench.row(f"status {name}, first", bench.hpcft("status", *runs), "")
    bench.row("… again", bench.hpcft("status", *runs), "1 s, 300 MB")
    forget_pages(many)
    bench.row("… again, with cold pages", bench.hpcft("status", *runs), "3 s")
    bench.row(f"collect {name}, first", bench.hpcft("collect", *runs), "")
    bench.row("… again", bench.hpcft("collect", *runs), "2 s")


def main() -> None:
    """Starts a cluster, runs all commands, prints the table and writes the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--finished", type=int, default=10_000)
    parser.add_argument("--points", type=int, default=1_000)
    parser.add_argument("--few", type=int, default=200)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="hpcft-control-") as name:
        folder = Path(name)
        with Testbed(folder / "slurm") as testbed:
            os.environ.update(testbed.env)
            hold = ["sbatch", "--nodes=4", "--exclusive", "--time=60", "--output=/dev/null"]
            subprocess.run([*hold, "--wrap", "sleep 3600"], check=True, capture_output=True)
            work = folder / "work"
            work.mkdir()
            write_recipes(work, options.points, options.few)
            bench = Bench(work, CallCounter(folder / "bin"), testbed.env)
            measure(bench, options)
    header = (
        "| action | calls | s | CPU s | MB | lines | bar | submitit's calls | s |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | --- | --- | ---: |"
    )
    if options.markdown:
        notes = (
            "The first status and collect read the run folders; later ones read an index of "
            "finished runs, `.index.sqlite` in the runs folder, which a change of a run's files "
            "overrides.\n"
        )
        text = PAGE.format(finished=options.finished, points=options.points, few=options.few,
                           table="\n".join([header, *bench.rows]) + "\n", notes=notes,
                           machine=platform.machine(), cores=os.cpu_count(), load=load)  # fmt: skip
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()
