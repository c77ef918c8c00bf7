"""What runs on the device, compiled for the host: the same stamps as in stamps.py. And what is shipped of it."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable

import numpy as np
import pytest

from hbmgym.memory_backend.oplog import KV
from hbmgym.memory_backend.vmm import build_device
from hbmgym.memory_backend.vmm.device_blocks import STAMP_ENTRY
from hbmgym.memory_backend.vmm.stamps import NO_FAULT, StampedRange, run_stamps, salts, word_offsets
from tests.memory_backend.vmm.logs import check, log, stamp

# (block bytes, chunk bytes): two words, a whole chunk, and blocks that straddle chunks at odd addresses.
SIZES = [(16, 64), (64, 64), (1_001, 64), (4_099, 512)]
BLOCKS = 5
TAG = 0x1234_5678_9ABC_DEF0
HOST = """
static struct { unsigned x; } blockIdx, blockDim = {2}, threadIdx;
#define __global__
#define __device__
static unsigned long long clock_ns(void) { return 0; }
#include "device.cu"
void launch(struct StampEntry *entries, int count, int blocks, long long chunk_bytes)
{
    for (blockIdx.x = 0; blockIdx.x < (unsigned)blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < 2; threadIdx.x++)
            run_stamps(entries, count, chunk_bytes);
}
"""
Launch = Callable[[np.ndarray, int], np.ndarray]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Runs (entries, chunk bytes) with more threads than entries and returns the entries."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (cc) to build device.cu for the host")
    folder = tmp_path_factory.mktemp("device")
    (folder / "host.c").write_text(HOST)
    flags = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{build_device.SOURCE.parent}")
    subprocess.run(["cc", *flags, "host.c", "-o", "host.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "host.so"))

    def run(entries: np.ndarray, chunk_bytes: int) -> np.ndarray:
        first, size = ctypes.c_void_p(entries.ctypes.data), ctypes.c_int64(chunk_bytes)
        library.launch(first, len(entries), len(entries), size)
        return entries

    return run


def entries(data: np.ndarray, is_check: bool) -> np.ndarray:
    """The STAMPs or CHECKs of the blocks data[i]; block i has the tag TAG + i."""
    rows = [(data[i].ctypes.data, data.shape[1], TAG + i, is_check, NO_FAULT, 0) for i in range(len(data))]
    return np.array(rows, STAMP_ENTRY)


def noise(block_bytes: int) -> np.ndarray:
    """uint8[BLOCKS, block_bytes], at odd addresses unless the size is even."""
    return np.random.default_rng(1).integers(0, 256, (BLOCKS, block_bytes), dtype=np.uint8)


def host_range(data: np.ndarray, chunk_bytes: int) -> StampedRange:
    offsets = word_offsets(data.shape[1], chunk_bytes)
    return StampedRange(data.reshape(-1), data.shape[1], offsets, salts(offsets))


@pytest.mark.parametrize(("block_bytes", "chunk_bytes"), SIZES)
def test_the_device_stamps_the_same_bytes_as_the_host(launch: Launch, block_bytes: int, chunk_bytes: int) -> None:
    on_device, on_host = noise(block_bytes), noise(block_bytes)
    launch(entries(on_device, is_check=False), chunk_bytes)
    stamped = host_range(on_host, chunk_bytes)
    run_stamps(log(*(stamp(KV, i, TAG + i) for i in range(BLOCKS))).view(np.recarray), 0, stamped, stamped)
    np.testing.assert_array_equal(on_device, on_host)


@pytest.mark.parametrize(("block_bytes", "chunk_bytes"), SIZES)
def test_the_device_names_the_word_and_what_lies_there(launch: Launch, block_bytes: int, chunk_bytes: int) -> None:
    data = noise(block_bytes)
    launch(entries(data, is_check=False), chunk_bytes)
    offsets = word_offsets(block_bytes, chunk_bytes).tolist()
    for word, offset in enumerate(offsets):
        spoiled = data.copy()
        spoiled[3, offset + word % 8] ^= 1
        spoiled[3, offsets[-1] :] ^= 2
        result = launch(entries(spoiled, is_check=True), chunk_bytes)
        assert result["wrong_word"].tolist() == [NO_FAULT, NO_FAULT, NO_FAULT, word, NO_FAULT]
        assert result["found"][3] == int.from_bytes(spoiled[3, offset : offset + 8].tobytes(), "little")
        stamped = host_range(spoiled, chunk_bytes)
        checks = log(*(check(KV, i, TAG + i) for i in range(BLOCKS))).view(np.recarray)
        assert run_stamps(checks, 0, stamped, stamped) == (3, 3, word)


def test_the_shipped_ptx_is_of_the_present_source() -> None:
    ptx = build_device.PTX.read_text()
    assert ptx.startswith(build_device.first_line()), "run python -m hbmgym.memory_backend.vmm.build_device"
    assert ".target sm_75" in ptx and all(f".entry {name}(" in ptx for name in ("run_stamps", "spin"))
