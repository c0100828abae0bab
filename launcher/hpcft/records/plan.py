"""Plan: how a recipe fits a cluster, number by number."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from hpcft.records.base import Offload, Precision, Record


class ParameterCount(Record):
    """Parameters of the model with its head and method, counted on the meta device."""

    total: int
    """All parameters, adapters and head included; a tied weight counts once."""
    trainable: int
    """Those that the optimizer updates."""
    added: int
    """Those that the method and the head add to the pretrained model."""
    largest_layer: int
    """Parameters of the largest module that ZeRO-3 gathers at once."""
    quantised: int = 0
    """Weights that the method holds in 4 bits."""


class ModelFacts(Record):
    """What planning has to know of a model, all from its configuration."""

    model_type: str
    """`transformers` model type."""
    parameters: ParameterCount
    """Exact counts."""
    layers: int
    """Decoder or encoder layers, L."""
    hidden_size: int
    """Width, H."""
    intermediate_size: int
    """Width of the feed-forward part, F."""
    attention_heads: int
    """Attention heads."""
    vocab_size: int
    """Vocabulary, V."""
    logits_width: int
    """Outputs per position that the loss sees: V for a language model, the labels for a head."""
    logits_positions: Literal["tokens", "sequence"]
    """Whether there is an output for each token or one for the sequence."""
    max_positions: int | None = None
    """Longest sequence that the model accepts, in tokens."""


class MemoryItem(Record):
    """One component of a predicted peak."""

    name: str
    """What takes the memory."""
    bytes: int
    """How much, per GPU or per node."""
    rule: str
    """The formula with its numbers."""


class Layout(Record):
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

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.ranks_per_node


class Plan(Record):
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
    """What one rank may use."""
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
    partition: str | None = None
    """Partition to submit to."""
    warnings: list[str] = Field(default_factory=list)
    """What the user should know before submitting."""
    reasons: list[str] = Field(default_factory=list)
    """Why this layout."""
    ds_config: dict[str, Any] | None = None
    """The DeepSpeed configuration; None without DeepSpeed."""

    @property
    def gpu_peak_bytes(self) -> int:
        """Predicted peak per rank."""
        return sum(item.bytes for item in self.gpu_memory)

    @property
    def host_peak_bytes(self) -> int:
        """Predicted peak per node."""
        return sum(item.bytes for item in self.host_memory)
