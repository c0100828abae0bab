"""Builders of what tests need: recipes, profiles, plans, run folders, tiny models."""

from __future__ import annotations

import functools
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hpcft.config import cluster_profile
from hpcft.config.recipe import load_recipe
from hpcft.config.recipe_types import FullRecipe
from hpcft.core import run_index
from hpcft.core.checkpoints import LATEST_FILE, MARKER_FILE
from hpcft.core.errors import ClusterError, InputError
from hpcft.core.files import create_folder, write_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import (
    Attempt,
    Checkpoint,
    Cluster,
    EvaluatedLayout,
    Job,
    Layout,
    Measurement,
    MemoryItem,
    ModelFacts,
    ParameterCount,
    Plan,
    Progress,
    RankError,
    Recovery,
    RunRecord,
)
from hpcft.jobs import results, status
from hpcft.planning import planner
from hpcft.planning.inputs import PlanInputs
from hpcft.planning.memory.trace_types import KINDS, LinearBytes, StepMemory, TracedStep
from hpcft.scheduler import slurm_commands
from hpcft.scheduler.job_state import JobState
from hpcft.scheduler.protocol import JobRequest

if TYPE_CHECKING:
    from hpcft.recovery.run import Run
    from hpcft.tasks.few_shot.requests import PromptRequest
    from hpcft.training.context import WorkerContext
    from hpcft.training.distributed.rank_env import RankInfo

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Said:
    """What a command line printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Said]


RECIPE = """\
name: tiny
model:
  config:
    model_type: bert
    vocab_size: 400
    hidden_size: 32
    num_hidden_layers: 1
    num_attention_heads: 2
    intermediate_size: 64
    max_position_embeddings: 64
  tokenizer: { vocab_size: 400 }
task:
  name: classification
  data:
    files: { train: train.jsonl, test: test.jsonl }
  labels: [bad, good]
  max_length: 32
method: { name: full }
train:
  global_batch_size: 4
  max_steps: 3
resources: { nodes: 1, gpus_per_node: 1, time_min: 10 }
"""


# A Slurm cluster without GPUs, for what is written and never queued.
SITE = """\
name: site
scheduler: slurm
accelerator: cpu
partition: main
partitions: [main, high]
max_nodes: 2
gpus_per_node: 4
cores_per_node: 8
host_memory_gib: 16
time_limit_min: 60
"""


def line_of(text: str, part: str) -> int:
    """Line of the first occurrence of a part of a text."""
    assert part in text
    return text[: text.index(part)].count("\n") + 1


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes a JSONL file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def film_rows(pairs: int) -> list[dict[str, Any]]:
    """Texts that a single word makes good or bad."""
    kinds = (("fine", "good"), ("poor", "bad"))
    return [{"text": f"a {word} film number {i}", "label": label}
            for i in range(pairs) for word, label in kinds]  # fmt: skip


ASKED = """\
name: asked
model: { path: base }
task:
  name: prompting
  data: { files: { train: train.jsonl, test: test.jsonl } }
  prompt: "Review: {text}\\nIt is "
  labels: [bad, good]
  shots: 4
  max_length: 250
method: { name: frozen }
evaluation: { per_device_eval_batch_size: 1 }
resources: { nodes: 1, gpus_per_node: 2, zero_stage: 0, time_min: 10 }
"""


# ---------------------------------------------------------------- golden files


def check_golden(name: str, text: str) -> None:
    """Compares a text with a golden file; `HPCFT_GOLDEN=write` rewrites the file instead."""
    file = ROOT / "tests" / "golden" / name
    if os.environ.get("HPCFT_GOLDEN") == "write":
        file.write_text(text)
    assert text == file.read_text()


# ---------------------------------------------------------------- recipe files


def load_one(*overrides: str, name: str = "tiny.yaml") -> FullRecipe:
    """The only point of a recipe file."""
    (point,) = load_recipe(name, list(overrides))
    return point.recipe


def recipe_problems(*overrides: str, name: str = "tiny.yaml") -> list[str]:
    """What is said of a recipe that is refused."""
    with pytest.raises(InputError) as error:
        load_recipe(name, list(overrides))
    return [str(problem) for problem in error.value.problems]


def write_file(name: str, text: str) -> Path:
    """Writes a file and the folders that it lies in."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# ---------------------------------------------------------------- plans without a trace

