"""Compares training speed and memory with other tools, on the same model and skewed data.

    python benchmarks/train/run.py [--rounds N] [--steps N] [--only NAME,…] [--factory PYTHON]
                                   [--json FILE] [--markdown FILE]

Contenders take turns, each in its own process, with the same number of threads. A useful token is
one that is not padding. All train every weight in fp32, without recomputation, with `sdpa`
attention.

- `ours`: the rank of a run of hpcft, packed, two micro-batches of 8 in a step of 16 examples
- `bare`: a plain PyTorch loop over the same micro-batches, which shows the overhead of the Trainer
- `padded`: `transformers.Trainer`, rows padded to the maximum, as the example scripts do by default
- `trl`, `trl-packed`: TRL's SFTTrainer, without and with packing
- `factory`, `factory-packed`: LLaMA-Factory, without and with packing that keeps examples apart

TRL is the one in this environment (`pip install trl`). LLaMA-Factory needs other versions: give it
an environment that sees this one's packages (a `.pth` file with its site-packages). Install into
it, without dependencies, `llamafactory` and the versions of `transformers`, `accelerate`,
`datasets`, `peft`, `trl`, `tokenizers`, `huggingface_hub`, … that
`pip install --dry-run llamafactory` lists, except torch. It imports torchaudio, which text does not
use: if no build of it fits this torch, an empty module of that name will do. Then pass that
environment's Python as `--factory`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import skewed_data
from meter import WARM_UP

PAGE = """# Measured: training speed

Made by `python benchmarks/train/run.py --markdown docs/reference/measured/train.md`.

A Llama of 20 million parameters on two CPU threads, fp32, examples of 8 to 512 tokens, half of
them shorter than 64, 16 a step; {rounds} turns of {steps} steps; of each step the fastest turn
counts. A useful token is one that is not padding. `bare` is a plain PyTorch loop over the same
micro-batches; the benchmark's docstring describes the others.

{table}
With `train.packing`, the examples of a micro-batch follow each other in a row without padding, and
each attends only to itself. A micro-batch has room for `micro-batch × max_length` tokens, as
planned. So loss, gradients and global batch are those of padded batches
(`tests/tasks/test_packing.py` compares them for each architecture), and memory stays within the
prediction. Where examples cannot share a row (encoders, virtual tokens, architectures that were not
tested), a step's examples are sorted by length before they are divided into micro-batches. The
examples of a step never depend on the number of ranks.
"""
HERE = Path(__file__).parent
CONTENDERS = ("ours", "bare", "padded", "trl", "trl-packed", "factory", "factory-packed")
THREADS = 2
TIMEOUT_S = 600
Turns = dict[str, list[dict[str, Any]]]


def recipe(steps: int) -> str:
    """Returns hpcft's recipe, which lies in the folder of the data."""
    text = json.dumps(
        {
            "name": "skewed",
            "model": {"path": "./model"},
            "task": {
                "name": "instruction",
                "data": {"files": {"train": "train.jsonl", "test": "test.jsonl"}},
                "prompt": "{prompt}",
                "completion": "{completion}",
                "max_length": skewed_data.MAX_LENGTH,
            },
            "method": {"name": "full"},
            "train": {
                "global_batch_size": skewed_data.GLOBAL_BATCH,
                "per_device_train_batch_size": skewed_data.MICRO_BATCH,
                "max_steps": steps,
                "learning_rate": 1e-4,
                "gradient_checkpointing": False,
                "bf16": False,
                "logging_steps": 1,
            },
            "resources": {"nodes": 1, "gpus_per_node": 1, "zero_stage": 0},
        }
    )
    return text  # JSON is valid YAML.


def prepare(folder: Path, steps: int) -> None:
    """Writes model and data, and has hpcft train them as a user would."""
    skewed_data.write(folder, examples=skewed_data.GLOBAL_BATCH * (steps + 1))
    (folder / "skewed.yaml").write_text(recipe(steps))
    command = ["-m", "hpcft", "submit", "skewed.yaml", "--cluster", "local", "--watch",
               "--runs-dir", str(folder / "runs")]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)


def measure(name: str, python: str, folder: Path, steps: int) -> dict[str, Any]:
    """Measures one turn of a contender."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(THREADS),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
        "DISABLE_VERSION_CHECK": "1",
        # The launcher of a local run sets these variables for its only rank.
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_JOB_ID": "1",
        "SUBMITIT_LOCAL_NTASKS": "1",
        "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
        "SUBMITIT_LOCAL_NODEID": "0",
        "SUBMITIT_LOCAL_GLOBALID": "0",
        "SUBMITIT_LOCAL_LOCALID": "0",
    }
    command = [python, str(HERE / "contender.py"), name, str(folder), str(result), str(steps)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if not result.exists():
        raise SystemExit(
            f"{name} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
        )
    measurement: dict[str, Any] = json.loads(result.read_text())
    return measurement


def step_s(turns: list[dict[str, Any]]) -> float:
    """Returns the mean seconds of a step, of each step the fastest turn: all turns do the same."""
    each = zip(*(turn["steps_s"] for turn in turns), strict=True)
    return statistics.mean(min(seconds) for seconds in each)


def table(turns_of: Turns) -> str:
    """Formats a row for each contender, as Markdown."""
    speeds = {name: turns[0]["tokens_per_step"] / step_s(turns) for name, turns in turns_of.items()}
    lines = [
        "| contender | useful tokens/s | ours is | whole turns | seconds a step | peak MiB |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for name, turns in turns_of.items():
        each = ", ".join(f"{turn['tokens_per_s']:.0f}" for turn in turns)
        ratio = f"{speeds['ours'] / speeds[name]:.2f} ×" if "ours" in speeds else ""
        figures = f"{step_s(turns):.3f} | {statistics.median(t['peak_mib'] for t in turns):.0f}"
        lines.append(f"| {name} | {speeds[name]:.0f} | {ratio} | {each} | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures all contenders and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps, warm-up included")
    parser.add_argument("--only", default="", help="names of contenders, with commas")
    parser.add_argument("--factory", help="the Python of LLaMA-Factory's environment")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(CONTENDERS)
    if not options.factory:
        names = [name for name in names if not name.startswith("factory")]
    turns_of: Turns = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="hpcft-train-") as made:
        folder = Path(made)
        prepare(folder, options.steps)
        for number in range(options.rounds):
            for name in names:
                python = options.factory if name.startswith("factory") else sys.executable
                turn = measure(name, python, folder, options.steps)
                turns_of[name].append(turn)
                speed = f"{turn['tokens_per_s']:.0f} tokens/s, {turn['tokens_per_step']:.0f} a step"
                print(f"{number + 1} {name}: {speed}", file=sys.stderr)
    print(table(turns_of))
    if options.json:
        options.json.write_text(json.dumps(turns_of, indent=1) + "\n")
    if options.markdown:
        measured = {"rounds": options.rounds, "steps": options.steps - WARM_UP}
        options.markdown.write_text(PAGE.format(table=table(turns_of), **measured))


if __name__ == "__main__":
    main()
