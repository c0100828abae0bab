"""Prompts a causal model that is not trained, with no or some examples shown (few-shot)."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from hpcft.core.errors import DataError, Problem
from hpcft.core.records.base import ColumnName, NonNegative, OneLine, PositiveInt
from hpcft.metrics import compute_metric
from hpcft.metrics.base import Scores
from hpcft.metrics.classification import classification_names
from hpcft.tasks.base import (
    Example,
    Head,
    Mode,
    TaskBase,
    choices_error,
    rows_error,
    unique,
)
from hpcft.tasks.data.templates import (
    UNLESS_NONE,
    LineTemplate,
    Template,
    choose_prompt,
    fill_choices,
    fill_template,
    template_fields,
)
from hpcft.tasks.labels import label_index

if TYPE_CHECKING:
    from hpcft.tasks.few_shot.requests import PromptRequest

MAX_ROWS = 64  # largest number of prompts in a batch, which bounds its logits
COLUMN_LETTERS = 64  # of a column in a choice, to plan by; batches are made by real tokens
NO_ANSWER = -1  # index of an answer that is none of the choices


@dataclass(frozen=True)
class Prompt:
    """Holds the prompt of one example."""

    shots: int
    """Number of shots in it: fewer than the task's if they would exceed the window."""
    request: PromptRequest
    """Tokens of the prompt and its choices."""