BILLION = 1_000_000_000
NVME = {"node_disk_path": "/local", "node_disk_gib": 1000.0}


def cluster(name: str, **changes: Any) -> Cluster:
    """A shipped profile with fields changed."""
    return cluster_profile.load_profile(name).cluster.model_copy(update=changes)


def small_site(**changes: Any) -> Cluster:
    """A Slurm cluster of four CPU nodes with 8 cores and 8 GiB each."""
    fields: dict[str, Any] = {
        "name": "site", "scheduler": "slurm", "accelerator": "cpu", "max_nodes": 4,
        "cores_per_node": 8, "host_memory_gib": 8.0, **changes,
    }  # fmt: skip
    return Cluster(**fields)


CLASSIFY = {"name": "classification", "labels": ["a", "b"], "data": {"path": "x/y"}}
COMPLETE = {"name": "instruction", "prompt": "{q}", "completion": "{a}", "data": {"path": "x/y"}}


def recipe(**sections: Any) -> FullRecipe:
    """A recipe from its sections, with the rest made up."""
    made: dict[str, Any] = {"name": "made", "model": {"path": "x/y"}, "task": dict(CLASSIFY),
                            "method": {"name": "full"}, **sections}  # fmt: skip
    return FullRecipe.model_validate(made)


def facts(total: int = BILLION, **changes: Any) -> ModelFacts:
    """A decoder of round numbers; `trainable` and the like are its counts."""
    counted = {
        "trainable": total, "added": 0, "largest_layer": total // 10, "quantised": 0,
        "embedding_parameters": 0, "layer": total // 20, "largest_trained": total // 10,
    }  # fmt: skip
    counts = {key: changes.pop(key, value) for key, value in counted.items()}
    shape: dict[str, Any] = {
        "model_type": "llama", "layers": 16, "hidden_size": 2048,
        "vocab_size": 32000, "logits_width": 32000,
        "max_positions": 4096,
    }  # fmt: skip
    return ModelFacts(parameters=ParameterCount(total=total, **counts), **(shape | changes))


def layout(stage: int, ranks: int = 1, **changes: Any) -> Layout:
    """One node of so many ranks."""
    fields: dict[str, Any] = {
        "nodes": 1, "ranks_per_node": ranks, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1, "gradient_checkpointing": False, "zero_stage": stage,
        "offload_optimizer": "none", "offload_param": "none",
    }  # fmt: skip
    return Layout(**(fields | changes))


def plan_inputs(
    made: FullRecipe | None = None,
    site: Cluster | None = None,
    known: ModelFacts | None = None,
    **fields: Any,
) -> PlanInputs:
    """Returns the inputs of a plan, by default of a made-up recipe and model on A100s."""
    known = known or facts()
    trace = linear_trace(known)
    return PlanInputs(made or recipe(), site or cluster("a100-80"), known, trace=trace, **fields)


def plan_of(
    made: FullRecipe, site: Cluster, known: ModelFacts, *, brief: bool = False, **fields: Any
) -> Plan:
    """Returns the plan of a made-up model."""
    return planner.make_plan(plan_inputs(made, site, known, **fields), brief=brief)


def layouts_of(made: FullRecipe, site: Cluster, known: ModelFacts) -> list[EvaluatedLayout]:
    """Returns all layouts of a made-up model."""
    return planner.evaluate_all(plan_inputs(made, site, known))


