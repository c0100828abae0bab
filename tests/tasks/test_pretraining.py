"""Checks pretraining: pairs from lines, masks by seed, loss and perplexity by hand."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import Cli, write_rows
from hpcft.core.records import DataSpec, TokenizerTraining
from hpcft.tasks.base import IGNORE_INDEX
from hpcft.tasks.data import examples
from hpcft.tasks.pretraining import Pretraining
from hpcft.training.data.tokenizer import train_tokenizer


def task(folder: Path | None = None, **options: Any) -> Pretraining:
    data = DataSpec(files={"train": str((folder or Path()) / "train.jsonl")}, seed=3)
    return Pretraining(name="pretraining", data=data, **{"max_length": 32} | options)


def article(number: int) -> list[str]:
    """Makes an article in WikiText's format; its words hold its number."""
    sentence = " ".join(f"a{number}w{word}" for word in range(6)) + " . "
    return [f" = Article {number} = ", "", sentence * 5, "", f" = = Section {number} = = ", "",
            sentence * 4, ""]  # fmt: skip


def articles_of(piece: str) -> set[str]:
    """Returns the articles that the words of a piece come from."""
    return {word.split("w")[0] for word in piece.split() if word != "."}


def test_load_examples_pairs_neighbours_or_other_documents(tmp_path: Path) -> None:
    lines = [line for number in range(40) for line in article(number)]
    write_rows(tmp_path / "train.jsonl", [{"text": line} for line in lines])
    pretraining = task(tmp_path)
    pairs = examples.load_examples(pretraining).splits["train"]
    for pair in pairs:
        first, second = articles_of(pair["first"]), articles_of(pair["second"])
        assert len(first) == len(second) == 1, "no piece crosses the end of an article"
        assert (first != second) == pair["label"], pair
        assert "=" not in pair["first"] + pair["second"]
        assert pair["first"].endswith("."), "a piece consists of whole sentences"
    unrelated = sum(pair["label"] for pair in pairs) / len(pairs)
    assert 0.4 < unrelated < 0.6
    assert len({articles_of(pair["first"]).pop() for pair in pairs}) == 40
    assert examples.load_examples(pretraining).splits["train"] == pairs, (
        "the same seed gives the same pairs"
    )


def test_load_examples_without_titles_splits_at_empty_lines(tmp_path: Path) -> None:
    lines = ["One is here. Two is here.", "Three is here. Four is here.", "", "Five. Six."]
    write_rows(tmp_path / "train.jsonl", [{"text": line} for line in lines])
    for pair in examples.load_examples(task(tmp_path)).splits["train"]:
        inside = [text in "Five. Six." for text in (pair["first"], pair["second"])]
        assert (inside[0] != inside[1]) == pair["label"]
    write_rows(tmp_path / "train.jsonl", [{"text": "Just this."}, {"text": ""}])
    with pytest.raises(Exception, match="2 rows are too few for one example"):
        examples.load_examples(task(tmp_path))


PIECE = " ".join(f"word{i}" for i in range(40))
TOKENIZER = train_tokenizer(
    TokenizerTraining(vocab_size=500), [PIECE], causal=False, has_mask=True, has_segments=True
)


def test_training_features_masks_80_10_10_of_15_percent() -> None:
    pretraining = task(max_length=512)
    kinds: Counter[str] = Counter()
    open_places = 0
    for number in range(150):
        words = PIECE.split()
        random.Random(number).shuffle(words)
        example = {"first": " ".join(words[:20]), "second": " ".join(words[20:]), "label": 1}
        (row,) = pretraining.training_features(example, TOKENIZER)
        assert pretraining.scoring_features(example, TOKENIZER) == [row], "masks are drawn once"
        plain = TOKENIZER(example["first"], example["second"])
        assert row["labels"][0] == 1
        assert row["token_type_ids"] == plain["token_type_ids"]
        assert set(row["token_type_ids"]) == {0, 1}
        open_places += len(plain["input_ids"]) - 3
        places = zip(row["input_ids"][1:], row["labels"][1:], plain["input_ids"][1:], strict=True)
        for got, label, was in places:
            if label == IGNORE_INDEX:
                assert got == was
                continue
            assert label == was
            assert was not in TOKENIZER.all_special_ids
            is_mask = got == TOKENIZER.mask_token_id
            kinds["mask" if is_mask else "kept" if got == was else "other"] += 1
    total = kinds.total()
    assert total / open_places == pytest.approx(0.15, abs=0.005)
    assert kinds["mask"] / total == pytest.approx(0.8, abs=0.03)
    assert kinds["other"] / total == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("label", [0, 1])
def test_training_features_long_pair_becomes_several_that_lose_nothing(label: int) -> None:
    pretraining = task(max_length=48, mlm_probability=0.01)
    sentences = [f"word{i} word{i + 1} word{i + 2} ." for i in range(24)]
    pair = {"first": " ".join(sentences[:12]), "second": " ".join(sentences[12:]), "label": label}
    rows = pretraining.training_features(pair, TOKENIZER)
    assert len(rows) > 2
    kept: list[int] = []
    for row in rows:
        assert len(row["input_ids"]) <= 48
        assert row["labels"][0] == label
        assert set(row["token_type_ids"]) == {0, 1}
        ids = [i if m == IGNORE_INDEX else m
               for i, m in zip(row["input_ids"][1:], row["labels"][1:], strict=True)]  # fmt: skip
        kept += [i for i in ids if i not in TOKENIZER.all_special_ids]
    whole = [i for sentence in sentences for i in TOKENIZER(sentence)["input_ids"][1:-1]]
    assert Counter(kept) == Counter(whole)
    if label == 0:
        assert kept == whole, "each text is followed by the one that follows it"
    one = {"first": PIECE, "second": PIECE, "label": label}
    (row,) = pretraining.training_features(one, TOKENIZER)
    assert len(row["input_ids"]) == 48, "a sentence that is too long is cut"


