"""Tests of real runs on this machine by the command line: training, results, failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from builders import ROOT, Cli, film_rows, write_rows
from real_runs import current_step, is_gone, supervisor_pids, until

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Submits the quickstart recipe as `make demo` does; its run folder."""
    runs = tmp_path_factory.mktemp("a runs 'folder' ü")  # Users have such paths.
    command = [sys.executable, "-m", "hpcft", "submit", str(ROOT / "recipes/quickstart.yaml"),
               "--cluster", "local", "--watch", "--runs-dir", str(runs)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("/600") > 3, "progress is shown while it runs"
    (folder,) = runs.glob("quickstart/*")
    return folder


def test_quickstart_run_learns(trained: Path, cli: Cli) -> None:
    result = cli("collect", "--json", "--runs-dir", trained.parents[1])
    (row,) = result.json
    assert row["state"] == "COMPLETED"
    assert row["metrics"]["majority"]["mean"] == pytest.approx(0.2)
    assert row["metrics"]["accuracy"]["mean"] > 0.7
    assert row["total_parameters"] == row["trainable_parameters"] == 240_901
    assert 0 < row["peak_memory_bytes"] < 4 * 2**30


def test_result_holds_measurement_and_prediction(trained: Path, cli: Cli) -> None:
    record = json.loads((trained / "result.json").read_text())
    measured, predicted = record["measured"], record["predicted"]
    assert {"starting", "model", "training", "evaluation", "saving"} <= set(measured["phases"])
    resident = {name: peaks["resident_bytes"] for name, peaks in measured["phases"].items()}
    assert measured["peak_memory_bytes"] == max(resident.values())
    assert 1 / 1.3 < measured["peak_memory_bytes"] / record["predicted_memory_bytes"] < 1
    assert resident["training"] > predicted["tensor_bytes"]
    of_node = measured["phases"]["training"]["host_bytes"]
    assert resident["training"] < of_node <= 2 * resident["training"], "two ranks on a node"
    assert measured["timed_steps"] == 598
    assert 0 < 598 * measured["step_s"] < 2 * measured["train_s"]
    assert measured["tokens_per_step"] == pytest.approx(predicted["tokens_per_step"], rel=0.01)
    collected = cli("collect", "--json", "--runs-dir", trained.parents[1])
    (row,) = collected.json
    assert row["phases"]["training"]["resident_bytes"] == resident["training"]
    assert row["step_s"] == [measured["step_s"]]
    assert row["predicted_step_s"] == predicted["step_s"]
    assert (predicted["device"], predicted["layout"]) == ("cpu", "ZeRO-3")


def test_logged_loss_two_ranks_starts_at_cross_entropy(trained: Path) -> None:
    """It starts at ln 5; a model's own loss the Trainer would multiply by the number of ranks."""
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] == pytest.approx(1.609, abs=0.1)
    assert losses[-1] < 0.5


