"""Few-shot mode: prompts the model for each example, and scores the answers. Nothing is trained.

Prompts with the same shots share the keys and values of those tokens (`hpcft.tasks.few_shot`).
Batches, and so the last digits of the answers, are the same for any number of ranks. A restarted
run continues with the batches that are not answered yet.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from hpcft.core.errors import DataError
from hpcft.metrics.base import Scores
from hpcft.tasks.few_shot.batching import make_batches, split_batches
from hpcft.tasks.few_shot.generation import generate
from hpcft.tasks.few_shot.requests import PromptRequest, count_row_tokens
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
"""Number of batches that must fit before the time limit; otherwise the rank stops."""


def prompt(context: WorkerContext) -> ModeResult:
    """Prompts the model for every example that is not answered yet, and scores the answers."""
    recipe, plan, reporter = context.recipe, context.plan, context.reporter
    task, paths, rank = recipe.few_shot_task, context.paths, context.rank
    summary = prepare_all_ranks(context)
    groups = read_prompts(paths)
    reporter.set(phase="model")
    init_process_group(plan)
    tokenizer = load_tokenizer(paths)
    # Only rank 0 reads the answers, because the shared folder of another rank may lag behind.
    (known, *_) = gather_objects(read_answers(paths.answers) if rank.is_first else None)
    new: dict[int, Answer] = {}
    with (
        inference_model(context, tokenizer) as model,
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
        for answers, tokens in runner.answer_batches(
            groups, known, rank.rank, rank.world_size, in_step=plan.layout.zero_stage == 3
        ):
            file.add(answers)
            new |= answers
            meter.add(len(answers), tokens)
            if stop_signal.stop_request.has_to_end(BATCHES_AHEAD * meter.batch_s):
                raise stop_signal.StoppedAfterSave  # The file holds all answers so far.
    for answers in gather_objects(new):
        known |= answers
    metrics = score_answers(task, groups, known)
    reporter.log(recipe.evaluation.split, metrics)
    reporter.set(phase="saving")
    return ModeResult(summary, parameters, metrics)


class PromptRunner:
    """Runs the prompts of a run through a model."""

    def __init__(
        self, model: Any, tokenizer: Any, task: FewShot, *, max_tokens: int, seed: int
    ) -> None:
        """Prepares to run prompts.

        Args:
            model: a causal model of transformers.
            tokenizer: the model's tokenizer.
            task: task with the options of the answers.
            max_tokens: largest number of tokens of a batch, with padding, without shared tokens.
            seed: seed of sampled answers.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.task = task
        self.max_tokens = max_tokens
        self.seed = seed
        eos = model.generation_config.eos_token_id
        eos = tokenizer.eos_token_id if eos is None else eos
        self.stop = eos if isinstance(eos, list) else [eos]

    def answer_batches(
        self,
        groups: Sequence[PromptGroup],
        known: dict[int, Answer],
        rank: int,
        ranks: int,
        *,
        in_step: bool,
    ) -> Iterator[tuple[dict[int, Answer], int]]:
        """Yields the answers of each of this rank's batches, and the number of its tokens.

        Args:
            groups: all prompts.
            known: answers of earlier starts; the same on all ranks.
            rank: global rank.
            ranks: number of ranks.
            in_step: whether all ranks have to run the same number of forward passes at the same
                time, because the model is sharded (ZeRO-3).
        """
        for group in groups:
            if known.keys() >= {*group.examples}:
                continue
            scorer = Scorer(self.model, group.prefix)
            shared = scorer.shared_tokens
            batches = make_batches(group.requests, shared, self._max_tokens(scorer, in_step))
            batches = [b[i : i + MAX_ROWS] for b in batches for i in range(0, len(b), MAX_ROWS)]
            todo = [b for b in batches if not known.keys() >= {group.examples[i] for i in b}]
            own = todo[rank::ranks]
            for number, batch in enumerate(split_batches(todo, ranks)[rank] if in_step else own):
                requests = [group.requests[i] for i in batch]
                examples = [group.examples[i] for i in batch]
                answers = self._answer(scorer, requests, examples, in_step=in_step)
                if number < len(own):  # Further batches only keep this rank in step.
                    tokens = sum(count_row_tokens(request, shared) for request in requests)
                    yield dict(zip(examples, answers, strict=True)), tokens

    def _max_tokens(self, scorer: Scorer, in_step: bool) -> int:
        """Returns the largest number of tokens of a batch; 1 makes batches of one request.

        Raises:
            DataError: the ranks cannot run in step, because the number of forward passes depends
                on the batch.
        """
        sharing = scorer.prefix.sharing
        if in_step and sharing == "none":
            model_type = self.model.config.model_type
            raise DataError(
                f"model: {model_type}: a model whose positions depend on the length of the text "
                "cannot be sharded for few-shot prompts; set resources.zero_stage: 0"
            )
        one_by_one = in_step and sharing != "cascade" and self.task.answer == "generation"
        return 1 if one_by_one else self.max_tokens

    def _answer(
        self, scorer: Scorer, requests: list[PromptRequest], examples: list[int], *, in_step: bool
    ) -> Sequence[Answer]:
        if self.task.answer == "likelihood":
            return scorer.score(requests)
        generated = generate(
            self.model,
            scorer.prefix,
            requests,
            max_new_tokens=self.task.max_new_tokens,
            temperature=self.task.temperature,
            seeds=[zlib.crc32(f"{self.seed} {example}".encode()) for example in examples],
            stop=self.stop,
            agree=_is_set_on_all_ranks if in_step else bool,
        )
        return [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in generated]


def _is_set_on_all_ranks(flag: bool) -> bool:
    return all(gather_objects(flag))


def score_answers(task: FewShot, groups: Sequence[PromptGroup], known: dict[int, Answer]) -> Scores:
    """Computes the task's metrics from all answers."""
    predictions, labels = [], []
    for group in groups:
        for example, label, request in zip(
            group.examples, group.labels, group.requests, strict=True
        ):
            answer = known[example]
            predictions.append(
                task.parse_answer(answer)
                if isinstance(answer, str)
                else task.most_likely_choice(answer, [len(choice) for choice in request.choices])
            )
            labels.append(label)
    return task.compute_metrics(predictions, labels, [])


class _ProgressMeter:
    """Reports how many examples are answered, the speed, and the time left."""

    def __init__(
        self, reporter: ProgressReporter, groups: Sequence[PromptGroup], known: dict[int, Answer]
    ) -> None:
        self.reporter = reporter
        self.total = sum(len(group.examples) for group in groups)
        self.before = len(known)
        self.own = self.tokens = 0
        self.batch_s = 0.0
        self.started_at = self.reported_at = time.time()
        reporter.set(phase="evaluation", step=self.before, total_steps=self.total)

    def add(self, examples: int, tokens: int) -> None:
        """Reports another batch of this rank; the other ranks are assumed to be as fast.

        Args:
            examples: number of examples that were answered.
            tokens: number of tokens that were run for them.
        """
        self.batch_s = time.time() - self.reported_at
        self.reported_at = time.time()
        self.own += examples
        self.tokens += tokens
        ranks = self.reporter.rank.world_size
        done = min(self.before + self.own * ranks, self.total)
        elapsed_s = time.time() - self.started_at
        self.reporter.set(
            phase="evaluation",
            step=done,
            total_steps=self.total,
            tokens_per_s=self.tokens * ranks / elapsed_s,
            eta_s=elapsed_s / (self.own * ranks) * (self.total - done),
        )
