"""Bytes and counts of the paper's section on memory."""

import pytest

from hbmgym.eval.avmp_paper.sizes import GIB, KV_PAGE_BYTES, align_up, split_bytes
from hbmgym.eval.avmp_paper.variants import fixed_dual

from .paper import JAMBA, MAMBA2


def test_sizes_are_rounded_up_to_128_bytes_and_never_zero():
    assert [align_up(size) for size in (-1, 0, 1, 128, 129)] == [128, 128, 128, 128, 256]


def test_a_page_and_a_state_have_the_papers_bytes():
    assert KV_PAGE_BYTES == 65_536
    assert (JAMBA.ssm_block_bytes, MAMBA2.ssm_block_bytes) == (262_144, 2_097_152)
    assert (JAMBA.padded_page_bytes, MAMBA2.padded_page_bytes) == (262_144, 2_097_152)


@pytest.mark.parametrize(("gib", "pages", "jamba", "mamba2"), [(1, 8192, 2048, 256), (4, 32768, 8192, 1024)])
def test_half_of_the_budget_holds_so_many(gib, pages, jamba, mamba2):
    kv_bytes, ssm_bytes = split_bytes(gib * GIB, 0.5)
    assert kv_bytes // KV_PAGE_BYTES == pages
    assert [ssm_bytes // model.ssm_block_bytes for model in (JAMBA, MAMBA2)] == [jamba, mamba2]


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, float("nan")])
def test_a_pool_may_not_be_empty_by_definition(ratio):
    with pytest.raises(ValueError, match="mamba_ratio is"):
        split_bytes(GIB, ratio)


@pytest.mark.parametrize(
    ("ratio", "name"), [(0.1, "fixed_dual_mr_0.10"), (0.5, "fixed_dual_mr_0.50"), (0.03125, "fixed_dual_mr_0.03125")]
)
def test_static_splits_are_named_by_their_ratio(ratio, name):
    assert fixed_dual(ratio).name == name