def test_saved_model_loads_back_and_predicts_the_same(trained: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    files = {file.name for file in (trained / "model").iterdir()}
    assert "model.safetensors" in files
    assert not [name for name in files if name.endswith((".bin", ".pkl", ".pt"))]
    model = AutoModelForSequenceClassification.from_pretrained(trained / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    held_out = [json.loads(line) for line in
                (ROOT / "recipes/data/helpdesk/test.jsonl").read_text().splitlines()]  # fmt: skip
    batch = tokenizer([row["text"] for row in held_out], padding=True, truncation=True,
                      max_length=64, return_tensors="pt")  # fmt: skip
    predictions = model(**batch).logits.argmax(-1).tolist()
    right = sum(model.config.id2label[label] == row["label"]
                for label, row in zip(predictions, held_out, strict=True))  # fmt: skip
    result = json.loads((trained / "result.json").read_text())
    assert right / len(held_out) == pytest.approx(result["metrics"]["accuracy"], abs=1e-6)


def test_progress_of_trained_run_has_every_field_that_status_shows(trained: Path, cli: Cli) -> None:
    (view,) = cli("status", "--json", "--runs-dir", trained.parents[1]).json
    progress = view["progress"]
    assert progress["step"] == progress["total_steps"] == 600
    for field in ("epoch", "loss", "learning_rate", "tokens_per_s", "memory_bytes",
                  "peak_memory_bytes", "eta_s"):  # fmt: skip
        assert progress[field] is not None, field
    assert cli("logs", "quickstart", "--rank", 1, "--runs-dir", trained.parents[1]).code == 0


def test_run_folder_is_private_and_its_records_are_json(trained: Path) -> None:
    assert (trained.stat().st_mode & 0o777) == 0o700
    readable = {"recipe", "plan", "job", "progress", "result", "cluster", "ds_config"}
    for name in readable:
        json.loads((trained / f"{name}.json").read_text())


def test_submit_unusual_user_data_trains_and_finds_its_run_again(tiny: Path, cli: Cli) -> None:
    """Unusual column names, unicode, empty and long rows, a label that occurs once."""
    rows = [{"Текст 📄": f"отзыв {i} " + "очень " * (i % 7), "my label": ["да", "no"][i % 2]}
            for i in range(16)]  # fmt: skip
    rows += [{"Текст 📄": "", "my label": "no"}, {"Текст 📄": "a" * 100_000, "my label": "да"},
             {"Текст 📄": "שלום e\u0301 👩‍👩‍👧", "my label": "maybe"}]  # fmt: skip
    write_rows(tiny.parent / "train.jsonl", rows)
    write_rows(tiny.parent / "test.jsonl", rows[:6])
    change = ["-o", "task.text=Текст 📄", "-o", "task.label=my label",
              "-o", "task.labels=[да, no, maybe]"]  # fmt: skip
    refused = cli("submit", tiny, "-c", "local", *change)
    assert refused.code == 2
    assert "train.jsonl:17 Текст 📄: the text is empty" in refused.err
    change += ["-o", "task.data.drop_empty=true"]
    done = cli("submit", tiny, "-c", "local", *change, "--watch")
    assert done.code == 0, done.err
    (row,) = cli("collect", "--json").json
    assert any("1 rows with empty text left out" in note for note in row["notes"])
    found = cli("submit", tiny, "-c", "local", *change)
    assert "has completed already" in found.err
    assert len(cli("status", "--json").json) == 1
    (folder,) = (tiny.parent / "runs/tiny").glob("*")
    before = (folder / "result.json").read_text()
    assert cli("submit", tiny, "-c", "local", *change, "--again", "--watch").code == 0
    assert (folder / "previous/0/result.json").read_text() == before, "nothing is lost"
    first, second = (json.loads(text)["metrics"] for text in
                     (before, (folder / "result.json").read_text()))  # fmt: skip
    assert first == second, "a fixed seed gives the same number twice"


def test_qlora_adapter_loads_back(workplace: Path, cli: Cli) -> None:
    """QLoRA of a local model on two ranks, evaluated before and after training."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from safetensors.torch import load_file

    from builders import llama_folder

    llama_folder(workplace / "base")
    rows = [{"q": f"is {n} even", "a": "yes" if n % 2 == 0 else "no"} for n in range(24)]
    write_rows(workplace / "d.jsonl", rows)
    write_rows(workplace / "t.jsonl", rows)
    (workplace / "q.yaml").write_text("""\
name: tiny_qlora
model: { path: base }
task:
  name: instruction
  data: { files: { train: d.jsonl, test: t.jsonl } }
  prompt: "{q}?"
  completion: " {a}"
  choices: [" yes", " no"]
  max_length: 64
method: { name: qlora, r: 4, target_modules: all-linear }
train: { global_batch_size: 4, max_steps: 4, learning_rate: 1e-3, optim: paged_adamw_8bit }
evaluation: { before: true }
resources: { gpus_per_node: 2, time_min: 10 }
""")
    done = cli("submit", "q.yaml", "-c", "local", "--watch")
    assert done.code == 0, done.err
    (folder,) = (workplace / "runs/tiny_qlora").glob("*")
    record = json.loads((folder / "result.json").read_text())
    assert record["metrics_before"]["perplexity"] != record["metrics"]["perplexity"]
    adapter = load_file(folder / "model/adapter_model.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    trainable = record["parameters"]["trainable"]
    assert sum(tensor.numel() for tensor in adapter.values()) == trainable
    model = AutoPeftModelForCausalLM.from_pretrained(folder / "model")
    assert model(torch.tensor([[1, 2, 3]])).logits.shape[-1] == model.config.vocab_size


PARITY = """\
name: parity
model: { path: base }
task:
  name: classification
  data: { files: { train: d.jsonl, validation: t.jsonl, test: t.jsonl } }
  labels: [bad, good]
  max_length: 48
method: { name: full }
train:
  global_batch_size: 4
  num_train_epochs: 1
  logging_steps: 1
  gradient_checkpointing: true
  save_strategy: epoch
  load_best_model_at_end: true
  metric_for_best_model: accuracy
evaluation: { before: true }
resources: { gpus_per_node: 2, zero_stage: 0, time_min: 10 }
"""


OFFLOADED = {"zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"}


@pytest.mark.parametrize(
    ("method", "sharded"),
    [
        ("full", {"zero_stage": 3}),
        pytest.param("lora", {"zero_stage": 3}, marks=pytest.mark.slow),
        pytest.param("head_only", {"zero_stage": 3}, marks=pytest.mark.slow),
        pytest.param("prompt_tuning", {"zero_stage": 2}, marks=pytest.mark.slow),
        ("qlora", {"zero_stage": 2}),
        pytest.param("full", OFFLOADED, marks=pytest.mark.slow),  # It compiles CPU Adam in 90 s.
    ],
)
def test_zero_stage_gives_losses_of_plain_data_parallelism(
    workplace: Path, cli: Cli, method: str, sharded: dict[str, object]
) -> None:
    """Losses and metrics are the same however states are sharded, with all features turned on."""
    from builders import llama_folder

    llama_folder(workplace / "base")
    rows = film_rows(8)
    write_rows(workplace / "d.jsonl", rows)
    write_rows(workplace / "t.jsonl", rows)
    (workplace / "parity.yaml").write_text(PARITY)
    results, losses = [], []
    for resources in ({"zero_stage": 0}, sharded):
        name = f"{method}{resources['zero_stage']}"
        change = ["-o", f"name={name}", "-o", f"method.name={method}"]
        for key, value in resources.items():
            change += ["-o", f"resources.{key}={value}"]
        done = cli("submit", "parity.yaml", "-c", "local", *change, "--watch")
        assert done.code == 0, done.err
        (folder,) = (workplace / "runs" / name).glob("*")
        results.append(json.loads((folder / "result.json").read_text()))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(losses[0]) == 4
    for key in ("metrics", "metrics_before"):
        assert results[0][key] == pytest.approx(results[1][key], abs=1e-6)


def _submit_long(tiny: Path, cli: Cli) -> Path:
    """Submits a run of two ranks that would take minutes; returns its folder once it trains."""
    submitted = cli("submit", tiny, "-c", "local", "-o", "train.max_steps=100000",
               "-o", "resources.gpus_per_node=2", "--json")  # fmt: skip
    assert submitted.code == 0, submitted.err
    folder = Path(submitted.json[0]["folder"])
    until(lambda: current_step(folder) > 0)
    return folder


def test_killed_supervisor_ends_all_ranks(tiny: Path, cli: Cli) -> None:
    folder = _submit_long(tiny, cli)
    ranks = supervisor_pids(folder)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    until(lambda: is_gone(folder), 10)
    (view,) = cli("status", "--json").json
    assert view["state"] == "FAILED"
    assert view["note"]


def test_cancel_ends_all_processes(tiny: Path, cli: Cli) -> None:
    folder = _submit_long(tiny, cli)
    assert "cancelled" in cli("cancel", "tiny").err
    until(lambda: is_gone(folder), 5)
    assert "has ended already" in cli("cancel", "tiny").err


def test_submit_twice_at_once_starts_one_job(tiny: Path, cli: Cli) -> None:
    command = [sys.executable, "-m", "hpcft", "submit", str(tiny), "-c", "local"]
    long = ["-o", "train.max_steps=100000"]
    processes = [
        subprocess.Popen(
            [*command, *long], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    messages = sorted(process.communicate(timeout=120)[1] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert "is already queued or running" in messages[0]
    assert "submitted as job" in messages[1]
    (file,) = (tiny.parent / "runs/tiny").glob("*/job.json")
    assert len(json.loads(file.read_text())["attempts"]) == 1
    assert "cancelled" in cli("cancel", "tiny").err
