"""Seconds of one engine iteration: the kernels of a model on a GPU (kernels.py) and what an engine's host adds.

    g = W(T) + ctx kv + B state                                                    T = B + P
    t = t_it + B t_seq + g + L layer                                               decoding alone
    t = t_it + B t_seq + max(kp (g + pairs a + P r + r0) + L layer, L floor)       with P tokens of prompts

with B decoding requests that read ctx tokens together, and prefill chunks of c tokens at offset x: P is the sum of c
and pairs that of c (x + c/2). W sums all kernels that see one token at a time; it is tabulated once at powers of two
and affine between them. Each GPU of a tensor-parallel group takes so long, communication included. The four constants
of the host, kp, layer, floor and the seconds before a request is queued, are those of an `EngineProfile`; the floor
does not apply to iterations of at most `graph_tokens` tokens. L counts pairs of blocks, a mixer and an MLP.

| constant | value | where it comes from |
|---|---|---|
| W, kv, state, a, r, r0 | sums of kernels | measured tables (gpus.json) and the model's own config (models.json) |
| kp, layer, floor, request | per engine or deployment | engines.json, or `python eval/calibrate.py` |
| t_it, t_seq | .5 ms, 2 us | fitted over the published rows, and held for all engines |
"""

import functools
import math
from typing import Any

import numpy as np

from hbmgym.envs.serving.engines import DEFAULT_ENGINE, ENGINE_PROFILES, EngineProfile
from hbmgym.envs.serving.gpus import Gpu
from hbmgym.envs.serving.kernels import Shard
from hbmgym.memory_backend.geometry import HybridModel
from hbmgym.memory_backend.jit import kernel

ITERATION_S, SEQUENCE_S = 0.5e-3, 2e-6
CHUNK_MOVE_S = 75e-6
SEGMENTS = 17
"""W is known at 1, 2, 4, ... 2^16 tokens, and goes on beyond them as between the last two."""

REFERENCE_BATCH, REFERENCE_CONTEXT = 16, 8192
MAX_ITERATIONS = 2**40
"""decode_iterations_until never answers more."""

# name, type, meaning; everything is per GPU, "all layers" unless said.
COST_TABLE: tuple[tuple[str, Any, str], ...] = (
    ("iteration_s", "f8", "every iteration: t_it"),
    ("layers_s", "f8", "every iteration: L layer"),
    ("floor_s", "f8", "every iteration with prefill of more than graph_tokens tokens, at least: L floor"),
    ("prefill_factor", "f8", "kp: how much longer kernels take in an iteration with prefill"),
    ("request_s", "f8", "from a request's arrival to the queue"),
    ("token_base_s", ("f8", SEGMENTS), "W in segment j, of up to 2^j tokens, is base + tokens x slope"),
    ("token_slope_s", ("f8", SEGMENTS), "see token_base_s"),
    ("kv_s_per_ctx_token", "f8", "reading the KV of one token"),
    ("state_s_per_seq", "f8", "reading and writing one recurrent state, and reading one window tail"),
    ("sequence_s", "f8", "every decoding request: t_seq"),
    ("attention_s_per_pair", "f8", "one prefill token attending to one token: kp a"),
    ("scan_s_per_token", "f8", "prefill recurrence of one token: kp r"),
    ("scan_floor_s", "f8", "the least that prefill recurrence takes: kp r0"),
    ("prefill_s_per_token", "f8", "one more token in a full chunk, attention aside: kp (dW/dT + r)"),
    ("slot_copy_s", "f8", "copying what is recurrent of a slot inside HBM: 2 bytes / (e_s BW)"),
    ("block_copy_s_per_byte", "f8", "copying any block inside HBM: 2 / (e_s BW)"),
    ("host_copy_s_per_byte", "f8", "copying between HBM and host memory: 1 / pcie, as stated by the vendor"),
    ("chunk_move_s", "f8", "moving one chunk from pool to pool"),
    ("prefill_budget", "i8", "most prompt tokens of one iteration"),
    ("page_tokens", "i8", "tokens of one page"),
    ("graph_tokens", "i8", "an iteration of at most so many tokens pays no floor"),
    ("snapshots_end_chunks", "i8", "1: a chunk ends where a snapshot is saved"),
)
COST = np.dtype([(name, *(kind if isinstance(kind, tuple) else (kind,))) for name, kind, _ in COST_TABLE], align=True)


