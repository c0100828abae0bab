"""Compares predicted with measured memory of real steps, and with other tools' estimates.

    python benchmarks/memory/run.py [--only PATTERN] [--measured FILE] [--json FILE]
                                    [--markdown FILE] [--device cpu|cuda]

Measurements are kept in the file given by `--measured`; a case is measured only if the file lacks
it. With `--only-measured` no case is measured.
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
from hpcft.planning.memory.model_states import (
    COMMUNICATOR_ITEM,
    CONTEXT_ITEM,
    FRAGMENTATION_ITEM,
    PROCESS_ITEM,
)

NOT_MEASURED = (PROCESS_ITEM, CONTEXT_ITEM, COMMUNICATOR_ITEM, "evaluation")

PAGE = """# Measured: predicted against measured memory

Made by
`python benchmarks/memory/run.py --device {device} --markdown docs/reference/measured/memory.md`.

Each case runs real training steps with hpcft's own Trainer, or batches of few-shot prompts with
its own scorer; a row shows the highest peak of a rank in MiB. On a CPU the measurement is what the
allocator reports, and RSS is the growth of the resident set. For comparison the table has
DeepSpeed's and accelerate's own estimates of the same case, which leave out the activations and
buffers of the step.
"""


def predicted_bytes(case: Case, device: str = "cpu") -> int:
    """Returns hpcft's prediction of a step's peak, without the process and without evaluation."""
    items = plan_of(case, device).gpu_memory
    # The tracker of a CPU sees tensors only, not what its C allocator keeps.
    left_out = (*NOT_MEASURED, FRAGMENTATION_ITEM) if device == "cpu" else NOT_MEASURED
    return sum(item.bytes for item in items if item.name not in left_out)


def make_row(case: Case, result: dict[str, Any], device: str) -> Row:
    """Returns the row of a measured case, predicted with an empty cache.

    The user's cache may hold predictions of older code.
    """
    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as empty,
        mock.patch.dict(os.environ, XDG_CACHE_HOME=empty),
    ):
        predicted = predicted_bytes(case, device)
    seconds = time.perf_counter() - start
    if device == "cpu":
        measured = result["peak_bytes"]
        others = {"RSS": result["rss_bytes"] - result["rss_before_bytes"]}
    else:
        measured = result["reserved_bytes"]
        others = {"allocated": result["peak_bytes"], "device": result["device_bytes"]}
    return Row(
        case=case.name,
        ranks=case.ranks,
        stage=case.stage,
        measured_bytes=measured,
        predicted_bytes=predicted,
        prediction_s=seconds,
        other_bytes=others,
        deepspeed_bytes=peers.deepspeed_bytes(case),
        accelerate_bytes=peers.accelerate_bytes(case),
    )


def main() -> int:
    """Measures, predicts and prints the table; returns 1 if an error exceeds its limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="*", help="names of cases, with * and ?")
    parser.add_argument("--measured", type=Path, help="JSON file that keeps measurements")
    parser.add_argument("--json", type=Path, help="JSON file for the results")
    parser.add_argument("--markdown", type=Path, help="Markdown file for the table")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only-measured", action="store_true", help="use stored measurements only")
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
        print_progress(f"[{number}/{len(chosen)}] {case.name}")
        if kept.get(case.name, {}).get("digest") != case.digest:
            try:
                kept[case.name] = measure(case, options.device)
            except (RuntimeError, HpcftError, ValueError) as error:
                print_progress(f"    {(str(error).strip().splitlines() or [''])[-1]}")
                continue
            if options.measured:
                write_text(options.measured, json.dumps(kept, indent=1))
        rows.append(make_row(case, kept[case.name], options.device))
    device = options.device
    print(text(rows, device))
    lines, all_pass = summary(rows, device)
    print("\n".join(lines))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if options.markdown:
        bullets = [f"- {line}" for line in lines]
        page = [PAGE.format(device=device), *bullets, "", markdown(rows, device), ""]
        options.markdown.write_text("\n".join(page))
    return 0 if all_pass else 1


def print_progress(line: str) -> None:
    """Prints a line of progress to stderr, apart from the table."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
