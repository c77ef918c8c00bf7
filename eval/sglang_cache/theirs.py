"""A case in SGLang's own cache, on the CPU: its radix tree, allocators and pools, driven as its scheduler drives them.

Imports SGLang (0.5.23 at the time of writing); `stand_ins.stand_in_for_gpu_packages` comes first where there is no GPU.
What is mirrored here rather than called is the scheduler's loop around the cache (`managers/scheduler.py` and
`scheduler_components/batch_result_processor.py`): which function is called when.
"""

from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateShape
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req, ScheduleBatch
from sglang.srt.mem_cache.allocation import alloc_for_decode_default, alloc_for_extend
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache
from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, HybridReqToTokenPool
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import mamba_track_grid
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

from hbmgym.eval.sglang_cache.cases import Case
from hbmgym.eval.sglang_cache.sequence import PAGE_TOKENS, token_ids

MOST_RUNNING = 32


def serve(case: Case, order: Sequence[int]) -> list[int]:
    """Prompt tokens that each request reuses; `order` names every request where it starts and where it ends."""
    assert min(request.output_tokens for request in case.requests) > 1, (
        "one that ends with its prefill goes another way"
    )
    engine = _Engine(case)
    texts = token_ids(case.requests)
    running: dict[int, Any] = {}
    reused = [0] * len(texts)
    for row in order:
        prompt, output = texts[row]
        if row in running:
            engine.decode(running.pop(row), output)
        else:
            running[row], reused[row] = engine.prefill(prompt)
    engine.cache.sanity_check()
    return reused


class _Engine:
    """The strategy is extra_buffer without the overlap scheduler: a working slot and one to save in, as here."""

    def __init__(self, case: Case) -> None:
        _configure()
        self.prefill_budget = case.prefill_budget
        self.requests = _request_pool(case)
        self.pages = _page_allocator(case, self.requests)
        self.cache = UnifiedRadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=self.requests,
                token_to_kv_pool_allocator=self.pages,
                page_size=PAGE_TOKENS,
                enable_mamba_extra_buffer=True,
                tree_components=(ComponentType.FULL, ComponentType.MAMBA),
            )
        )
        self.started = 0

    def prefill(self, prompt: list[int]) -> tuple[Any, int]:
        """Match, take memory and compute, chunk by chunk; returns the request and the tokens that it reuses."""
        request = Req(str(self.started), "", array("q", prompt), SamplingParams(max_new_tokens=1))
        self.started += 1
        request.init_next_round_input(self.cache)
        request.lock = self.cache.lock(request.last_node)
        reused = int(request.prefix_len)
        while request.prefix_len < len(prompt):
            request.extend_end = min(request.prefix_len + self.prefill_budget, len(prompt))
            batch = self._batch(request, request.extend_end)
            alloc_for_extend(batch)
            ScheduleBatch._mamba_radix_cache_v2_req_prepare_for_extend(batch, request)
            # The copy of the matched state into the request's slot happens in the forward pass.
            request.kv.mamba_cow_src_index, request.kv.mamba_needs_clear = None, False
            checkpoint_kv_cache(request, self.cache)
        return request, reused

    def decode(self, request: Any, output: list[int]) -> None:
        """All tokens behind the first, which prefill has brought; then give everything back."""
        request.output_ids.append(output[0])
        for token in output[1:]:
            alloc_for_decode_default(self._batch(request, int(request.kv.kv_committed_len)), 1)
            request.output_ids.append(token)
            if request.kv.kv_committed_len % mamba_track_grid(PAGE_TOKENS) == 0:
                self._track(request.kv)
        request.finished_len = len(output)
        request.finished_reason = FINISH_LENGTH(len(output))
        release_kv_cache(request, self.cache, checkpoint=True)

    def _track(self, kv: Any) -> None:
        """What the scheduler notes when the forward pass has saved a state (`_handle_finish_state_updated_req`)."""
        kv.mamba_last_track_idx = kv.mamba_next_track_idx
        kv.mamba_prev_track_seqlen = kv.mamba_last_track_seqlen
        kv.mamba_last_track_seqlen = kv.kv_committed_len
        kv.mamba_next_track_idx = self.requests.get_mamba_ping_pong_other_idx(kv.mamba_next_track_idx)

    def _batch(self, request: Any, tokens: int) -> Any:
        """What the allocating functions read of a ScheduleBatch."""
        row = torch.tensor([request.kv.req_pool_idx or 0])
        length = torch.tensor([tokens])
        return SimpleNamespace(
            reqs=[request],
            tree_cache=self.cache,
            req_to_token_pool=self.requests,
            token_to_kv_pool_allocator=self.pages,
            device="cpu",
            model_config=SimpleNamespace(hf_text_config=SimpleNamespace(), is_encoder_decoder=False),
            hisparse_coordinator=None,
            maybe_evict_swa=lambda: None,
            is_dllm=lambda: False,
            prefix_lens=[request.prefix_len],
            extend_lens=[request.extend_len],
            extend_num_tokens=request.extend_len,
            req_pool_indices=row,
            req_pool_indices_cpu=row,
            seq_lens=length,
            seq_lens_cpu=length,
        )


def _configure() -> None:
    args = ServerArgs(
        model_path="none",
        device="cpu",
        page_size=PAGE_TOKENS,
        mamba_radix_cache_strategy="extra_buffer",
        disable_overlap_schedule=True,
        attention_backend="torch_native",
    )
    args._mamba_cache_chunk_size = PAGE_TOKENS  # else it is read from the model's files
    set_global_server_args_for_scheduler(args)


def _request_pool(case: Case) -> Any:
    shape = Mamba2StateShape.create(
        tp_world_size=1, intermediate_size=2, n_groups=1, num_heads=1, head_dim=2, state_size=1, conv_kernel=2
    )
    return HybridReqToTokenPool(
        size=MOST_RUNNING,
        mamba_size=case.slots,
        mamba_spec_state_size=MOST_RUNNING,
        max_context_len=case.pages * PAGE_TOKENS,
        device="cpu",
        enable_memory_saver=False,
        cache_params=Mamba2CacheParams(shape=shape, layers=[0]),
        mamba_layer_ids=[0],
        enable_mamba_extra_buffer=True,
        enable_overlap_schedule=False,
    )


def _page_allocator(case: Case, requests: Any) -> Any:
    tokens = case.pages * PAGE_TOKENS
    storage = HybridLinearKVPool(
        size=tokens,
        dtype=torch.bfloat16,
        page_size=PAGE_TOKENS,
        head_num=1,
        head_dim=1,
        full_attention_layer_ids=[1],
        device="cpu",
        mamba_pool=requests.mamba_pool,
    )
    return PagedTokenToKVPoolAllocator(
        size=tokens, page_size=PAGE_TOKENS, dtype=torch.bfloat16, device="cpu", kvcache=storage, need_sort=False
    )
