"""iteration_s against a plain-Python twin of the formula in cost_model.py, and what follows from it."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbmgym.envs.serving.cost_model import (
    COST,
    MAX_ITERATIONS,
    SEGMENTS,
    cold_prefill_s,
    decode_iterations_until,
    decode_span_s,
    iteration_s,
    make_cost,
    recovery_s,
    token_wise_s,
    tpot_reference_s,
)
from hbmgym.envs.serving.engines import ENGINE_PROFILES, EngineProfile
from hbmgym.envs.serving.gpus import GPUS, find_gpu
from hbmgym.envs.serving.kernels import Shard
from hbmgym.memory_backend.geometry import HybridModel, find_model

H200, A100 = find_gpu("h200"), find_gpu("a100")
QWEN, DENSE = find_model("qwen3-next-80b-a3b"), find_model("qwen3.5-27b")
VLLM, SGLANG = ENGINE_PROFILES["vllm-graph"], ENGINE_PROFILES["sglang-eager"]
NEXT = make_cost(QWEN, H200)
# Budget and page are small so that a few hundred tokens make several chunks.
SMALL_CHUNKS = {
    "vllm": make_cost(DENSE, A100, engine=VLLM, weight_dtype="bf16", prefill_budget=200, page_tokens=64),
    "sglang": make_cost(DENSE, A100, engine=SGLANG, weight_dtype="bf16", prefill_budget=200, page_tokens=64),
}
POWERS = [2**place for place in range(SEGMENTS)]


def near(value: float) -> object:
    return pytest.approx(value, rel=1e-9)


def shard_of(engine: EngineProfile, model: HybridModel = QWEN, tensor_parallel: int = 1) -> Shard:
    return Shard(model, H200, engine.kernels, "fp8", "bf16", "fp32", tensor_parallel)


def twin_s(shard: Shard, engine: EngineProfile, decoding: int, context: int, prefill: int, pairs: float) -> float:
    """The formula of cost_model.py, term by term."""
    tokens = decoding + prefill
    layers = shard.model.blocks / 2
    work = float(np.interp(tokens, POWERS, [shard.token_wise_s(count) for count in POWERS]))
    work += context * shard.kv_s_per_token + decoding * shard.state_s
    host = 0.5e-3 + decoding * 2e-6
    if prefill == 0:
        return host + work + layers * engine.layer_s
    work += pairs * shard.attention_s_per_pair + prefill * shard.scan_s_per_token + shard.scan_floor_s
    busy = engine.prefill_factor * work + layers * engine.layer_s
    floor = layers * engine.prefill_floor_s if tokens > engine.graph_tokens else 0.0
    return host + max(busy, floor)


@settings(deadline=None)
@given(
    st.sampled_from(list(ENGINE_PROFILES.values())),
    st.sampled_from((QWEN, DENSE, find_model("gpt-oss-120b"), find_model("nemotron-3-nano-30b-a3b"))),
    st.sampled_from((1, 2, 8)),
    st.integers(0, 512),
    st.integers(0, 10**7),
    st.integers(0, 40_000),
    st.integers(0, 200_000),
)
def test_an_iteration_takes_what_the_formula_says(engine, model, parallel, decoding, context, prefill, offset):
    if decoding + prefill == 0:
        decoding = 1
    cost = make_cost(model, H200, engine=engine, tensor_parallel=parallel)
    pairs = prefill * (offset + 0.5 * prefill)
    context = context if decoding else 0
    expected = twin_s(shard_of(engine, model, parallel), engine, decoding, context, prefill, pairs)
    assert iteration_s(cost, decoding, context, prefill, pairs) == near(expected)


def test_empty_iteration_takes_no_time():
    assert iteration_s(NEXT, 0, 0, 0, 0.0) == 0.0


@pytest.mark.parametrize("engine", ENGINE_PROFILES.values(), ids=ENGINE_PROFILES)
def test_the_table_is_exact_at_powers_of_two(engine):
    cost, shard = make_cost(QWEN, H200, engine=engine), shard_of(engine)
    for tokens in POWERS:
        assert token_wise_s(cost, tokens) == near(shard.token_wise_s(tokens)), tokens


@given(st.integers(2, SEGMENTS - 1), st.floats(0, 1))
def test_the_table_is_affine_between_powers_of_two(place, share):
    first, last = 2 ** (place - 1), 2**place
    tokens = first + round(share * (last - first))
    line = np.interp(tokens, [first, last], [token_wise_s(NEXT, first), token_wise_s(NEXT, last)])
    assert token_wise_s(NEXT, tokens) == near(float(line))


@given(st.integers(1, 2**17))
def test_the_table_is_near_the_kernels_it_sums(tokens):
    assert token_wise_s(NEXT, tokens) == pytest.approx(shard_of(VLLM).token_wise_s(tokens), rel=0.1)


def test_the_table_goes_on_beyond_its_end():
    last = 2 ** (SEGMENTS - 1)
    step = token_wise_s(NEXT, last) - token_wise_s(NEXT, last // 2)
    assert token_wise_s(NEXT, 2 * last) == near(token_wise_s(NEXT, last) + 2 * step)


def test_the_floor_holds_for_prefill_of_more_tokens_than_a_graph_has():
    cost = make_cost(QWEN, H200, engine=replace(VLLM, prefill_floor_s=2e-3))
    floor_s = 48 * 2e-3
    assert iteration_s(cost, 0, 0, 512, 512 * 256.0) < floor_s
    assert iteration_s(cost, 0, 0, 513, 513 * 256.5) == near(0.5e-3 + floor_s)
    assert iteration_s(cost, 12, 0, 500, 500 * 250.0) < floor_s
    assert iteration_s(cost, 13, 0, 500, 500 * 250.0) == near(0.5e-3 + 13 * 2e-6 + floor_s)
    assert iteration_s(cost, 600, 0, 0, 0.0) < floor_s
    assert iteration_s(cost, 0, 0, 16384, 16384 * 8192.0) > 0.5e-3 + floor_s


@settings(deadline=None)
@given(
    st.sampled_from([make_cost(QWEN, H200, engine=engine) for engine in ENGINE_PROFILES.values()]),
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 10**6), st.integers(0, 9000)), min_size=2, max_size=2),
)
def test_more_work_takes_no_less_time(cost, two):
    decoding, context, prefill = (sorted(column) for column in zip(*two, strict=True))
    less, more = (iteration_s(cost, decoding[i], context[i], prefill[i], 0.5 * prefill[i] ** 2) for i in (0, 1))
    assert less <= more


def test_tensor_parallelism_halves_what_heads_share_out():
    half = make_cost(QWEN, H200, tensor_parallel=2)
    for name in ("kv_s_per_ctx_token", "state_s_per_seq", "attention_s_per_pair", "slot_copy_s"):
        assert half[name] == near(NEXT[name] / 2), name
    for name in ("iteration_s", "layers_s", "floor_s", "request_s", "sequence_s", "block_copy_s_per_byte"):
        assert half[name] == NEXT[name], name


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("tokens", [1, 64, 8192])
def test_two_gpus_are_less_than_twice_as_fast_as_one(gpu, tokens):
    one, two = (make_cost(QWEN, gpu, tensor_parallel=parallel) for parallel in (1, 2))
    assert token_wise_s(two, tokens) > token_wise_s(one, tokens) / 2


def test_what_is_copied_to_every_gpu_is_read_by_every_gpu():
    half, eighth = (make_cost(QWEN, H200, tensor_parallel=parallel) for parallel in (2, 8))
    assert eighth.kv_s_per_ctx_token == near(half.kv_s_per_ctx_token)
    latent, shared = (make_cost(find_model("kimi-linear-48b-a3b"), H200, tensor_parallel=g) for g in (1, 4))
    assert shared.kv_s_per_ctx_token == near(latent.kv_s_per_ctx_token)


def test_dtypes_act_on_their_own_terms():
    def changed(**dtypes: str) -> set[str]:
        other = make_cost(QWEN, H200, **dtypes)
        return {name for name in COST.names if np.any(other[name] != NEXT[name])}

    assert changed(weight_dtype="bf16") == {"token_base_s", "token_slope_s", "prefill_s_per_token"}
    assert changed(kv_dtype="fp8") == {"kv_s_per_ctx_token", "attention_s_per_pair"}
    assert changed(state_dtype="bf16") == {"state_s_per_seq", "slot_copy_s"}
    assert make_cost(QWEN, H200, state_dtype="bf16").state_s_per_seq == near(NEXT.state_s_per_seq / 2)


def test_every_constant_of_the_host_acts_on_its_own_terms():
    prefill = {"attention_s_per_pair", "scan_s_per_token", "scan_floor_s", "prefill_s_per_token"}
    terms = {
        "prefill_factor": {"prefill_factor", *prefill},
        "layer_s": {"layers_s"},
        "prefill_floor_s": {"floor_s"},
        "request_s": {"request_s"},
        "graph_tokens": {"graph_tokens"},
        "snapshots_end_chunks": {"snapshots_end_chunks"},
    }
    for name, expected in terms.items():
        value = False if name == "snapshots_end_chunks" else 3
        other = make_cost(QWEN, H200, engine=replace(VLLM, **{name: value}))
        assert {field for field in COST.names if np.any(other[field] != NEXT[field])} == expected, name


def test_the_floor_and_the_layers_are_those_of_the_models_pairs_of_blocks():
    for slug, layers in (("qwen3-next-80b-a3b", 48), ("qwen3.5-27b", 64), ("nemotron-3-nano-30b-a3b", 26)):
        cost = make_cost(find_model(slug), H200, engine=replace(VLLM, layer_s=1e-3, prefill_floor_s=2e-3))
        assert (cost.layers_s, cost.floor_s) == (near(layers * 1e-3), near(layers * 2e-3)), slug


def test_reference_tpot_is_batch_16_at_8k():
    assert tpot_reference_s(NEXT) == iteration_s(NEXT, 16, 16 * 8192, 0, 0.0)


# Copies.


def test_copies_read_and_write_every_byte():
    assert NEXT.slot_copy_s == near(2 * 77_266_944 / (0.86 * 4.8e12))
    assert NEXT.block_copy_s_per_byte * 77_266_944 == near(NEXT.slot_copy_s)


def test_a_measured_copy_replaces_the_bandwidth_and_holds_for_slots_of_one_gpu_too():
    cost = make_cost(QWEN, H200, tensor_parallel=2, block_copy_s_per_byte=1e-12)
    assert cost.block_copy_s_per_byte == 1e-12
    assert cost.slot_copy_s == near(77_266_944 / 2 * 1e-12)


# Recovery.

page_counts = st.integers(0, 3000)


@given(page_counts, page_counts, page_counts)
def test_recovery_is_the_sum_of_its_parts(first, second, third):
    low, middle, high = sorted((first, second, third))
    assert recovery_s(NEXT, low, high) == near(recovery_s(NEXT, low, middle) + recovery_s(NEXT, middle, high))
    assert recovery_s(NEXT, low, low) == 0.0


@given(page_counts, page_counts)
def test_recovery_pays_no_floor_no_iteration_and_no_request(one, other):
    low, high = sorted((one, other))
    slow = replace(VLLM, prefill_floor_s=1.0, layer_s=1.0, request_s=1.0, graph_tokens=0)
    assert recovery_s(make_cost(QWEN, H200, engine=slow), low, high) == recovery_s(NEXT, low, high)


def test_recovery_is_what_pages_add_to_a_full_chunk():
    cost = make_cost(QWEN, H200, engine=replace(VLLM, prefill_floor_s=0.0))
    shorter = 8192 - 10 * cost.page_tokens
    whole, part = (iteration_s(cost, 0, 0, tokens, 0.5 * tokens**2) for tokens in (8192, shorter))
    assert recovery_s(cost, shorter // cost.page_tokens, 8192 // cost.page_tokens) == near(whole - part)


def test_a_token_in_chunks_of_one_takes_no_less_than_in_chunks_of_two():
    one, two = (make_cost(QWEN, H200, prefill_budget=budget).prefill_s_per_token for budget in (1, 2))
    assert one >= two


# Cold prefill.


def stepped_s(cost: np.record, lengths: list[int]) -> float:
    """From arrival over chunks of these lengths, one after the other."""
    starts = np.cumsum([0, *lengths[:-1]])
    return cost.request_s + sum(
        iteration_s(cost, 0, 0, length, length * (start + 0.5 * length))
        for start, length in zip(starts.tolist(), lengths, strict=True)
    )


@pytest.mark.parametrize(
    ("kernels", "tokens", "lengths"),
    [
        ("vllm", 500, [200, 200, 48, 52]),  # a chunk ends at 448, the last page boundary
        ("vllm", 128, [128]),
        ("vllm", 448, [200, 200, 48]),
        ("vllm", 63, [63]),
        ("vllm", 210, [192, 18]),
        ("sglang", 500, [200, 200, 100]),
        ("sglang", 63, [63]),
        ("sglang", 400, [200, 200]),
    ],
)
def test_cold_prefill_is_its_chunks_after_the_requests_own_time(kernels, tokens, lengths):
    cost = SMALL_CHUNKS[kernels]
    assert sum(lengths) == tokens
    assert cold_prefill_s(cost, tokens) == near(stepped_s(cost, lengths))


@settings(deadline=None)
@given(st.sampled_from(list(SMALL_CHUNKS.values())), st.integers(1, 3000))
def test_cold_prefill_equals_stepping(cost, tokens):
    page = int(cost.page_tokens)
    boundary = tokens // page * page if cost.snapshots_end_chunks else tokens
    parts = [end - start for start, end in ((0, boundary), (boundary, tokens)) if end > start]
    lengths = [min(200, part - done) for part in parts for done in range(0, part, 200)]
    assert cold_prefill_s(cost, tokens) == near(stepped_s(cost, lengths))


# Spans of decode iterations.

costs = st.sampled_from((NEXT, *SMALL_CHUNKS.values()))
batches = st.integers(1, 512)
contexts = st.integers(0, 10**7)


@settings(deadline=None)
@given(costs, batches, contexts, st.integers(1, 2000))
def test_span_equals_stepping(cost, decoding, context, iterations):
    naive = math.fsum(iteration_s(cost, decoding, context + i * decoding, 0, 0.0) for i in range(iterations))
    assert decode_span_s(cost, decoding, context, iterations) == near(naive)


@settings(deadline=None)
@given(costs, batches, contexts, st.floats(-1.0, 10.0), st.booleans())
def test_iterations_until_equals_search(cost, decoding, context, seconds, exact):
    naive = 1
    while decode_span_s(cost, decoding, context, naive) < seconds:
        naive += 1
    if exact:  # a target that is exactly the end of an iteration
        seconds = decode_span_s(cost, decoding, context, naive)
    assert decode_iterations_until(cost, decoding, context, seconds) == naive


@settings(deadline=None)
@given(costs, batches, contexts, st.floats(1.0, 1e20))
def test_iterations_until_is_the_first_that_is_late_enough(cost, decoding, context, seconds):
    n = decode_iterations_until(cost, decoding, context, seconds)
    assert n == MAX_ITERATIONS or decode_span_s(cost, decoding, context, n) >= seconds
    assert n == 1 or decode_span_s(cost, decoding, context, n - 1) < seconds


@pytest.mark.parametrize("seconds", [math.inf, 1e300])
def test_iterations_until_is_capped(seconds):
    assert decode_iterations_until(NEXT, 8, 1000, seconds) == MAX_ITERATIONS


def test_a_model_without_attention_has_iterations_of_equal_length():
    cost = make_cost(replace(QWEN, attention_layers=0), H200)
    one = iteration_s(cost, 8, 0, 0, 0.0)
    assert decode_span_s(cost, 8, 10**6, 1000) == near(1000 * one)
    assert decode_iterations_until(cost, 8, 10**6, 999.5 * one) == 1000


# Refusals.


def refusal_of(model: HybridModel, **facts: object) -> str:
    with pytest.raises(ValueError) as refusal:
        make_cost(model, H200, **facts)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_shape_without_weights_is_refused():
    assert refusal_of(find_model("mamba2-1b3")).startswith("mamba2-1b3 is a shape without weights")


@pytest.mark.parametrize("name", ["tensor_parallel", "expert_parallel", "prefill_budget", "page_tokens"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_below_one_are_refused(name, value):
    assert refusal_of(QWEN, **{name: value}) == f"{name} is {value}, expected an integer >= 1"


@pytest.mark.parametrize(
    ("model", "tensor", "expert", "named"),
    [
        (QWEN, 1, 2, "qwen3-next-80b-a3b has 512 experts and tensor_parallel is 1"),
        (QWEN, 4, 3, "qwen3-next-80b-a3b has 512 experts and tensor_parallel is 4"),
        (QWEN, 4, 8, "qwen3-next-80b-a3b has 512 experts and tensor_parallel is 4"),
        (find_model("granite-4.0-h-small"), 16, 16, "granite-4.0-h-small has 72 experts and tensor_parallel is 16"),
        (DENSE, 2, 2, "qwen3.5-27b has no experts and tensor_parallel is 2"),
    ],
)
def test_experts_that_cannot_be_shared_out_are_refused(model, tensor, expert, named):
    line = refusal_of(model, tensor_parallel=tensor, expert_parallel=expert)
    assert line == f"expert_parallel is {expert}, but {named}: choose a number that divides both"


@pytest.mark.parametrize("name", ["weight_dtype", "kv_dtype", "state_dtype"])
def test_a_dtype_that_is_not_known_is_refused(name):
    assert "'int3'" in refusal_of(QWEN, **{name: "int3"})
