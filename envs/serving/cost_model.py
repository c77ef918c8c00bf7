"""Seconds of one engine iteration: a roofline of weights and compute, plus KV, state, attention and recurrence.

    t = t_fix + max(W_eff(T) / (e_w BW), 2 P_active T / (e_c F)) + ctx kv_token / (e_k BW) + B 2 state / (e_s BW)
        + L_attn 4 H_q d_h c (x + c/2) / (e_a F) + L_rec (a_rec c + t_rec0 [c > 0]) + B t_seq,   T = B + c,
    W_eff(T) = W (1 - (1 - P_active / P_total)^T)

with B decoding requests that read ctx tokens together, and prefill chunks of c tokens at offset x. BW and F are the
peak rates of one GPU. Under tensor parallelism g, weights, state and compute are divided by g, and KV as far as engines
divide it (`HybridModel.kv_token_bytes`); communication is t_comm (g - 1) / g per layer and iteration, which is 0, that
is not modelled, unless a calibration has fitted it.

The constants of the first block may be replaced by a calibration (constants.py); these are the priors:

| constant | value | where it comes from |
|---|---|---|
| t_fix | 126 us + 32 us per layer | BLIS's fits |
| t_seq | 4 us per decoding request | BLIS's fits |
| e_w, e_k | .71, .53 | BLIS's fits |
| e_s | per GPU, see gpus.py | measured decode recurrence, without the convolution (aiconfigurator, Qwen3.5-35B-A3B) |
| e_c | .5 | our assumption |
| t_comm | 0 | not modelled |

| constant | value | where it comes from |
|---|---|---|
| e_a | .5 | our assumption |
| a_rec | 47.5 + 13.3 ns per token and layer | the same tables: prefill scan + convolution, H200, 32x128x128 state |
| t_rec0 | 11.6 us per layer | the same tables: floor of the scan |

Scaling a_rec and t_rec0 by state size and by bandwidth to other models and GPUs is our assumption too.
"""

import math

import numpy as np

from hbmgym.envs.serving.constants import LOADED, CostConstants
from hbmgym.envs.serving.gpus import GPUS, Gpu
from hbmgym.memory_backend.geometry import HybridModel
from hbmgym.memory_backend.jit import kernel

E_A = 0.5
A_REC_S, T_REC0_S = (47.5 + 13.3) * 1e-9, 11.6e-6
REFERENCE_STATE_ELEMENTS = 32 * 128 * 128
CHUNK_MOVE_S = 75e-6

REFERENCE_BATCH, REFERENCE_CONTEXT = 16, 8192
MAX_ITERATIONS = 2**40
"""decode_iterations_until never answers more."""

# name, type, meaning; everything is per GPU, "all layers" unless said.
COST_TABLE: tuple[tuple[str, str, str], ...] = (
    ("t_fix_s", "f8", "every iteration, communication included"),
    ("weights_s", "f8", "reading all weights: W / (e_w BW)"),
    ("log_miss", "f8", "log(1 - P_active / P_total), -inf for a dense model: an expert is missed by one token"),
    ("compute_s_per_token", "f8", "2 P_active / (e_c F)"),
    ("kv_s_per_ctx_token", "f8", "reading the KV of one token: kv_token / (e_k BW)"),
    ("state_s_per_seq", "f8", "reading and writing one recurrent state, without convolution: 2 state / (e_s BW)"),
    ("attention_s_per_pair", "f8", "one prefill token attending to one token: L_attn 4 H_q d_h / (e_a F)"),
    ("recurrence_s_per_token", "f8", "L_rec a_rec"),
    ("recurrence_floor_s", "f8", "L_rec t_rec0, once per iteration with prefill"),
    ("t_seq_s", "f8", "every decoding request"),
    ("slot_copy_s", "f8", "copying one slot inside HBM: 2 slot / (e_s BW)"),
    ("block_copy_s_per_byte", "f8", "copying any block inside HBM: 2 / (e_s BW)"),
    ("chunk_move_s", "f8", "moving one chunk from pool to pool"),
    ("prefill_budget", "i8", "most prompt tokens of one iteration"),
    ("page_tokens", "i8", "tokens of one page"),
)
COST = np.dtype([(name, kind) for name, kind, _ in COST_TABLE], align=True)


