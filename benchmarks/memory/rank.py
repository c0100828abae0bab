"""Runs one rank of a measured case: real training or few-shot scoring, on random tokens.

`measure.py` starts it in a process of its own: `rank.py CASE FOLDER RANK`.
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

from hpcft.config import cluster_profile
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.files import read_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Plan
from hpcft.tasks.few_shot.task import MAX_ROWS
from hpcft.training.distributed import rank_env


def run(case: Case, folder: Path, rank: int) -> dict[str, Any]:
    """Trains or prompts as the case says, and returns this rank's measurement."""
    plan = read_record(folder / "plan.json", Plan)
    info = rank_env.RankInfo(rank, case.ranks, rank, "localhost", "0")
    rank_env._set_environment(info, plan)
    if case.ranks > 1 and plan.accelerator == "cpu":
        _wait_for_gloo_threads()
    recording = Recording(on_gpu=plan.accelerator == "cuda")
    run_case = _prompt if case.task == "prompting" else _train
    run_case(case, plan, RunPaths(folder), recording)
    return recording.result()


class Recording:
    """Records the memory of a rank by phase: on a CPU with a profiler, on a GPU its counters."""

    def __init__(self, *, on_gpu: bool) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.on_gpu = on_gpu
        self.times: list[float] = []
        self.rss_before_bytes = 0
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def begin(self) -> None:
        """Starts recording."""
        self.rss_before_bytes = _resident_bytes("VmRSS")
        if not self.on_gpu:
            self.profiler.start()

    def mark(self, name: str) -> None:
        """Starts a phase of that name."""
        from torch.profiler import record_function

        with record_function(f"{events.MARK}{name}"):
            pass

    def step(self, part: str = "") -> None:
        """Starts a step, or a named part of the current step."""
        if part:
            self.mark(f"step {len(self.times)}, {part}")
            return
        if self.on_gpu and not self.times:
            import torch

            torch.cuda.reset_peak_memory_stats()
        self.times.append(time.perf_counter())
        self.mark(f"step {len(self.times)}")

    def end(self) -> None:
        """Ends the last step."""
        self.times.append(time.perf_counter())
        self.mark("end")

    def result(self) -> dict[str, Any]:
        """Returns the measurement, in bytes and seconds."""
        import torch

        measured: dict[str, Any] = {
            "rss_bytes": _resident_bytes("VmHWM"),
            "rss_before_bytes": self.rss_before_bytes,
            "threads": torch.get_num_threads(),
            "step_s": [b - a for a, b in itertools.pairwise(self.times)],
        }
        if self.on_gpu:
            free, total = torch.cuda.mem_get_info()
            return measured | {
                "peak_bytes": torch.cuda.max_memory_allocated(),
                "reserved_bytes": torch.cuda.max_memory_reserved(),
                "device_bytes": total - free,
            }
        self.profiler.stop()
        return measured | _account(self.profiler)


# ---------------------------------------------------------------- training


def _train(case: Case, plan: Plan, paths: RunPaths, recording: Recording) -> None:
    import datasets
    from transformers import TrainerCallback

    from hpcft.training.data import batch_order, prepare
    from hpcft.training.modes import finetune
    from hpcft.training.trainer import model

    class Marks(TrainerCallback):  # type: ignore[misc]
        """Starts the phases of the profile."""

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
    # The recording takes the place of the reporter, which would write into a run folder.
    context = _context(paths, recipe, plan, reporter=Marks())
    arguments = finetune.training_arguments(context, examples.accumulation, has_validation=False)
    rank_env.init_process_group(plan)
    loaded = model.load_model(context, tokenizer)
    _own_storage(loaded)
    trainer = finetune.make_trainer(context, arguments, loaded, tokenizer, split, None)
    trainer.batch_plan, trainer.max_length = examples, recipe.task.max_length
    recording.mark("trainer")
    trainer.train()


def _context(paths: RunPaths, recipe: FullRecipe, plan: Plan, reporter: Any = None) -> Any:
    """Returns the context of this rank, as a worker has it."""
    from hpcft.recovery.run import Run
    from hpcft.training.context import WorkerContext

    site = cluster_profile.load_profile("local").cluster
    return WorkerContext(Run(paths, recipe, site), plan, reporter)


