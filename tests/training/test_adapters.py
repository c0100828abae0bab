"""Tests of several adapters of one base model, trained by runs and compared by a sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builders import Cli, film_rows, llama_folder, write_rows
from hpcft.training.modes import answer_log

TRAINED = """\
name: {name}
model: {{ path: base }}
task:
  name: instruction
  data: {{ files: {{ train: {name}.jsonl, test: {name}.jsonl }} }}
  prompt: "{{text}}. It is"
  completion: " {{label}}"
  max_length: 48
method: {{ name: lora, r: 8, target_modules: all-linear }}
train: {{ global_batch_size: 12, max_steps: 60, learning_rate: 1e-2 }}
resources: {{ nodes: 1, gpus_per_node: 1, zero_stage: 0, time_min: 10 }}
"""

COMPARED = """\
name: compared
model: { path: base }
task:
  name: prompting
  data: { files: { test: asked.jsonl } }
  prompt: "{text}. It is"
  labels: [bad, good]
  choices: [" bad", " good"]
  max_length: 48
method: { name: frozen }
resources: { nodes: 1, gpus_per_node: 1, zero_stage: 0, time_min: 10 }
"""


@pytest.mark.slow
def test_sweep_over_trained_adapters_each_prefers_its_training_answers(
    workplace: Path, cli: Cli
) -> None:
    """Both give the answers that they were trained on a higher likelihood than the base model."""
    rows = film_rows(24)
    swapped = {"good": "bad", "bad": "good"}
    llama_folder(workplace / "base")
    write_rows(workplace / "asked.jsonl", rows)
    write_rows(workplace / "right.jsonl", rows)
    write_rows(workplace / "wrong.jsonl", [{**row, "label": swapped[row["label"]]} for row in rows])
    adapters = []
    for name in ("right", "wrong"):
        (workplace / f"{name}.yaml").write_text(TRAINED.format(name=name))
        done = cli("submit", f"{name}.yaml", "-c", "local", "--watch")
        assert done.code == 0, done.err
        (folder,) = (workplace / "runs" / name).glob("*")
        adapters.append(str((folder / "model").relative_to(workplace)))
    (workplace / "compared.yaml").write_text(COMPARED)
    grid = f"sweep.grid={{method.adapter_path: {json.dumps([*adapters, None])}}}"
    done = cli("submit", "compared.yaml", "-c", "local", "-o", grid, "--watch")
    assert done.code == 0, done.err
    results = [row for row in cli("collect", "--json").json if row["recipe"] == "compared"]
    answers = {}
    for row in results:
        (run_id,) = row["run_ids"]
        folder = workplace / "runs/compared" / run_id / "answers"
        answers[row["point"]["method.adapter_path"]] = answer_log.read_answers(folder)
    right, wrong = adapters
    assert answers.keys() == {right, wrong, None}
    assert answers[right] != answers[wrong]
    for example, of_base in answers[None].items():
        for adapter in adapters:
            pairs = zip(answers[adapter][example], of_base, strict=True)
            assert all(adapted > base for adapted, base in pairs)
