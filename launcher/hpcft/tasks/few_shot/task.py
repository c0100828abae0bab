"""Prompting: a causal model answers as it is, shown none or some examples (zero- to few-shot)."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from hpcft.core.errors import DataError, Problem
from hpcft.core.records.base import ColumnName, NonNegative, OneLine, PositiveInt
from hpcft.metrics import Scores, classification_names, compute_metric
from hpcft.tasks.base import (
    Example,
    Head,
    Mode,
    TaskBase,
    label_index,
    rows_error,
    text_of,
    unique,
)
from hpcft.tasks.data.templates import Template, fill_template, template_fields

if TYPE_CHECKING:
    from hpcft.tasks.few_shot.requests import PromptRequest

MAX_ROWS = 64  # prompts of a batch at most, which bounds its logits
NO_ANSWER = -1  # the answer that is none of the choices


@dataclass(frozen=True)
class Prompt:
    """What the model is asked for one example."""

    shots: int
    """Shots that it shows: fewer than the task's where they would exceed the window."""
    request: PromptRequest
    """Its tokens."""


class FewShot(TaskBase):
    """Give each example one of a fixed set of labels by asking a model that is not trained for it.

    The text is `preamble`, then each shot (the prompt of a training example and its answer), then
    the prompt of the example, with `separator` between them. The shots are drawn by `train.seed`
    from the train split, of each label as many as of the others, and are the same for all.
    """

    causal: ClassVar[bool] = True
    keeps_locations: ClassVar[bool] = True

    name: Literal["prompting"]
    """`prompting`."""
    prompt: Template
    """Question with `{column}` where a column's text goes, up to where the answer begins; `{{` is a
    brace. Blanks at its end are taken as the answer's."""
    label: ColumnName = "label"
    """Column of the true label: one of `labels`, or its index."""
    labels: Annotated[list[OneLine], Field(min_length=2, max_length=1000), AfterValidator(unique)]
    """The labels; of two, the second is the positive class."""
    choices: Annotated[list[OneLine], Field(default_factory=list), AfterValidator(unique)]
    """The words that answer, one for each label; without it the labels themselves."""
    shots: Annotated[int, Field(ge=0, le=1000)] = 0
    """Examples shown before the question, k; 0 is zero-shot."""
    preamble: str = ""
    """Text in front of it all."""
    separator: str = "\n\n"
    """Text between the shots, and before the question."""
    answer: Literal["likelihood", "generation"] = "likelihood"
    """`likelihood`: the choice whose tokens are the likeliest after the prompt. `generation`: the
    choice that the generated text begins with; where it begins with none, there is no answer, which
    counts as wrong."""
    length_normalised: bool = False
    """Divide a choice's log-likelihood by its tokens before comparing."""
    max_new_tokens: PositiveInt = 8
    """Tokens that are generated at most."""
    temperature: NonNegative = 0.0
    """Of generation; 0 is greedy, else one sample is drawn by `train.seed`."""
    max_length: Annotated[int, Field(ge=8, le=1_000_000)] = 2048
    """Window in tokens, answer included. Of a longer prompt whole shots are left out, the last
    first; the question is never cut."""

    def mode(self, *, trains: bool) -> Mode:
        """Returns `few_shot`, whatever the method."""
        return "few_shot"

    def rows_per_batch(self, windows: int) -> int:
        """Returns the prompts of a batch, taking a shot to be as long as the question."""
        return min(windows * (1 + self.shots), MAX_ROWS)

    @property
    def generated_tokens(self) -> int:
        """Tokens that are generated for an example; 0 where likelihoods are compared."""
        return self.max_new_tokens if self.answer == "generation" else 0

    @property
    def as_few_shot(self) -> FewShot:
        """This task."""
        return self

    @property
    def words(self) -> list[str]:
        """The answers, one for each label."""
        return self.choices or self.labels

    @property
    def needed_splits(self) -> tuple[str, ...]:
        """Without shots there is nothing to take from the train split."""
        return ("train",) if self.shots else ()

    def problems(self) -> list[tuple[str, str, str]]:
        """What is wrong between its fields: field, what, fix."""
        found = []
        if not template_fields(self.prompt):
            what = "names no {column}, so that every example asks the same"
            found.append(("prompt", what, "put the column's name in braces"))
        if self.choices and len(self.choices) != len(self.labels):
            what = f"expected one for each of {len(self.labels)} labels, got {len(self.choices)}"
            found.append(("choices", what, "in the order of the labels"))
        if self.answer == "generation":
            if len({word.strip().casefold() for word in self.words}) < len(self.words):
                what = "differ in blanks or case only, which answers do not tell apart"
                found.append(("choices", what, "use other words"))
            if self.length_normalised:
                what = "is of answer: likelihood, which generation does not use"
                found.append(("length_normalised", what, "leave it out"))
        if self.answer == "likelihood" and self.temperature:
            what = "is of answer: generation; a likelihood is not drawn"
            found.append(("temperature", what, "leave it out or set answer: generation"))
        return found

    def columns(self) -> list[str]:
        """Columns that the prompt names, and that of the label."""
        return list(dict.fromkeys([*template_fields(self.prompt), self.label]))

    def example(self, row: Mapping[str, Any]) -> Example:
        """`prompt`, filled in, and `label` as an index."""
        values = {column: text_of(row, column) for column in template_fields(self.prompt)}
        prompt = fill_template(self.prompt, values)
        return {"prompt": prompt, "label": label_index(row, self.label, self.labels)}

    def texts(self, example: Example) -> list[str]:
        """Prompt and answer together."""
        return [example["prompt"] + self.words[example["label"]]]

    def head(self) -> Head:
        """The language model's own head."""
        return Head("AutoModelForCausalLM")

    # ------------------------------------------------------------ prompts

    def check_splits(self, splits: Mapping[str, list[Example]], scored: str) -> None:
        """Refuses a train split with too few shots of a label."""
        self.chosen_shots(splits, scored, seed=0)

    def chosen_shots(
        self, splits: Mapping[str, list[Example]], scored: str, seed: int
    ) -> list[Example]:
        """The shots, in their order.

        Each label gets as many as the others; which labels get the odd ones is drawn too.

        Args:
            splits: all examples.
            scored: the split that is scored: what it asks is never shown, wherever it comes from.
            seed: what they are drawn by.

        Raises:
            DataError: the train split has too few of a label.
        """
        if not self.shots:
            return []
        asked = {_content(example["prompt"]) for example in splits[scored]}
        pools: list[dict[str, Example]] = [{} for _ in self.labels]
        for example in splits["train"]:
            content = _content(example["prompt"])
            if content not in asked:
                pools[example["label"]].setdefault(content, example)
        draw = random.Random(seed)
        order = draw.sample(range(len(self.labels)), len(self.labels))
        shots = []
        for place, label in enumerate(order):
            wanted = self.shots // len(order) + (place < self.shots % len(order))
            pool = list(pools[label].values())
            if len(pool) < wanted:
                raise DataError(
                    f"task.shots: {self.shots} shots of {len(order)} labels take {wanted} labelled "
                    f"{self.labels[label]}, the train split has {len(pool)} beside what is scored; "
                    "lower task.shots or add examples"
                )
            shots += draw.sample(pool, wanted)
        draw.shuffle(shots)
        return shots

    def prompts(
        self, splits: Mapping[str, list[Example]], scored: str, tokenizer: Any, seed: int
    ) -> list[Prompt]:
        """What the model is asked, for each example of the scored split.

        Args:
            splits: all examples.
            scored: the split that is scored.
            tokenizer: of the model.
            seed: what the shots are drawn by.

        Raises:
            DataError: the train split has too few examples of a label.
            InputError: a question does not fit the window by itself.
        """
        from hpcft.tasks.few_shot.requests import encode

        shown = [
            example["prompt"] + self.words[example["label"]]
            for example in self.chosen_shots(splits, scored, seed)
        ]
        found: list[Prompt] = []
        problems: list[Problem] = []
        for example in splits[scored]:
            for count in range(len(shown), -1, -1):
                text = self.preamble + self.separator.join([*shown[:count], example["prompt"]])
                try:
                    request = encode(tokenizer, text, self.words)
                except ValueError as error:  # the tokenizer makes nothing of a choice
                    raise DataError(f"{example['place']} task.choices: {error}") from None
                excess = self._length(request) - self.max_length
                if excess <= 0:
                    found.append(Prompt(count, request))
                    break
            else:
                problems.append(self._too_long(example, excess))
        if problems:
            raise rows_error(problems)
        return found

    def _length(self, request: PromptRequest) -> int:
        """Tokens of a prompt with the longest answer."""
        generates = self.answer == "generation"
        longest = self.max_new_tokens if generates else max(map(len, request.choices))
        return len(request.tokens) + longest

    def _too_long(self, example: Example, excess: int) -> Problem:
        what = (
            f"the question alone takes {self.max_length + excess} tokens with its answer, "
            f"the window is {self.max_length}"
        )
        fix = "raise task.max_length as far as the model allows, or leave the row out"
        return Problem(example["place"], ", ".join(template_fields(self.prompt)), what, fix)

    def notes(self, prompts: Sequence[Prompt], seed: int) -> list[str]:
        """How the number was made, and which prompts show fewer shots."""
        found = [self._way(seed)]
        fewer = [prompt.shots for prompt in prompts if prompt.shots < self.shots]
        if fewer:
            each = ", ".join(f"{fewer.count(n)} with {n}" for n in sorted({*fewer}, reverse=True))
            found.append(
                f"{len(fewer)} of {len(prompts)} prompts exceed max_length {self.max_length} with "
                f"{self.shots} shots and show fewer: {each}"
            )
        return found

    def _way(self, seed: int) -> str:
        shots = f"{self.shots}-shot, " + (f"shots drawn by seed {seed}, " if self.shots else "")
        if self.answer == "generation":
            drawn = f"sampled at temperature {self.temperature:g} by seed {seed}"
            how = drawn if self.temperature else "generated greedily"
            return f"{shots}answers {how}, at most {self.max_new_tokens} tokens"
        norm = "divided by its tokens" if self.length_normalised else "not normalised by length"
        return f"{shots}the likeliest choice counts, its log-likelihood {norm}"

    # ------------------------------------------------------------ answers

    def likeliest(self, scores: Sequence[float], tokens: Sequence[int]) -> int:
        """The choice with the highest log-likelihood; of equals the first.

        Args:
            scores: log-likelihood of each choice, summed over its tokens.
            tokens: number of tokens of each.
        """
        each = tokens if self.length_normalised else [1] * len(scores)
        judged = [score / count for score, count in zip(scores, each, strict=True)]
        return max(range(len(judged)), key=judged.__getitem__)

    def answered(self, text: str) -> int:
        """The choice that a text begins with, upper and lower case alike; `NO_ANSWER` for none.

        A choice is a whole word: `no` does not begin `nothing`.
        """
        begun = text.strip().casefold()
        longest_first = sorted(range(len(self.words)), key=lambda i: -len(self.words[i]))
        for index in longest_first:
            word = self.words[index].strip().casefold()
            if begun.startswith(word) and not re.match(r"\w", begun[len(word) :]):
                return index
        return NO_ANSWER

    def metric_names(self) -> list[str]:
        """Those of `metrics/classification`; of generated answers also the share that is none."""
        generated = ["no_answer"] if self.answer == "generation" else []
        return [*classification_names(self.labels), *generated]

    def metrics(self, reduced: Any, labels: Any, examples: Sequence[Example]) -> Scores:
        """Accuracy, precision, recall and F1 as in `metrics/classification`.

        Args:
            reduced: index of each example's answer; `NO_ANSWER` is wrong for every label.
            labels: index of the true one.
            examples: not needed.
        """
        result = compute_metric(
            "classification", predictions=reduced, references=labels, labels=self.labels
        )
        if self.answer == "generation":
            result["no_answer"] = reduced.count(NO_ANSWER) / len(reduced)
        return result


def _content(text: str) -> str:
    """What makes two questions the same: their words, whatever the blanks and the case."""
    return " ".join(text.split()).casefold()
