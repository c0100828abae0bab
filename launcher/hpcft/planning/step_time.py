"""Predicts the time of an optimizer step: compute, communication and offloading.

P is all parameters, T the trained ones, N the ranks on n nodes with r each, L the layers, H the
width, V the outputs per position, B the micro-batch, S the sequence in tokens, A the micro-batches
per step. Where rows are at hand, S is the mean length that micro-batches are padded to; else every
sequence counts as long as the recipe allows. No two parts of a step are taken to overlap, though
DeepSpeed overlaps: the estimate errs on the long side.
"""

from __future__ import annotations

from hpcft.core.records import Layout, ModelFacts, StepTime
from hpcft.methods.base import COMPUTE_BYTES
from hpcft.planning.hardware import Rates
from hpcft.planning.inputs import PlanInputs

# A layer forward and backward is about 150 kernels that Python starts one by one at 10 to 15 µs:
# tiny micro-batches take this long whatever the GPU.
LAYER_OVERHEAD_S = 0.002
# On a CPU that was measured: a step of the Trainer takes as long as this many of the measured
# layers, and a real layer as long as so many; ZeRO-3's hooks and gloo's collectives make it longer.
# Seen on two cores, where a layer took 1.1 ms: 18 ms a step for the quickstart with two layers in
# plain data parallelism, 74 ms under ZeRO-3, and 229 ms with six layers.
CORE_STEP_LAYERS = 6.0
CORE_LAYER_FACTOR = 2.5
CORE_ZERO3_FACTOR = 30.0
# «39 % more training runtime» with 4-bit weights, which are dequantised for every use (Raschka
# 2023, «Practical Tips for Finetuning LLMs Using LoRA»).
QUANTISED_SLOWDOWN = 1.39
# A hop of a ring within or between nodes, start of the kernel included.
HOP_S = 10e-6
# Adam on the host: weight, gradient and both moments in fp32 are read (16), three of them written
# (12), and the 16-bit weight (2).
CPU_ADAM_BYTES = 30
# fp32 weight and moments, each way (ZeRO-Infinity, arXiv:2104.07857, section 3).
NVME_STATES_BYTES = 12


def predict_step_time(inputs: PlanInputs, layout: Layout) -> StepTime:
    """Returns the predicted time of one optimizer step, or of one batch that is scored."""
    rates = inputs.rates(layout)
    passes = 1.0 if inputs.method.trains else 0.5  # weights come forward and backward, or forward
    offload_s = passes * _offload_s(inputs, layout, rates) if inputs.on_gpu else 0.0
    step = StepTime(
        compute_s=_compute_s(inputs, layout, rates),
        communication_s=passes * _communication_s(inputs, layout, rates),
        offload_s=offload_s,
    )
    return _with_generation(step, inputs, layout)


def _with_generation(step: StepTime, inputs: PlanInputs, layout: Layout) -> StepTime:
    """Returns a step's time with that of the tokens generated after it, one pass for each."""
    tokens = inputs.recipe.task.generated_tokens
    if not tokens:
        return step
    passes = 1 + tokens
    return StepTime(
        compute_s=step.compute_s + tokens * overhead_s(inputs, layout),
        communication_s=passes * step.communication_s,
        offload_s=passes * step.offload_s,
    )


# ---------------------------------------------------------------- compute


def forward_flops(facts: ModelFacts, tokens: float, sequence_tokens: float) -> float:
    """Returns the FLOPs of a forward pass.

    They are 2 for each token and multiplied parameter, and those of attention. Kaplan et al. 2020
    (arXiv:2001.08361, table 1): 2·P + 2·L·S·H for a causal mask; without one the two products Q·K
    and A·V take 4·L·S·H. Attention is counted in full: a padded batch has a mask that most kernels
    do not use to skip work. The output layer is among the parameters.

    Args:
        facts: the model.
        tokens: tokens of all sequences.
        sequence_tokens: length of a sequence, S.
    """
    multiplied = facts.parameters.total - facts.parameters.embedding_parameters
    return tokens * (2 * multiplied + _attention_flops(facts, sequence_tokens))


def _attention_flops(facts: ModelFacts, sequence_tokens: float) -> float:
    """Returns the FLOPs of attention for each token of a forward pass."""
    return 4 * facts.layers * sequence_tokens * facts.hidden_size


def micro_batch_flops(inputs: PlanInputs, layout: Layout) -> float:
    """Returns the FLOPs of a micro-batch: forward, again where recomputed, and backward.

    Backward passes 2·P back through the layers (and attention twice) and forms 2·T of gradients:
    6·P in all for full fine-tuning, 8·P with checkpointing, 4·P for adapters. Nothing passes
    through a frozen base below a trained head.
    """
    facts, p, length = inputs.facts, inputs.facts.parameters, inputs.padded_tokens(layout)
    tokens = layout.per_device_train_batch_size * length
    multiplied = p.total - p.embedding_parameters
    flops = forward_flops(facts, tokens, length) * (1 + layout.gradient_checkpointing)
    if not inputs.method.trains:
        return flops
    if inputs.method.saves_adapter or p.trainable == p.total:
        flops += tokens * (2 * multiplied + 2 * _attention_flops(facts, length))
    flops += tokens * 2 * min(p.trainable, multiplied)
    if layout.loss_chunks > 1:
        flops += tokens * 2 * facts.hidden_size * facts.logits_width  # logits are made twice
    return flops


