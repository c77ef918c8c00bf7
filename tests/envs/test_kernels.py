"""The closed forms of kernels.py against kernels that NVIDIA measured, and what must hold whatever the constants are.

The figures are microseconds from the tables of aiconfigurator-core 0.12.0 (Apache-2.0), each named by GPU, engine and
version, dtype and shape. The shapes were chosen by rule before any was compared, after the projections, experts and
heads of Qwen3-Next, Qwen3.5-397B and Qwen3.5-27B; messages are 64 KB to 64 MB in steps of four. Met within 25 % are
776 of 948: 120 of 132 dense products, 256 of 352 experts (49 of 88 at 8 tokens, 76 at 1k, 72 at 4k, 59 at 8k), decode
attention 139 of 166, prefill attention 78 of 84, prefill recurrence 35 of 40, decode recurrence 53 of 66, all-reduce
95 of 108. Those here are some of them. Not met are, above all:
- experts of a few tokens, whose kernels the tables launch one by one (see experts_t0 in gpus.json);
- expert-parallel GPUs at 4k tokens and more (up to 2.4 times too fast, on A100 three times): the busiest of them has
  more than its share of the rows;
- messages of 256 KB to 8 MB between B200s, and of 256 or 512 KB between 4 or 8 others (up to three times too fast);
- what fits into the large caches of the L40S and the RTX PRO 6000, where the tables find it in every repetition.
"""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbmgym.envs.serving.gpus import ENGINES, FILE, GPUS, HEAD_DIMS, Gpu, find_gpu
from hbmgym.envs.serving.kernels import Shard, all_reduce_s, experts_s, gemm_s
from hbmgym.memory_backend.geometry import MODELS, HybridModel, find_model, weight_number_bytes

US = 1e-6
KERNEL_DTYPES = {"bf16": "bf16", "fp8": "fp8", "nvfp4": "fp4"}
NEXT = find_model("qwen3-next-80b-a3b")
SERVED = [model for model in MODELS.values() if model.total_params]


def measured(us: float) -> object:
    return pytest.approx(us * US, rel=0.25)


def one_layer(**shape: object) -> HybridModel:
    """A model of one layer with the kernel that was measured, and no other."""
    return replace(NEXT, **{"attention_layers": 0, "recurrent_layers": 0, **shape})


def shard_of(gpu: str, engine: str, model: HybridModel, kv_dtype: str = "bf16") -> Shard:
    return Shard(model, find_gpu(gpu), engine.partition("/")[0], "bf16", kv_dtype, "fp32")


# GPU, engine/version, dtype of the weights (fp8: fp8_block of SGLang, fp8 of vLLM); m, n, k.
GEMM = [
    ("h200", "sglang/0.5.14", "bf16", 64, 12288, 2048, 16.18),
    ("h200", "sglang/0.5.14", "bf16", 8192, 16384, 4096, 1626),
    ("h200", "sglang/0.5.14", "fp8", 1024, 16384, 4096, 165.5),
    ("h200", "sglang/0.5.14", "fp8", 64, 5120, 6144, 15.66),
    ("h100", "sglang/0.5.14", "bf16", 64, 12288, 2048, 21.58),
    ("h100", "sglang/0.5.14", "bf16", 8192, 16384, 4096, 1645),
    ("h100", "sglang/0.5.14", "fp8", 64, 5120, 6144, 16.87),
    ("a100", "sglang/0.5.10", "bf16", 64, 12288, 2048, 39.49),
    ("a100", "sglang/0.5.10", "bf16", 8192, 16384, 4096, 4466),
    ("b200", "sglang/0.5.14", "bf16", 64, 12288, 2048, 10.73),
    ("b200", "sglang/0.5.14", "bf16", 8192, 16384, 4096, 671.8),
    ("b200", "sglang/0.5.14", "fp8", 1024, 16384, 4096, 76.59),
    ("l40s", "sglang/0.5.14", "bf16", 64, 12288, 2048, 90.42),
    ("l40s", "sglang/0.5.14", "bf16", 8192, 16384, 4096, 5591),
    ("l40s", "vllm/0.24.0", "fp8", 64, 5120, 6144, 53.33),
    ("rtxpro6000", "sglang/0.5.14", "bf16", 64, 12288, 2048, 37.17),
    ("rtxpro6000", "sglang/0.5.14", "bf16", 8192, 16384, 4096, 2821),
    ("rtxpro6000", "vllm/0.24.0", "fp8", 64, 5120, 6144, 25.75),
]


