"""Recipe: an experiment, with its model, data, method, training and evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, JsonValue

from hpcft.core.records.base import (
    Auto,
    Fraction,
    InputRecord,
    Name,
    NonNegative,
    Offload,
    OneLine,
    PositiveInt,
    Revision,
    Share,
    SlurmWord,
    Split,
)


class TokenizerTraining(InputRecord):
    """A byte-level BPE tokenizer trained on the training split, for a new model."""

    vocab_size: Annotated[int, Field(ge=260, le=1_000_000)]
    """Largest size of the vocabulary: 256 bytes, 3 special tokens and the learned tokens; at most
    the model's own."""
    lowercase: bool = False
    """Convert all letters to lower case."""


class ModelSpec(InputRecord):
    """The model to train: its weights, configuration and tokenizer."""

    path: OneLine | None = None
    """Hub name (`google/gemma-7b`) or local folder; without it, `config` makes a new model."""
    revision: Revision | None = None
    """Hub revision to use: branch, tag or, best, a commit."""
    config: dict[str, JsonValue] | None = None
    """Hugging Face configuration fields, with `model_type`. With `path`, they only describe the
    architecture, so that planning needs neither network nor weights; without `path`, a new model is
    made from them."""
    tokenizer: OneLine | TokenizerTraining | None = None
    """Hub name or folder of the tokenizer, or how to train one; by default, the one at `path`."""
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation of `transformers`."""


class DataSpec(InputRecord):
    """The data: where the examples come from and how they are split."""

    path: OneLine | None = None
    """Hub data set name (`nyu-mll/glue`), or a local folder with the files of a hub data set or of
    `save_to_disk`."""
    name: SlurmWord | None = None
    """Configuration of the data set (`winogrande_l`)."""
    revision: Revision | None = None
    """Hub revision of the data set."""
    files: dict[Split, OneLine] | None = None
    """Local files by split, instead of `path`: CSV, TSV, JSONL, JSON, Parquet, Arrow or text by
    their suffix, the text formats also with `.gz`."""
    splits: dict[Split, OneLine] = Field(default_factory=dict)
    """Source split of each of our splits (`validation: validation_matched`); join several with `+`.
    By default, the splits of the same names."""
    fractions: dict[Split, Share] | None = None
    """Pool all loaded splits, shuffle with `seed`, and cut into these fractions (sum at most 1)."""
    seed: int = 0
    """Seed of shuffling for `fractions` and of sampling for `limits` and `sample`."""
    limits: dict[Split, PositiveInt] = Field(default_factory=dict)
    """Largest number of examples of each split, sampled with `seed`."""
    drop_empty: bool = False
    """Leave out rows whose text is empty, and say in the results table how many."""
    sample: dict[Split, Share] = Field(default_factory=dict)
    """Share of each split's examples to use, sampled with `seed`."""


class Task(InputRecord):
    """The task and its data; each task adds its own options."""

    name: str
    """Name of the task; one of the files in `tasks/`."""
    data: DataSpec
    """Data of the task."""
    max_length: Annotated[int, Field(ge=8, le=1_000_000)] = 512
    """Longest sequence in tokens; longer texts are cut at the end (prompts: at the front)."""


class Method(InputRecord):
    """The training method; each method adds its own options."""

    name: str
    """Name of the method; one of the files in `methods/`."""


class Train(InputRecord):
    """Training options, with the names and values of Hugging Face `TrainingArguments`."""

    global_batch_size: PositiveInt = 16
    """Examples per optimizer step over all ranks; the plan splits them into micro-batches."""
    per_device_train_batch_size: PositiveInt | Auto = "auto"
    """Micro-batch size: examples per rank and forward pass; with `auto`, the plan chooses it."""
    num_train_epochs: Annotated[float, Field(gt=0, le=1_000_000)] = 3.0
    """Number of passes over the training split."""
    max_steps: Annotated[int, Field(ge=-1)] = -1
    """Number of optimizer steps; -1 for as many as `num_train_epochs` needs."""
    learning_rate: Annotated[float, Field(gt=0, lt=10)] = 5e-5
    """Peak learning rate."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"
    ] = "linear"
    """Learning-rate schedule."""
    warmup_steps: Annotated[float, Field(ge=0)] = 0
    """Steps of linear warm-up; a value below 1 is a share of all steps."""
    weight_decay: Annotated[float, Field(ge=0, lt=10)] = 0.0
    """Decoupled weight decay (AdamW)."""
    adam_beta1: Fraction = 0.9
    """AdamW's first decay rate."""
    adam_beta2: Fraction = 0.999
    """AdamW's second decay rate."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: NonNegative = 1.0
    """Largest global gradient norm; larger gradients are clipped. 0 turns clipping off."""
    label_smoothing_factor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing factor."""
    optim: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_bnb_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
    ] = "adamw_torch"
    """Optimizer."""
    bf16: bool | Auto = "auto"
    """bfloat16 mixed precision; with `auto`, on hardware that supports it."""
    fp16: bool | Auto = "auto"
    """float16 mixed precision with loss scaling; with `auto`, on GPUs without bfloat16."""
    gradient_checkpointing: bool | Auto = "auto"
    """Recompute activations in the backward pass; with `auto`, only if needed to fit."""
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = "random"
    """Order of the training examples; a step has the same examples on any number of ranks."""
    packing: bool | Auto = "auto"
    """Put the examples of a micro-batch into one row without padding: the same loss and gradients
    in less time, with fewer, fuller micro-batches. With `auto`, where task, method and model allow
    it."""
    eval_strategy: Literal["no", "epoch", "steps"] = "epoch"
    """When the validation split is scored during training."""
    eval_steps: PositiveInt | None = None
    """Steps between validations, for `eval_strategy: steps`."""
    save_strategy: Literal["no", "epoch", "steps"] = "no"
    """When checkpoints are written."""
    save_steps: PositiveInt = 500
    """Steps between checkpoints, for `save_strategy: steps`."""
    save_total_limit: PositiveInt | None = 1
    """Number of checkpoints to keep; the oldest are deleted."""
    load_best_model_at_end: bool = False
    """Use the checkpoint with the best `metric_for_best_model` as the final model."""
    metric_for_best_model: OneLine | None = None
    """Metric that decides which checkpoint is best, for example `accuracy`."""
    logging_steps: PositiveInt = 10
    """Steps between lines of metrics.jsonl."""
    dataloader_num_workers: Annotated[int, Field(ge=0, le=64)] = 0
    """Number of data-loading processes per rank."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of initial weights, example order and dropout."""


