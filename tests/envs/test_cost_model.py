import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbmgym.envs.serving.constants import CostConstants
from hbmgym.envs.serving.cost_model import (
    MAX_ITERATIONS,
    cold_prefill_s,
    decode_iterations_until,
    decode_span_s,
    iteration_s,
    make_cost,
    tpot_reference_s,
)
from hbmgym.envs.serving.gpus import GPUS, find_gpu
from hbmgym.memory_backend.geometry import find_model

H200 = find_gpu("h200")
NEXT = make_cost(find_model("qwen3-next-80b-a3b"), H200)
DENSE = make_cost(find_model("qwen3.5-27b"), find_gpu("a100"), weight_dtype="bf16", prefill_budget=200, page_tokens=64)


def near(value: float) -> object:
    return pytest.approx(value, rel=1e-12)


def test_empty_iteration_takes_no_time():
    assert iteration_s(NEXT, 0, 0, 0, 0.0) == 0.0


def test_decode_iteration_is_fixed_weights_kv_state_and_request_terms():
    weights = 80e9 * (1 - (77 / 80) ** 10) / (0.71 * 4.8e12)
    state = 2 * 36 * 32 * 128 * 128 * 4 / (0.86 * 4.8e12)
    expected = 126e-6 + 48 * 32e-6 + weights + 5000 * 24576 / (0.53 * 4.8e12) + 10 * (state + 4e-6)
    assert iteration_s(NEXT, 10, 5000, 0, 0.0) == near(expected)


def test_prefill_iteration_pays_compute_attention_and_recurrence():
    compute = 2 * 3e9 * 8192 / (0.5 * 989e12)
    weights = 80e9 / (0.71 * 4.8e12)
    attention = 12 * 4 * 16 * 256 * 8192 * 4096.0 / (0.5 * 989e12)
    expected = 126e-6 + 48 * 32e-6 + max(compute, weights) + attention + 36 * (60.8e-9 * 8192 + 11.6e-6)
    assert compute > weights
    assert iteration_s(NEXT, 0, 0, 8192, 8192 * 4096.0) == near(expected)


def test_dense_model_reads_all_weights_for_one_token():
    alone = 126e-6 + 64 * 32e-6 + 54e9 / (0.71 * 2.039e12) + 2 * 48 * 48 * 128 * 128 * 4 / (0.86 * 2.039e12) + 4e-6
    assert iteration_s(DENSE, 1, 0, 0, 0.0) == near(alone)


def test_recurrence_scales_with_state_size_and_bandwidth():
    assert DENSE.recurrence_s_per_token == near(48 * 60.8e-9 * 1.5 * 4.8 / 2.039)


def test_measured_recurrence_of_qwen35_35b_is_met():
    # aiconfigurator gdn_perf: microseconds per sequence and layer when decoding.
    model = find_model("qwen3.5-35b-a3b")
    for gpu, measured_us in (("h200", 1.021), ("h100", 1.40)):
        per_layer_us = 1e6 * make_cost(model, find_gpu(gpu)).state_s_per_seq / model.recurrent_layers
        assert per_layer_us == pytest.approx(measured_us, rel=0.01)


def test_copies_read_and_write_every_byte():
    assert NEXT.slot_copy_s == near(2 * 77_266_944 / (0.86 * 4.8e12))
    assert NEXT.block_copy_s_per_byte * 77_266_944 == near(NEXT.slot_copy_s)


def test_tensor_parallelism_divides_bytes_and_compute_but_not_fixed_time():
    half = make_cost(find_model("qwen3-next-80b-a3b"), H200, tensor_parallel=2)
    for name in ("weights_s", "kv_s_per_ctx_token", "state_s_per_seq", "compute_s_per_token", "slot_copy_s"):
        assert half[name] == near(NEXT[name] / 2), name
    assert (half.t_fix_s, half.t_seq_s) == (NEXT.t_fix_s, NEXT.t_seq_s)


def test_what_is_copied_to_every_gpu_is_read_by_every_gpu():
    half, eighth = (make_cost(find_model("qwen3-next-80b-a3b"), H200, tensor_parallel=g) for g in (2, 8))
    assert eighth.kv_s_per_ctx_token == near(half.kv_s_per_ctx_token)
    latent, shared = (make_cost(find_model("kimi-linear-48b-a3b"), H200, tensor_parallel=g) for g in (1, 4))
    assert shared.kv_s_per_ctx_token == near(latent.kv_s_per_ctx_token)


