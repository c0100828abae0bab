"""Types of traced memory: samples, segments, steps."""

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
"""What a tensor is counted as; the last one is that of all ranks together."""


PHASES = ("forward", "backward", "optimizer")
"""Parts of a step by their first word: what is there beside the trace differs between them."""


Sizes = tuple[int, ...]
"""Bytes alive of each kind."""


Sample = tuple[Sizes, int]
"""What is alive at one moment, and how many of ZeRO-3's events were before it in its part of the
step; negative: during that event."""


Segments = dict[str, list[Sample]]
"""Part of the step to its moments, in order."""


class TracedStep(Record):
    """Everything that the memory of a step depends on, besides the micro-batch."""

    model: ModelSpec
    """The model."""
    task: TrainedTask
    """The task: head, loss and sequence length."""
    method: AnyMethod
    """The method."""
    precision: Precision
    """Compute precision."""
    optim: str
    """Optimizer."""
    zero_stage: int
    """DeepSpeed ZeRO stage; 0 is without DeepSpeed."""
    zero: ZeroSizes | None = None
    """Sizes of its buckets; None without DeepSpeed."""
    checkpointing: bool
    """Whether layers are recomputed."""
    loss_chunks: int = 1
    """Parts in which the loss is computed."""
    single: bool
    """Whether a micro-batch is one example, which some kernels treat otherwise."""
    padded: bool
    """Whether the examples of a batch differ in length, so that attention takes a mask."""
    packed: bool = False
    """Whether those of a micro-batch share a row when training, where none does."""
    accelerator: str
    """`cuda` or `cpu`."""
    flash_attention: bool = False
    """Whether the GPU has flash attention (compute capability 8.0 on)."""
    threads: int = 1
    """CPU threads of a rank."""
    labelled_tokens: int | None = None
    """Tokens of an example that carry a loss; None: all, the most there can be."""


class LinearBytes(StoredPart):
    """A moment of the step: bytes of each kind, affine in the micro-batch."""

    part: str
    """Part of the step."""
    fixed: list[int]
    """Bytes that do not depend on the micro-batch, by kind."""
    each: list[int]
    """Bytes for each example, by kind."""

    @property
    def phase(self) -> str:
        """The first word of the part."""
        return self.part.partition(" ")[0]

    def at(self, micro_batch: int, share: float = 1.0) -> list[int]:
        """Bytes of each kind on a rank that holds this share of the shards."""
        found = [a + b * micro_batch for a, b in zip(self.fixed, self.each, strict=True)]
        return [*found[:-1], int(found[-1] * share)]


class StepMemory(StoredRecord):
    """The moments of a step that are the largest for some micro-batch."""

    training: list[LinearBytes]
    """Moments of an optimizer step."""
    evaluation: list[LinearBytes]
    """Moments of scoring a batch."""

    def accumulating(self) -> StepMemory:
        """The same step with the gradients of an earlier micro-batch there from the start.

        A gradient is then added to what is there, and goes; else it stays. So all of them take the
        place of those that are there so far.
        """
        place = KINDS.index("gradients")
        every = max(line.fixed[place] for line in self.training)
        training = [
            line.model_copy(
                update={"fixed": [*line.fixed[:place], every, *line.fixed[place + 1 :]]}
            )
            for line in self.training
        ]
        return self.model_copy(update={"training": training})

    def evaluation_bytes(self, batch: int) -> int:
        """The most memory while a batch is scored."""
        return max(sum(line.at(batch)) for line in self.evaluation)


@dataclass(frozen=True)
class Traces:
    """What small traces of a step told."""

    parts: dict[tuple[int, int], Segments]
    """Depth and micro-batch to what is alive."""
    batches: list[int]
    """The micro-batches: one, or two that a line goes through."""
    layers: int
    """The model's true depth."""
    period: int
    """Layers after which their types repeat."""
    width: int
    """Bytes of a gathered element."""
    order: zero3_schedule.ModuleSchedule | None
    """ZeRO-3's events in the deepest trace."""


class PromptBatch(Record):
    """Everything that the memory of a batch depends on."""

    model: ModelSpec
    """The model."""
    task: FewShot
    """How it is asked."""
    method: AnyMethod
    """Whether it is in 4 bits."""
    precision: Precision
    """Compute precision."""
    accelerator: str
    """`cuda` or `cpu`."""
    prompts: int
    """Prompts of `max_length` that it may hold, B."""


class BatchMemory(StoredRecord):
    """What a forward pass of a batch takes, beside weights and the shared cache."""

    activations: int
    """Bytes at most, whatever is behind the last layer left out."""
    dequantised: int
    """What of these are 4-bit weights on their way through a matrix product."""
    logits: int
    """Bytes at most behind the last layer, beyond what the activations took, which have gone."""
    token: int
    """Bytes of keys and values of a token, in all layers."""
    copies: bool
    """Whether each row has a copy of what all share."""
