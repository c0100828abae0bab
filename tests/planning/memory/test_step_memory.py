"""Tests traced memory against real training, closed forms, and itself at any depth."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import CLASSIFY, COMPLETE, ROOT, cluster, recipe
from hpcft.core.records import Layout, ParameterCount, ZeroSizes
from hpcft.planning.inputs import PlanInputs
from hpcft.planning.memory import rank_memory, zero3_schedule, zero_memory
from hpcft.planning.memory.extrapolate import envelope, moments
from hpcft.planning.memory.model_states import NF4_DOUBLE_BYTES, persistent_bytes
from hpcft.planning.memory.step_memory import step_memory
from hpcft.planning.memory.trace_types import KINDS, LinearBytes, StepMemory, TracedStep
from hpcft.planning.memory.zero3_schedule import FETCH, RELEASE, ModuleSchedule

sys.path.insert(0, str(ROOT / "benchmarks" / "memory"))

LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 160,
         "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 500, "max_position_embeddings": 256}  # fmt: skip
GEMMA3 = {**LLAMA, "model_type": "gemma3_text", "head_dim": 16, "sliding_window": 16,
          "num_hidden_layers": 11, "layer_types": [
              "full_attention" if i % 3 == 2 else "sliding_attention" for i in range(11)
          ]}  # fmt: skip
BERT = {"model_type": "bert", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6,
        "num_attention_heads": 4, "vocab_size": 500}  # fmt: skip

pytestmark = [pytest.mark.usefixtures("cache_of_this_module"), pytest.mark.process]


def step(config: dict[str, Any], method: str = "full", **changes: Any) -> TracedStep:
    """Makes a step of a tiny model on a CPU."""
    task = {**(CLASSIFY if config["model_type"] == "bert" else COMPLETE), "max_length": 48}
    made = recipe(model={"config": config}, task=task, method={"name": method})
    fields: dict[str, Any] = {
        "precision": "fp32", "optim": "adamw_torch", "zero_stage": 0, "checkpointing": False,
        "single_example": False, "padded": True, "accelerator": "cpu",
    }  # fmt: skip
    return TracedStep(model=made.model, task=made.task, method=made.method, **(fields | changes))


def peak(memory: StepMemory, batch: int) -> int:
    """Returns the peak of a training step, in bytes."""
    return max(sum(line.at(batch)) for line in memory.training)


# ---------------------------------------------------------------- real training


@pytest.mark.parametrize("name", ["llama-lora-bf16"])
def test_trace_equals_allocator_in_real_training(name: str) -> None:
    """Runs one case of the memory benchmark, which trains with hpcft's own Trainer."""
    import cases
    import measure
    import run

    case = next(case for case in cases.CASES if case.name == name)
    measured = measure.measure(case)
    predicted = run.predicted_bytes(case)
    assert predicted == pytest.approx(measured["peak_bytes"], rel=0.001)


# ---------------------------------------------------------------- extrapolation


