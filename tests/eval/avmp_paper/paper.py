"""What several tests of the AVMP paper share."""

from pathlib import Path

import numpy as np
import pytest

from hbmgym.envs.traces.avmp_workloads import PaperRequests, load_prompt_pool
from hbmgym.eval.avmp_paper.allocator import REQUEST, Allocator, make_allocator
from hbmgym.eval.avmp_paper.sizes import GIB, MODELS
from hbmgym.eval.avmp_paper.variants import Variant

SHAREGPT = Path(__file__).resolve().parents[4] / "shared" / "avmp_paper" / "sharegpt_prompt_tokens.json"
JAMBA = MODELS["jamba_1_5_mini"]
MAMBA2 = MODELS["mamba2_1b3"]


def sharegpt_lengths() -> np.ndarray:
    """The recorded prompt lengths; skips where they are not beside the repository."""
    if not SHAREGPT.is_file():
        pytest.skip("shared/avmp_paper/sharegpt_prompt_tokens.json is not beside the repository")
    return load_prompt_pool(SHAREGPT)


def requests(*columns: tuple[int, int, int]) -> PaperRequests:
    """Requests by arrival, prompt and generated tokens."""
    arrival, prompt, generated = np.array(columns).T
    return PaperRequests(arrival, prompt, generated)


def small_allocator(variant: Variant, kv_pages: int, ssm_blocks: int, count: int = 8) -> Allocator:
    """Pools of the given sizes; the requests have a prompt of 1024 tokens each."""
    records = np.zeros(count, REQUEST).view(np.recarray)
    records.prompt, records.generated = 1024, 64
    allocator = make_allocator(variant, JAMBA, GIB, records)
    for pool, total in ((allocator.kv, kv_pages), (allocator.ssm, ssm_blocks)):
        head = pool.table.head
        head.total = head.free = total
        pool.table.stack[:total] = np.arange(total)[::-1]
    return allocator


def entry(pool, request: int) -> list[int]:
    """The pages that a request holds, in order."""
    pages, page = [], int(pool.tracker.first[request])
    while page != -1:
        pages.append(page)
        page = int(pool.tracker.after[page])
    return pages


def free_pages(pool) -> list[int]:
    """In the order in which they will be handed out."""
    table = pool.table
    return table.stack[: table.head.free][::-1].tolist()
