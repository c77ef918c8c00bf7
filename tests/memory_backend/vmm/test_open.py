"""Choosing a driver, and layouts that are refused."""

import os
import sys
from pathlib import Path

import pytest

from hbmgym.memory_backend.split import Layout
from hbmgym.memory_backend.vmm import VmmError, VmmRefused, open_vmm
from tests.memory_backend.vmm.logs import (
    CHUNKS,
    KV_CHUNKS,
    LAYOUT,
)


def test_auto_is_host_or_says_why_not() -> None:
    with open_vmm("auto", LAYOUT, KV_CHUNKS) as chosen:
        assert chosen.why.startswith(f"{chosen.name}: auto") and "\n" not in chosen.why
    with open_vmm("accounting", LAYOUT, KV_CHUNKS) as chosen:
        assert chosen.why == "accounting: asked for by name"


def test_other_systems_fall_back_to_accounting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(VmmRefused, match="need Linux, this is darwin"):
        open_vmm("host", LAYOUT, KV_CHUNKS)
    with open_vmm("auto", LAYOUT, KV_CHUNKS) as chosen:
        assert chosen.name == "cuda" or (chosen.name == "accounting" and "darwin" in chosen.why)


def test_an_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'gpu', expected one of accounting, host, host-huge, cuda, auto"):
        open_vmm("gpu", LAYOUT, KV_CHUNKS)


def test_more_kv_chunks_than_the_budget_are_refused() -> None:
    with pytest.raises(VmmError, match="kv_chunks is 33, expected 0 to 32"):
        open_vmm("accounting", LAYOUT, CHUNKS + 1)


@pytest.mark.skipif(sys.platform != "linux", reason="host memory needs Linux")
@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(2**50, 2**40, 2**40, 2**40, 1, 1), rf"{2**50} bytes is above half of the free memory \(\d+ bytes"),
        (Layout(10**6, 1000, 100, 100, 1, 1), "chunk_bytes 1000 is not a multiple of"),
        (Layout(2**22, 2**21, 8, 100, 1, 1), "blocks of 8 bytes cannot be stamped"),
    ],
)
def test_a_layout_that_host_cannot_hold_is_refused(layout: Layout, message: str) -> None:
    with pytest.raises(VmmRefused, match=message):
        open_vmm("host", layout, 1)
    assert "host is refused" in open_vmm("auto", layout, 1).why


@pytest.mark.skipif(sys.platform != "linux", reason="host memory needs Linux")
def test_too_many_chunks_for_the_mapping_limit_are_refused() -> None:
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    if limit > 200_000:
        pytest.skip(f"vm.max_map_count {limit} would take a large budget to reach")
    page = os.sysconf("SC_PAGE_SIZE")
    with pytest.raises(VmmRefused, match=f"above vm.max_map_count {limit}"):
        open_vmm("host", Layout((limit // 2) * page, page, page, page, 1, 1), 1)
