"""How long an optimizer step takes under a layout: compute, communication, offload.

P is all parameters, T the trained ones, N the ranks on n nodes with r each, L the layers, H the
width, V the outputs per position, B the micro-batch, S the sequence in tokens, A the micro-batches
per step. Every sequence counts as long as the recipe allows and no two parts of a step are taken to
overlap, though data are shorter and DeepSpeed overlaps: the estimate errs on the long side.
"""

from __future__ import annotations

from hpcft.core.records import Cluster, Layout, ModelFacts, Precision, StepTime
from hpcft.methods import AnyMethod
from hpcft.methods.base import COMPUTE_BYTES
from hpcft.planning.hardware import Rates, hardware_rates

# A layer forward and backward is about 150 kernels that Python starts one by one at 10 to 15 µs:
# tiny micro-batches take this long whatever the GPU.
LAYER_OVERHEAD_S = 0.002
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


def predict_step_time(
    facts: ModelFacts,
    method: AnyMethod,
    layout: Layout,
    precision: Precision,
    sequence_tokens: int,
    cluster: Cluster,
) -> StepTime:
    """Predicted time of one optimizer step."""
    reached = hardware_rates(cluster, precision, layout.ranks_per_node)
    passes = 1.0 if method.trains else 0.5  # weights come forward and backward, or forward alone
    return StepTime(
        compute_s=_compute_s(facts, method, layout, sequence_tokens, reached),
        communication_s=passes * _communication_s(facts, layout, precision, reached),
        offload_s=passes * _offload_s(facts, layout, precision, reached)
        if cluster.accelerator == "cuda"
        else 0.0,
    )


# ---------------------------------------------------------------- compute


def forward_flops(facts: ModelFacts, tokens: float, sequence_tokens: int) -> float:
    """FLOPs of a forward pass: 2 for each token and multiplied parameter, and attention.

    Kaplan et al. 2020 (arXiv:2001.08361, table 1): 2·P + 2·L·S·H for a causal mask; without one
    the two products Q·K and A·V take 4·L·S·H. It is counted in full: a padded batch has a mask that
    most kernels do not use to skip work. The output layer is among the parameters.
    """
    multiplied = facts.parameters.total - facts.parameters.embedding_parameters
    return tokens * (2 * multiplied + _attention_flops(facts, sequence_tokens))


def _attention_flops(facts: ModelFacts, sequence_tokens: int) -> float:
    """FLOPs of attention for each token of a forward pass."""
    return 4 * facts.layers * sequence_tokens * facts.hidden_size


def step_flops(facts: ModelFacts, method: AnyMethod, layout: Layout, sequence_tokens: int) -> float:
    """FLOPs of a micro-batch: forward, again where recomputed, and backward.

    Backward passes 2·P back through the layers (and attention twice) and forms 2·T of gradients:
    6·P in all for full fine-tuning, 8·P with checkpointing, 4·P for adapters. Nothing passes
    through a frozen base below a trained head.
    """
    p = facts.parameters
    tokens = layout.per_device_train_batch_size * sequence_tokens
    multiplied = p.total - p.embedding_parameters
    flops = forward_flops(facts, tokens, sequence_tokens) * (1 + layout.gradient_checkpointing)
    if not method.trains:
        return flops
    if method.adapter or p.trainable == p.total:
        flops += tokens * (2 * multiplied + 2 * _attention_flops(facts, sequence_tokens))
    flops += tokens * 2 * min(p.trainable, multiplied)
    if layout.loss_chunks > 1:
        flops += tokens * 2 * facts.hidden_size * facts.logits_width  # logits are made twice
    return flops


def _compute_s(
    facts: ModelFacts, method: AnyMethod, layout: Layout, sequence_tokens: int, reached: Rates
) -> float:
    flops = step_flops(facts, method, layout, sequence_tokens)
    slowdown = QUANTISED_SLOWDOWN if facts.parameters.quantised else 1.0
    flops_s = layout.gradient_accumulation_steps * slowdown * flops / reached.flops
    return flops_s + overhead_s(facts, layout)