def make_cost(
    model: HybridModel,
    gpu: Gpu,
    *,
    engine: EngineProfile = ENGINE_PROFILES[DEFAULT_ENGINE],
    tensor_parallel: int = 1,
    expert_parallel: int = 1,
    weight_dtype: str = "fp8",
    kv_dtype: str = "bf16",
    state_dtype: str = "fp32",
    prefill_budget: int = 8192,
    page_tokens: int = 64,
    chunk_move_s: float = CHUNK_MOVE_S,
    block_copy_s_per_byte: float | None = None,
) -> np.record:
    """The constants of `model` on `gpu` under `engine` as one COST record.

    `block_copy_s_per_byte`: as measured (eval/gpu_check.py); None: by bandwidth. ValueError for a model without weights
    and for a group of GPUs that cannot share its experts out.
    """
    if model.total_params == 0:
        raise ValueError(f"{model.slug} is a shape without weights: the cost model cannot serve it")
    counts = {"tensor_parallel": tensor_parallel, "prefill_budget": prefill_budget, "page_tokens": page_tokens}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected an integer >= 1")
    _check_experts(model, tensor_parallel, expert_parallel)
    if weight_dtype.endswith("fp4") and not model.experts:
        raise ValueError(
            f"weight_dtype is {weight_dtype}, but {model.slug} has no experts, and no other weights are of 4 bits "
            "here: choose bf16 or fp8"
        )
    shard = Shard(model, gpu, engine.kernels, weight_dtype, kv_dtype, state_dtype, tensor_parallel, expert_parallel)
    layers = model.blocks / 2

    cost = np.zeros(1, COST).view(np.recarray)[0]
    cost.iteration_s, cost.sequence_s = ITERATION_S, SEQUENCE_S
    cost.layers_s, cost.floor_s = layers * engine.layer_s, layers * engine.prefill_floor_s
    cost.prefill_factor, cost.request_s = engine.prefill_factor, engine.request_s
    cost.token_base_s[:], cost.token_slope_s[:] = _token_table(shard)
    cost.kv_s_per_ctx_token = shard.kv_s_per_token
    cost.state_s_per_seq = shard.state_s
    cost.attention_s_per_pair = engine.prefill_factor * shard.attention_s_per_pair
    cost.scan_s_per_token = engine.prefill_factor * shard.scan_s_per_token
    cost.scan_floor_s = engine.prefill_factor * shard.scan_floor_s
    full = cost.token_slope_s[min(max((prefill_budget - 1).bit_length(), 1), SEGMENTS - 1)]
    cost.prefill_s_per_token = engine.prefill_factor * full + cost.scan_s_per_token
    if block_copy_s_per_byte is None:
        block_copy_s_per_byte = 2 / (gpu.state_e_bw * gpu.bandwidth)
    cost.block_copy_s_per_byte = block_copy_s_per_byte
    # A window tail is shared page by page in real engines: resuming from it, or keeping it, copies nothing.
    cost.slot_copy_s = block_copy_s_per_byte * model.recurrent_bytes(state_dtype, tensor_parallel)
    cost.host_copy_s_per_byte = 1 / gpu.pcie
    cost.chunk_move_s = chunk_move_s
    cost.prefill_budget = prefill_budget
    cost.page_tokens = page_tokens
    cost.graph_tokens = engine.graph_tokens
    cost.snapshots_end_chunks = engine.snapshots_end_chunks
    return cost


