"""Losses and metrics by hand, and traps of the libraries beneath that would make them wrong."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from builders import ROOT
from hpcft.core.records import DataSpec, TokenizerTraining
from hpcft.methods.qlora import QLoRA
from hpcft.tasks.base import IGNORED
from hpcft.tasks.classification import Classification
from hpcft.tasks.instruction import Instruction
from hpcft.training.data.tokenizer import train_tokenizer

DATA = DataSpec(files={"train": "x.jsonl"})
CHOICE = Instruction(
    name="instruction", data=DATA, prompt="{q}", completion="{a}", choices=["yes", "no"]
)
CLASSES = Classification(name="classification", data=DATA, labels=["bad", "good"])
THREE = Classification(name="classification", data=DATA, labels=["a", "b", "c"])


def test_loss_of_parts_is_the_loss_of_the_whole() -> None:
    """However a global batch is split, the parts' losses sum to its mean over completion tokens."""
    torch.manual_seed(0)
    logits = torch.randn(6, 9, 11)
    labels = torch.randint(0, 11, (6, 9))
    labels[:, :3] = IGNORED
    labels[2, 5:] = IGNORED
    items = (labels[:, 1:] != IGNORED).sum()
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1), ignore_index=IGNORED
    )
    parts = [CHOICE.loss(logits[i : i + 2], labels[i : i + 2], items, 0.0) for i in (0, 2, 4)]
    assert torch.stack(parts).sum().item() == pytest.approx(expected.item(), rel=1e-6)
    assert CHOICE.loss(logits, labels, None, 0.0).item() == pytest.approx(expected.item(), rel=1e-6)


def test_label_smoothing_is_the_textbook_formula() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.5, 1.0]])
    labels = torch.tensor([0, 0])
    logs = logits.log_softmax(-1)
    expected = -(0.9 * logs[:, 0] + 0.1 * logs.mean(-1)).mean()
    assert CLASSES.loss(logits, labels, None, 0.1).item() == pytest.approx(expected.item())


def test_choices_are_judged_by_their_likelihood() -> None:
    """Two examples of two choices, with likelihoods that are known."""
    uniform = torch.zeros(4, 4, 5)  # every token has probability 1/5
    uniform[0, 1, 3] = math.log(4)  # of the first choice's only token: 4/8
    labels = torch.full((4, 4), IGNORED)
    labels[0, 2] = 3
    labels[1, 2] = 1
    labels[2, 2] = 1
    labels[3, 2:] = 1  # two tokens: 1/25
    reduced = CHOICE.reduce_logits(uniform, labels)
    assert reduced[:, 0].exp().tolist() == pytest.approx([0.5, 0.2, 0.2, 0.04])
    assert reduced[:, 1].tolist() == [1, 1, 1, 2]
    examples = [{"completion": "yes"}, {"completion": "no"}]
    metrics = CHOICE.metrics(reduced.numpy(), labels.numpy(), examples)
    assert metrics["accuracy"] == 0.5
    # the true completions have likelihood 1/2 (one token) and 1/25 (two tokens)
    assert metrics["completion_loss"] == pytest.approx(-math.log(0.5 * 0.04) / 3)
    assert metrics["perplexity"] == pytest.approx((0.5 * 0.04) ** (-1 / 3))


def test_length_normalised_choice_differs() -> None:
    task = CHOICE.model_copy(update={"length_normalised": True})
    scores = torch.tensor([[-1.0, 1.0], [-1.5, 3.0]]).numpy()
    examples = [{"completion": "no"}]
    assert CHOICE.metrics(scores, None, examples)["accuracy"] == 0
    assert task.metrics(scores, None, examples)["accuracy"] == 1


def test_binary_metrics_by_hand() -> None:
    # 3 of 4 goods and 1 of 2 bads right: tp 3, fp 1, fn 1
    references = torch.tensor([1, 1, 1, 1, 0, 0]).numpy()
    logits = torch.eye(2)[[1, 1, 1, 0, 0, 1]].numpy()
    metrics = CLASSES.metrics(logits, references, [])
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    assert metrics["precision"] == metrics["recall"] == metrics["f1"] == pytest.approx(3 / 4)
    assert metrics["recall[good]"] == pytest.approx(3 / 4)
    assert metrics["recall[bad]"] == pytest.approx(1 / 2)
    assert metrics["majority"] == pytest.approx(4 / 6)


def test_multiclass_metrics_are_means_over_classes() -> None:
    references = torch.tensor([0, 0, 1, 2]).numpy()
    logits = torch.eye(3)[[0, 1, 1, 2]].numpy()
    metrics = THREE.metrics(logits, references, [])
    assert metrics["recall"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert metrics["f1"] == metrics["f1_macro"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_scoring_a_4bit_model_does_not_cut_its_gradients(tmp_path: Path) -> None:
    """bitsandbytes repacks weights at the first evaluation on some CPUs, without backward pass."""
    from transformers import AutoModelForCausalLM

    from builders import llama_folder

    method = QLoRA(name="qlora", r=4, target_modules="all-linear")
    model = AutoModelForCausalLM.from_pretrained(
        llama_folder(tmp_path / "base"), **method.load_options("fp32", 0)
    )
    linear = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for module in linear:
        module.support_avx512bf16_for_cpu = True  # as on a CPU that has AVX512-BF16
    model = method.wrap(model, causal=True, checkpointing=False)
    ids = torch.tensor([[1, 5, 9, 13]])

    def gradients() -> list[torch.Tensor]:
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    after = gradients()
    assert len(linear) == 14
    assert any(g.abs().sum() > 0 for g in before)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


TRAIN_TOKENIZER = """
import json, sys
from hpcft.core.records import TokenizerTraining
from hpcft.training.data.tokenizer import train_tokenizer
texts = json.loads(sys.stdin.read())
made = train_tokenizer(TokenizerTraining(vocab_size=600, lowercase=True), texts, causal=False)
print(json.dumps(sorted(made.get_vocab().items())))
"""


def test_the_same_texts_give_the_same_tokenizer() -> None:
    """In another process too: the hash seeds of the trainer's tables do not show."""
    rows = (ROOT / "recipes/data/helpdesk/train.jsonl").read_text().splitlines()
    texts = json.dumps([json.loads(row)["text"] for row in rows])
    made = [
        subprocess.run([sys.executable, "-c", TRAIN_TOKENIZER], input=texts, text=True,
                       capture_output=True, check=True).stdout
        for _ in range(2)
    ]  # fmt: skip
    assert len(json.loads(made[0])) == 600
    assert made[0] == made[1]


def test_trained_tokenizer_frames_texts_as_its_model_reads_them() -> None:
    wanted = TokenizerTraining(vocab_size=300)
    encoder = train_tokenizer(wanted, ["some text"], causal=False)
    causal = train_tokenizer(wanted, ["some text"], causal=True)
    start, end = encoder.convert_tokens_to_ids(["<s>", "</s>"])
    pair = encoder("some", "Tëxt 📄")
    assert pair["input_ids"][0] == start
    assert pair["input_ids"].count(end) == 2
    assert pair["input_ids"][-1] == end
    ids = causal("Tëxt  📄")["input_ids"]
    assert ids[0] == start
    assert end not in ids
    assert causal.decode(ids, skip_special_tokens=True) == "Tëxt  📄"
