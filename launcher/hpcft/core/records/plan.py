"""Plan: how a recipe fits a cluster, number by number."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from hpcft.core.records.base import Offload, Precision, StoredPart, StoredRecord, renamed_from


class ParameterCount(StoredPart):
    """Parameters of the model with its head and method, counted on the meta device."""

    total: int
    """All parameters, adapters and head included; a tied weight counts once."""
    trainable: int
    """Those that the optimizer updates."""
    added: int
    """Those that the method and the head add to the pretrained model."""
    largest_layer: int
    """Parameters of the largest module that ZeRO-3 gathers at once."""
    layer: int = 0
    """Parameters of a decoder or encoder layer, the largest."""
    trained_tensors: list[int] = Field(default_factory=list)
    """Those of each trained matrix, in order."""
    trained_vectors: list[int] = Field(default_factory=list)
    """Those of each trained bias and norm, in order."""
    largest_trained: int = 0
    """Those of the largest tensor that is trained."""
    quantised: int = 0
    """Weights that the method holds in 4 bits."""
    embedding_parameters: int = Field(
        default=0, validation_alias=renamed_from("looked_up", "embedding_parameters")
    )
    """Those of embedding tables: looked up, never multiplied. A table that is tied to the output
    layer is multiplied there and does not count."""


class ModelFacts(StoredPart):
    """What planning has to know of a model, all from its configuration."""

    model_type: str
    """`transformers` model type."""
    parameters: ParameterCount
    """Exact counts."""
    layers: int
    """Decoder or encoder layers, L."""
    hidden_size: int
    """Width, H."""
    vocab_size: int
    """Vocabulary, V."""
    logits_width: int
    """Outputs per position that the loss sees: V for a language model, the labels for a head."""
    max_positions: int | None = None
    """Longest sequence that the model accepts, in tokens."""
    supports_chunked_loss: bool = Field(
        default=False, validation_alias=renamed_from("loss_in_parts", "supports_chunked_loss")
    )
    """Whether logits and loss can be computed in parts: for a language model whose logits are what
    its output layer gives, or soft-capped."""


class MemoryItem(StoredPart):
    """One component of a predicted peak."""

    name: str
    """What takes the memory."""
    bytes: int
    """How much, per GPU or per node."""
    rule: str
    """The formula with its numbers."""


class Layout(StoredPart):
    """How a run is laid out over GPUs: everything that the planner may choose."""

    nodes: int
    """Nodes."""
    ranks_per_node: int
    """Ranks (processes) on each node, one per GPU."""
    per_device_train_batch_size: int
    """Micro-batch, B."""
    gradient_accumulation_steps: int
    """Micro-batches per optimizer step and rank."""
    gradient_checkpointing: bool
    """Whether activations are recomputed."""
    zero_stage: int
    """DeepSpeed ZeRO stage; 0 is plain data parallelism without DeepSpeed."""
    offload_optimizer: Offload
    """Where the optimizer's states are."""
    offload_param: Offload
    """Where the parameters are between uses."""
    loss_chunks: int = 1
    """Parts in which logits and loss are computed, one after the other; 1 is all at once."""

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.ranks_per_node

    @property
    def examples_per_step(self) -> int:
        """Examples of a step on all ranks: the global batch, or what is scored at once."""
        micro_batches = self.gradient_accumulation_steps * self.world_size
        return self.per_device_train_batch_size * micro_batches

    @property
    def recomputes(self) -> bool:
        """Whether modules run again in the backward pass: layers, or the output layer."""
        return self.gradient_checkpointing or self.loss_chunks > 1


class ZeroSizes(StoredPart):
    """Sizes that DeepSpeed is given, in elements."""

    reduce_bucket_elements: int
    """Gradients that are reduced together."""
    prefetch_bucket_elements: int
    """ZeRO-3: parameters that are gathered ahead of their use."""
    persistence_threshold_elements: int
    """ZeRO-3: parameters up to this size are whole at all times."""
    max_live_elements: int
    """ZeRO-3: nothing is gathered ahead while this much is whole."""
    max_reuse_distance_elements: int
    """ZeRO-3: parameters that are used again within this distance stay whole."""
    sub_group_elements: int
    """ZeRO-3: elements of a rank's shard that its optimizer goes over at once."""


class StepTime(StoredPart):
    """Predicted time of one optimizer step; nothing is taken to overlap."""

    compute_s: float
    """Forward, backward and recomputation of all micro-batches."""
    communication_s: float
    """Gathering, reducing and scattering between ranks."""
    offload_s: float
    """Between GPU, host and disk, and the optimizer on the host."""

    @property
    def total_s(self) -> float:
        """The whole step."""
        return self.compute_s + self.communication_s + self.offload_s


