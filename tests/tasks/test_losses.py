"""Tests of losses and metrics of classification and instruction tuning, computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from hpcft.core.records import DataSpec
from hpcft.tasks.base import IGNORE_INDEX
from hpcft.tasks.classification import Classification
from hpcft.tasks.instruction import Instruction

DATA = DataSpec(files={"train": "x.jsonl"})
CHOICE = Instruction(
    name="instruction", data=DATA, prompt="{q}", completion="{a}", choices=["yes", "no"]
)
CLASSES = Classification(name="classification", data=DATA, labels=["bad", "good"])
THREE = Classification(name="classification", data=DATA, labels=["a", "b", "c"])


def test_loss_split_batch_sums_to_mean_of_whole_batch() -> None:
    """The losses of the parts sum to the mean over all completion tokens of the global batch."""
    torch.manual_seed(0)
    logits = torch.randn(6, 9, 11)
    labels = torch.randint(0, 11, (6, 9))
    labels[:, :3] = IGNORE_INDEX
    labels[2, 5:] = IGNORE_INDEX
    items = (labels[:, 1:] != IGNORE_INDEX).sum()
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1), ignore_index=IGNORE_INDEX
    )
    parts = [CHOICE.loss(logits[i : i + 2], labels[i : i + 2], items, 0.0) for i in (0, 2, 4)]
    assert torch.stack(parts).sum().item() == pytest.approx(expected.item(), rel=1e-6)
    assert CHOICE.loss(logits, labels, None, 0.0).item() == pytest.approx(expected.item(), rel=1e-6)


def test_loss_label_smoothing_is_textbook_formula() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.5, 1.0]])
    labels = torch.tensor([0, 0])
    logs = logits.log_softmax(-1)
    expected = -(0.9 * logs[:, 0] + 0.1 * logs.mean(-1)).mean()
    assert CLASSES.loss(logits, labels, None, 0.1).item() == pytest.approx(expected.item())


def test_reduce_logits_choices_gives_their_likelihoods() -> None:
    """Two examples of two choices, with likelihoods that are known."""
    uniform = torch.zeros(4, 4, 5)  # every token has probability 1/5
    uniform[0, 1, 3] = math.log(4)  # of the first choice's only token: 4/8
    labels = torch.full((4, 4), IGNORE_INDEX)
    labels[0, 2] = 3
    labels[1, 2] = 1
    labels[2, 2] = 1
    labels[3, 2:] = 1  # two tokens: 1/25
    reduced = CHOICE.reduce_logits(uniform, labels)
    assert reduced[:, 0].exp().tolist() == pytest.approx([0.5, 0.2, 0.2, 0.04])
    assert reduced[:, 1].tolist() == [1, 1, 1, 2]
    examples = [{"completion": "yes"}, {"completion": "no"}]
    metrics = CHOICE.compute_metrics(reduced.numpy(), labels.numpy(), examples)
    assert metrics["accuracy"] == 0.5
    # The true completions have likelihood 1/2 (one token) and 1/25 (two tokens).
    assert metrics["completion_loss"] == pytest.approx(-math.log(0.5 * 0.04) / 3)
    assert metrics["perplexity"] == pytest.approx((0.5 * 0.04) ** (-1 / 3))


def test_compute_metrics_length_normalised_picks_another_choice() -> None:
    task = CHOICE.model_copy(update={"length_normalised": True})
    scores = torch.tensor([[-1.0, 1.0], [-1.5, 3.0]]).numpy()
    examples = [{"completion": "no"}]
    assert CHOICE.compute_metrics(scores, None, examples)["accuracy"] == 0
    assert task.compute_metrics(scores, None, examples)["accuracy"] == 1


def test_compute_metrics_two_labels_match_hand_computation() -> None:
    # 3 of 4 good and 1 of 2 bad examples are right: tp 3, fp 1, fn 1.
    references = torch.tensor([1, 1, 1, 1, 0, 0]).numpy()
    logits = torch.eye(2)[[1, 1, 1, 0, 0, 1]].numpy()
    metrics = CLASSES.compute_metrics(logits, references, [])
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    assert metrics["precision"] == metrics["recall"] == metrics["f1"] == pytest.approx(3 / 4)
    assert metrics["recall[good]"] == pytest.approx(3 / 4)
    assert metrics["recall[bad]"] == pytest.approx(1 / 2)
    assert metrics["majority"] == pytest.approx(4 / 6)


def test_compute_metrics_three_labels_are_means_over_labels() -> None:
    references = torch.tensor([0, 0, 1, 2]).numpy()
    logits = torch.eye(3)[[0, 1, 1, 2]].numpy()
    metrics = THREE.compute_metrics(logits, references, [])
    assert metrics["recall"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert metrics["f1"] == metrics["f1_macro"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