@pytest.mark.parametrize(("gpu", "engine", "dtype", "m", "n", "k", "us"), GEMM)
def test_dense_products_take_what_was_measured(gpu, engine, dtype, m, n, k, us):
    found = find_gpu(gpu)
    assert gemm_s(found.gemm[dtype], found, m, n, k, weight_number_bytes(dtype)) == measured(us)


# GPU, engine/version, dtype of the weights (fp8: fp8_block, but fp8 on RTX PRO); tokens, hidden size, width on one
# GPU (128 are slices of 1024), experts, experts per token, expert-parallel GPUs. Routing power_law_1.2.
EXPERTS = [
    ("h200", "vllm/0.24.0", "bf16", 1024, 2048, 512, 256, 8, 1, 531.7),
    ("h200", "vllm/0.24.0", "bf16", 1024, 4096, 1024, 512, 10, 1, 3046),
    ("h200", "vllm/0.24.0", "fp8", 1024, 2048, 512, 256, 8, 1, 351),
    ("h200", "vllm/0.24.0", "fp8", 8, 4096, 1024, 512, 10, 1, 272.5),
    ("h200", "sglang/0.5.14", "bf16", 1024, 4096, 1024, 512, 10, 8, 702.5),
    ("h200", "sglang/0.5.14", "fp8", 1024, 2048, 512, 256, 8, 1, 313.9),
    ("h200", "vllm/0.24.0", "fp8", 8192, 2048, 512, 256, 8, 1, 1289),
    ("h100", "vllm/0.24.0", "bf16", 1024, 2048, 512, 256, 8, 1, 641.8),
    ("h100", "vllm/0.24.0", "fp8", 1024, 2048, 512, 256, 8, 1, 417.9),
    ("h100", "sglang/0.5.14", "bf16", 1024, 4096, 1024, 512, 10, 8, 841.6),
    ("a100", "sglang/0.5.10", "bf16", 8, 4096, 1024, 512, 10, 1, 1310),
    ("b200", "vllm/0.24.0", "bf16", 1024, 4096, 1024, 512, 10, 8, 242.5),
    ("b200", "vllm/0.24.0", "fp8", 8192, 2048, 512, 256, 8, 1, 837.2),
    ("b200", "vllm/0.24.0", "nvfp4", 4096, 4096, 1024, 512, 10, 8, 175),
    ("b200", "sglang/0.5.14", "bf16", 4096, 4096, 1024, 512, 10, 8, 393.7),
    ("b200", "sglang/0.5.14", "fp8", 1024, 4096, 1024, 512, 10, 8, 213.3),
    ("l40s", "vllm/0.24.0", "bf16", 1024, 2048, 512, 256, 8, 1, 2574),
    ("l40s", "vllm/0.24.0", "fp8", 1024, 4096, 1024, 512, 10, 8, 1457),
    ("l40s", "sglang/0.5.14", "bf16", 1024, 2048, 512, 256, 8, 1, 3525),
    ("rtxpro6000", "vllm/0.24.0", "fp8", 1024, 2048, 512, 256, 8, 1, 653.5),
    ("rtxpro6000", "vllm/0.24.0", "nvfp4", 4096, 4096, 1024, 512, 10, 8, 581.3),
    ("rtxpro6000", "vllm/0.24.0", "bf16", 8, 4096, 1024, 512, 10, 1, 1354),
    ("rtxpro6000", "sglang/0.5.14", "bf16", 1024, 4096, 1024, 512, 10, 8, 1570),
    # The same experts as some above, all on one GPU instead of on eight.
    ("h200", "sglang/0.5.14", "bf16", 1024, 4096, 1024, 512, 10, 1, 4370),
    ("h100", "sglang/0.5.14", "bf16", 1024, 4096, 1024, 512, 10, 1, 5569),
    ("b200", "vllm/0.24.0", "bf16", 1024, 4096, 1024, 512, 10, 1, 1900),
    ("b200", "vllm/0.24.0", "nvfp4", 4096, 4096, 1024, 512, 10, 1, 864.8),
    ("b200", "sglang/0.5.14", "bf16", 4096, 4096, 1024, 512, 10, 1, 2346),
    ("b200", "sglang/0.5.14", "fp8", 1024, 4096, 1024, 512, 10, 1, 1357),
    ("l40s", "vllm/0.24.0", "fp8", 1024, 4096, 1024, 512, 10, 1, 9200),
    ("rtxpro6000", "vllm/0.24.0", "nvfp4", 4096, 4096, 1024, 512, 10, 1, 3562),
    ("rtxpro6000", "sglang/0.5.14", "bf16", 1024, 4096, 1024, 512, 10, 1, 11060),
    # And in slices on each of eight.
    ("h200", "vllm/0.24.0", "fp8", 8192, 4096, 128, 512, 10, 1, 1630),
    ("h200", "sglang/0.5.14", "bf16", 1024, 4096, 128, 512, 10, 1, 516.7),
    ("h100", "vllm/0.24.0", "bf16", 4096, 4096, 128, 512, 10, 1, 1157),
    ("h100", "sglang/0.5.14", "fp8", 4096, 4096, 128, 512, 10, 1, 829.1),
    ("a100", "sglang/0.5.10", "bf16", 1024, 4096, 128, 512, 10, 1, 1405),
    ("b200", "vllm/0.24.0", "nvfp4", 4096, 4096, 128, 512, 10, 1, 336.4),
    ("b200", "sglang/0.5.14", "bf16", 4096, 4096, 128, 512, 10, 1, 467.7),
]