class RunTime(StoredPart):
    """Predicted time of a run; what depends on the number of examples is None where that is."""

    step: StepTime
    """One optimizer step."""
    steps: int | None
    """Optimizer steps of the run; None: the number of examples is not known before it starts."""
    start_s: float
    """Starting Python on all ranks and reading the weights."""
    evaluation_s: float | None
    """Scoring during and after training."""
    saving_s: float
    """Writing checkpoints and the model."""

    @property
    def run_s(self) -> float | None:
        """The whole run."""
        if self.steps is None or self.evaluation_s is None:
            return None
        return self.start_s + self.steps * self.step.total_s + self.evaluation_s + self.saving_s


class EvaluatedLayout(StoredPart):
    """A layout beside the chosen one: what it costs, and what is in its way."""

    layout: Layout
    """The layout."""
    step: StepTime
    """Predicted time of one optimizer step."""
    gpu_peak_bytes: int | None
    """Predicted peak per rank; None where the model states alone exceed what there is."""
    why_infeasible: str = Field(validation_alias=renamed_from("obstacle", "why_infeasible"))
    """Why it does not fit; empty when it does."""

    @property
    def gpu_hours_per_1000_steps(self) -> float:
        """GPU hours of 1,000 steps."""
        return self.layout.world_size * self.step.total_s / 3.6


class Plan(StoredRecord):
    """Exactly what a job will run: the layout, what it needs, and why."""

    recipe: str
    """Name of the recipe."""
    cluster: str
    """Name of the profile."""
    accelerator: Literal["cuda", "cpu"]
    """What the ranks compute on."""
    layout: Layout
    """How the run is laid out."""
    precision: Precision
    """Compute precision."""
    optim: str
    """Optimizer that the device supports."""
    per_device_eval_batch_size: int
    """Examples per rank and forward pass when scoring."""
    facts: ModelFacts
    """The model."""
    gpu_memory: list[MemoryItem]
    """Predicted peak per rank, by component."""
    gpu_capacity_bytes: int
    """What one rank may use: the GPU without what other processes hold."""
    other_processes_bytes: int = 0
    """What other processes hold on the GPU."""
    host_memory: list[MemoryItem]
    """Predicted peak host memory per node, by component."""
    host_capacity_bytes: int
    """What a node offers."""
    cpus_per_task: int
    """CPU cores per rank."""
    mem_mib: int
    """Host memory to ask for per node, in MiB."""
    time_min: int
    """Time limit to ask for."""
    signal_delay_s: int = 60
    """Seconds before the time limit at which the job is signalled, so that it can save."""
    time: RunTime | None = None
    """Predicted time, from which the limit comes; None for a fallback."""
    loading_s: float = 0.0
    """Seconds that starting and loading may take before a rank counts as hanging."""
    saving_s: float = 0.0
    """Seconds that saving may take before a rank counts as hanging."""
    disk: list[MemoryItem] = Field(default_factory=list)
    """Predicted size of what the run writes, by component."""
    node_disk_bytes: int = 0
    """Room that offloading takes on the disk of each node."""
    node_disk_capacity_bytes: int = 0
    """Room on the disk of each node."""
    partition: str | None = None
    """Partition to submit to."""
    warnings: list[str] = Field(default_factory=list)
    """What the user should know before submitting."""
    reasons: list[str] = Field(default_factory=list)
    """Why this layout."""
    next_best: EvaluatedLayout | None = None
    """The cheapest layout of another kind that fits too."""
    cheaper_infeasible: list[EvaluatedLayout] = Field(
        default_factory=list, validation_alias=renamed_from("fell_out", "cheaper_infeasible")
    )
    """Kinds of layout that would be cheaper but do not fit even at their smallest micro-batch."""
    recovery_number: int = 0
    """Number of the recovery that it follows; 0: the plan that the run was submitted with."""
    ds_config: dict[str, Any] | None = None
    """The DeepSpeed configuration; None without DeepSpeed."""

    @property
    def gpu_peak_bytes(self) -> int | None:
        """Predicted peak per rank; None for a fallback, whose layout nobody has predicted."""
        return sum(item.bytes for item in self.gpu_memory) if self.gpu_memory else None

    @property
    def gpu_hours(self) -> float | None:
        """Predicted GPU hours of the run; None where its length is not known."""
        run_s = self.time.run_s if self.time else None
        return None if run_s is None else self.layout.world_size * run_s / 3600

    @property
    def gpu_hours_per_1000_steps(self) -> float | None:
        """Predicted GPU hours of 1,000 steps."""
        return self.layout.world_size * self.time.step.total_s / 3.6 if self.time else None

    @property
    def host_peak_bytes(self) -> int | None:
        """Predicted peak per node; None for a fallback."""
        return sum(item.bytes for item in self.host_memory) if self.host_memory else None
