"""One rank of a measured case: the product's own loading and Trainer, or asking, on made-up tokens.

Started by `measure.py`, in a process of its own: `rank.py CASE FOLDER RANK`.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import cases
import events
from case import STEPS, Case

from hpcft.core.files import read_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Plan
from hpcft.tasks.few_shot.task import MAX_ROWS
from hpcft.training.distributed import rank_env


def run(case: Case, folder: Path, rank: int) -> dict[str, Any]:
    """Trains or asks as the case says, and returns what this rank needed."""
    plan = read_record(folder / "plan.json", Plan)
    me = rank_env.RankInfo(rank, case.ranks, rank, "here", "0")
    rank_env._set_environment(me, plan)
    if case.ranks > 1 and plan.accelerator == "cpu":
        _let_gloo_go_first()
    recording = Recording(on_gpu=plan.accelerator == "cuda")
    work = _ask if case.task == "prompting" else _train
    work(case, plan, RunPaths(folder), recording)
    return recording.result()


class Recording:
    """The memory of a rank, by phase of its work."""

    def __init__(self, *, on_gpu: bool) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.on_gpu = on_gpu
        self.times: list[float] = []
        self.rss_before_bytes = 0
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def begin(self) -> None:
        """What follows is recorded."""
        self.rss_before_bytes = _resident_bytes("VmRSS")
        if not self.on_gpu:
            self.profiler.start()

    def mark(self, name: str) -> None:
        """The phase of that name begins."""
        from torch.profiler import record_function

        with record_function(f"{events.MARK}{name}"):
            pass

    def step(self, of: str = "") -> None:
        """A step begins, or a part of it."""
        if of:
            self.mark(f"step {len(self.times)}, {of}")
            return
        if self.on_gpu and not self.times:
            import torch

            torch.cuda.reset_peak_memory_stats()
        self.times.append(time.perf_counter())
        self.mark(f"step {len(self.times)}")

    def end(self) -> None:
        """The last step has ended."""
        self.times.append(time.perf_counter())
        self.mark("end")

    def result(self) -> dict[str, Any]:
        """What was needed."""
        import torch

        found: dict[str, Any] = {
            "rss_bytes": _resident_bytes("VmHWM"),
            "rss_before_bytes": self.rss_before_bytes,
            "threads": torch.get_num_threads(),
            "step_s": [b - a for a, b in itertools.pairwise(self.times)],
        }
        if self.on_gpu:
            free, total = torch.cuda.mem_get_info()
            return found | {
                "peak_bytes": torch.cuda.max_memory_allocated(),
                "reserved_bytes": torch.cuda.max_memory_reserved(),
                "device_bytes": total - free,
            }
        self.profiler.stop()
        return found | _added_up(self.profiler)


# ---------------------------------------------------------------- training


def _train(case: Case, plan: Plan, paths: RunPaths, recording: Recording) -> None:
    import datasets
    from transformers import TrainerCallback

    from hpcft.training.data import batch_order, prepare
    from hpcft.training.modes import finetune
    from hpcft.training.trainer import model

    class Marks(TrainerCallback):  # type: ignore[misc]
        """Bounds the phases of the profile."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            recording.mark("setup")

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            recording.step()

        def on_substep_end(self, *_: Any, **__: Any) -> None:
            recording.step("next micro-batch")

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            recording.step("optimizer")

        def on_train_end(self, *_: Any, **__: Any) -> None:
            recording.end()

    recipe = case.recipe()
    tokenizer = prepare.load_tokenizer(paths)
    rows = _features(case, plan.facts.vocab_size)
    split = prepare.PreparedSplit(datasets.Dataset.from_list(rows), [])
    recording.begin()
    examples = batch_order.plan_batches(recipe, plan, split.lengths)
    arguments = finetune.training_arguments(
        paths, recipe, plan, examples.accumulation, has_validation=False
    )
    rank_env.init_process_group(plan)
    loaded = model.load_model(paths, recipe, plan, tokenizer)
    _own_storage(loaded)
    trainer = finetune.make_trainer(
        recipe, plan, arguments, loaded, tokenizer, split, None, Marks()
    )
    trainer.order, trainer.max_length = examples, recipe.task.max_length
    recording.mark("trainer")
    trainer.train()


def _features(case: Case, vocab_size: int) -> list[dict[str, Any]]:
    """Examples of exactly the sequence length, enough for every step of every rank."""
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


# ---------------------------------------------------------------- asking


def _ask(case: Case, plan: Plan, paths: RunPaths, recording: Recording) -> None:
    from hpcft.tasks.few_shot.task import FewShot
    from hpcft.training.data import prepare
    from hpcft.training.modes.few_shot import PromptRunner
    from hpcft.training.trainer import model

    recipe = case.recipe()
    task = recipe.task
    assert isinstance(task, FewShot)
    tokenizer = prepare.load_tokenizer(paths)
    group = _prompts(case)
    recording.begin()
    with model.inference_model(paths, recipe, plan, tokenizer) as loaded:
        _own_storage(loaded)
        room = plan.per_device_eval_batch_size * task.max_length
        asker = PromptRunner(loaded, tokenizer, task, max_tokens=room, seed=0)
        recording.mark("trainer")
        recording.mark("setup")
        recording.step()
        batches = asker.answers([group], {}, rank=0, ranks=1, together=False)
        for number, (found, _) in enumerate(batches, 1):
            assert len(found) == MAX_ROWS, f"a batch has {len(found)} prompts"
            if number < STEPS:
                recording.step()
        recording.end()


def _prompts(case: Case) -> Any:
    """Prompts that fill the window and show the same shots, as many to a batch as may be."""
    from hpcft.tasks.few_shot.requests import PromptRequest
    from hpcft.training.data.few_shot_prompts import PromptGroup

    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(3, 8000) for _ in range(count)]

    # A tokenizer makes of a word no more tokens than it has bytes, and one for the blank before it.
    choices = [tokens(len(word.encode()) + 1) for word in case.words]
    own = case.batch * case.sequence // MAX_ROWS - sum(len(choice) - 1 for choice in choices)
    shots = tokens(case.sequence - own - max(map(len, choices)))
    requests = [PromptRequest(shots + tokens(own), choices) for _ in range(STEPS * MAX_ROWS)]
    return PromptGroup(shots, list(range(len(requests))), [0] * len(requests), requests)


# ---------------------------------------------------------------- memory


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