class Evaluation(InputRecord):
    """The evaluation of the finished model."""

    split: Literal["validation", "test"] = "test"
    """Split whose metrics go into the results table."""
    per_device_eval_batch_size: PositiveInt | Auto = "auto"
    """Examples per rank and forward pass when scoring. A pass of prompts takes as many as fit into
    this number times `max_length` tokens."""
    before: bool = False
    """Also score the model before training, to compare before and after."""


class Resources(InputRecord):
    """The resources that a run may use; with `auto`, the plan chooses what fits."""

    nodes: PositiveInt | Auto = "auto"
    """Number of nodes."""
    gpus_per_node: PositiveInt | Auto = "auto"
    """Number of GPUs per node, one rank each; on a cluster without GPUs, ranks per node."""
    time_min: PositiveInt | Auto = "auto"
    """Time limit in minutes."""
    partition: SlurmWord | None = None
    """Partition, if the profile lists several."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] | Auto = "auto"
    """DeepSpeed ZeRO stage; 0 is plain data parallelism."""
    offload_optimizer: Offload | Auto = "auto"
    """Place in which ZeRO keeps the optimizer states."""
    offload_param: Offload | Auto = "auto"
    """Place in which ZeRO-3 keeps the parameters between uses."""
    checkpoint_min: Annotated[float, Field(ge=0, le=100_000)] | Auto = "auto"
    """Minutes between the checkpoints that a run resumes from after a failure. With `auto`, they
    depend on the time of a save and on how often nodes fail; with 0, the run saves only before a
    time limit or a preemption. Checkpoints that you want to keep are set by
    `train.save_strategy`."""


def _auto_resources(value: object) -> object:
    """Replaces the word `auto` by an empty section, which has every default."""
    return {} if value == "auto" else value


# The field `list` of Sweep hides the type of that name inside the class.
_Values = list[JsonValue]
_Points = list[dict[str, JsonValue]]
_Seeds = Annotated[list[int], Field(max_length=1000)]


class Sweep(InputRecord):
    """Several runs from one recipe: every combination of `grid`, `zip`, `list` and `seeds`."""

    grid: dict[str, _Values] = Field(default_factory=dict)
    """Values by dotted field; every combination is a run."""
    zip: dict[str, _Values] = Field(default_factory=dict)
    """Equally many values by dotted field; a run takes the first of each, the next the second, …"""
    list: _Points = Field(default_factory=lambda: [])
    """List of points, each a mapping from dotted field to value."""
    seeds: _Seeds = Field(default_factory=lambda: [])
    """Values of `train.seed` to repeat each run with; the results table shows mean ± deviation."""


class Baseline(InputRecord):
    """Published results of the same experiment, which the results table shows next to ours."""

    source: OneLine
    """Source of the numbers."""
    metrics: dict[OneLine, float] = Field(default_factory=dict)
    """Value by metric, on the scale of our metric (accuracy .9382, not 93.82)."""
    outcome: OneLine | None = None
    """Reported outcome instead of a number, for example `out of memory`."""


class Recipe(InputRecord):
    """An experiment: the model, the data, the method, and how to train and evaluate."""

    name: Name
    """Name of the run folder and the job: lower-case letters, digits, `_` and `-`."""
    description: str = ""
    """One line of description."""
    model: ModelSpec
    """Model to train."""
    task: Task
    """Task and data."""
    method: Method
    """Training method."""
    train: Train = Field(default_factory=Train)
    """Training options."""
    evaluation: Evaluation = Field(default_factory=Evaluation)
    """Evaluation options."""
    resources: Annotated[
        Resources, BeforeValidator(_auto_resources, json_schema_input_type=Resources | Auto)
    ] = Field(default_factory=Resources)
    """Resources that the run may use; the word `auto` for all defaults."""
    sweep: Sweep | None = None
    """Sweep: several runs from this recipe, submitted as one job array."""
    baseline: Baseline | None = None
    """Published results to compare with."""