@pytest.mark.parametrize(
    ("gpu", "engine", "dtype", "tokens", "hidden", "width", "experts", "per_token", "parallel", "us"), EXPERTS
)
def test_experts_take_what_was_measured(gpu, engine, dtype, tokens, hidden, width, experts, per_token, parallel, us):
    found = find_gpu(gpu)
    kernel = found.kernels[engine.partition("/")[0]].experts[KERNEL_DTYPES[dtype]]
    number_bytes = weight_number_bytes(dtype)
    seconds = experts_s(kernel, found, tokens, experts, per_token, parallel, hidden, width, 3, number_bytes)
    assert seconds == measured(us)


# GPU, engine/version, dtype of KV; query heads, KV heads, head size; requests, tokens of context each.
DECODE_ATTENTION = [
    ("h200", "vllm/0.24.0", "bf16", 16, 2, 256, 16, 8192, 77.23),
    ("h200", "vllm/0.24.0", "fp8", 16, 2, 256, 16, 8192, 106.9),
    ("h200", "sglang/0.5.14", "fp8", 32, 8, 128, 64, 1024, 74.58),
    ("h100", "vllm/0.24.0", "bf16", 32, 8, 128, 16, 8192, 210.9),
    ("h100", "sglang/0.5.14", "fp8", 16, 2, 256, 16, 8192, 70.75),
    ("a100", "vllm/0.14.0", "bf16", 32, 8, 128, 64, 1024, 192.7),
    ("a100", "sglang/0.5.10", "bf16", 32, 8, 128, 64, 1024, 268.4),
    ("b200", "vllm/0.24.0", "fp8", 16, 2, 256, 16, 8192, 31.78),
    ("b200", "sglang/0.5.14", "bf16", 16, 2, 256, 64, 1024, 28.83),
    ("l40s", "vllm/0.24.0", "bf16", 16, 2, 256, 16, 8192, 428.9),
    ("l40s", "sglang/0.5.14", "fp8", 32, 8, 128, 16, 8192, 401.7),
    ("rtxpro6000", "vllm/0.24.0", "bf16", 16, 2, 256, 16, 8192, 198.5),
    ("rtxpro6000", "sglang/0.5.14", "bf16", 32, 8, 128, 16, 8192, 360.8),
]


