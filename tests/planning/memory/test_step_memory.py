"""Memory by trace: it agrees with real training, closed forms, and itself at any depth."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import CLASSIFY, COMPLETE, ROOT, cluster, recipe
from hpcft.core.records import Layout, ParameterCount, ZeroSizes
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

pytestmark = pytest.mark.usefixtures("cache_of_this_module")


def step(config: dict[str, Any], method: str = "full", **changes: Any) -> TracedStep:
    """A step of a tiny model on a CPU."""
    task = {**(CLASSIFY if config["model_type"] == "bert" else COMPLETE), "max_length": 48}
    made = recipe(model={"config": config}, task=task, method={"name": method})
    fields: dict[str, Any] = {
        "precision": "fp32", "optim": "adamw_torch", "zero_stage": 0, "checkpointing": False,
        "single": False, "padded": True, "accelerator": "cpu",
    }  # fmt: skip
    return TracedStep(model=made.model, task=made.task, method=made.method, **(fields | changes))


def peak(found: StepMemory, batch: int) -> int:
    """The most of a step."""
    return max(sum(line.at(batch)) for line in found.training)


# ---------------------------------------------------------------- real training


@pytest.mark.parametrize("name", ["llama-lora-bf16"])
def test_the_trace_is_what_the_allocator_sees(name: str) -> None:
    """Real steps through the product's own Trainer, by the benchmark, which has 80 such cases."""
    import cases
    import measure
    import run

    case = next(case for case in cases.CASES if case.name == name)
    measured = measure.measure(case)
    predicted = run.predicted_bytes(case)
    assert predicted == pytest.approx(measured["peak_bytes"], rel=0.001)


# ---------------------------------------------------------------- two small depths tell all