def linear_trace(facts: ModelFacts) -> Callable[[TracedStep], StepMemory]:
    """Makes a stand-in for `step_memory` with three moments: forward, backward, optimizer.

    Korthikanti et al. 2022 (arXiv:2205.05198, equation 1) count 34 B S H bytes a layer in 16 bits
    for F = 4 H, of which 16 of width F; with checkpointing a layer keeps 2 B S H.
    """
    p = facts.parameters

    def trace(step: TracedStep) -> StepMemory:
        width = 4 if step.precision == "fp32" else 2
        held = width if step.zero_stage else 4
        weights = 0 if step.zero_stage == 3 else held * p.trainable
        if step.zero_stage < 3:
            weights += width * (p.total - p.trainable - p.quantised) + p.quantised // 2
        gradients = 0 if step.zero_stage else 4 * p.trainable
        states = 0 if step.zero_stage else 8 * p.trainable
        layer = step.task.max_length * ((18 + 4 * 4) * facts.hidden_size)
        kept = 2 * step.task.max_length * facts.hidden_size
        each = kept * facts.layers + layer if step.checkpointing else layer * facts.layers
        logits = step.task.max_length * facts.logits_width * (width + 8)
        chunk = logits // step.loss_chunks
        persistent = {"weights": weights, "optimizer states": states}
        backward = {**persistent, "gradients": gradients}
        if step.zero_stage in (1, 2):
            backward["gradient shards"] = width * p.trainable
        optimizer = {**persistent, "gradients": gradients}
        acts = each * width // 2
        return StepMemory(
            training=[
                _line("forward head", persistent, {"activations": acts, "logits and loss": chunk}),
                _line("backward 0", backward, {"activations": acts // 4}),
                _line("optimizer", optimizer, {}),
            ],
            evaluation=[
                _line(
                    "evaluation head",
                    persistent,
                    {"activations": layer // 4, "logits and loss": chunk},
                )
            ],
        )

    return trace


def _line(segment: str, fixed: dict[str, int], per_example: dict[str, int]) -> LinearBytes:
    by_kind = [[sizes.get(kind, 0) for kind in KINDS] for sizes in (fixed, per_example)]
    return LinearBytes(segment=segment, fixed=by_kind[0], per_example=by_kind[1])


# ---------------------------------------------------------------- made-up run folders

AWAY = ClusterError("squeue failed (1): Unable to contact slurm controller")
GIB = 2**30
# PyTorch's message if a GPU is full. `who` says which processes hold its memory.
OOM = ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total "
       "capacity of 14.74 GiB of which 1.12 GiB is free. {who}Of the allocated memory 13.01 GiB is "
       "allocated by PyTorch, and 402.51 MiB is reserved by PyTorch but unallocated.")  # fmt: skip
MINE = "Including non-PyTorch memory, this process has 13.61 GiB memory in use. "


def run_recipe(seed: int = 1, learning_rate: float = 1e-4, **sections: Any) -> FullRecipe:
    """Returns the recipe of a run."""
    fields: dict[str, Any] = {
        "name": "made", "model": {"path": "x/y"}, "method": {"name": "full"},
        "task": {"name": "classification", "labels": ["a", "b"], "data": {"path": "x/y"}},
        "train": {"seed": seed, "learning_rate": learning_rate}, **sections,
    }  # fmt: skip
    return FullRecipe.model_validate(fields)


def run_record(run_id: str, **metrics: float) -> RunRecord:
    """Returns the result of a run with these metrics."""
    return RunRecord(
        run_id=run_id, recipe="made", finished_at=1.0, split="test", metrics=metrics,
        parameters=ParameterCount(total=66_364_418, trainable=592_130, added=0, largest_layer=0),
        measured=Measurement(wall_s=3600.0, gpu_hours=2.0, peak_memory_bytes=3 * GIB,
                          peak_host_bytes=GIB),
        predicted_memory_bytes=4 * GIB,
        versions={"torch": "2.9.1"},
    )  # fmt: skip


def run_plan(**changes: Any) -> Plan:
    """Returns a plan of round numbers."""
    layout = Layout(nodes=1, ranks_per_node=1, per_device_train_batch_size=1,
                    gradient_accumulation_steps=1, gradient_checkpointing=False, zero_stage=0,
                    offload_optimizer="none", offload_param="none")  # fmt: skip
    facts = ModelFacts(
        model_type="bert", layers=1, hidden_size=1, vocab_size=1, logits_width=1,
        parameters=ParameterCount(total=8_537_680_896, trainable=8_537_680_896, added=0,
                                  largest_layer=0),
    )  # fmt: skip
    plan = Plan(recipe="made", cluster="site", accelerator="cuda", layout=layout,
                precision="bf16", optim="adamw_torch", per_device_eval_batch_size=1, facts=facts,
                gpu_memory=[MemoryItem(name="all", bytes=70 * GIB, rule="")],
                gpu_capacity_bytes=80 * GIB, host_memory=[], host_capacity_bytes=1,
                cpus_per_task=1, mem_mib=1, time_min=1)  # fmt: skip
    return plan.model_copy(update=changes)


def write_recovery(paths: RunPaths, step: int, at: float = 1.0, **fields: Any) -> None:
    """Writes into a run folder that the run was requeued after a failure, and from which step."""
    defaults: dict[str, Any] = {"number": 1, "job_id": "11", "rank": 1, "node": "n2",
                                "cause": "nccl", "evidence": "peer gone", "action": "requeue",
                                "layout": run_plan().layout,
                                "per_device_eval_batch_size": 1}  # fmt: skip
    recovery = Recovery(at=at, step=step, **(defaults | fields))
    paths.recoveries.mkdir(exist_ok=True)
    write_record(paths.recoveries / f"{recovery.number}.json", recovery)


def run_progress(age_s: float = 0.0, **fields: Any) -> Progress:
    """Returns a heartbeat that is some seconds old."""
    now = time.time()
    defaults: dict[str, Any] = {"phase": "training", "step": 30, "total_steps": 120, "node": "n7",
                                "loss": 0.51234, "eta_s": 75.0, "memory_bytes": GIB,
                                "peak_memory_bytes": 2 * GIB,
                                "tokens_per_s": 12345.6}  # fmt: skip
    return Progress(updated_at=now - age_s, started_at=now - 100, **(defaults | fields))


def job_request(
    cluster: Cluster, logs: Path, runs: list[Path], *, exclude: list[str] | None = None
) -> JobRequest:
    """Returns a job on two nodes of four ranks; an array if it is for several runs."""
    layout = Layout(nodes=2, ranks_per_node=4, per_device_train_batch_size=1,
                    gradient_accumulation_steps=4, gradient_checkpointing=True, zero_stage=3,
                    offload_optimizer="none", offload_param="none")  # fmt: skip
    plan = run_plan(layout=layout, cpus_per_task=12, mem_mib=49152, time_min=90, partition="gpu")
    return JobRequest(cluster=cluster, plan=plan, name="made",
                      token="hpcft-0123456789ab-0-89abcdef", runs=runs, logs=logs,
                      exclude=exclude or [])  # fmt: skip


@dataclass
class Runs:
    """A runs folder whose run folders the test writes, and the Slurm that is asked about them."""

    root: Path
    states: dict[str, JobState] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    away: ClusterError | None = None
    asked: list[str] = field(default_factory=list)
    """Job ids that Slurm was asked about; "tokens" for each search by token."""

    def add(self, run_id: str, *, job_id: str | None = "11", scheduler: str = "slurm",
            parts: tuple[Any, ...] = (), errors: tuple[tuple[str, str], ...] = (),
            log: str = "", **fields: Any) -> RunPaths:  # fmt: skip
        """Writes a run folder with these records, rank errors and this error log."""
        paths = RunPaths(self.root / "made" / run_id)
        create_folder(paths.folder)
        paths.logs.mkdir()
        attempt = Attempt(
            job_id=job_id,
            token=f"token-{run_id}",
            array_index=fields.pop("array_index", None),
            submitted_at=float(len(list(self.root.glob("made/*")))),
            logs=str(paths.logs),
            host=os.uname().nodename,
        )
        defaults: dict[str, Any] = {"run_id": run_id, "recipe": "made", "cluster": "site",
                                    "scheduler": scheduler, "attempts": [attempt]}  # fmt: skip
        write_record(paths.job, Job(**(defaults | fields)))
        files = {RunRecord: paths.result, Progress: paths.progress, Plan: paths.plan,
                 FullRecipe: paths.recipe}  # fmt: skip
        for part in parts:
            write_record(files[type(part)], part)
            if isinstance(part, Progress):
                os.utime(paths.progress, (part.updated_at, part.updated_at))
        for rank, (kind, message) in enumerate(errors):
            paths.errors.mkdir(exist_ok=True)
            error = RankError(rank=rank, node=f"n{rank}", at=10.0 + rank, kind=kind,
                              message=message)  # fmt: skip
            write_record(paths.errors / f"{rank}.json", error)
        if log:
            (paths.logs / f"{job_id}_0_log.err").write_text(log)
        return paths

    def find(self, run_id: str) -> run_index.FoundRun:
        """Returns the run folder of a run."""
        (run,) = run_index.find_runs(self.root, run_id)
        return run

    def status_of(self, run_id: str) -> status.RunStatus:
        """Returns the status of a run."""
        return status.run_status(self.find(run_id))

    def statuses(self) -> list[status.RunStatus]:
        """Returns the status of all runs."""
        return status.run_statuses(run_index.list_runs(self.root))

    def rows(self) -> list[results.ResultRow]:
        """Returns the rows of results of all runs."""
        return results.result_rows(self.statuses())


def make_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Returns a runs folder without runs; from now on it answers instead of Slurm."""
    runs = Runs(workplace / "runs")
    (runs.root / "made").mkdir(parents=True)

    def job_states(job_ids: list[str], origins: Any = None) -> dict[str, JobState]:
        runs.asked += job_ids
        unknown = JobState("UNKNOWN", str(runs.away) if runs.away else "nobody knows the job")
        known = {} if runs.away else runs.states
        return {job_id: known.get(job_id, unknown) for job_id in job_ids}

    def ids_by_token() -> dict[tuple[str, int | None], str]:
        runs.asked.append("tokens")
        if runs.away:
            raise runs.away
        return {(token, None): job_id for token, job_id in runs.tokens.items()}

    monkeypatch.setattr(slurm_commands, "job_states", job_states)
    monkeypatch.setattr(slurm_commands, "ids_by_token", ids_by_token)
    return runs


# ---------------------------------------------------------------- tiny models


def llama_folder(folder: Path, *, layers: int = 2) -> Path:
    """A small Llama with a byte-level tokenizer, as `save_pretrained` writes them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        set_seed,
    )

    alphabet = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {token: index for index, token in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def bert_folder(folder: Path, *, layers: int = 1, head: bool = True) -> Path:
    """A BERT with its tokenizer, with a head that tells bad films from good ones or without."""
    from transformers import BertConfig, BertForSequenceClassification, set_seed

    from conftest import film_rows
    from hpcft.core.records import TokenizerTraining
    from hpcft.training.data.tokenizer import train_tokenizer

    texts = [row["text"] for row in film_rows(24)]
    tokenizer = train_tokenizer(
        TokenizerTraining(vocab_size=300), texts, causal=False, has_segments=True
    )
    tokenizer.save_pretrained(folder)
    set_seed(0)
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
        id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1},
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    (model if head else model.bert).save_pretrained(folder)
    return folder


FAMILIES = ("bpe", "unigram", "wordpiece")
FAMILY_TEXT = "how many legs has a horse ? four legs (A) (B) good bad which one is it"


def family_tokenizer(
    family: str, *, adds_start: bool = False, adds_end: bool = False, side: str = "right",
    merges: Sequence[tuple[str, str]] = (),
) -> Any:  # fmt: skip
    """A small tokenizer as one of these families has it.

    Args:
        family: `bpe` (byte-level, as GPT-2), `unigram` (as SentencePiece) or `wordpiece` (BERT).
        adds_start: whether it puts `<s>` in front of a text.
        adds_end: whether it puts `</s>` after a text, and between the texts of a pair.
        side: side of the padding.
        merges: further pairs of tokens that `bpe` joins.
    """
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    content = json.loads(_trained_family(family))
    for pair in merges:
        vocab = content["model"]["vocab"]
        vocab["".join(pair)] = len(vocab)
        content["model"]["merges"].append(list(pair))
        content["pre_tokenizer"]["use_regex"] = False  # joins letters with signs too
    core = Tokenizer.from_str(json.dumps(content))
    start, end = ["<s>"] * adds_start, ["</s>"] * adds_end
    core.post_processor = TemplateProcessing(
        single=[*start, "$A", *end],
        pair=[*start, "$A", *end, "$B:1", *(f"{token}:1" for token in end)],
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", mask_token="<mask>", padding_side=side,
    )  # fmt: skip


@functools.cache  # the trainers give another vocabulary each time
def _trained_family(family: str) -> str:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    options: dict[str, Any] = {
        "special_tokens": ["<pad>", "<s>", "</s>", "<unk>", "<mask>"], "show_progress": False,
    }  # fmt: skip
    if family == "bpe":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, **options)
    elif family == "unigram":
        core = Tokenizer(models.Unigram())
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        core.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", **options)
    else:
        core = Tokenizer(models.WordPiece(unk_token="<unk>"))
        core.normalizer = normalizers.BertNormalizer()
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=120, **options)
    core.train_from_iterator([FAMILY_TEXT] * 20, trainer)
    text: str = core.to_str()
    return text