@pytest.mark.parametrize(
    ("gpu", "engine", "dtype", "q_heads", "kv_heads", "head_dim", "requests", "context", "us"), DECODE_ATTENTION
)
def test_decode_attention_takes_what_was_measured(
    gpu, engine, dtype, q_heads, kv_heads, head_dim, requests, context, us
):
    model = one_layer(attention_layers=1, q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim)
    shard = shard_of(gpu, engine, model, dtype)
    assert shard.kernels.attention_t0_s + requests * context * shard.kv_s_per_token == measured(us)


# GPU, engine/version, dtype of KV; query heads, KV heads, head size; tokens of the only prompt.
PREFILL_ATTENTION = [
    ("h200", "vllm/0.24.0", "bf16", 16, 2, 256, 8192, 795.7),
    ("h200", "sglang/0.5.14", "fp8", 16, 2, 256, 8192, 616.1),
    ("h100", "vllm/0.24.0", "fp8", 32, 8, 128, 8192, 969.2),
    ("h100", "sglang/0.5.14", "bf16", 16, 2, 256, 8192, 869.5),
    ("a100", "vllm/0.14.0", "bf16", 32, 8, 128, 8192, 3120),
    ("b200", "vllm/0.24.0", "bf16", 16, 2, 256, 8192, 451.2),
    ("b200", "sglang/0.5.14", "fp8", 32, 8, 128, 8192, 502.1),
    ("l40s", "vllm/0.24.0", "bf16", 32, 8, 128, 8192, 2993),
    ("l40s", "sglang/0.5.14", "bf16", 16, 2, 256, 8192, 3234),
    ("rtxpro6000", "vllm/0.24.0", "bf16", 16, 2, 256, 8192, 1996),
    ("rtxpro6000", "sglang/0.5.14", "fp8", 32, 8, 128, 8192, 1719),
]


@pytest.mark.parametrize(
    ("gpu", "engine", "dtype", "q_heads", "kv_heads", "head_dim", "tokens", "us"), PREFILL_ATTENTION
)
def test_prefill_attention_takes_what_was_measured(gpu, engine, dtype, q_heads, kv_heads, head_dim, tokens, us):
    model = one_layer(attention_layers=1, q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim)
    assert shard_of(gpu, engine, model, dtype).attention_s_per_pair * tokens**2 / 2 == measured(us)


def gated_delta_net(qk_heads: int, heads: int) -> HybridModel:
    """One layer with heads of 128 x 128 numbers, and its convolution."""
    channels = 128 * (2 * qk_heads + heads)
    return one_layer(recurrent_layers=1, state_shape=(heads, 128, 128), conv_shape=(channels, 3))


# GPU, engine/version; QK heads, heads of the state; tokens of the only prompt. Chunked scan and convolution together.
SCAN = [
    ("h200", "vllm/0.24.0", 16, 32, 8192, 512.4),
    ("h200", "vllm/0.24.0", 16, 64, 8192, 565.4),
    ("h200", "sglang/0.5.14", 16, 32, 2048, 229.7),
    ("h100", "vllm/0.24.0", 8, 32, 8192, 480.5),
    ("h100", "sglang/0.5.14", 16, 64, 8192, 1511),
    ("b200", "vllm/0.24.0", 16, 32, 2048, 121.5),
    ("b200", "sglang/0.5.14", 16, 64, 8192, 1067),
    ("l40s", "sglang/0.5.14", 8, 32, 8192, 2111),
    ("rtxpro6000", "vllm/0.24.0", 16, 32, 8192, 1152),
    ("rtxpro6000", "sglang/0.5.14", 16, 64, 8192, 1820),
]


@pytest.mark.parametrize(("gpu", "engine", "qk_heads", "heads", "tokens", "us"), SCAN)
def test_prefill_recurrence_takes_what_was_measured(gpu, engine, qk_heads, heads, tokens, us):
    shard = shard_of(gpu, engine, gated_delta_net(qk_heads, heads))
    assert shard.scan_floor_s + tokens * shard.scan_s_per_token == measured(us)