def test_training_features_asks_for_special_tokens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer(
        TokenizerTraining(vocab_size=500), [PIECE], causal=False, has_mask=True
    )
    asked: list[int] = []
    known = type(tokenizer).all_special_ids.fget
    monkeypatch.setattr(type(tokenizer), "all_special_ids",
                        property(lambda self: [asked.append(1), known(self)][1]))  # fmt: skip
    for number in range(20):
        pair = {"first": f"word{number}", "second": "word1 word2", "label": 0}
        task(max_length=48).training_features(pair, tokenizer)
    assert len(asked) < 20


def scores_and_labels() -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Makes scores of six pairs of nine tokens over eleven words, 2, 2, 3, 3, 1 and 1 masked."""
    torch.manual_seed(0)
    labels = torch.full((6, 9), IGNORE_INDEX)
    labels[:, 0] = torch.tensor([0, 1, 1, 0, 0, 1])
    for pair, count in enumerate((2, 2, 3, 3, 1, 1)):
        labels[pair, 3 : 3 + count] = torch.arange(count) + pair
    return (torch.randn(6, 9, 11), torch.randn(6, 2)), labels


def test_loss_with_equal_masks_is_bert_loss() -> None:
    (words, follows), labels = scores_and_labels()
    two = slice(0, 2)
    ce = torch.nn.functional.cross_entropy
    tokens = labels[two].clone()
    tokens[:, 0] = IGNORE_INDEX
    expected = ce(words[two].reshape(-1, 11), tokens.reshape(-1)) + ce(follows[two], labels[two, 0])
    found = task().loss((words[two], follows[two]), labels[two], None, 0.0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_loss_of_parts_sums_to_loss_of_whole() -> None:
    (words, follows), labels = scores_and_labels()
    items = labels.ne(IGNORE_INDEX).sum()  # as the Trainer counts
    whole = task().loss((words, follows), labels, None, 0.0)
    parts = [task().loss((words[s], follows[s]), labels[s], items, 0.0)
             for s in (slice(0, 1), slice(1, 4), slice(4, 6))]  # fmt: skip
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)


def test_compute_metrics_perplexity_over_masked_tokens_by_hand() -> None:
    """It is not the mean of batches' perplexities, nor exp of the mean of their losses."""
    (words, follows), labels = scores_and_labels()
    batches = [slice(0, 2), slice(2, 4), slice(4, 6)]
    reduced = torch.cat([task().reduce_logits((words[s], follows[s]), labels[s]) for s in batches])
    found = task().compute_metrics(reduced.numpy(), labels.numpy(), [])
    losses, right = [], []
    for pair in range(6):
        for place in range(1, 9):
            if (label := labels[pair, place].item()) != IGNORE_INDEX:
                scores = words[pair, place].tolist()
                losses.append(math.log(sum(map(math.exp, scores))) - scores[label])
                right.append(scores[label] == max(scores))
    assert len(losses) == 12
    assert found["masked_loss"] == pytest.approx(sum(losses) / 12)
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / 12))
    assert found["masked_accuracy"] == pytest.approx(sum(right) / 12)
    pairs = (follows.argmax(-1) == labels[:, 0]).float().mean().item()
    assert found["next_sentence_accuracy"] == pytest.approx(pairs)


PRETRAIN = """\
name: pretrain
model:
  config:
    model_type: bert
    vocab_size: 400
    hidden_size: 64
    num_hidden_layers: 2
    num_attention_heads: 4
    intermediate_size: 128
    max_position_embeddings: 48
  tokenizer: { vocab_size: 400 }
task:
  name: pretraining
  data: { files: { train: train.jsonl, validation: test.jsonl, test: test.jsonl } }
  max_length: 48
method: { name: full }
train: { global_batch_size: 16, max_steps: 60, learning_rate: 3e-3, warmup_steps: 0.1 }
evaluation: { before: true }
resources: { gpus_per_node: 2, zero_stage: 2, time_min: 10 }
"""


@pytest.mark.process
def test_submit_pretraining_on_two_ranks_lowers_perplexity(workplace: Path, cli: Cli) -> None:
    """Perplexity falls from about the vocabulary's size; the model can then be planned with."""
    line = "the cat sat on the mat . it was a fine day . the dog ran to the door . "
    for split, documents in (("train", 30), ("test", 8)):
        lines = [{"text": text} for text in (line, "")]
        write_rows(workplace / f"{split}.jsonl", lines * documents)
    (workplace / "pretrain.yaml").write_text(PRETRAIN)
    done = cli("submit", "pretrain.yaml", "-c", "local", "--watch")
    assert done.code == 0, done.err
    (folder,) = (workplace / "runs/pretrain").glob("*")
    record = json.loads((folder / "result.json").read_text())
    before, after = record["metrics_before"], record["metrics"]
    assert 200 < before["perplexity"] < 800
    assert after["perplexity"] < 10
    assert after["perplexity"] == pytest.approx(math.exp(after["masked_loss"]))
    planned = cli("params", "pretrain.yaml", "--json", "-o", f"model.path={folder / 'model'}")
    assert planned.code == 0, planned.err
    refused = cli("plan", "pretrain.yaml", "-c", "local", "-o", "model.config.model_type=roberta")
    assert "roberta has no AutoModelForPreTraining" in refused.err
