"""Recipe: what to train, on what, how, and what others reported."""

from __future__ import annotations

from typing import Annotated, Any, Literal

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
    """Upper bound of the vocabulary: 256 bytes, 3 special tokens, and what is learnt; at most the
    model's own."""
    lowercase: bool = False
    """Take upper- and lower-case letters for the same."""


class ModelSpec(InputRecord):
    """Which model is trained, and where its weights, configuration and tokenizer are."""

    path: OneLine | None = None
    """Hub name (`google/gemma-7b`) or local folder. None: a new model from `config`."""
    revision: Revision | None = None
    """Hub revision (branch, tag or commit) to use; a commit is best."""
    config: dict[str, JsonValue] | None = None
    """Hugging Face configuration fields, `model_type` among them. With `path` it only describes the
    architecture, so that planning needs neither network nor weights; without, it is the model."""
    tokenizer: OneLine | TokenizerTraining | None = None
    """Hub name or folder of the tokenizer, or how to train one; by default the one at `path`."""
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    """Attention of `transformers`."""


class DataSpec(InputRecord):
    """Where the examples come from and how they are split."""

    path: OneLine | None = None
    """Hub data set name (`nyu-mll/glue`), or a local folder: data files as a hub data set has them,
    or what `save_to_disk` wrote."""
    name: SlurmWord | None = None
    """Configuration of the data set (`winogrande_l`)."""
    revision: Revision | None = None
    """Hub revision of the data set."""
    files: dict[Split, OneLine] | None = None
    """Local files by split, instead of `path`: CSV, JSONL/JSON or Parquet by their suffix."""
    splits: dict[Split, OneLine] = Field(default_factory=dict)
    """Our splits and the source's that each is read from (`validation: validation_matched`),
    several joined with `+`; without it, those of the same names."""
    fractions: dict[Split, Share] | None = None
    """Pool all loaded splits, shuffle with `seed`, and cut into these fractions (sum at most 1)."""
    seed: int = 0
    """Seed of shuffling for `fractions` and of sampling for `limits`."""
    limits: dict[Split, PositiveInt] = Field(default_factory=dict)
    """At most this many examples of a split, sampled with `seed`."""
    drop_empty: bool = False
    """Leave out rows whose text is empty instead of refusing them; the table tells how many."""
    sample: dict[Split, Share] = Field(default_factory=dict)
    """This share of a split's examples, sampled with `seed` (R3: 3 % of MultiNLI)."""


class Task(InputRecord):
    """What the examples ask of the model; each task file adds its own options."""

    name: str
    """Which task; one of the files in `tasks/`."""
    data: DataSpec
    """Where the examples come from."""
    max_length: Annotated[int, Field(ge=8, le=1_000_000)] = 512
    """Longest sequence in tokens; longer texts are cut at the end (prompts: at the front)."""


class Method(InputRecord):
    """How the model is trained; each method file adds its own options."""

    name: str
    """Which method; one of the files in `methods/`."""


class Train(InputRecord):
    """Optimisation; fields and values bear the names of Hugging Face `TrainingArguments`."""

    global_batch_size: PositiveInt = 16
    """Examples per optimizer step over all ranks; the plan splits it into micro-batches."""
    per_device_train_batch_size: PositiveInt | Auto = "auto"
    """Micro-batch: examples per rank and forward pass; `auto` lets the plan choose."""
    num_train_epochs: Annotated[float, Field(gt=0, le=1_000_000)] = 3.0
    """Passes over the training split."""
    max_steps: Annotated[int, Field(ge=-1)] = -1
    """Stop after this many optimizer steps; -1: by epochs."""
    learning_rate: Annotated[float, Field(gt=0, lt=10)] = 5e-5
    """Peak learning rate."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"
    ] = "linear"
    """Learning-rate schedule."""
    warmup_steps: Annotated[float, Field(ge=0)] = 0
    """Steps of linear warm-up; below 1, a share of all steps."""
    weight_decay: Annotated[float, Field(ge=0, lt=10)] = 0.0
    """Decoupled weight decay (AdamW)."""
    adam_beta1: Fraction = 0.9
    """AdamW's first decay rate."""
    adam_beta2: Fraction = 0.999
    """AdamW's second decay rate."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: NonNegative = 1.0
    """Gradient clipping by global norm; 0 turns it off."""
    label_smoothing_factor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing."""
    optim: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_bnb_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
    ] = "adamw_torch"
    """Optimizer."""
    bf16: bool | Auto = "auto"
    """bfloat16 mixed precision; `auto`: where the hardware has it."""
    fp16: bool | Auto = "auto"
    """float16 with loss scaling; `auto`: on GPUs without bfloat16."""
    gradient_checkpointing: bool | Auto = "auto"
    """Recompute activations in the backward pass; `auto`: only where it does not fit without."""
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = "random"
    """Order of the training examples; a step's are the same on any number of ranks."""
    packing: bool | Auto = "auto"
    """Put the examples of a micro-batch into one row without padding: the same loss and gradients
    in less time, and fewer, fuller micro-batches. `auto`: where task, method and model allow it."""
    eval_strategy: Literal["no", "epoch", "steps"] = "epoch"
    """When the validation split is scored during training."""
    eval_steps: PositiveInt | None = None
    """Steps between validations, for `eval_strategy: steps`."""
    save_strategy: Literal["no", "epoch", "steps"] = "no"
    """When checkpoints are written."""
    save_steps: PositiveInt = 500
    """Steps between checkpoints, for `save_strategy: steps`."""
    save_total_limit: PositiveInt | None = 1
    """Checkpoints kept."""
    load_best_model_at_end: bool = False
    """End with the checkpoint that scored best on `metric_for_best_model`."""
    metric_for_best_model: OneLine | None = None
    """Metric that decides which checkpoint is best, for example `accuracy`."""
    logging_steps: PositiveInt = 10
    """Steps between lines of metrics.jsonl."""
    dataloader_num_workers: Annotated[int, Field(ge=0, le=64)] = 0
    """Data-loading processes per rank."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of initial weights, order and dropout."""


