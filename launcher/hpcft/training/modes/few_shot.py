"""A run that trains nothing: a model is asked for each example, and what it answers is scored.

Prompts that show the same shots share the keys and values of them (`hpcft.tasks.few_shot`). They run in
batches that are the same for any number of ranks, and so do their last digits: a run that starts
again goes on with the batches that are not answered yet.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from hpcft.core.errors import DataError
from hpcft.metrics import Scores
from hpcft.tasks.few_shot.batching import make_batches, split_batches
from hpcft.tasks.few_shot.generation import generate
from hpcft.tasks.few_shot.requests import PromptRequest, row_tokens
from hpcft.tasks.few_shot.scorer import Scorer
from hpcft.tasks.few_shot.task import MAX_ROWS, FewShot
from hpcft.training.context import WorkerContext
from hpcft.training.data.few_shot_prompts import PromptGroup, read_prompts
from hpcft.training.data.prepare import load_tokenizer, prepare_all_ranks
from hpcft.training.distributed import stop_signal
from hpcft.training.distributed.collectives import gather_objects
from hpcft.training.distributed.rank_env import init_process_group
from hpcft.training.modes.answer_log import Answer, AnswerFile, read_answers
from hpcft.training.modes.result import ModeResult
from hpcft.training.telemetry.progress import ProgressReporter
from hpcft.training.trainer.model import check_parameter_count, inference_model

BATCHES_AHEAD = 2
"""Before a time limit there has to be room for so many batches."""


def prompt(context: WorkerContext) -> ModeResult:
    """Prompts the model for every example that is not answered yet, and scores the answers."""
    recipe, plan, reporter = context.recipe, context.plan, context.reporter
    task, paths, rank = recipe.task.as_few_shot, context.paths, context.rank
    summary = prepare_all_ranks(context)
    groups = read_prompts(paths)
    reporter.set(phase="model")
    init_process_group(plan)
    tokenizer = load_tokenizer(paths)
    # Rank 0 decides what is known: the folder of another rank may lag behind.
    (known, *_) = gather_objects(read_answers(paths.answers) if rank.is_first else None)
    new: dict[int, Answer] = {}
    with (
        inference_model(paths, recipe, plan, tokenizer) as model,
        AnswerFile(paths.answers, rank.rank) as file,
    ):
        parameters = check_parameter_count(model, plan.facts)
        runner = PromptRunner(
            model,
            tokenizer,
            task,
            max_tokens=plan.per_device_eval_batch_size * task.max_length,
            seed=recipe.train.seed,
        )
        meter = _ProgressMeter(reporter, groups, known)
        for found, tokens in runner.answers(
            groups, known, rank.rank, rank.world_size, together=plan.layout.zero_stage == 3
        ):
            file.add(found)
            new |= found
            meter.tell(len(found), tokens)
            if stop_signal.stop_request.has_to_end(BATCHES_AHEAD * meter.batch_s):
                raise stop_signal.StoppedAfterSave  # all answers so far are in the file
    for others in gather_objects(new):
        known |= others
    metrics = score_answers(task, groups, known)
    reporter.log(recipe.evaluation.split, metrics)
    reporter.set(phase="saving")
    return ModeResult(summary, parameters, metrics)


class PromptRunner:
    """Asks a model what the prompts of a run say."""

    def __init__(
        self, model: Any, tokenizer: Any, task: FewShot, *, max_tokens: int, seed: int
    ) -> None:
        """What is asked how.

        Args:
            model: a causal model of transformers.
            tokenizer: its tokenizer.
            task: how it is asked.
            max_tokens: most tokens of a batch beside the shared ones, padding included.
            seed: of sampled answers.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.task = task
        self.max_tokens = max_tokens
        self.seed = seed
        ends = model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        self.stop = ends if isinstance(ends, list) else [ends]

    def answers(
        self,
        groups: Sequence[PromptGroup],
        known: dict[int, Answer],
        rank: int,
        ranks: int,
        *,
        together: bool,
    ) -> Iterator[tuple[dict[int, Answer], int]]:
        """The answers of this rank's batches, each with the tokens that were run for it.

        Args:
            groups: all prompts.
            known: what was answered before; the same on all ranks.
            rank: this one.
            ranks: all of them.
            together: whether all ranks run as many batches, because each run takes all of them.
        """
        for group in groups:
            if known.keys() >= {*group.examples}:
                continue
            scorer = Scorer(self.model, group.prefix)
            shared = scorer.shared_tokens
            every = make_batches(group.requests, shared, self._budget(scorer, together))
            cut = [part[i : i + MAX_ROWS] for part in every for i in range(0, len(part), MAX_ROWS)]
            todo = [b for b in cut if not known.keys() >= {group.examples[i] for i in b}]
            own = todo[rank::ranks]
            for number, batch in enumerate(split_batches(todo, ranks)[rank] if together else own):
                requests = [group.requests[i] for i in batch]
                examples = [group.examples[i] for i in batch]
                found = self._ask(scorer, requests, examples, together=together)
                if number < len(own):  # else it is run because the others need it
                    tokens = sum(row_tokens(request, shared) for request in requests)
                    yield dict(zip(examples, found, strict=True)), tokens

    def _budget(self, scorer: Scorer, together: bool) -> int:
        """Tokens of a batch; 1 makes batches of one request.

        Raises:
            DataError: ranks that run together could not: the number of runs depends on the batch.
        """
        sharing = scorer.prefix.sharing
        if together and sharing == "none":
            kind = self.model.config.model_type
            what = "a model whose positions depend on the length of the text cannot be sharded"
            raise DataError(f"model: {kind}: {what}; set resources.zero_stage: 0")
        alone = together and sharing != "cascade" and self.task.answer == "generation"
        return 1 if alone else self.max_tokens

    def _ask(
        self, scorer: Scorer, requests: list[PromptRequest], examples: list[int], *, together: bool
    ) -> Sequence[Answer]:
        if self.task.answer == "likelihood":
            return scorer.score(requests)
        written = generate(
            self.model,
            scorer.prefix,
            requests,
            max_new_tokens=self.task.max_new_tokens,
            temperature=self.task.temperature,
            seeds=[zlib.crc32(f"{self.seed} {example}".encode()) for example in examples],
            stop=self.stop,
            agree=_all_agree if together else bool,
        )
        return [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written]