# GPU, engine/version; QK heads, heads of the state; requests. Step of the recurrence and of the convolution together.
DECODE_RECURRENCE = [
    ("h200", "vllm/0.24.0", 16, 32, 1, 6.57),
    ("h200", "vllm/0.24.0", 16, 64, 256, 543.2),
    ("h100", "vllm/0.24.0", 16, 32, 64, 99.19),
    ("h100", "sglang/0.5.14", 16, 64, 256, 734.4),
    ("a100", "sglang/0.5.10", 16, 32, 64, 141.3),
    ("b200", "vllm/0.24.0", 16, 32, 256, 181),
    ("b200", "sglang/0.5.14", 16, 64, 1, 7.06),
    ("l40s", "vllm/0.24.0", 16, 32, 64, 411.2),
    ("rtxpro6000", "sglang/0.5.14", 16, 64, 64, 372.8),
]


@pytest.mark.parametrize(("gpu", "engine", "qk_heads", "heads", "requests", "us"), DECODE_RECURRENCE)
def test_decode_recurrence_takes_what_was_measured(gpu, engine, qk_heads, heads, requests, us):
    shard = shard_of(gpu, engine, gated_delta_net(qk_heads, heads))
    assert shard.gpu.state_t0_s + requests * shard.state_s == measured(us)


# GPU, engine/version; GPUs, bf16 numbers of the message (message_size of the tables). CUDA graph.
ALL_REDUCE = [
    ("h200", "vllm/0.24.0", 2, 4096, 4.64),
    ("h200", "vllm/0.24.0", 8, 33554432, 323.3),
    ("h100", "vllm/0.24.0", 8, 16777216, 177.8),
    ("a100", "vllm/0.14.0", 2, 33554432, 388.5),
    ("b200", "vllm/0.24.0", 8, 4096, 7.824),
    ("b200", "vllm/0.24.0", 8, 33554432, 222.8),
    ("l40s", "vllm/0.22.0", 2, 262144, 32.1),
    ("rtxpro6000", "vllm/0.24.0", 2, 33554432, 1844),
    # 64 KB, 4 MB and 16 MB.
    ("h200", "vllm/0.24.0", 2, 32768, 4.825),
    ("h200", "vllm/0.24.0", 2, 2097152, 20.49),
    ("h200", "vllm/0.24.0", 2, 8388608, 76.57),
    ("h200", "vllm/0.24.0", 4, 32768, 5.395),
    ("h200", "vllm/0.24.0", 4, 2097152, 29.83),
    ("h200", "vllm/0.24.0", 4, 8388608, 93.78),
    ("h200", "vllm/0.24.0", 8, 32768, 6.561),
    ("h200", "vllm/0.24.0", 8, 2097152, 28.43),
    ("h200", "vllm/0.24.0", 8, 8388608, 87.17),
    ("h100", "vllm/0.24.0", 2, 32768, 4.515),
    ("h100", "vllm/0.24.0", 2, 2097152, 20.24),
    ("h100", "vllm/0.24.0", 2, 8388608, 81.42),
    ("h100", "vllm/0.24.0", 4, 32768, 5.234),
    ("h100", "vllm/0.24.0", 4, 2097152, 30.25),
    ("h100", "vllm/0.24.0", 4, 8388608, 98.77),
    ("h100", "vllm/0.24.0", 8, 32768, 6.411),
    ("h100", "vllm/0.24.0", 8, 2097152, 30.81),
    ("h100", "vllm/0.24.0", 8, 8388608, 92.38),
    ("b200", "vllm/0.24.0", 2, 32768, 7.083),
    ("b200", "vllm/0.24.0", 2, 8388608, 57.43),
    ("b200", "vllm/0.24.0", 4, 32768, 7.395),
    ("b200", "vllm/0.24.0", 4, 2097152, 29.96),
    ("b200", "vllm/0.24.0", 4, 8388608, 68.01),
    ("b200", "vllm/0.24.0", 8, 32768, 8.641),
    ("b200", "vllm/0.24.0", 8, 2097152, 26.31),
    ("b200", "vllm/0.24.0", 8, 8388608, 63.21),
]


