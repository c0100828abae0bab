"""Tests of tokenizers that are trained on the texts of a run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from builders import ROOT
from hpcft.core.records import TokenizerTraining
from hpcft.training.data.tokenizer import train_tokenizer

TRAIN_TOKENIZER = """
import json, sys
from hpcft.core.records import TokenizerTraining
from hpcft.training.data.tokenizer import train_tokenizer
texts = json.loads(sys.stdin.read())
spec = TokenizerTraining(vocab_size=600, lowercase=True)
tokenizer = train_tokenizer(spec, texts, causal=False)
print(json.dumps(sorted(tokenizer.get_vocab().items())))
"""


@pytest.mark.process
def test_train_tokenizer_same_texts_give_same_vocabulary() -> None:
    """In another process too: the hash seeds of the trainer's tables have no effect."""
    rows = (ROOT / "recipes/data/helpdesk/train.jsonl").read_text().splitlines()
    texts = json.dumps([json.loads(row)["text"] for row in rows])
    vocabularies = [
        subprocess.run([sys.executable, "-c", TRAIN_TOKENIZER], input=texts, text=True,
                       capture_output=True, check=True).stdout
        for _ in range(2)
    ]  # fmt: skip
    assert len(json.loads(vocabularies[0])) == 600
    assert vocabularies[0] == vocabularies[1]


def test_train_tokenizer_adds_start_and_end_tokens_of_its_model() -> None:
    spec = TokenizerTraining(vocab_size=300)
    encoder = train_tokenizer(spec, ["some text"], causal=False)
    causal = train_tokenizer(spec, ["some text"], causal=True)
    start, end = encoder.convert_tokens_to_ids(["<s>", "</s>"])
    pair = encoder("some", "Tëxt 📄")
    assert pair["input_ids"][0] == start
    assert pair["input_ids"].count(end) == 2
    assert pair["input_ids"][-1] == end
    ids = causal("Tëxt  📄")["input_ids"]
    assert ids[0] == start
    assert end not in ids
    assert causal.decode(ids, skip_special_tokens=True) == "Tëxt  📄"