@pytest.mark.parametrize(
    ("config", "method", "changes"),
    [
        (LLAMA, "full", {}),
        (LLAMA, "full", {"checkpointing": True, "precision": "bf16"}),
        (LLAMA, "lora", {"precision": "bf16"}),
        (LLAMA, "qlora", {"checkpointing": True}),
        (GEMMA3, "full", {}),
        (GEMMA3, "lora", {"checkpointing": True}),
        (BERT, "full", {"single": True}),
        (LLAMA, "full", {"zero_stage": 2}),
        (LLAMA, "full", {"zero_stage": 3, "checkpointing": True}),
    ],
)
def test_the_whole_model_is_what_small_traces_say(
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
    asked = step(config, method, zero=sizes if changes.get("zero_stage") else None, **changes)
    small = step_memory(asked)
    layers = int(config["num_hidden_layers"])
    monkeypatch.setattr(run.models, "period", lambda *_: layers)  # so that nothing repeats
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where the small one is not known
    whole = step_memory(asked)
    for batch in (1,) if changes.get("single") else (2, 3, 8):
        assert peak(small, batch) == pytest.approx(peak(whole, batch), rel=1e-3)


@pytest.mark.parametrize("kind", ["opt", "gpt_neox", "gpt2", "qwen3", "mistral", "phi", "falcon"])
def test_any_architecture_is_traced_without_a_rule_of_its_own(kind: str) -> None:
    names = {"gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4}}
    plain = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    found = step_memory(step({"model_type": kind, "vocab_size": 500, **names.get(kind, plain)}))
    assert peak(found, 4) > peak(found, 2) > 0
    assert found.evaluation_bytes(2) < peak(found, 2)


@pytest.mark.parametrize(
    ("method", "changes"), [("full", {"zero_stage": 3, "zero": True}), ("qlora", {"padded": False})]
)
def test_what_an_operation_returns_is_remembered_rightly(
    method: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpcft.planning.memory.tracing import shape_cache
    from hpcft.planning.memory.tracing.run import trace_depths

    sizes = SIZES if changes.get("zero") else None
    asked = step(LLAMA, method, checkpointing=True, single=True, **changes | {"zero": sizes})
    remembered = trace_depths(asked).parts
    monkeypatch.setattr(shape_cache, "_is_functional", lambda _: False)
    assert remembered == trace_depths(asked).parts


def test_a_result_that_shares_memory_is_not_remembered() -> None:
    import torch

    from hpcft.planning.memory.tracing import shape_cache

    whole = torch.empty(4, 6, device="meta")
    for operation, arguments in (
        (torch.ops.aten._unsafe_view.default, (whole, [24])),  # shares, and does not say so
        (torch.ops.aten.view.default, (whole, [24])),
        (torch.ops.aten.add_.Tensor, (whole, whole)),
    ):
        for _ in range(2):
            found = shape_cache.run(operation, arguments, {}, 1)
            assert found.untyped_storage()._cdata == whole.untyped_storage()._cdata
    for _ in range(2):
        total = shape_cache.run(torch.ops.aten.add.Tensor, (whole, whole.T.contiguous().T), {}, 1)
        assert total.shape == (4, 6)
        assert total.untyped_storage()._cdata != whole.untyped_storage()._cdata
    halves = shape_cache.run(torch.ops.aten.add.Tensor, (whole.half(), whole.half()), {}, 1)
    assert halves.dtype == torch.float16


# ---------------------------------------------------------------- closed forms


LAYOUT = Layout(
    nodes=1, ranks_per_node=1, per_device_train_batch_size=2, gradient_accumulation_steps=1,
    gradient_checkpointing=False, zero_stage=0, offload_optimizer="none", offload_param="none",
)  # fmt: skip


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_closed_form_and_trace_agree_on_what_lasts(method: str, precision: Any) -> None:
    from hpcft.planning import model_facts
    from hpcft.planning.memory.tracing.run import trace_depths

    wide = {**LLAMA, "hidden_size": 256, "intermediate_size": 512}
    asked = step(wide, method, precision=precision)
    facts = model_facts.compute_model_facts(asked.model, asked.task, asked.method)
    traced = next(line for line in step_memory(asked).training if line.part.startswith("forward"))
    kinds = dict(zip(KINDS, traced.at(2), strict=True))
    by_hand = persistent_bytes(facts, asked.method, LAYOUT, precision, "adamw_torch")
    lasting = sum(kinds[k] for k in ("weights", "4-bit weights", "adapters", "optimizer states"))
    assert lasting == pytest.approx(by_hand, rel=0.02), "the tables of 4-bit types are beside"
    assert kinds["optimizer states"] == pytest.approx(8 * facts.parameters.trainable, rel=1e-3)
    assert (kinds["adapters"] > 0) == (method != "full")
    assert kinds["adapters"] == pytest.approx(4 * facts.parameters.trainable * (method != "full"))
    by_type = facts.parameters.quantised * NF4_DOUBLE_BYTES
    assert kinds["4-bit weights"] == pytest.approx(by_type, rel=0.05)
    at = KINDS.index("dequantised weights")
    points = [
        p for parts in trace_depths(asked).parts.values() for ps in parts.values() for p in ps
    ]
    assert any(sizes[at] for sizes, _ in points) == (method == "qlora")


@pytest.mark.parametrize(
    ("method", "stage"), [("full", 0), ("full", 1), ("full", 3), ("lora", 2), ("qlora", 0)]
)
def test_what_is_known_without_a_trace_is_below_what_one_tells(method: str, stage: int) -> None:
    """A layout that is refused by it would have been refused by its trace."""
    from hpcft.planning import model_facts

    made = recipe(model={"config": LLAMA}, task={**COMPLETE, "max_length": 48},
                  method={"name": method})  # fmt: skip
    facts = model_facts.compute_model_facts(made.model, made.task, made.method)
    laid = LAYOUT.model_copy(update={"zero_stage": stage, "ranks_per_node": 2})
    traced = step_memory(rank_memory.traced_step(made, laid, cluster("cpu"), facts, "fp32"))
    peak = rank_memory.peak_memory(traced, facts, laid, "fp32", "adamw_torch", on_gpu=False)
    least = rank_memory.lower_bound_bytes(
        facts, made.method, laid, "fp32", "adamw_torch", on_gpu=False
    )
    assert 0 < least <= peak.total_bytes


def test_zero_1_is_traced_as_zero_2_where_every_gradient_fits_a_bucket() -> None:
    from hpcft.planning import model_facts

    site = cluster("a100-80")
    for method, width, stage in (("lora", 64, 2), ("full", 64, 2), ("full", 4000, 1)):
        made = recipe(model={"config": LLAMA | {"intermediate_size": width * 10}}, task=COMPLETE,
                      method={"name": method})  # fmt: skip
        facts = model_facts.compute_model_facts(made.model, made.task, made.method)
        steps = [
            rank_memory.traced_step(
                made, LAYOUT.model_copy(update={"zero_stage": n}), site, facts, "bf16"
            )
            for n in (1, 2)
        ]
        assert steps[0].zero_stage == stage
        assert (steps[0] == steps[1]) == (stage == 2)
        if stage == 2:
            assert step_memory(steps[1].model_copy(update={"zero_stage": 1})) == step_memory(
                steps[1]
            )


def test_logits_are_the_vocabulary_times_the_tokens() -> None:
    traced = max(
        (line for line in step_memory(step(LLAMA)).training if line.part == "forward head"),
        key=lambda line: sum(line.at(4)),
    )
    logits = dict(zip(KINDS, traced.at(4), strict=True))["logits and loss"]
    assert logits == pytest.approx(4 * 4 * 48 * 500 * 3, rel=0.1), "all, chosen, log-softmax"


def test_gradients_of_an_earlier_micro_batch_are_there_from_the_start() -> None:
    once = step_memory(step(LLAMA))
    again = once.accumulating()
    trained = max(line.fixed[KINDS.index("gradients")] for line in once.training)
    assert peak(again, 8) == pytest.approx(peak(once, 8) + trained, rel=0.02)


def test_flash_attention_holds_less_than_a_mask() -> None:
    with_mask = step(LLAMA, accelerator="cuda", precision="bf16", flash_attention=True)
    without = with_mask.model_copy(update={"padded": False})
    assert peak(step_memory(without), 8) < peak(step_memory(with_mask), 8)


# ---------------------------------------------------------------- arithmetic


lines = st.lists(
    st.tuples(st.integers(0, 1000), st.integers(0, 50)).map(
        lambda pair: LinearBytes(part="forward 0", fixed=[pair[0]], each=[pair[1]])
    ),
    min_size=1,
    max_size=30,
)


@given(lines, st.integers(1, 200))
def test_the_envelope_is_the_maximum(every: list[LinearBytes], batch: int) -> None:
    best = envelope(every)
    assert max(line.at(batch)[0] for line in best) == max(line.at(batch)[0] for line in every)


def test_a_tensor_across_a_cut_is_kept_on_both_sides() -> None:
    counts = ParameterCount(
        total=100, trainable=100, added=0, largest_layer=60, trained_tensors=[60, 40]
    )
    assert zero_memory.largest_share(counts, 2) == 1.0, (
        "the second part begins inside the first tensor"
    )
    assert zero_memory.largest_share(counts, 1) == 1.0
    even = counts.model_copy(update={"trained_tensors": [50, 50]})
    assert zero_memory.largest_share(even, 2) == 0.5


def test_a_group_of_the_optimizer_takes_whole_parameters() -> None:
    """DeepSpeed adds one parameter's share after the other until the group is large enough."""
    counts = ParameterCount(
        total=100, trainable=100, added=0, largest_layer=60,
        trained_tensors=[20, 60, 10], trained_vectors=[10],
    )  # fmt: skip
    assert zero_memory.largest_group(counts, 2, 1000) == 45, (
        "all matrices; vectors are a row of their own"
    )
    assert zero_memory.largest_group(counts, 2, 20) == 40, "10 are too few, and then come 30"
    assert zero_memory.largest_group(counts, 2, 1) == 30
    assert zero_memory.largest_group(counts.model_copy(update={"trained_tensors": []}), 1, 10) == 10


def test_an_event_is_that_of_the_deeper_trace() -> None:
    """Where two depths differ in their moments the largest stand for them, whatever their events.

    An event is a place in a list: what lies on a line through 3 and 9 of them would be beyond it.
    """
    parts = {
        depth: {f"backward {i}": [((depth,), event) for event in events] for i in range(depth)}
        for depth, events in ((2, (1, 3)), (3, (1, 5, 9)))
    }
    traced = {(depth, batch): parts[depth] for depth in parts for batch in (2, 3)}
    found = moments(traced, [2, 3], 80, 1)
    assert {event for _, event in found} <= {1, 5, 9}
    assert max(line.at(2)[0] for line, _ in found) == 80


# ---------------------------------------------------------------- gathers

SIZES = ZeroSizes(
    reduce_bucket_elements=10, prefetch_bucket_elements=50, persistence_threshold_elements=5,
    max_live_elements=300, max_reuse_distance_elements=0, sub_group_elements=100,
)  # fmt: skip


def order(layers: int) -> ModuleSchedule:
    """A row of layers of 100 elements and a bias each, forward and back."""
    names = [f"layers.{i}" for i in range(layers)]
    parts = {f"forward {i}": [(FETCH, n), (RELEASE, n)] for i, n in enumerate(names)}
    parts |= {
        f"backward {i}": [(FETCH, names[i]), (RELEASE, names[i])] for i in reversed(range(layers))
    }
    return ModuleSchedule(parts, {n: {f"{n}.w": 100, f"{n}.b": 5} for n in names}, "layers")


def test_gathers_stay_within_their_bounds_and_end() -> None:
    played = zero3_schedule.simulate(order(20), SIZES, on_cpu=False)
    assert played.always == 20 * 5
    most = max(max(high) for high in played.highest.values())
    assert 200 <= most <= SIZES.max_live_elements + 100
    assert list(played.settled.values())[-1][-1] <= played.always + SIZES.max_live_elements


def test_without_prefetch_one_layer_is_whole_at_a_time() -> None:
    alone = SIZES.model_copy(update={"prefetch_bucket_elements": 0})
    played = zero3_schedule.simulate(order(20), alone, on_cpu=False)
    assert {max(high) for high in played.highest.values()} == {100 + 100}


def test_what_is_used_again_soon_stays() -> None:
    near = SIZES.model_copy(
        update={"prefetch_bucket_elements": 0, "max_reuse_distance_elements": 210}
    )
    played = zero3_schedule.simulate(order(20), near, on_cpu=False)
    assert played.settled["forward 19"][-1] > played.settled["forward 0"][-1]


def test_a_row_of_layers_is_stretched_by_its_period() -> None:
    long, like = zero3_schedule.extend_to_depth(order(4), 4, 10, 2)
    assert list(long.parts)[:10] == [f"forward {i}" for i in range(10)]
    assert [like[f"forward {i}"].split()[1] for i in range(10)] == list("0121212123")
    assert set(long.owned) == {f"layers.{i}" for i in range(10)}
    assert long.owned["layers.9"] == {"layers.9.w": 100, "layers.9.b": 5}