class FewShot(TaskBase):
    """Gives each example one of a fixed set of labels by prompting the model as it is.

    The text is `preamble`, then each shot (the prompt of a training example and its answer), then
    the prompt of the example, with `separator` between them. The shots are drawn by `train.seed`
    from the train split, equally many of each label, and are the same for all examples.
    """

    causal: ClassVar[bool] = True
    keeps_locations: ClassVar[bool] = True

    name: Literal["prompting"]
    """`prompting`."""
    prompt: Template
    """Question with `{column}` where a column's text goes, or `{column?}` where that text may be
    empty, up to where the answer begins; `{{` is a brace. Blanks at its end count as the
    answer's."""
    prompt_when_empty: Annotated[Template | None, UNLESS_NONE] = None
    """Question of rows in which a column that only `prompt` names is empty."""
    label: ColumnName = "label"
    """Column of the true label: one of `labels`, or its index."""
    labels: Annotated[list[OneLine], Field(min_length=2, max_length=1000), AfterValidator(unique)]
    """Labels; of two, the second is the positive class."""
    choices: Annotated[list[LineTemplate], Field(default_factory=list), AfterValidator(unique)]
    """Text of the answer for each label; by default the labels themselves. With `{column}` it
    differs from row to row."""
    shots: Annotated[int, Field(ge=0, le=1000)] = 0
    """Number of examples shown before the question; 0 is zero-shot."""
    preamble: str = ""
    """Text in front of everything else."""
    separator: str = "\n\n"
    """Text between the shots, and before the question."""
    answer: Literal["likelihood", "generation"] = "likelihood"
    """Way to find the answer. `likelihood`: the choice whose tokens are likeliest after the
    prompt. `generation`: the choice that the generated text begins with; a text that begins with
    none is no answer, which counts as wrong."""
    length_normalised: bool = False
    """Whether to divide a choice's log-likelihood by its number of tokens before comparing."""
    max_new_tokens: PositiveInt = 8
    """Largest number of generated tokens."""
    temperature: NonNegative = 0.0
    """Temperature of generation: 0 is greedy; otherwise one sample is drawn by `train.seed`."""
    max_length: Annotated[int, Field(ge=8, le=1_000_000)] = 2048
    """Window in tokens, answer included. Of a longer prompt whole shots are left out, the last
    first; the question is never cut."""

    def mode(self, *, trains: bool) -> Mode:
        """Returns `few_shot`, whatever the method."""
        return "few_shot"

    def rows_per_batch(self, windows: int) -> int:
        """Returns the number of prompts in a batch, taking a shot to be as long as the question."""
        return min(windows * (1 + self.shots), MAX_ROWS)

    @property
    def generated_tokens(self) -> int:
        """Largest number of tokens generated for an example; 0 if likelihoods are compared."""
        return self.max_new_tokens if self.answer == "generation" else 0

    @property
    def answer_texts(self) -> list[str]:
        """Text of the answer for each label; a column in it stands for a text of usual length."""
        columns = {column for choice in self.choices for column in template_fields(choice)}
        usual = dict.fromkeys(columns, "x" * COLUMN_LETTERS)
        return [fill_template(choice, usual) for choice in self.choices] or self.labels

    @property
    def compares_choices(self) -> bool:
        """Whether the likeliest choice is the answer."""
        return self.answer == "likelihood"

    def choices_of(self, example: Example) -> list[str]:
        """Returns the text of the answer for each label, in an example."""
        choices: list[str] = example.get("choices", self.labels)
        return choices

    @property
    def needed_splits(self) -> tuple[str, ...]:
        """The train split, if shots are shown."""
        return ("train",) if self.shots else ()

    def problems(self) -> list[tuple[str, str, str]]:
        """Returns fields that contradict each other, as (field, what is wrong, fix)."""
        found = []
        if not template_fields(self.prompt):
            what = "names no {column}, so that all examples have the same prompt"
            found.append(("prompt", what, "put a column's name in braces"))
        if self.choices and len(self.choices) != len(self.labels):
            what = f"expected one for each of {len(self.labels)} labels, got {len(self.choices)}"
            found.append(("choices", what, "list them in the order of the labels"))
        if self.answer == "generation":
            if any(map(template_fields, self.choices)):
                what = "name columns, but a generated answer is compared with the same few words"
                found.append(("choices", what, "set answer: likelihood"))
            if len(set(map(_normalise, self.answer_texts))) < len(self.answer_texts):
                what = "two differ only in blanks or case, which are ignored in generated answers"
                found.append(("choices", what, "use other words"))
            if self.length_normalised:
                what = "applies to answer: likelihood only"
                found.append(("length_normalised", what, "remove it"))
        if self.answer == "likelihood" and self.temperature:
            what = "applies to answer: generation only"
            found.append(("temperature", what, "remove it, or set answer: generation"))
        return found

    def columns(self) -> list[str]:
        """Returns the columns that prompt and choices name, and that of the label."""
        templates = [self.prompt, self.prompt_when_empty or "", *self.choices]
        named = [column for template in templates for column in template_fields(template)]
        return list(dict.fromkeys([*named, self.label]))

    def parse_row(self, row: Mapping[str, Any]) -> Example:
        """Returns `prompt`, filled in, and `label` as an index; and `choices`, if there are."""
        prompt = choose_prompt(self.prompt, self.prompt_when_empty, row)
        example = {
            "prompt": fill_template(prompt, row),
            "label": label_index(row, self.label, self.labels),
        }
        choices = fill_choices(self.choices, row, "choices")
        return {**example, "choices": choices} if choices else example

    def tokenizer_texts(self, example: Example) -> list[str]:
        """Returns prompt and answer as one text."""
        return [self._shot(example)]

    def head(self) -> Head:
        """Returns the language model's own head."""
        return Head("AutoModelForCausalLM")

    # ------------------------------------------------------------ prompts

    def check_splits(self, splits: Mapping[str, list[Example]], scored: str) -> None:
        """Checks that the train split has enough examples of each label for the shots."""
        self.draw_shots(splits, scored, seed=0)

    def draw_shots(
        self, splits: Mapping[str, list[Example]], scored: str, seed: int
    ) -> list[Example]:
        """Draws the shots, equally many of each label, in the order in which they are shown.

        If the labels do not divide the shots, the labels that get one more are drawn too.

        Args:
            splits: all examples, by split.
            scored: name of the split that is scored; its questions are never shown as shots, even
                if the train split has them too.
            seed: seed of the draw.

        Raises:
            DataError: the train split has too few examples of a label.
        """
        if not self.shots:
            return []
        scored_questions = {_normalise(example["prompt"]) for example in splits[scored]}
        pools: list[dict[str, Example]] = [{} for _ in self.labels]
        for example in splits["train"]:
            question = _normalise(example["prompt"])
            if question not in scored_questions:
                pools[example["label"]].setdefault(question, example)
        draw = random.Random(seed)
        order = draw.sample(range(len(self.labels)), len(self.labels))
        shots = []
        for place, label in enumerate(order):
            count = self.shots // len(order) + (place < self.shots % len(order))
            pool = list(pools[label].values())
            if len(pool) < count:
                raise DataError(
                    f"task.shots: {self.shots} shots of {len(order)} labels need {count} examples "
                    f"labelled {self.labels[label]}; without those that are scored, the train "
                    f"split has {len(pool)}; lower task.shots or add examples"
                )
            shots += draw.sample(pool, count)
        draw.shuffle(shots)
        return shots

    def build_prompts(
        self, splits: Mapping[str, list[Example]], scored: str, tokenizer: Any, seed: int
    ) -> list[Prompt]:
        """Builds the prompt of each example of the scored split.

        Args:
            splits: all examples, by split.
            scored: name of the split that is scored.
            tokenizer: the model's tokenizer.
            seed: seed by which the shots are drawn.

        Raises:
            DataError: the train split has too few examples of a label.
            InputError: a question alone exceeds the window.
        """
        # `requests` is imported late, because the package's other modules import torch.
        from hpcft.tasks.few_shot.requests import encode_prompt

        shots = [self._shot(example) for example in self.draw_shots(splits, scored, seed)]
        prompts: list[Prompt] = []
        problems: list[Problem] = []
        for example in splits[scored]:
            choices = self.choices_of(example) if self.compares_choices else []
            for count in range(len(shots), -1, -1):
                text = self.preamble + self.separator.join([*shots[:count], example["prompt"]])
                try:
                    request = encode_prompt(tokenizer, text, choices)
                except ValueError as error:
                    raise choices_error(example, error, "task.choices") from None
                excess = self._length(request) - self.max_length
                if excess <= 0:
                    prompts.append(Prompt(count, request))
                    break
            else:
                problems.append(self._too_long(example, excess))
        if problems:
            raise rows_error(problems)
        return prompts

    def check_tokens(self, examples: Sequence[Example], tokenizer: Any) -> None:
        """Checks that the choices of these examples differ in their tokens.

        Raises:
            DataError: two have the same tokens.
        """
        from hpcft.tasks.few_shot.requests import encode_prompt  # as in `build_prompts`

        for example in examples:
            try:
                encode_prompt(
                    tokenizer, self.preamble + example["prompt"], self.choices_of(example)
                )
            except ValueError as error:
                raise choices_error(example, error, "task.choices") from None

    def _shot(self, example: Example) -> str:
        """Returns the text that shows an example: its prompt and the true answer."""
        return str(example["prompt"] + self.choices_of(example)[example["label"]])

    def _length(self, request: PromptRequest) -> int:
        """Returns the tokens of a prompt with its longest answer."""
        generates = self.answer == "generation"
        longest = self.max_new_tokens if generates else max(map(len, request.choices))
        return len(request.tokens) + longest

    def _too_long(self, example: Example, excess: int) -> Problem:
        what = (
            f"the question alone takes {self.max_length + excess} tokens with its answer, "
            f"the window is {self.max_length}"
        )
        fix = "raise task.max_length as far as the model allows, or remove the row"
        return Problem(example["place"], ", ".join(template_fields(self.prompt)), what, fix)

    def describe_prompts(self, prompts: Sequence[Prompt], seed: int) -> list[str]:
        """Returns notes for the result: how answers are found, and which prompts were shortened."""
        notes = [self._describe_answers(seed)]
        shortened = [prompt.shots for prompt in prompts if prompt.shots < self.shots]
        if shortened:
            counts = ", ".join(
                f"{shortened.count(n)} with {n}" for n in sorted({*shortened}, reverse=True)
            )
            notes.append(
                f"{len(shortened)} of {len(prompts)} prompts exceed max_length {self.max_length} "
                f"with {self.shots} shots and show fewer: {counts}"
            )
        return notes

    def _describe_answers(self, seed: int) -> str:
        shots = f"{self.shots}-shot, " + (f"shots drawn by seed {seed}, " if self.shots else "")
        if self.answer == "generation":
            sampled = f"sampled at temperature {self.temperature:g} by seed {seed}"
            how = sampled if self.temperature else "generated greedily"
            return f"{shots}answers {how}, at most {self.max_new_tokens} tokens"
        norm = "divided by its tokens" if self.length_normalised else "not normalised by length"
        return f"{shots}the likeliest choice counts, its log-likelihood {norm}"

    # ------------------------------------------------------------ answers

    def most_likely_choice(self, scores: Sequence[float], tokens: Sequence[int]) -> int:
        """Returns the choice with the highest log-likelihood; the first of equal ones.

        Args:
            scores: log-likelihood of each choice, summed over its tokens.
            tokens: number of tokens of each.
        """
        divisors = tokens if self.length_normalised else [1] * len(scores)
        compared = [score / divisor for score, divisor in zip(scores, divisors, strict=True)]
        return max(range(len(compared)), key=compared.__getitem__)

    def parse_answer(self, text: str) -> int:
        """Returns the choice that a text begins with, in any case; `NO_ANSWER` if it has none.

        A choice is a whole word: `no` does not begin `nothing`.
        """
        start = text.strip().casefold()
        longest_first = sorted(
            range(len(self.answer_texts)), key=lambda i: -len(self.answer_texts[i])
        )
        for index in longest_first:
            word = self.answer_texts[index].strip().casefold()
            if start.startswith(word) and not re.match(r"\w", start[len(word) :]):
                return index
        return NO_ANSWER

    def metric_names(self) -> list[str]:
        """Returns the names of `metrics/classification`, with that of the share without answer."""
        return classification_names(self.labels, allows_no_answer=self.answer == "generation")

    def compute_metrics(self, reduced: Any, labels: Any, examples: Sequence[Example]) -> Scores:
        """Computes accuracy, precision, recall and F1 with `metrics/classification`.

        Args:
            reduced: index of each example's answer; `NO_ANSWER` is wrong for every label.
            labels: index of the true label.
            examples: not used.
        """
        return compute_metric(
            "classification",
            predictions=reduced,
            references=labels,
            labels=self.labels,
            allows_no_answer=self.answer == "generation",
        )


def _normalise(text: str) -> str:
    """Returns a text's words without regard to blanks and case, to compare texts by."""
    return " ".join(text.split()).casefold()