@pytest.mark.parametrize(("gpu", "engine", "gpus", "numbers", "us"), ALL_REDUCE)
def test_all_reduce_takes_what_was_measured(gpu, engine, gpus, numbers, us):
    assert all_reduce_s(find_gpu(gpu), gpus, 2 * numbers) == measured(us)


# Whatever the constants are.

models, gpus, engines = st.sampled_from(SERVED), st.sampled_from(list(GPUS.values())), st.sampled_from(ENGINES)
weight_dtypes = st.sampled_from(("bf16", "fp16", "fp8", "nvfp4", "mxfp4"))
tokens = st.integers(1, 2**17)
parallels = st.sampled_from((1, 2, 4, 8))


def without_communication(gpu: Gpu) -> Gpu:
    return replace(gpu, all_reduce={8: (0.0, math.inf)})


@settings(deadline=None)
@given(models, gpus, engines, weight_dtypes, parallels, tokens, tokens)
def test_more_tokens_take_no_less_time(model, gpu, engine, dtype, parallel, some, more):
    shard = Shard(model, gpu, engine, dtype, "bf16", "fp32", parallel)
    few, many = sorted((some, more))
    assert shard.token_wise_s(few) <= shard.token_wise_s(many)


@settings(deadline=None)
@given(gpus, engines, st.sampled_from(("bf16", "fp8", "fp4")), tokens, st.floats(0.25, 4), st.floats(0.25, 4))
def test_wider_numbers_take_no_less_time(gpu, engine, dtype, count, one, other):
    narrow, wide = sorted((one, other))
    for dense in gpu.gemm.values():
        assert gemm_s(dense, gpu, count, 4096, 2048, narrow) <= gemm_s(dense, gpu, count, 4096, 2048, wide)
    kernel = gpu.kernels[engine].experts[dtype]
    slim, broad = (experts_s(kernel, gpu, count, 512, 10, 1, 2048, 512, 3, number) for number in (narrow, wide))
    assert slim <= broad


@settings(deadline=None)
@given(models, gpus, engines, weight_dtypes, tokens)
def test_fewer_gpus_take_no_less_time_where_they_need_not_communicate(model, gpu, engine, dtype, count):
    alone = without_communication(gpu)
    seconds = [
        Shard(model, alone, engine, dtype, "bf16", "fp32", parallel).token_wise_s(count) for parallel in (1, 2, 4, 8)
    ]
    assert seconds == sorted(seconds, reverse=True)


@settings(deadline=None)
@given(models, gpus, engines, weight_dtypes, parallels)
def test_one_token_reads_at_least_the_weights_it_passes_through(model, gpu, engine, dtype, parallel):
    expert = model.mlp_matrices * model.expert_width * model.expert_input
    routed = model.moe_layers * model.experts_per_token * expert
    dense_bytes = 2 if dtype.endswith("fp4") else weight_number_bytes(dtype)
    read = (model.counted_active_params - routed) * dense_bytes + routed * weight_number_bytes(dtype)
    shard = Shard(model, gpu, engine, dtype, "bf16", "fp32", parallel)
    assert shard.token_wise_s(1) >= read / parallel / gpu.bandwidth


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_one_gpu_sums_nothing_and_more_pay_by_the_message(gpu):
    assert all_reduce_s(gpu, 1, 1e9) == 0.0
    for number, (t0_s, bandwidth) in gpu.all_reduce.items():
        assert all_reduce_s(gpu, number, 0) == t0_s
        assert all_reduce_s(gpu, number, 1e9) == pytest.approx(t0_s + 1e9 / bandwidth)


def test_numbers_of_gpus_that_were_not_measured_take_the_next_larger_or_the_largest():
    gpu = find_gpu("h200")
    assert all_reduce_s(gpu, 3, 1e9) == all_reduce_s(gpu, 4, 1e9)
    assert all_reduce_s(gpu, 16, 1e9) == all_reduce_s(gpu, 8, 1e9)