class Evaluation(InputRecord):
    """How the finished model is scored."""

    split: Literal["validation", "test"] = "test"
    """The split whose metrics go into the results table."""
    per_device_eval_batch_size: PositiveInt | Auto = "auto"
    """Examples per rank and forward pass when scoring; of prompts, as many as have the tokens of so
    many of `max_length`."""
    before: bool = False
    """Also score the model before training, for a before/after comparison."""


class Resources(InputRecord):
    """What the run may take from the cluster; `auto` lets the plan choose what fits."""

    nodes: PositiveInt | Auto = "auto"
    """Number of nodes."""
    gpus_per_node: PositiveInt | Auto = "auto"
    """Ranks per node, one for each GPU; on a cluster without GPUs, ranks per node."""
    time_min: PositiveInt | Auto = "auto"
    """Time limit in minutes."""
    partition: SlurmWord | None = None
    """Partition, where the profile offers several."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] | Auto = "auto"
    """DeepSpeed ZeRO stage; 0 is plain data parallelism."""
    offload_optimizer: Offload | Auto = "auto"
    """Where ZeRO keeps the optimizer's states."""
    offload_param: Offload | Auto = "auto"
    """Where ZeRO-3 keeps the parameters between uses."""
    checkpoint_min: Annotated[float, Field(ge=0, le=100_000)] | Auto = "auto"
    """Minutes between checkpoints that are only there to go on from after a failure; `auto`: by
    what a save takes and how often nodes fail; 0: none but those before a time limit or a
    preemption. `train.save_strategy` is apart from them, for those that you want to keep."""


def _auto_resources(value: Any) -> Any:
    """`resources: auto` stands for every default."""
    return {} if value == "auto" else value


# `list` is a field of Sweep and hides the type of that name there, hence these.
_Values = list[JsonValue]
_Points = list[dict[str, JsonValue]]
_Seeds = Annotated[list[int], Field(max_length=1000)]


class Sweep(InputRecord):
    """Several runs from one recipe; `grid`, `zip`, `list` and `seeds` multiply each other."""

    grid: dict[str, _Values] = Field(default_factory=dict)
    """Dotted field to values; every combination is run."""
    zip: dict[str, _Values] = Field(default_factory=dict)
    """Dotted field to values of equal number; the first of each, the second of each, …"""
    list: _Points = Field(default_factory=lambda: [])
    """Points written out, each a mapping from dotted field to value."""
    seeds: _Seeds = Field(default_factory=lambda: [])
    """Repeats with these values of `train.seed`; the table shows mean ± spread."""


class Baseline(InputRecord):
    """What others reported for the same experiment; shown beside ours, never used."""

    source: OneLine
    """Where the numbers come from."""
    metrics: dict[OneLine, float] = Field(default_factory=dict)
    """Metric to value, on the scale of our metric (accuracy .9382, not 93.82)."""
    outcome: OneLine | None = None
    """What happened instead of a number, for example `out of memory`."""


class Recipe(InputRecord):
    """One experiment: what to train, on what, how, and what others reported."""

    name: Name
    """Name of the run folder and the job: lower-case letters, digits, `_` and `-`."""
    description: str = ""
    """A line for people."""
    model: ModelSpec
    """The model."""
    task: Task
    """The task and its data."""
    method: Method
    """The training method."""
    train: Train = Field(default_factory=Train)
    """Optimisation."""
    evaluation: Evaluation = Field(default_factory=Evaluation)
    """Scoring."""
    resources: Annotated[
        Resources, BeforeValidator(_auto_resources, json_schema_input_type=Resources | Auto)
    ] = Field(default_factory=Resources)
    """What the run may take from the cluster; the word `auto` for all defaults."""
    sweep: Sweep | None = None
    """Several runs from this recipe, submitted as one job array."""
    baseline: Baseline | None = None
    """Numbers that others reported."""