def make_cost(
    model: HybridModel,
    gpu: Gpu,
    *,
    tensor_parallel: int = 1,
    weight_dtype: str = "fp8",
    kv_dtype: str = "bf16",
    state_dtype: str = "fp32",
    prefill_budget: int = 8192,
    page_tokens: int = 64,
    chunk_move_s: float = CHUNK_MOVE_S,
    constants: CostConstants = LOADED.constants,
) -> np.record:
    """The constants of `model` on `gpu` as one COST record; ValueError for a model without weights."""
    if model.total_params == 0:
        raise ValueError(f"{model.slug} is a shape without weights: the cost model cannot serve it")
    counts = {"tensor_parallel": tensor_parallel, "prefill_budget": prefill_budget, "page_tokens": page_tokens}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected an integer >= 1")
    # One GPU's part of a model is read as if g GPUs formed one with g times the rates.
    bandwidth = tensor_parallel * gpu.bandwidth
    flops = tensor_parallel * gpu.flops
    state_efficiency = gpu.state_efficiency if constants.e_s is None else constants.e_s
    copy_bandwidth = state_efficiency * bandwidth
    recurrence = model.state_elements / REFERENCE_STATE_ELEMENTS * GPUS["h200"].bandwidth / bandwidth
    dense = model.active_params == model.total_params
    layers = model.attention_layers + model.recurrent_layers

    cost = np.zeros(1, COST).view(np.recarray)[0]
    cost.t_fix_s = constants.t_fix_s + constants.t_fix_per_layer_s * layers
    cost.t_fix_s += constants.t_comm_s * layers * (tensor_parallel - 1) / tensor_parallel
    cost.weights_s = model.weight_bytes(weight_dtype) / (constants.e_w * bandwidth)
    cost.log_miss = -math.inf if dense else math.log1p(-model.active_params / model.total_params)
    cost.compute_s_per_token = 2 * model.active_params / (constants.e_c * flops)
    cost.kv_s_per_ctx_token = model.kv_token_bytes(kv_dtype, tensor_parallel) / (constants.e_k * gpu.bandwidth)
    cost.state_s_per_seq = 2 * model.state_bytes(state_dtype) / copy_bandwidth
    cost.attention_s_per_pair = model.attention_layers * 4 * model.q_heads * model.head_dim / (E_A * flops)
    cost.recurrence_s_per_token = model.recurrent_layers * A_REC_S * recurrence
    cost.recurrence_floor_s = model.recurrent_layers * T_REC0_S * recurrence
    cost.t_seq_s = constants.t_seq_s
    cost.slot_copy_s = 2 * model.slot_bytes(state_dtype) / copy_bandwidth
    # A byte of a pool lies on one GPU, so tensor parallelism does not speed it up.
    cost.block_copy_s_per_byte = 2 / (state_efficiency * gpu.bandwidth)
    if constants.block_copy_s_per_byte is not None:
        cost.block_copy_s_per_byte = constants.block_copy_s_per_byte
        cost.slot_copy_s = constants.block_copy_s_per_byte * model.slot_bytes(state_dtype, tensor_parallel)
    cost.chunk_move_s = chunk_move_s
    cost.prefill_budget = prefill_budget
    cost.page_tokens = page_tokens
    return cost


@kernel
def iteration_s(cost, decoding, context_tokens, prefill_tokens, prefill_attention):
    """Seconds of one iteration; 0 when it is empty.

    `decoding` requests read `context_tokens` together; `prefill_attention` sums c * (x + c/2) over the prefill chunks.
    """
    tokens = decoding + prefill_tokens
    if tokens == 0:
        return 0.0
    weights_s = cost.weights_s * -math.expm1(tokens * cost.log_miss)
    seconds = cost.t_fix_s + max(weights_s, tokens * cost.compute_s_per_token)
    seconds += context_tokens * cost.kv_s_per_ctx_token
    seconds += decoding * (cost.state_s_per_seq + cost.t_seq_s)
    if prefill_tokens > 0:
        seconds += prefill_attention * cost.attention_s_per_pair
        seconds += prefill_tokens * cost.recurrence_s_per_token + cost.recurrence_floor_s
    return seconds


@kernel
def decode_span_s(cost, decoding, context_tokens, iterations):
    """Seconds of `iterations` pure decode iterations; each lengthens the context by `decoding` tokens."""
    count = float(iterations)
    first = iteration_s(cost, decoding, context_tokens, 0, 0.0)
    return count * first + cost.kv_s_per_ctx_token * decoding * (0.5 * count * (count - 1.0))


@kernel
def decode_iterations_until(cost, decoding, context_tokens, seconds):
    """The smallest n >= 1 with decode_span_s(n) >= seconds, at most MAX_ITERATIONS."""
    first = iteration_s(cost, decoding, context_tokens, 0, 0.0)
    if first >= seconds:
        return 1
    if not decode_span_s(cost, decoding, context_tokens, MAX_ITERATIONS) > seconds:
        return MAX_ITERATIONS
    # square n^2 + linear n = seconds, solved without cancellation; rounding is mended by the loops.
    square = 0.5 * cost.kv_s_per_ctx_token * decoding
    linear = first - square
    root = 2.0 * seconds / (linear + math.sqrt(linear * linear + 4.0 * square * seconds))
    n = max(1, math.ceil(root))
    while n > 1 and decode_span_s(cost, decoding, context_tokens, n - 1) >= seconds:
        n -= 1
    while decode_span_s(cost, decoding, context_tokens, n) < seconds:
        n += 1
    return n


@kernel
def recovery_s(cost, pages, goal):
    """Seconds that prefill takes for the pages after `pages` up to `goal`, beside what else an iteration does."""
    tokens = (goal - pages) * cost.page_tokens
    pairs = tokens * (0.5 * (goal + pages) * cost.page_tokens)
    return tokens * (cost.compute_s_per_token + cost.recurrence_s_per_token) + pairs * cost.attention_s_per_pair


@kernel
def cold_prefill_s(cost, tokens):
    """Seconds from arrival to first token of a prompt that finds an idle engine and an empty cache.

    Chunks of prefill_budget; the last one ends at the last page boundary, what is left of a page comes by itself.
    """
    aligned = tokens // cost.page_tokens * cost.page_tokens
    seconds = 0.0
    done = 0
    while done < tokens:
        end = aligned if done < aligned else tokens
        chunk = min(end - done, cost.prefill_budget)
        seconds += iteration_s(cost, 0, 0, chunk, chunk * (done + 0.5 * chunk))
        done += chunk
    return seconds


@kernel
def tpot_reference_s(cost):
    """Seconds of a decode iteration at batch 16 and 8k context each; the TPOT SLO is a multiple of it."""
    return iteration_s(cost, REFERENCE_BATCH, REFERENCE_BATCH * REFERENCE_CONTEXT, 0, 0.0)