def _all_agree(done: bool) -> bool:
    """Whether all ranks are done with their batches."""
    return all(gather_objects(done))


def score_answers(task: FewShot, groups: Sequence[PromptGroup], known: dict[int, Answer]) -> Scores:
    """The task's metrics of all answers."""
    predictions, labels = [], []
    for group in groups:
        for example, label, request in zip(
            group.examples, group.labels, group.requests, strict=True
        ):
            answer = known[example]
            predictions.append(
                task.answered(answer)
                if isinstance(answer, str)
                else task.likeliest(answer, [len(choice) for choice in request.choices])
            )
            labels.append(label)
    return task.metrics(predictions, labels, [])


class _ProgressMeter:
    """Tells the reporter how many examples are answered, how fast, and when all will be."""

    def __init__(
        self, reporter: ProgressReporter, groups: Sequence[PromptGroup], known: dict[int, Answer]
    ) -> None:
        self.reporter = reporter
        self.total = sum(len(group.examples) for group in groups)
        self.before = len(known)
        self.own = self.tokens = 0
        self.batch_s = 0.0
        self.begun = self.told_at = time.time()
        reporter.set(phase="evaluation", step=self.before, total_steps=self.total)

    def tell(self, examples: int, tokens: int) -> None:
        """So many more of this rank are answered; the others are taken to be as fast."""
        self.batch_s = time.time() - self.told_at
        self.told_at = time.time()
        self.own += examples
        self.tokens += tokens
        ranks = self.reporter.rank.world_size
        done = min(self.before + self.own * ranks, self.total)
        elapsed_s = time.time() - self.begun
        self.reporter.set(
            phase="evaluation",
            step=done,
            total_steps=self.total,
            tokens_per_s=self.tokens * ranks / elapsed_s,
            eta_s=elapsed_s / (self.own * ranks) * (self.total - done),
        )