def test_each_gpu_sums_twice_per_layer():
    gpu, count = find_gpu("h200"), 100
    paid = Shard(NEXT, gpu, "vllm", "fp8", "bf16", "fp32", 2).token_wise_s(count)
    free = Shard(NEXT, without_communication(gpu), "vllm", "fp8", "bf16", "fp32", 2).token_wise_s(count)
    assert paid - free == pytest.approx(2 * 48 * all_reduce_s(gpu, 2, 2 * count * 2048))


@pytest.mark.parametrize("engine", ENGINES)
def test_experts_read_what_is_touched_and_compute_what_is_routed_to_this_gpu(engine):
    gpu, hidden, width = find_gpu("h200"), 4096, 1024
    kernel = replace(gpu.kernels[engine].experts["fp8"], t0_s=0.0, coverage=1.0, p=1.0)

    def seconds(count: int, parallel: int, matrices: int = 3) -> float:
        return experts_s(kernel, gpu, count, 512, 10, parallel, hidden, width, matrices, 1.0)

    read = 10 * 3 * hidden * width / (kernel.e_bw * gpu.bandwidth)
    computed = 2 * 10 * 3 * hidden * width / (kernel.e_f * gpu.flops)
    passed = kernel.passes * 2 * 10 * (hidden + width) / gpu.bandwidth
    assert seconds(1, 1) == pytest.approx(read + computed + passed)
    assert seconds(10**6, 1) == pytest.approx(51.2 * read + 10**6 * (computed + passed))
    assert seconds(10**6, 8) == pytest.approx(seconds(10**6, 1) / 8)
    assert seconds(1, 1, matrices=2) == pytest.approx(2 / 3 * (read + computed) + passed)


@settings(deadline=None)
@given(st.sampled_from([model for model in SERVED if model.experts]), gpus, engines, weight_dtypes, tokens)
def test_whole_experts_of_some_take_no_longer_than_slices_of_all(model, gpu, engine, dtype, count):
    seconds = [
        Shard(model, gpu, engine, dtype, "bf16", "fp32", 8, expert_parallel).token_wise_s(count)
        for expert_parallel in (1, 2, 4, 8)
    ]
    for fewer, more in pairwise(seconds):
        assert more <= fewer * (1 + 1e-9)


def test_expert_parallel_gpus_hold_whole_experts_and_others_slices():
    gpu, hidden = find_gpu("h200"), NEXT.hidden_size
    kernel = gpu.kernels["vllm"].experts["fp8"]
    router = gemm_s(gpu.gemm["bf16"], gpu, 64, NEXT.experts, hidden, 2)
    for tensor, expert in ((8, 1), (8, 2), (8, 8), (1, 1)):
        lonely = replace(NEXT, attention_layers=0, recurrent_layers=0, shared_width=0)
        without = replace(lonely, moe_layers=0)
        both = [
            Shard(model, without_communication(gpu), "vllm", "fp8", "bf16", "fp32", tensor, expert).token_wise_s(64)
            for model in (lonely, without)
        ]
        elementwise = 0.5 * 48 * 14 * 2 * 64 * hidden / (0.7 * gpu.bandwidth)
        width = NEXT.expert_width * expert / tensor
        routed = experts_s(kernel, gpu, 64, NEXT.experts, 10, expert, hidden, width, 3, 1)
        assert both[0] - both[1] == pytest.approx(48 * (router + routed) + elementwise)


def test_weights_of_4_bits_are_those_of_the_experts():
    gpu, dense = find_gpu("b200"), find_model("qwen3.5-27b")
    seconds = {dtype: Shard(dense, gpu, "vllm", dtype, "bf16", "fp32").token_wise_s(64) for dtype in ("bf16", "nvfp4")}
    assert seconds["nvfp4"] == seconds["bf16"]
    seconds = {dtype: Shard(NEXT, gpu, "vllm", dtype, "bf16", "fp32").token_wise_s(64) for dtype in ("bf16", "nvfp4")}
    assert seconds["nvfp4"] < seconds["bf16"]


