"""Plan: the layout of a run on a cluster, with predicted memory and time."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from hpcft.core.records.base import Offload, Precision, StoredPart, StoredRecord, renamed_from


class ParameterCount(StoredPart):
    """Parameters of the model with its head and method, counted on the meta device."""

    total: int
    """Number of all parameters, with adapters and head; a tied weight counts once."""
    trainable: int
    """Number of parameters that the optimizer updates."""
    added: int
    """Number of parameters that the method and the head add to the pretrained model."""
    largest_layer: int
    """Number of parameters of the largest module that ZeRO-3 gathers at once."""
    layer: int = 0
    """Number of parameters of the largest decoder or encoder layer."""
    trained_tensors: list[int] = Field(default_factory=list)
    """Number of parameters of each trained matrix, in order."""
    trained_vectors: list[int] = Field(default_factory=list)
    """Number of parameters of each trained bias and norm, in order."""
    largest_trained: int = 0
    """Number of parameters of the largest trained tensor."""
    quantised: int = 0
    """Number of weights that the method stores in 4 bits."""
    embedding_parameters: int = Field(
        default=0, validation_alias=renamed_from("looked_up", "embedding_parameters")
    )
    """Number of parameters in embedding tables, which are looked up and never multiplied. A table
    that is tied to the output layer is multiplied there, so it does not count."""


class ModelFacts(StoredPart):
    """Facts of a model that planning needs, all from its configuration."""

    model_type: str
    """Model type of `transformers`."""
    parameters: ParameterCount
    """Exact parameter counts."""
    layers: int
    """Number of decoder or encoder layers, L."""
    hidden_size: int
    """Hidden size, H."""
    vocab_size: int
    """Vocabulary size, V."""
    logits_width: int
    """Outputs per position in the loss: V for a language model, the number of labels for a head."""
    max_positions: int | None = None
    """Longest sequence that the model accepts, in tokens; None without a limit."""
    supports_chunked_loss: bool = Field(
        default=False, validation_alias=renamed_from("loss_in_parts", "supports_chunked_loss")
    )
    """Whether logits and loss can be computed in chunks: true for a language model whose logits are
    the output layer's own, or soft-capped."""


class MemoryItem(StoredPart):
    """One component of a predicted peak."""

    name: str
    """Name of the component."""
    bytes: int
    """Size in bytes, per GPU or per node."""
    rule: str
    """Formula with its numbers."""


class Layout(StoredPart):
    """Layout of a run over GPUs: everything that the planner may choose."""

    nodes: int
    """Number of nodes."""
    ranks_per_node: int
    """Number of ranks (processes) on each node, one per GPU."""
    per_device_train_batch_size: int
    """Micro-batch size, B: examples per rank and forward pass."""
    gradient_accumulation_steps: int
    """Number of micro-batches per optimizer step and rank."""
    gradient_checkpointing: bool
    """Whether activations are recomputed in the backward pass."""
    zero_stage: int
    """DeepSpeed ZeRO stage; 0 is plain data parallelism without DeepSpeed."""
    offload_optimizer: Offload
    """Place of the optimizer states."""
    offload_param: Offload
    """Place of the parameters between uses."""
    loss_chunks: int = 1
    """Number of chunks in which logits and loss are computed; 1 is all at once."""

    @property
    def world_size(self) -> int:
        """Number of all ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def examples_per_step(self) -> int:
        """Number of examples per step on all ranks: the global batch, or the scoring batch."""
        micro_batches = self.gradient_accumulation_steps * self.world_size
        return self.per_device_train_batch_size * micro_batches

    @property
    def recomputes(self) -> bool:
        """Whether modules run again in the backward pass: the layers or the output layer."""
        return self.gradient_checkpointing or self.loss_chunks > 1


class ZeroSizes(StoredPart):
    """Sizes in DeepSpeed's ZeRO configuration, in elements."""

    reduce_bucket_elements: int
    """Number of gradient elements that are reduced together."""
    prefetch_bucket_elements: int
    """Number of parameter elements that ZeRO-3 gathers ahead of their use."""
    persistence_threshold_elements: int
    """Size up to which ZeRO-3 never shards a parameter."""
    max_live_elements: int
    """Number of gathered elements above which ZeRO-3 gathers nothing ahead."""
    max_reuse_distance_elements: int
    """Distance to the next use, in elements, within which ZeRO-3 keeps parameters gathered."""
    sub_group_elements: int
    """Number of elements of a rank's shard that ZeRO-3's optimizer updates at once."""


class StepTime(StoredPart):
    """Predicted time of one optimizer step; assumes that nothing overlaps."""

    compute_s: float
    """Seconds of forward, backward and recomputation of all micro-batches."""
    communication_s: float
    """Seconds of collectives between ranks: gather, reduce, scatter."""
    offload_s: float
    """Seconds of transfers between GPU, host and disk, and of the optimizer on the host."""

    @property
    def total_s(self) -> float:
        """Seconds of the whole step."""
        return self.compute_s + self.communication_s + self.offload_s


class RunTime(StoredPart):
    """Predicted time of a run; fields that need the number of examples are None without it."""

    step: StepTime
    """Predicted time of one optimizer step."""
    steps: int | None
    """Number of optimizer steps; None if the number of examples is not known before the start."""
    start_s: float
    """Seconds to start Python on all ranks and to load the weights."""
    evaluation_s: float | None
    """Seconds of evaluation during and after training; None if the split's size is not known."""
    saving_s: float
    """Seconds to write checkpoints and the model."""

    @property
    def run_s(self) -> float | None:
        """Seconds of the whole run; None if its length is not known."""
        if self.steps is None or self.evaluation_s is None:
            return None
        return self.start_s + self.steps * self.step.total_s + self.evaluation_s + self.saving_s