@pytest.mark.parametrize(
    ("config", "method", "changes"),
    [
        (LLAMA, "full", {}),
        (LLAMA, "full", {"checkpointing": True, "precision": "bf16"}),
        (LLAMA, "lora", {"precision": "bf16"}),
        (LLAMA, "qlora", {"checkpointing": True}),
        (GEMMA3, "full", {}),
        (GEMMA3, "lora", {"checkpointing": True}),
        (BERT, "full", {"single_example": True}),
        (LLAMA, "full", {"zero_stage": 2}),
        (LLAMA, "full", {"zero_stage": 3, "checkpointing": True}),
    ],
)
def test_extrapolated_memory_equals_trace_of_full_model(
    config: dict[str, Any],
    method: str,
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from hpcft.planning.memory.tracing import run

    sizes = ZeroSizes(
        reduce_bucket_elements=20_000, prefetch_bucket_elements=5_000,
        persistence_threshold_elements=100, max_live_elements=60_000,
        max_reuse_distance_elements=60_000 if changes.get("checkpointing") else 0,
        sub_group_elements=100_000,
    )  # fmt: skip
    traced = step(config, method, zero=sizes if changes.get("zero_stage") else None, **changes)
    extrapolated = step_memory(traced)
    layers = int(config["num_hidden_layers"])
    # Without repeating layers the full model is traced, in an empty cache.
    monkeypatch.setattr(run, "layer_period", lambda *_: layers)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    full = step_memory(traced)
    for batch in (1,) if changes.get("single_example") else (2, 3, 8):
        assert peak(extrapolated, batch) == pytest.approx(peak(full, batch), rel=1e-3)


@pytest.mark.parametrize("kind", ["opt", "gpt_neox", "gpt2", "qwen3", "mistral", "phi", "falcon"])
def test_step_memory_traces_any_architecture(kind: str) -> None:
    names = {"gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4}}
    plain = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    memory = step_memory(step({"model_type": kind, "vocab_size": 500, **names.get(kind, plain)}))
    assert peak(memory, 4) > peak(memory, 2) > 0
    assert memory.evaluation_bytes(2) < peak(memory, 2)


@pytest.mark.parametrize(
    ("method", "changes"), [("full", {"zero_stage": 3, "zero": True}), ("qlora", {"padded": False})]
)
def test_shape_cache_changes_no_trace(
    method: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpcft.planning.memory.tracing import shape_cache
    from hpcft.planning.memory.tracing.run import trace_depths

    sizes = SIZES if changes.get("zero") else None
    traced = step(
        LLAMA, method, checkpointing=True, single_example=True, **changes | {"zero": sizes}
    )
    with_cache = trace_depths(traced).segments
    monkeypatch.setattr(shape_cache, "_is_functional", lambda _: False)
    assert with_cache == trace_depths(traced).segments


def test_shape_cache_skips_results_that_share_memory() -> None:
    import torch

    from hpcft.planning.memory.tracing import shape_cache

    whole = torch.empty(4, 6, device="meta")
    for operation, arguments in (
        (
            torch.ops.aten._unsafe_view.default,
            (whole, [24]),
        ),  # its schema does not say that it shares
        (torch.ops.aten.view.default, (whole, [24])),
        (torch.ops.aten.add_.Tensor, (whole, whole)),
    ):
        for _ in range(2):
            result = shape_cache.run_operation(operation, arguments, {}, 1)
            assert result.untyped_storage()._cdata == whole.untyped_storage()._cdata
    add = torch.ops.aten.add.Tensor
    for _ in range(2):
        total = shape_cache.run_operation(add, (whole, whole.T.contiguous().T), {}, 1)
        assert total.shape == (4, 6)
        assert total.untyped_storage()._cdata != whole.untyped_storage()._cdata
    halves = shape_cache.run_operation(add, (whole.half(), whole.half()), {}, 1)
    assert halves.dtype == torch.float16


# ---------------------------------------------------------------- closed forms


LAYOUT = Layout(
    nodes=1, ranks_per_node=1, per_device_train_batch_size=2, gradient_accumulation_steps=1,
    gradient_checkpointing=False, zero_stage=0, offload_optimizer="none", offload_param="none",
)  # fmt: skip


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_persistent_bytes_equals_trace(method: str, precision: Any) -> None:
    from hpcft.planning import model_facts
    from hpcft.planning.memory.tracing.run import trace_depths

    wide = {**LLAMA, "hidden_size": 256, "intermediate_size": 512}
    traced = step(wide, method, precision=precision)
    facts = model_facts.compute_model_facts(traced.model, traced.task, traced.method)
    line = next(m for m in step_memory(traced).training if m.segment.startswith("forward"))
    kinds = dict(zip(KINDS, line.at(2), strict=True))
    made = recipe(model={"config": wide}, task=COMPLETE, method={"name": method})
    inputs = PlanInputs(made, cluster("cpu"), facts, fixed_precision=precision)
    closed_form = persistent_bytes(inputs, LAYOUT)
    persistent = sum(kinds[k] for k in ("weights", "4-bit weights", "adapters", "optimizer states"))
    assert persistent == pytest.approx(closed_form, rel=0.02), "without the tables of 4-bit types"
    assert kinds["optimizer states"] == pytest.approx(8 * facts.parameters.trainable, rel=1e-3)
    assert (kinds["adapters"] > 0) == (method != "full")
    assert kinds["adapters"] == pytest.approx(4 * facts.parameters.trainable * (method != "full"))
    four_bit = facts.parameters.quantised * NF4_DOUBLE_BYTES
    assert kinds["4-bit weights"] == pytest.approx(four_bit, rel=0.05)
    place = KINDS.index("dequantised weights")
    samples = [
        sample
        for segments in trace_depths(traced).segments.values()
        for segment in segments.values()
        for sample in segment
    ]
    assert any(sizes[place] for sizes, _ in samples) == (method == "qlora")


@pytest.mark.parametrize(
    ("method", "stage"), [("full", 0), ("full", 1), ("full", 3), ("lora", 2), ("qlora", 0)]
)
def test_lower_bound_is_at_most_traced_peak(method: str, stage: int) -> None:
    """Checks that a layout refused by its lower bound would have been refused by its trace."""
    from hpcft.planning import model_facts

    made = recipe(model={"config": LLAMA}, task={**COMPLETE, "max_length": 48},
                  method={"name": method})  # fmt: skip
    facts = model_facts.compute_model_facts(made.model, made.task, made.method)
    layout = LAYOUT.model_copy(update={"zero_stage": stage, "ranks_per_node": 2})
    inputs = PlanInputs(made, cluster("cpu"), facts, fixed_precision="fp32")
    traced = step_memory(rank_memory.traced_step(inputs, layout))
    items = rank_memory.peak_items(inputs, layout, traced)
    least = rank_memory.lower_bound_bytes(inputs, layout)
    assert 0 < least <= sum(item.bytes for item in items)


def test_traced_step_takes_zero_1_as_zero_2_if_every_gradient_fits_a_bucket() -> None:
    from hpcft.planning import model_facts

    site = cluster("a100-80")
    for method, width, stage in (("lora", 64, 2), ("full", 64, 2), ("full", 4000, 1)):
        made = recipe(model={"config": LLAMA | {"intermediate_size": width * 10}}, task=COMPLETE,
                      method={"name": method})  # fmt: skip
        facts = model_facts.compute_model_facts(made.model, made.task, made.method)
        inputs = PlanInputs(made, site, facts, fixed_precision="bf16")
        steps = [
            rank_memory.traced_step(inputs, LAYOUT.model_copy(update={"zero_stage": n}))
            for n in (1, 2)
        ]
        assert steps[0].zero_stage == stage
        assert (steps[0] == steps[1]) == (stage == 2)
        if stage == 2:
            assert step_memory(steps[1].model_copy(update={"zero_stage": 1})) == step_memory(
                steps[1]
            )


def test_logits_take_the_vocabulary_times_the_tokens() -> None:
    traced = max(
        (line for line in step_memory(step(LLAMA)).training if line.segment == "forward head"),
        key=lambda line: sum(line.at(4)),
    )
    logits = dict(zip(KINDS, traced.at(4), strict=True))["logits and loss"]
    assert logits == pytest.approx(4 * 4 * 48 * 500 * 3, rel=0.1), (
        "logits of all tokens, of labelled ones, log-softmax"
    )


def test_with_accumulation_holds_gradients_from_the_start() -> None:
    once = step_memory(step(LLAMA))
    again = once.with_accumulation()
    trained = max(line.fixed[KINDS.index("gradients")] for line in once.training)
    assert peak(again, 8) == pytest.approx(peak(once, 8) + trained, rel=0.02)


def test_flash_attention_takes_less_than_attention_with_a_mask() -> None:
    with_mask = step(LLAMA, accelerator="cuda", precision="bf16", flash_attention=True)
    without = with_mask.model_copy(update={"padded": False})
    assert peak(step_memory(without), 8) < peak(step_memory(with_mask), 8)


# ---------------------------------------------------------------- arithmetic


lines = st.lists(
    st.tuples(st.integers(0, 1000), st.integers(0, 50)).map(
        lambda pair: LinearBytes(segment="forward 0", fixed=[pair[0]], per_example=[pair[1]])
    ),
    min_size=1,
    max_size=30,
)


@given(lines, st.integers(1, 200))
def test_envelope_has_the_maximum_of_all_lines(all_lines: list[LinearBytes], batch: int) -> None:
    upper = envelope(all_lines)
    assert max(line.at(batch)[0] for line in upper) == max(line.at(batch)[0] for line in all_lines)


def test_largest_share_counts_a_split_tensor_on_both_ranks() -> None:
    counts = ParameterCount(
        total=100, trainable=100, added=0, largest_layer=60, trained_tensors=[60, 40]
    )
    assert zero_memory.largest_share(counts, 2) == 1.0, (
        "the second rank's part begins inside the first tensor"
    )
    assert zero_memory.largest_share(counts, 1) == 1.0
    even = counts.model_copy(update={"trained_tensors": [50, 50]})
    assert zero_memory.largest_share(even, 2) == 0.5


def test_largest_group_takes_whole_parameters() -> None:
    """Checks groups as DeepSpeed fills them, parameter by parameter until one is large enough."""
    counts = ParameterCount(
        total=100, trainable=100, added=0, largest_layer=60,
        trained_tensors=[20, 60, 10], trained_vectors=[10],
    )  # fmt: skip
    assert zero_memory.largest_group(counts, 2, 1000) == 45, (
        "all matrices; vectors are grouped apart"
    )
    assert zero_memory.largest_group(counts, 2, 20) == 40, (
        "a group of 10 is too small, so that 30 are added"
    )
    assert zero_memory.largest_group(counts, 2, 1) == 30
    assert zero_memory.largest_group(counts.model_copy(update={"trained_tensors": []}), 1, 10) == 10


def test_moments_take_events_from_the_deeper_trace() -> None:
    """Checks that an event number is one of the deeper trace, never an extrapolated one.

    It is an index into a list, which an extrapolated number would exceed.
    """
    segments = {
        depth: {f"backward {i}": [((depth,), event) for event in events] for i in range(depth)}
        for depth, events in ((2, (1, 3)), (3, (1, 5, 9)))
    }
    traced = {(depth, batch): segments[depth] for depth in segments for batch in (2, 3)}
    full = moments(traced, [2, 3], 80, 1)
    assert {event for _, event in full} <= {1, 5, 9}
    assert max(line.at(2)[0] for line, _ in full) == 80


# ---------------------------------------------------------------- ZeRO-3's schedule

SIZES = ZeroSizes(
    reduce_bucket_elements=10, prefetch_bucket_elements=50, persistence_threshold_elements=5,
    max_live_elements=300, max_reuse_distance_elements=0, sub_group_elements=100,
)  # fmt: skip


def schedule(layers: int) -> ModuleSchedule:
    """Makes a schedule of layers with 100 elements and a bias each, forward and backward."""
    names = [f"layers.{i}" for i in range(layers)]
    events = {f"forward {i}": [(FETCH, n), (RELEASE, n)] for i, n in enumerate(names)}
    events |= {
        f"backward {i}": [(FETCH, names[i]), (RELEASE, names[i])] for i in reversed(range(layers))
    }
    return ModuleSchedule(events, {n: {f"{n}.w": 100, f"{n}.b": 5} for n in names}, "layers")


def test_simulate_stays_within_the_limits() -> None:
    gathered = zero3_schedule.simulate(schedule(20), SIZES, on_cpu=False)
    assert gathered.initial == 20 * 5
    highest = max(max(elements) for elements in gathered.during.values())
    assert 200 <= highest <= SIZES.max_live_elements + 100
    assert list(gathered.after.values())[-1][-1] <= gathered.initial + SIZES.max_live_elements


def test_simulate_without_prefetch_gathers_one_layer_at_a_time() -> None:
    no_prefetch = SIZES.model_copy(update={"prefetch_bucket_elements": 0})
    gathered = zero3_schedule.simulate(schedule(20), no_prefetch, on_cpu=False)
    assert {max(elements) for elements in gathered.during.values()} == {100 + 100}


def test_simulate_keeps_parameters_within_the_reuse_distance() -> None:
    reusing = SIZES.model_copy(
        update={"prefetch_bucket_elements": 0, "max_reuse_distance_elements": 210}
    )
    gathered = zero3_schedule.simulate(schedule(20), reusing, on_cpu=False)
    assert gathered.after["forward 19"][-1] > gathered.after["forward 0"][-1]


def test_extend_to_depth_repeats_layers_by_their_period() -> None:
    extended, source = zero3_schedule.extend_to_depth(schedule(4), 4, 10, 2)
    assert list(extended.events)[:10] == [f"forward {i}" for i in range(10)]
    assert [source[f"forward {i}"].split()[1] for i in range(10)] == list("0121212123")
    assert set(extended.owned) == {f"layers.{i}" for i in range(10)}
    assert extended.owned["layers.9"] == {"layers.9.w": 100, "layers.9.b": 5}
