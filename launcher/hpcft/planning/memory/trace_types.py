"""Types of traced memory: kinds of tensors, samples, segments, steps and batches."""

from __future__ import annotations

from dataclasses import dataclass

from hpcft.core.records import ModelSpec, Precision, Record, StoredPart, StoredRecord, ZeroSizes
from hpcft.methods import AnyMethod
from hpcft.planning.memory import zero3_schedule
from hpcft.tasks.base import TrainedTask
from hpcft.tasks.few_shot.task import FewShot

KINDS = (
    "weights", "4-bit weights", "adapters", "gradients", "optimizer states", "activations",
    "dequantised weights", "logits and loss", "ZeRO gathers and buckets", "gradient shards",
)  # fmt: skip
"""Kinds of tensors. The last one counts the shards of all ranks together, the others one rank."""


PHASES = ("forward", "backward", "optimizer")
"""Phases of an optimizer step. A segment's name begins with its phase: `forward 0`."""


Sizes = tuple[int, ...]
"""Live bytes by kind, in the order of `KINDS`."""


Sample = tuple[Sizes, int]
"""Live bytes at one moment of a step, and the number of ZeRO-3 events in its segment so far.

The number is negative while that event (a fetch or a release) is happening."""


Segments = dict[str, list[Sample]]
"""Name of a segment of the step (`forward 0`, `backward head`, …) to its samples in order."""


class TracedStep(Record):
    """Everything but the micro-batch that the memory of a training step depends on."""

    model: ModelSpec
    """The recipe's model."""
    task: TrainedTask
    """The recipe's task: head, loss and sequence length."""
    method: AnyMethod
    """The recipe's method."""
    precision: Precision
    """Compute precision."""
    optim: str
    """Optimizer, as in the recipe; empty under ZeRO, whose optimizer is not traced."""
    zero_stage: int
    """DeepSpeed ZeRO stage; 0 is without DeepSpeed."""
    zero: ZeroSizes | None = None
    """Bucket sizes given to DeepSpeed; None without DeepSpeed."""
    checkpointing: bool
    """Whether activations are recomputed in the backward pass (gradient checkpointing)."""
    loss_chunks: int = 1
    """Number of chunks in which the loss is computed."""
    single_example: bool
    """Whether a micro-batch is one example, for which some kernels work differently."""
    padded: bool
    """Whether the examples of a batch differ in length, so that attention takes a mask."""
    packed: bool = False
    """Whether training packs the examples of a micro-batch into one row, without padding."""
    accelerator: str
    """`cuda` or `cpu`."""
    flash_attention: bool = False
    """Whether the GPU has flash attention (compute capability 8.0 or higher)."""
    threads: int = 1
    """CPU threads of a rank; only the memory benchmark sets another number."""
    labelled_tokens: int | None = None
    """Tokens of an example that carry a loss; None means all, the largest possible number. Only the
    memory benchmark sets it."""


class LinearBytes(StoredPart):
    """Live bytes at one moment of a step, by kind, as a linear function of the micro-batch."""

    segment: str
    """Segment of the step that the moment belongs to, for example `forward 0`."""
    fixed: list[int]
    """Bytes that do not depend on the micro-batch, by kind."""
    per_example: list[int]
    """Bytes per example of the micro-batch, by kind."""

    @property
    def phase(self) -> str:
        """Phase of the step: the first word of the segment's name."""
        return self.segment.partition(" ")[0]

    def at(self, micro_batch: int, share: float = 1.0) -> list[int]:
        """Returns the live bytes by kind on one rank.

        Args:
            micro_batch: examples of the micro-batch.
            share: part of the gradient shards that this rank holds, from 0 to 1.
        """
        sizes = [a + b * micro_batch for a, b in zip(self.fixed, self.per_example, strict=True)]
        return [*sizes[:-1], int(sizes[-1] * share)]


class StepMemory(StoredRecord):
    """Memory of a step: the moments that can be the peak for some micro-batch."""

    training: list[LinearBytes]
    """Moments of an optimizer step."""
    evaluation: list[LinearBytes]
    """Moments of evaluating one batch."""

    def with_accumulation(self) -> StepMemory:
        """Returns the step as it is while gradients of an earlier micro-batch are held.

        The gradients of all trained parameters are then live throughout the step. A new gradient is
        added to the old one in place and freed, so these replace the gradients of the trace.
        """
        place = KINDS.index("gradients")
        gradients = max(line.fixed[place] for line in self.training)
        training = [
            line.model_copy(
                update={"fixed": [*line.fixed[:place], gradients, *line.fixed[place + 1 :]]}
            )
            for line in self.training
        ]
        return self.model_copy(update={"training": training})

    def evaluation_bytes(self, batch: int) -> int:
        """Returns the peak memory of evaluating a batch, in bytes."""
        return max(sum(line.at(batch)) for line in self.evaluation)


@dataclass(frozen=True)
class Traces:
    """Traces of a step at one or two depths and micro-batches."""

    segments: dict[tuple[int, int], Segments]
    """Depth (layers) and micro-batch (examples) of each trace to its samples."""
    micro_batches: list[int]
    """Traced micro-batches: one, or two through which a line is drawn."""
    layers: int
    """Number of layers of the full model."""
    period: int
    """Number of layers after which the layer types repeat."""
    element_bytes: int
    """Bytes of one element that ZeRO-3 gathers."""
    schedule: zero3_schedule.ModuleSchedule | None
    """ZeRO-3's fetches and releases in the deepest trace; None below ZeRO-3."""


class PromptBatch(Record):
    """Everything that the memory of a batch of prompts depends on."""

    model: ModelSpec
    """The recipe's model."""
    task: FewShot
    """The recipe's few-shot task."""
    method: AnyMethod
    """The recipe's method; it says whether the model is in 4 bits."""
    precision: Precision
    """Compute precision."""
    accelerator: str
    """`cuda` or `cpu`."""
    prompts: int
    """Largest number of prompts of `max_length` tokens in the batch."""


class BatchMemory(StoredRecord):
    """Memory of the forward pass of a batch of prompts, without weights and the shared cache."""

    activation_bytes: int
    """Peak bytes of activations up to and including the last layer."""
    dequantised_bytes: int
    """Bytes of `activation_bytes` that are 4-bit weights dequantised for a matrix product."""
    logits_bytes: int
    """Bytes by which the output layer's peak exceeds `activation_bytes`; 0 if it is lower."""
    kv_bytes_per_token: int
    """Bytes of the keys and values of one token, in all layers."""
    copies_prefix: bool
    """Whether every row holds a copy of the keys and values of the shared shots."""