def overhead_s(facts: ModelFacts, layout: Layout) -> float:
    """What of the compute time is starting kernels."""
    return layout.gradient_accumulation_steps * facts.layers * LAYER_OVERHEAD_S


# ---------------------------------------------------------------- communication


def _communication_s(
    facts: ModelFacts, layout: Layout, precision: Precision, reached: Rates
) -> float:
    """Time between ranks (Rajbhandari et al. 2020, arXiv:1910.02054, section 7).

    Plain data parallelism all-reduces fp32 gradients once a step, which is a reduce-scatter and an
    all-gather. ZeRO-1 and 2 reduce-scatter gradients (2 for every micro-batch) and all-gather the
    new weights; ZeRO-3 all-gathers all weights forward and backward and reduce-scatters gradients
    in every micro-batch. Checkpointing adds nothing: a layer that is gathered to be recomputed
    stays for its backward pass (DeepSpeed's stage3_max_reuse_distance).
    """
    if layout.world_size == 1:
        return 0.0
    p, width = facts.parameters, COMPUTE_BYTES[precision]
    micro_batches, stage = layout.gradient_accumulation_steps, layout.zero_stage
    gradients_s = _spread_s(width * p.trainable, facts.layers, layout, reached)
    if stage == 0:
        return 2 * _spread_s(4 * p.trainable, facts.layers, layout, reached)
    if stage == 1:
        return 2 * gradients_s
    if stage == 2:
        return (micro_batches + 1) * gradients_s
    weights_s = _spread_s(width * (p.total - p.quantised), facts.layers, layout, reached)
    return micro_batches * (2 * weights_s + gradients_s)


def _spread_s(size_bytes: float, collectives: int, layout: Layout, reached: Rates) -> float:
    """Time to all-gather or reduce-scatter that many bytes in so many collectives.

    In two steps, as NCCL does: over the network each node takes in (n − 1)/n of the bytes, its GPUs
    sharing the adapters, and within a node each GPU (r − 1)/r over its own link.
    """
    n, r = layout.nodes, layout.ranks_per_node
    between_s = size_bytes * (n - 1) / n / reached.network
    within_s = size_bytes * (r - 1) / r / reached.link
    return between_s + within_s + collectives * (n - 1 + r - 1) * HOP_S


# ---------------------------------------------------------------- offload


def _offload_s(facts: ModelFacts, layout: Layout, precision: Precision, reached: Rates) -> float:
    """Time for states and weights that are not on the GPU.

    Optimizer (ZeRO-Offload, arXiv:2101.06840, section 4): each micro-batch's gradients go down and
    once a step the new weights come up, T/N a rank over its link; Adam runs in the host's memory.
    On NVMe its states are read and written too. Parameters: P/N a rank come up (from NVMe first
    into the host) before each of the two gathers of a micro-batch.
    """
    if layout.offload_optimizer == layout.offload_param == "none":
        return 0.0
    p, width = facts.parameters, COMPUTE_BYTES[precision]
    micro_batches, ranks = layout.gradient_accumulation_steps, layout.world_size
    gradients_s = width * p.trainable / ranks / reached.host_link
    adam_s = CPU_ADAM_BYTES * p.trainable / layout.nodes / reached.host_memory
    total_s = (micro_batches + 1) * gradients_s + adam_s
    if layout.offload_optimizer == "nvme":
        total_s += 2 * NVME_STATES_BYTES * p.trainable / layout.nodes / reached.disk
    if layout.offload_param != "none":
        total_s += 2 * micro_batches * width * p.total / ranks / reached.host_link
    if layout.offload_param == "nvme":
        total_s += (2 * micro_batches + 1) * width * p.total / layout.nodes / reached.disk
    return total_s
