"""Predicted against measured memory of real steps, and beside what others estimate.

    python benchmarks/memory/run.py [--only PATTERN] [--measured FILE] [--json FILE]
                                    [--markdown FILE] [--device cpu|cuda]

Measurements are kept in the file given by `--measured` and made only where it lacks them;
`--only-measured` makes none.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import peers
from case import Case
from cases import CASES, ON_GPU
from measure import measure, plan_of
from table import Row, markdown, summary, text

from hpcft.core.errors import HpcftError
from hpcft.core.files import write_text
from hpcft.planning.memory.model_states import COMMUNICATOR, CONTEXT, PROCESS

BESIDE = (PROCESS, CONTEXT, COMMUNICATOR, "evaluation")

PAGE = """# Predicted against measured memory

Made by `python benchmarks/memory/run.py --device {device} --markdown docs/memory.md`: real training
steps through the product's own Trainer, or batches of prompts through what asks them, the peak of
each rank in MiB. On a CPU the truth is what the allocator itself reports; RSS is how much the
resident set grew. Beside ours: DeepSpeed's and accelerate's own estimates of the same case, which
leave out what the step itself holds.
"""


def predicted_bytes(case: Case, device: str = "cpu") -> int:
    """What hpcft predicts of a step: without the process, and without what scoring takes beyond."""
    items = plan_of(case, device).gpu_memory
    return sum(item.bytes for item in items if item.name not in BESIDE)


def row_of(case: Case, found: dict[str, Any], device: str) -> Row:
    """A measured case with every prediction of it, made anew: a cache may hold older code's."""
    begun = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as empty,
        mock.patch.dict(os.environ, XDG_CACHE_HOME=empty),
    ):
        predicted = predicted_bytes(case, device)
    seconds = time.perf_counter() - begun
    if device == "cpu":
        measured = found["peak_bytes"]
        beside = {"RSS": found["rss_bytes"] - found["rss_before_bytes"]}
    else:
        measured = found["reserved_bytes"]
        beside = {"allocated": found["peak_bytes"], "device": found["device_bytes"]}
    return Row(
        case=case.name,
        ranks=case.ranks,
        stage=case.stage,
        measured_bytes=measured,
        predicted_bytes=predicted,
        prediction_s=seconds,
        beside_bytes=beside,
        deepspeed_bytes=peers.deepspeed_bytes(case),
        accelerate_bytes=peers.accelerate_bytes(case),
    )


def main() -> int:
    """Measures, predicts, prints the table; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="*", help="names of cases, with * and ?")
    parser.add_argument("--measured", type=Path, help="JSON file that keeps measurements")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--markdown", type=Path, help="where the table goes")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only-measured", action="store_true", help="measure nothing anew")
    options = parser.parse_args()
    cases = CASES if options.device == "cpu" else ON_GPU
    chosen = [case for case in cases if fnmatch.fnmatch(case.name, options.only)]
    kept: dict[str, Any] = {}
    if options.measured and options.measured.exists():
        kept = json.loads(options.measured.read_text())
    rows = []
    if options.only_measured:
        chosen = [case for case in chosen if kept.get(case.name, {}).get("digest") == case.digest]
    for number, case in enumerate(chosen, 1):
        say(f"[{number}/{len(chosen)}] {case.name}")
        if kept.get(case.name, {}).get("digest") != case.digest:
            try:
                kept[case.name] = measure(case, options.device)
            except (RuntimeError, HpcftError, ValueError) as error:
                say(f"    {(str(error).strip().splitlines() or [''])[-1]}")
                continue
            if options.measured:
                write_text(options.measured, json.dumps(kept, indent=1))
        rows.append(row_of(case, kept[case.name], options.device))
    device = options.device
    print(text(rows, device))
    lines, holds = summary(rows, device)
    print("\n".join(lines))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if options.markdown:
        said = [f"- {line}" for line in lines]
        page = [PAGE.format(device=device), *said, "", markdown(rows, device), ""]
        options.markdown.write_text("\n".join(page))
    return 0 if holds else 1


def say(line: str) -> None:
    """Progress, beside the table."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