def test_windows_are_read_once_per_sequence_and_attended_to_by_every_token_of_a_prompt():
    gpu, model = find_gpu("h200"), find_model("gpt-oss-120b")
    shard = Shard(model, gpu, "vllm", "mxfp4", "bf16", "fp32")
    kernels = gpu.kernels["vllm"]
    assert shard.state_s == pytest.approx(model.window_bytes() / (kernels.attention_e_bw["bf16"][0] * gpu.bandwidth))
    fp8_bytes, fp8_share = model.window_bytes(kv_dtype="fp8"), kernels.attention_e_bw["fp8"][0]
    assert 2 * fp8_bytes == model.window_bytes()
    fp8 = Shard(model, gpu, "vllm", "mxfp4", "fp8", "fp32")
    assert fp8.state_s == pytest.approx(fp8_bytes / (fp8_share * gpu.bandwidth))
    pairs = model.window_layers * model.window_tokens * 4 * model.q_heads * model.head_dim
    assert shard.scan_s_per_token == pytest.approx(pairs / (kernels.attention_e_f["bf16"][0] * gpu.flops))


def test_heads_of_another_width_are_read_as_those_of_the_nearest():
    gpu = find_gpu("h200")
    for width, nearest in ((64, 0), (96, 0), (100, 1), (160, 1), (256, 2), (576, 2)):
        shard = Shard(one_layer(attention_layers=1, head_dim=width), gpu, "vllm", "bf16", "bf16", "fp32")
        share = gpu.kernels["vllm"].attention_e_bw["bf16"][nearest]
        assert shard.kv_s_per_token == pytest.approx(2 * 2 * width * 2 / (share * gpu.bandwidth)), width


@pytest.mark.parametrize("dtype", ["int4", "fp32", "BF16", ""])
def test_weights_in_a_dtype_without_kernels_are_refused_in_one_line(dtype):
    with pytest.raises(ValueError, match=r"weight_dtype is '.*', expected one of: bf16, fp16, fp8") as refusal:
        Shard(NEXT, find_gpu("h200"), "vllm", dtype, "bf16", "fp32")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_every_gpu_has_kernels_for_every_dtype_and_says_what_is_assumed(gpu):
    assert set(gpu.gemm) == {"bf16", "fp8"}
    assert set(gpu.kernels) == set(ENGINES)
    for kernels in gpu.kernels.values():
        assert set(kernels.experts) == {"bf16", "fp8", "fp4"}
        for shares in (kernels.attention_e_bw, kernels.attention_e_f):
            assert set(shares) == {"bf16", "fp8"}
            assert {len(by_head) for by_head in shares.values()} == {len(HEAD_DIMS)}
        assert kernels.scan_token_s + kernels.scan_token_head_s > 0
    assert set(gpu.all_reduce) == {2, 4, 8}
    assert gpu.sources["rates"] and gpu.sources["assumed"]


def test_every_number_is_positive_but_for_one_of_those_of_a_scan():
    def numbers(value: object, path: str):
        if isinstance(value, dict):
            for key, below in value.items():
                yield from numbers(below, f"{path}.{key}")
        elif isinstance(value, list):
            for place, below in enumerate(value):
                yield from numbers(below, f"{path}.{place}")
        elif not isinstance(value, str):
            yield path, value

    for path, value in numbers(json.loads(FILE.read_text(encoding="utf-8")), ""):
        assert value > 0 or (value == 0 and path.endswith(("ns_per_token", "ns_per_token_and_head"))), path


def test_gpu_memory_is_in_bytes():
    sizes = {gpu.slug: gpu.memory_bytes for gpu in GPUS.values()}
    assert sizes["h200"] == 141e9 and sizes["h100"] == sizes["a100"] == 80e9 and sizes["rtx3060"] == 12e9


def test_unknown_gpu_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown GPU 'h20' \(did you mean 'h200'\?\): known are h200, h100, a100"):
        find_gpu("h20")
