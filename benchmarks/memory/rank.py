"""One rank of a measured case: the product's own loading, Trainer and loss, on synthetic features.

Started by `measure.py`, in a process of its own: `rank.py CASE FOLDER RANK`.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import cases
import events
from cases import STEPS, Case

from hpcft.paths import RunPaths
from hpcft.records import Plan
from hpcft.store import read
from hpcft.train import start


def features(case: Case, vocab_size: int) -> list[dict[str, Any]]:
    """Examples of exactly the sequence length, enough for every step of every rank."""
    import random

    draw = random.Random(0)
    count = STEPS * case.accumulation * case.batch * case.ranks
    rows = []
    for _ in range(count):
        ids = [draw.randrange(3, min(vocab_size, 8000)) for _ in range(case.sequence)]
        labels: Any = [-100] * (case.sequence - case.labelled_tokens) + ids[-case.labelled_tokens :]
        if case.task == "classification":
            labels = draw.randrange(2)
        rows.append({"input_ids": ids, "attention_mask": [1] * case.sequence, "labels": labels})
    return rows


def run(case: Case, folder: Path, rank: int) -> dict[str, Any]:
    """Trains the case and returns what this rank needed."""
    plan = read(folder / "plan.json", Plan)
    me = start.Rank(rank, case.ranks, rank, "here", "0")
    start._set_environment(me, plan)

    import torch
    from torch.profiler import ProfilerActivity, profile, record_function
    from transformers import TrainerCallback

    from hpcft.train import loop, model, prepare

    times: list[float] = []
    on_gpu = plan.accelerator == "cuda"

    class Marks(TrainerCallback):  # type: ignore[misc]
        """Bounds the phases of the profile."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            with record_function(f"{events.MARK}setup"):
                pass

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if on_gpu and not times:
                torch.cuda.reset_peak_memory_stats()
            times.append(time.perf_counter())
            with record_function(f"{events.MARK}step {len(times)}"):
                pass

        def on_substep_end(self, *_: Any, **__: Any) -> None:
            with record_function(f"{events.MARK}step {len(times)}, next micro-batch"):
                pass

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            with record_function(f"{events.MARK}step {len(times)}, optimizer"):
                pass

        def on_train_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())
            with record_function(f"{events.MARK}end"):
                pass

    if case.ranks > 1 and not on_gpu:
        _let_gloo_go_first()
    paths = RunPaths(folder)
    recipe = case.recipe()
    tokenizer = prepare.load_tokenizer(paths)
    rows = features(case, plan.facts.vocab_size)
    rss_before = _resident_bytes("VmRSS")
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    if not on_gpu:
        profiler.start()
    arguments = loop.training_arguments(paths, recipe, plan, has_validation=False)
    loop._start_communication(plan)
    loaded = model.load(paths, recipe, plan, tokenizer)
    _own_storage(loaded)
    trainer = loop._trainer(
        recipe, plan, arguments, loaded, tokenizer, prepare.Split(rows, []), None, Marks()
    )
    with record_function(f"{events.MARK}trainer"):
        pass
    trained = trainer.train()
    result: dict[str, Any] = {
        "rss_bytes": _resident_bytes("VmHWM"),
        "rss_before_bytes": rss_before,
        "threads": torch.get_num_threads(),
        "step_s": [b - a for a, b in itertools.pairwise(times)],
        "loss": trained.training_loss,
    }
    if on_gpu:
        free, total = torch.cuda.mem_get_info()
        return result | {
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "device_bytes": total - free,
        }
    profiler.stop()
    return result | _added_up(profiler)


def _let_gloo_go_first() -> None:
    """Makes every wait for a collective last until gloo's threads have let go of its tensors.

    The profiler sees this thread only: what another one gives back last would seem to live on.
    """
    from torch.distributed import Work

    wait = Work.wait

    def patiently(work: Any, *options: Any) -> Any:
        result = wait(work, *options)
        time.sleep(0.002)
        return result

    Work.wait = patiently  # type: ignore[assignment, method-assign]


def _own_storage(model: Any) -> None:
    """Gives weights that still lie in the mapped file their own memory, as on a GPU."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not hasattr(tensor, "ds_id") and getattr(tensor, "quant_state", None) is None:
            tensor.data = tensor.data.clone()


def _added_up(profiler: Any) -> dict[str, Any]:
    blocks, operations = events.read(profiler)
    found = events.account(blocks, operations, "step")
    by_name = {name: (peak, end) for name, peak, end in found.marks}
    steps = [
        max(peak for name, peak, _ in found.marks if name.split(",")[0] == f"step {number}")
        for number in range(1, STEPS + 1)
    ]
    return {
        "peak_bytes": found.peak_bytes,
        "step_peaks_bytes": steps,
        "before_bytes": by_name["setup"][1],
        "setup_peak_bytes": max(by_name["trainer"][0], by_name["setup"][0]),
        "loading_peak_bytes": by_name["loading"][0],
        "phases": found.marks,
        "unseen_frees": found.unseen_frees,
        "groups": events.groups(found.live),
        "around": events.around(operations, found.peak_at_ns, 3),
        "operations": events.around(operations, found.peak_at_ns, 30),
    }


def _resident_bytes(field: str) -> int:
    """The resident set now (`VmRSS`) or at its peak (`VmHWM`); Linux counts both in KiB.

    `getrusage` will not do: its peak begins with that of the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


if __name__ == "__main__":
    name, folder, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    result = run(cases.named(name), folder, rank)
    (folder / f"{rank}.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may wait for peers that have already ended