def _compute_s(inputs: PlanInputs, layout: Layout, rates: Rates) -> float:
    flops = micro_batch_flops(inputs, layout)
    slowdown = QUANTISED_SLOWDOWN if inputs.facts.parameters.quantised else 1.0
    flops_s = layout.gradient_accumulation_steps * slowdown * flops / rates.flops
    return flops_s + overhead_s(inputs, layout)


def overhead_s(inputs: PlanInputs, layout: Layout) -> float:
    """Returns the part of the compute time that goes into starting kernels."""
    layers, micro_batches = inputs.facts.layers, layout.gradient_accumulation_steps
    if inputs.core is None:
        return micro_batches * layers * LAYER_OVERHEAD_S
    each = CORE_ZERO3_FACTOR if layout.zero_stage == 3 else CORE_LAYER_FACTOR
    return (CORE_STEP_LAYERS + each * micro_batches * layers) * inputs.core.layer_s


# ---------------------------------------------------------------- communication


def _communication_s(inputs: PlanInputs, layout: Layout, rates: Rates) -> float:
    """Returns the time between ranks (Rajbhandari et al. 2020, arXiv:1910.02054, section 7).

    Plain data parallelism all-reduces fp32 gradients once a step, which is a reduce-scatter and an
    all-gather. ZeRO-1 and 2 reduce-scatter gradients (2 for every micro-batch) and all-gather the
    new weights; ZeRO-3 all-gathers all weights forward and backward and reduce-scatters gradients
    in every micro-batch. Checkpointing adds nothing: a layer that is gathered to be recomputed
    stays for its backward pass (DeepSpeed's stage3_max_reuse_distance).
    """
    if layout.world_size == 1:
        return 0.0
    p, layers, width = inputs.facts.parameters, inputs.facts.layers, COMPUTE_BYTES[inputs.precision]
    micro_batches, stage = layout.gradient_accumulation_steps, layout.zero_stage
    gradients_s = _collectives_s(width * p.trainable, layers, layout, rates)
    if stage == 0:
        return 2 * _collectives_s(4 * p.trainable, layers, layout, rates)
    if stage == 1:
        return 2 * gradients_s
    if stage == 2:
        return (micro_batches + 1) * gradients_s
    weights_s = _collectives_s(width * (p.total - p.quantised), layers, layout, rates)
    return micro_batches * (2 * weights_s + gradients_s)


def _collectives_s(size_bytes: float, collectives: int, layout: Layout, rates: Rates) -> float:
    """Returns the time to all-gather or reduce-scatter that many bytes in so many collectives.

    In two steps, as NCCL does: over the network each node takes in (n − 1)/n of the bytes, its GPUs
    sharing the adapters, and within a node each GPU (r − 1)/r over its own link.
    """
    n, r = layout.nodes, layout.ranks_per_node
    between_s = size_bytes * (n - 1) / n / rates.network
    within_s = size_bytes * (r - 1) / r / rates.link
    return between_s + within_s + collectives * (n - 1 + r - 1) * HOP_S


# ---------------------------------------------------------------- offload


def _offload_s(inputs: PlanInputs, layout: Layout, rates: Rates) -> float:
    """Returns the time for states and weights that are not on the GPU.

    Optimizer (ZeRO-Offload, arXiv:2101.06840, section 4): each micro-batch's gradients go down and
    once a step the new weights come up, T/N a rank over its link; Adam runs in the host's memory.
    On NVMe its states are read and written too. Parameters: P/N a rank come up (from NVMe first
    into the host) before each of the two gathers of a micro-batch.
    """
    if layout.offload_optimizer == layout.offload_param == "none":
        return 0.0
    p, width = inputs.facts.parameters, COMPUTE_BYTES[inputs.precision]
    micro_batches, ranks = layout.gradient_accumulation_steps, layout.world_size
    gradients_s = width * p.trainable / ranks / rates.host_link
    adam_s = CPU_ADAM_BYTES * p.trainable / layout.nodes / rates.host_memory
    total_s = (micro_batches + 1) * gradients_s + adam_s
    if layout.offload_optimizer == "nvme":
        total_s += 2 * NVME_STATES_BYTES * p.trainable / layout.nodes / rates.disk
    if layout.offload_param != "none":
        total_s += 2 * micro_batches * width * p.total / ranks / rates.host_link
    if layout.offload_param == "nvme":
        total_s += (2 * micro_batches + 1) * width * p.total / layout.nodes / rates.disk
    return total_s
