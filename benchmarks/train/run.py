"""Training speed and memory beside the field's own tools, on the same model and skewed data.

    python benchmarks/train/run.py [--rounds N] [--steps N] [--only NAME,…] [--factory PYTHON]
                                   [--json FILE] [--markdown FILE]

Contenders take turns, each in a process of its own, with the same threads. A useful token is one
that is no padding. All train every weight in fp32, without recomputation, with attention by `sdpa`.

- `ours`: a rank of a run that `hpcft submit` made, packed, micro-batch 8 × 2 in 16 examples a step
- `bare`: PyTorch alone over the same micro-batches of the same run: what our Trainer costs beside
- `padded`: `transformers.Trainer`, rows padded to the maximum, as the example scripts do by default
- `trl`, `trl-packed`: TRL's SFTTrainer, without and with packing
- `factory`, `factory-packed`: LLaMA-Factory, without and with packing that keeps examples apart

TRL is the one in this environment (`pip install trl`). LLaMA-Factory asks for versions of its own:
give it an environment that sees this one's packages (a `.pth` file naming its site-packages), and
install into that, without dependencies, `llamafactory` and the versions of `transformers`,
`accelerate`, `datasets`, `peft`, `trl`, `tokenizers`, `huggingface_hub`, … that
`pip install --dry-run llamafactory` names, torch excepted. It imports torchaudio, which text does
not use: where no build of it fits this torch, an empty module of that name will do. Then name that
environment's Python with `--factory`.
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

import data
from meter import WARM_UP

PAGE = """# Training speed

Made by `python benchmarks/train/run.py --markdown docs/train.md`: a Llama of 20 million
parameters on two CPU threads, fp32, examples of 8 to 512 tokens, half of them shorter than 64, 16
a step; {rounds} turns of {steps} steps, each step at the quietest of its turns. A useful token is
one that is no padding.
`bare` is a plain PyTorch loop over our very micro-batches; what the others are stands in the
benchmark's docstring.

{table}
How: the examples of a micro-batch stand one after another in a row without padding
(`train.packing`), each attends to itself alone, and a micro-batch has room for `micro-batch ×
max_length` tokens, as planned; so loss, gradients and global batch are those of padded batches
(`tests/tasks/test_packing.py` compares them for each architecture), and the predicted memory bounds it.
Where examples cannot share a row (encoders, virtual tokens, architectures that are not known to
be right), a step's examples are sorted by length before they are cut into micro-batches. Which
examples make up a step never depends on the number of ranks.
"""
HERE = Path(__file__).parent
CONTENDERS = ("ours", "bare", "padded", "trl", "trl-packed", "factory", "factory-packed")
THREADS = 2
TIMEOUT_S = 600
Found = dict[str, list[dict[str, Any]]]


def recipe(steps: int) -> str:
    """Our recipe, beside the data."""
    shape = json.dumps(
        {
            "name": "skewed",
            "model": {"path": "./model"},
            "task": {
                "name": "instruction",
                "data": {"files": {"train": "train.jsonl", "test": "test.jsonl"}},
                "prompt": "{prompt}",
                "completion": "{completion}",
                "max_length": data.MAX_LENGTH,
            },
            "method": {"name": "full"},
            "train": {
                "global_batch_size": data.GLOBAL_BATCH,
                "per_device_train_batch_size": data.MICRO_BATCH,
                "max_steps": steps,
                "learning_rate": 1e-4,
                "gradient_checkpointing": False,
                "bf16": False,
                "logging_steps": 1,
            },
            "resources": {"nodes": 1, "gpus_per_node": 1, "zero_stage": 0},
        }
    )
    return shape  # YAML holds JSON


def prepare(folder: Path, steps: int) -> None:
    """Model, data, and our run of it: submitted, trained and scored as a user's."""
    data.write(folder, examples=data.GLOBAL_BATCH * (steps + 1))
    (folder / "skewed.yaml").write_text(recipe(steps))
    command = ["-m", "hpcft", "submit", "skewed.yaml", "--cluster", "local", "--watch",
               "--runs-dir", str(folder / "runs")]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)


def measure(name: str, python: str, folder: Path, steps: int) -> dict[str, Any]:
    """One turn of a contender."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(THREADS),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
        "DISABLE_VERSION_CHECK": "1",
        # As the launcher of a local run tells its only rank who it is.
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
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def step_s(turns: list[dict[str, Any]]) -> float:
    """Mean seconds of a step, each at the quietest of its turns: all turns take the same steps."""
    each = zip(*(turn["steps_s"] for turn in turns), strict=True)
    return statistics.mean(min(seconds) for seconds in each)


def table(found: Found) -> str:
    """A line for each contender, as Markdown."""
    speeds = {name: turns[0]["tokens_per_step"] / step_s(turns) for name, turns in found.items()}
    lines = [
        "| contender | useful tokens/s | ours is | whole turns | seconds a step | peak MiB |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for name, turns in found.items():
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
    found: Found = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="hpcft-train-") as made:
        folder = Path(made)
        prepare(folder, options.steps)
        for number in range(options.rounds):
            for name in names:
                python = options.factory if name.startswith("factory") else sys.executable
                turn = measure(name, python, folder, options.steps)
                found[name].append(turn)
                speed = f"{turn['tokens_per_s']:.0f} tokens/s, {turn['tokens_per_step']:.0f} a step"
                print(f"{number + 1} {name}: {speed}", file=sys.stderr)
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.markdown:
        measured = {"rounds": options.rounds, "steps": options.steps - WARM_UP}
        options.markdown.write_text(PAGE.format(table=table(found), **measured))


if __name__ == "__main__":
    main()