# ---------------------------------------------------------------- of each kind


VOCABULARY = 259
SHARED = 51
WINDOW = 12  # smaller than the prefix, and than most rows
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma": {"head_dim": 16},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "gemma2": {"head_dim": 16, "sliding_window": WINDOW},
    "gemma3_text": {"head_dim": 16, "sliding_window": WINDOW,
                    "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "phi3": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {},
    "gpt_oss": {"head_dim": 16, "sliding_window": WINDOW, "num_local_experts": 4,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "mamba": {},
}  # fmt: skip


def tiny_model(kind: str, **changes: Any) -> Any:
    """A random model of this architecture, its weights large enough to have opinions."""
    import transformers

    transformers.set_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **MORE[kind], **changes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def prompt_requests(choices: tuple[int, ...] = (1, 2, 5), count: int = 7) -> list[PromptRequest]:
    """Prompts that share their beginning, of unlike lengths, with choices of so many tokens."""
    from hpcft.tasks.few_shot.requests import PromptRequest

    dice = random.Random(0)

    def tokens(number: int) -> list[int]:
        return [dice.randrange(3, VOCABULARY) for _ in range(number)]

    shots = [1, *tokens(SHARED - 1)]
    return [
        PromptRequest([*shots, 3 + i, *tokens(4 + 5 * (i % 4))], [tokens(n) for n in choices])
        for i in range(count)
    ]


# ---------------------------------------------------------------- training processes


def write_checkpoint(paths: RunPaths, step: int, **changes: Any) -> Path:
    """Writes a complete checkpoint of ZeRO-3, with a shard of 100 bytes; returns its folder.

    Args:
        paths: the run's files.
        step: optimizer step of the checkpoint.
        changes: fields of its record that differ.
    """
    folder = paths.checkpoints / f"checkpoint-{step}"
    (folder / f"global_step{step}").mkdir(parents=True)
    (folder / f"global_step{step}/shard.pt").write_bytes(b"x" * 100)
    (folder / LATEST_FILE).write_text(f"global_step{step}")
    fields: dict[str, Any] = {
        "step": step, "at": 1.0, "user_requested": False, "layout": layout(3), "precision": "bf16",
        "files": {f"global_step{step}/shard.pt": 100}, "tag": f"global_step{step}",
        "metrics_bytes": 0, "losses": [0.0], "logged_loss": 0.0, "logged_step": 0, "train_s": 1.0,
    }  # fmt: skip
    write_record(folder / MARKER_FILE, Checkpoint.model_validate(fields | changes))
    return folder


def worker_context(
    folder: Path,
    recipe: FullRecipe,
    plan: Plan,
    *,
    profile: Cluster | None = None,
    rank: RankInfo | None = None,
    restart_index: int = 0,
) -> WorkerContext:
    """Returns the context of a training process, by default the only rank of a local run.

    Args:
        folder: the run folder, which needs no files.
        recipe: the recipe of the run.
        plan: the plan that the process runs.
        profile: the cluster profile; by default the shipped profile `local`.
        rank: the process among the ranks.
        restart_index: number of recoveries before the process started.
    """
    # Imported here, because the reporter imports transformers, which most tests do without.
    from hpcft.recovery.run import Run
    from hpcft.training.context import WorkerContext
    from hpcft.training.distributed.rank_env import RankInfo
    from hpcft.training.telemetry.progress import ProgressReporter

    run = Run(RunPaths(folder), recipe, profile or cluster("local"))
    reporter = ProgressReporter(run.paths, rank or RankInfo(0, 1, 0, "here", "1"), restart_index)
    return WorkerContext(run, plan, reporter, restart_index)


def submitted_run(folder: Path, recipe: FullRecipe, profile: Cluster, plan: Plan) -> Run:
    """Writes the files of a run that was submitted and has no recovery; returns the run.

    Args:
        folder: the run folder, which exists.
        recipe: the recipe of the run.
        profile: the cluster profile.
        plan: the plan that it was submitted with.
    """
    from hpcft.recovery.run import Run

    paths = RunPaths(folder)
    for file, record in ((paths.recipe, recipe), (paths.cluster, profile), (paths.plan, plan)):
        write_record(file, record)
    return Run.open(folder)