class EvaluatedLayout(StoredPart):
    """A layout that the planner evaluated: its cost, and why it does not fit."""

    layout: Layout
    """Layout that was evaluated."""
    step: StepTime
    """Predicted time of one optimizer step."""
    run_s: float | None = None
    """Predicted time of the whole run in seconds; None if its length is unknown."""
    over_limit_s: float = 0.0
    """Seconds by which the run exceeds its longest time limit; 0 within it or if unknown."""
    gpu_peak_bytes: int | None = None
    """Predicted peak memory per rank, in bytes; None if the model states alone are too large."""
    why_infeasible: str = Field(
        default="", validation_alias=renamed_from("obstacle", "why_infeasible")
    )
    """Reason why it does not fit; empty if it fits."""

    @property
    def gpu_hours_per_1000_steps(self) -> float:
        """Predicted GPU hours of 1,000 steps."""
        return self.layout.world_size * self.step.total_s / 3.6

    @property
    def gpu_seconds(self) -> float:
        """Predicted GPU time of the run in seconds; of one example if its length is unknown."""
        layout = self.layout
        if self.run_s is not None:
            return layout.world_size * self.run_s
        examples = layout.per_device_train_batch_size * layout.gradient_accumulation_steps
        return self.step.total_s / examples

    @property
    def cost(self) -> tuple[float, float]:
        """Sort key by which the planner prefers layouts: in time first, then GPU time."""
        return self.over_limit_s, self.gpu_seconds


class Plan(StoredRecord):
    """The plan of a job: its layout, the resources that it needs, and the reasons."""

    recipe: str
    """Name of the recipe."""
    cluster: str
    """Name of the cluster profile."""
    accelerator: Literal["cuda", "cpu"]
    """Device that the ranks compute on."""
    layout: Layout
    """Layout of the run."""
    precision: Precision
    """Compute precision."""
    optim: str
    """Optimizer, one that the device supports."""
    per_device_eval_batch_size: int
    """Examples per rank and forward pass when scoring."""
    facts: ModelFacts
    """Facts of the model."""
    gpu_memory: list[MemoryItem]
    """Predicted peak memory per rank, by component; empty for a fallback."""
    gpu_capacity_bytes: int
    """Memory that a rank may use, in bytes: the GPU without what other processes hold."""
    other_processes_bytes: int = 0
    """Memory that other processes hold on the GPU, in bytes."""
    host_memory: list[MemoryItem]
    """Predicted peak host memory per node, by component; empty for a fallback."""
    host_capacity_bytes: int
    """Host memory of a node that a job may use, in bytes."""
    cpus_per_task: int
    """Number of CPU cores per rank."""
    mem_mib: int
    """Host memory to request per node, in MiB."""
    time_min: int
    """Time limit to request, in minutes."""
    signal_delay_s: int = 60
    """Seconds before the time limit at which Slurm signals the job, so that it can save."""
    time: RunTime | None = None
    """Predicted time, from which the time limit follows; None for a fallback."""
    efficiency: float | None = None
    """Share of the peak FLOP/s that the predicted time assumes; None for a fallback."""
    overhead_s: float = 0.0
    """Seconds of a step's compute time that go into starting kernels."""
    tokens_per_step: int = 0
    """Tokens of an optimizer step, without padding, that the predicted time assumes."""
    loading_s: float = 0.0
    """Seconds that starting and loading may take before a rank counts as hanging."""
    saving_s: float = 0.0
    """Seconds that saving may take before a rank counts as hanging."""
    disk: list[MemoryItem] = Field(default_factory=list)
    """Predicted size of the files that the run writes, by component."""
    node_disk_bytes: int = 0
    """Disk space on each node that offloading takes, in bytes."""
    node_disk_capacity_bytes: int = 0
    """Disk space on each node, in bytes."""
    partition: str | None = None
    """Partition to submit to; None for the site's default."""
    warnings: list[str] = Field(default_factory=list)
    """Warnings for the user before submitting."""
    reasons: list[str] = Field(default_factory=list)
    """Reasons for this layout."""
    next_best: EvaluatedLayout | None = None
    """Cheapest layout of another kind that fits too; None if there is none."""
    cheaper_infeasible: list[EvaluatedLayout] = Field(
        default_factory=list, validation_alias=renamed_from("fell_out", "cheaper_infeasible")
    )
    """Cheaper kinds of layout that do not fit even at their smallest micro-batch."""
    recovery_number: int = 0
    """Number of the recovery that it follows; 0 for the plan of the submission."""
    ds_config: dict[str, Any] | None = None
    """DeepSpeed configuration; None without DeepSpeed."""

    @property
    def gpu_peak_bytes(self) -> int | None:
        """Predicted peak memory per rank, in bytes; None for a fallback."""
        return sum(item.bytes for item in self.gpu_memory) if self.gpu_memory else None

    @property
    def gpu_hours(self) -> float | None:
        """Predicted GPU hours of the run; None if its length is not known."""
        run_s = self.time.run_s if self.time else None
        return None if run_s is None else self.layout.world_size * run_s / 3600

    @property
    def gpu_hours_per_1000_steps(self) -> float | None:
        """Predicted GPU hours of 1,000 steps."""
        return self.layout.world_size * self.time.step.total_s / 3.6 if self.time else None

    @property
    def host_peak_bytes(self) -> int | None:
        """Predicted peak host memory per node, in bytes; None for a fallback."""
        return sum(item.bytes for item in self.host_memory) if self.host_memory else None