def _features(case: Case, vocab_size: int) -> list[dict[str, Any]]:
    """Returns examples of exactly the sequence length, enough for every step of every rank."""
    generator = random.Random(0)
    count = STEPS * case.accumulation * case.batch * case.ranks
    rows = []
    for _ in range(count):
        ids = [generator.randrange(3, min(vocab_size, 8000)) for _ in range(case.sequence)]
        labels: Any = [-100] * (case.sequence - case.labelled_tokens) + ids[-case.labelled_tokens :]
        if case.task == "classification":
            labels = generator.randrange(2)
        rows.append({"input_ids": ids, "attention_mask": [1] * case.sequence, "labels": labels})
    return rows


# ---------------------------------------------------------------- few-shot prompting


def _prompt(case: Case, plan: Plan, paths: RunPaths, recording: Recording) -> None:
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
    with model.inference_model(_context(paths, recipe, plan), tokenizer) as loaded:
        _own_storage(loaded)
        room = plan.per_device_eval_batch_size * task.max_length
        asker = PromptRunner(loaded, tokenizer, task, max_tokens=room, seed=0)
        recording.mark("trainer")
        recording.mark("setup")
        recording.step()
        batches = asker.answer_batches([group], {}, rank=0, ranks=1, in_step=False)
        for number, (answered, _) in enumerate(batches, 1):
            assert len(answered) == MAX_ROWS, f"a batch has {len(answered)} prompts"
            if number < STEPS:
                recording.step()
        recording.end()


def _prompts(case: Case) -> Any:
    """Returns prompts that fill the window with the same shots, the most that a batch may hold."""
    from hpcft.tasks.few_shot.requests import PromptRequest
    from hpcft.training.data.few_shot_prompts import PromptGroup

    generator = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [generator.randrange(3, 8000) for _ in range(count)]

    # A tokenizer makes at most one token of a byte, and one of the space before the word.
    choices = [tokens(len(word.encode()) + 1) for word in case.words]
    own = case.batch * case.sequence // MAX_ROWS - sum(len(choice) - 1 for choice in choices)
    shots = tokens(case.sequence - own - max(map(len, choices)))
    requests = [PromptRequest(shots + tokens(own), choices) for _ in range(STEPS * MAX_ROWS)]
    return PromptGroup(shots, list(range(len(requests))), [0] * len(requests), requests)


# ---------------------------------------------------------------- memory


def _wait_for_gloo_threads() -> None:
    """Makes every wait for a collective last until gloo's threads have freed its tensors.

    The profiler sees this thread only: a tensor freed by another thread would seem to stay live.
    """
    from torch.distributed import Work

    wait = Work.wait

    def wait_longer(work: Any, *options: Any) -> Any:
        result = wait(work, *options)
        time.sleep(0.002)
        return result

    Work.wait = wait_longer  # type: ignore[assignment, method-assign]


def _own_storage(model: Any) -> None:
    """Copies weights that are still in the mapped file into memory of their own, as on a GPU."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not hasattr(tensor, "ds_id") and getattr(tensor, "quant_state", None) is None:
            tensor.data = tensor.data.clone()


def _account(profiler: Any) -> dict[str, Any]:
    blocks, operations = events.read(profiler)
    account = events.account(blocks, operations, "step")
    by_name = {name: (peak, end) for name, peak, end in account.phases}
    steps = [
        max(peak for name, peak, _ in account.phases if name.split(",")[0] == f"step {number}")
        for number in range(1, STEPS + 1)
    ]
    return {
        "peak_bytes": account.peak_bytes,
        "step_peaks_bytes": steps,
        "before_bytes": by_name["setup"][1],
        "setup_peak_bytes": max(by_name["trainer"][0], by_name["setup"][0]),
        "loading_peak_bytes": by_name["loading"][0],
        "phases": account.phases,
        "unseen_frees": account.unseen_frees,
        "groups": events.groups(account.live),
        "around": events.around(operations, account.peak_at_ns, 3),
        "operations": events.around(operations, account.peak_at_ns, 30),
    }


def _resident_bytes(field: str) -> int:
    """Returns the resident set now (`VmRSS`) or at its peak (`VmHWM`), in bytes.

    `getrusage` does not work here: its peak includes that of the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


if __name__ == "__main__":
    name, folder, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    result = run(cases.find_case(name), folder, rank)
    (folder / f"{rank}.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # Gloo's threads may wait for peers that have already exited.