def test_dtypes_scale_their_own_term_only():
    cheap = make_cost(find_model("qwen3-next-80b-a3b"), H200, weight_dtype="bf16", kv_dtype="fp8", state_dtype="bf16")
    assert cheap.weights_s == near(2 * NEXT.weights_s)
    assert cheap.kv_s_per_ctx_token == near(NEXT.kv_s_per_ctx_token / 2)
    assert cheap.state_s_per_seq == near(NEXT.state_s_per_seq / 2)
    assert cheap.compute_s_per_token == NEXT.compute_s_per_token


def test_reference_tpot_is_batch_16_at_8k():
    assert tpot_reference_s(NEXT) == iteration_s(NEXT, 16, 16 * 8192, 0, 0.0)


def test_cold_prefill_cuts_at_the_last_page_boundary():
    # Budget 200, page 64: 500 tokens are chunks of 200, 200, 48 (to 448) and a tail of 52.
    chunks = ((0, 200), (200, 200), (400, 48), (448, 52))
    expected = sum(iteration_s(DENSE, 0, 0, c, c * (x + c / 2)) for x, c in chunks)
    assert cold_prefill_s(DENSE, 500) == near(expected)


def test_cold_prefill_of_whole_pages_has_no_tail():
    assert cold_prefill_s(DENSE, 128) == near(iteration_s(DENSE, 0, 0, 128, 128 * 64.0))


def test_cold_prefill_shorter_than_a_page_is_one_iteration():
    assert cold_prefill_s(DENSE, 63) == near(iteration_s(DENSE, 0, 0, 63, 63 * 31.5))


costs = st.sampled_from((NEXT, DENSE))
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


def test_unknown_gpu_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown GPU 'h20' \(did you mean 'h200'\?\): known are h200, h100, a100"):
        find_gpu("h20")


def test_gpu_memory_is_in_bytes():
    sizes = {"h200": 141e9, "h100": 80e9, "a100": 80e9, "rtx3060": 12e9}
    assert {slug: gpu.memory_bytes for slug, gpu in GPUS.items()} == sizes


def test_communication_is_per_layer_and_the_share_that_other_gpus_hold():
    def fixed_s(tensor_parallel: int) -> float:
        model, constants = find_model("qwen3-next-80b-a3b"), CostConstants(t_comm_s=8e-6)
        return make_cost(model, H200, tensor_parallel=tensor_parallel, constants=constants).t_fix_s - NEXT.t_fix_s

    assert fixed_s(1) == 0.0
    assert fixed_s(2) == pytest.approx(48 * 8e-6 / 2)
    assert fixed_s(8) == pytest.approx(48 * 8e-6 * 7 / 8)


def test_every_constant_acts_on_its_own_terms():
    terms = {
        "t_fix_s": {"t_fix_s"},
        "t_fix_per_layer_s": {"t_fix_s"},
        "t_seq_s": {"t_seq_s"},
        "e_w": {"weights_s"},
        "e_k": {"kv_s_per_ctx_token"},
        "e_s": {"state_s_per_seq", "slot_copy_s", "block_copy_s_per_byte"},
        "e_c": {"compute_s_per_token"},
        "t_comm_s": {"t_fix_s"},
        "block_copy_s_per_byte": {"slot_copy_s", "block_copy_s_per_byte"},
    }
    assert set(terms) == {field.name for field in dataclasses.fields(CostConstants)}
    model = find_model("qwen3-next-80b-a3b")
    usual = make_cost(model, H200, tensor_parallel=2)
    for name, expected in terms.items():
        other = make_cost(model, H200, tensor_parallel=2, constants=CostConstants(**{name: 0.123}))
        assert {field for field in usual.dtype.names if other[field] != usual[field]} == expected, name


def test_a_measured_copy_holds_for_slots_of_one_gpu_too():
    model, constants = find_model("qwen3-next-80b-a3b"), CostConstants(block_copy_s_per_byte=1e-12)
    cost = make_cost(model, H200, tensor_parallel=2, constants=constants)
    assert cost.block_copy_s_per_byte == 1e-12
    assert cost.slot_copy_s == near(77_266_944 / 2 * 1e-12)


def test_shape_without_weights_is_refused():
    with pytest.raises(ValueError, match="mamba2-1b3 is a shape without weights"):
        make_cost(find_model("mamba2-1b3"), H200)


@pytest.mark.parametrize("name", ["tensor_parallel", "prefill_budget", "page_tokens"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0, expected an integer >= 1"):
        make_cost(find_model("qwen3.5-4b"), H200, **{name: 0})