def _check_experts(model: HybridModel, tensor_parallel: int, expert_parallel: int) -> None:
    if expert_parallel < 1:
        raise ValueError(f"expert_parallel is {expert_parallel}, expected an integer >= 1")
    if expert_parallel == 1:
        return
    if not model.experts or model.experts % expert_parallel or tensor_parallel % expert_parallel:
        experts = f"{model.experts} experts" if model.experts else "no experts"
        raise ValueError(
            f"expert_parallel is {expert_parallel}, but {model.slug} has {experts} and tensor_parallel is "
            f"{tensor_parallel}: choose a number that divides both"
        )


@functools.lru_cache(maxsize=256)
def _token_table(shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    """W as (base, slope) by segment, seconds and seconds per token; shapes (SEGMENTS,)."""
    tokens = 2.0 ** np.arange(SEGMENTS)
    seconds = np.array([shard.token_wise_s(int(count)) for count in tokens])
    slope = np.append(0.0, np.diff(seconds) / np.diff(tokens))
    return seconds - slope * tokens, slope


@kernel
def token_wise_s(cost, tokens):
    """W: seconds of all kernels that see one token at a time, in an iteration of `tokens` >= 1 tokens."""
    rest = min(tokens, 1 << (SEGMENTS - 1)) - 1
    segment = 0
    while rest > 0:
        rest >>= 1
        segment += 1
    return cost.token_base_s[segment] + tokens * cost.token_slope_s[segment]


@kernel
def iteration_s(cost, decoding, context_tokens, prefill_tokens, prefill_attention):
    """Seconds of one iteration; 0 when it is empty.

    `decoding` requests read `context_tokens` together; `prefill_attention` sums c * (x + c/2) over the prefill chunks.
    """
    tokens = decoding + prefill_tokens
    if tokens == 0:
        return 0.0
    seconds = token_wise_s(cost, tokens)
    seconds += context_tokens * cost.kv_s_per_ctx_token + decoding * cost.state_s_per_seq
    host_s = cost.iteration_s + decoding * cost.sequence_s
    if prefill_tokens == 0:
        return host_s + seconds + cost.layers_s
    seconds = cost.prefill_factor * seconds + cost.scan_floor_s + cost.layers_s
    seconds += prefill_attention * cost.attention_s_per_pair + prefill_tokens * cost.scan_s_per_token
    if tokens > cost.graph_tokens:
        seconds = max(seconds, cost.floor_s)
    return host_s + seconds


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
    """Seconds that prefill takes for the pages after `pages` up to `goal`, as a part of full chunks.

    What chunks cost whatever their length, the floor above all, is left out: it is paid anyway.
    """
    tokens = (goal - pages) * cost.page_tokens
    pairs = tokens * (0.5 * (goal + pages) * cost.page_tokens)
    return tokens * cost.prefill_s_per_token + pairs * cost.attention_s_per_pair


@kernel
def cold_prefill_s(cost, tokens):
    """Seconds from arrival to first token of a prompt that finds an idle engine and an empty cache.

    Chunks of prefill_budget; where snapshots end chunks, one ends at the last page boundary.
    """
    aligned = tokens // cost.page_tokens * cost.page_tokens if cost.snapshots_end_chunks != 0 else tokens
    seconds = cost.request_s
    done = 0
    while done < tokens:
        end = aligned if done < aligned else tokens
        chunk = min(end - done, cost.prefill_budget)
        seconds += iteration_s(cost, 0, 0, chunk, chunk * (done + 0.5 * chunk))
        done += chunk
    return seconds


@kernel
def tpot_reference_s(cost):
    """Seconds of a decode iteration at batch 16 and 8k context each, which the TPOT SLO refers to."""
    return iteration_s(cost, REFERENCE_BATCH, REFERENCE_BATCH * REFERENCE_CONTEXT, 0, 0.0)
