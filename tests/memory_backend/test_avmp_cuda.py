"""The allocator on a GPU's memory, or on the double's."""

from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("cuda.bindings.driver", exc_type=ImportError)

from cuda.bindings import driver as d

from hbmgym.memory_backend.avmp import Avmp
from hbmgym.memory_backend.split import Layout
from hbmgym.memory_backend.vmm import VmmError
from hbmgym.memory_backend.vmm.cuda_calls import call
from tests.memory_backend.allocator_model import Comparison, random_step
from tests.memory_backend.vmm import device
from tests.memory_backend.vmm.cuda_double.controls import Double

pytestmark = pytest.mark.gpu
CHUNK = 2**21
LAYOUT = Layout(24 * CHUNK, CHUNK, 1_500_008, 5_000_003, min_slots=1, min_pages=1)
FOREVER = -1


@pytest.fixture
def avmp() -> Iterator[Avmp]:
    with Avmp.of_layout(LAYOUT, backend="cuda", migrate=None) as allocator:
        yield allocator


def fill(avmp: Avmp, handle: int, value: int) -> None:
    (block,) = avmp.resolve(handle)
    device.write(avmp.base("kv") + int(block) * LAYOUT.page_bytes, np.full(LAYOUT.page_bytes, value, np.uint8))


def bytes_of(avmp: Avmp, handle: int) -> np.ndarray:
    (block,) = avmp.resolve(handle)
    return device.read(avmp.base("kv") + int(block) * LAYOUT.page_bytes, LAYOUT.page_bytes)


def test_random_steps_agree_with_the_model_and_every_stamp_reads_back() -> None:
    rng = np.random.default_rng(5)
    with Avmp.of_layout(LAYOUT, backend="cuda", migrate=None, check=True) as real:
        both = Comparison(real, 0.5, holds_bytes=False)
        for _ in range(150):
            random_step(both, rng)
            both.compare()
        assert real.stats().moves.accepted > 5 and real.stats().relocated_bytes > 0


def test_bytes_follow_their_handles_and_the_base_stays(avmp: Avmp) -> None:
    pages, base = avmp.allocate("kv", avmp.stats().kv.capacity), avmp.base("kv")
    for value, page in enumerate(pages[-3:], start=1):
        fill(avmp, page, value)
    avmp.free(pages[:-3])
    avmp.request_split(0.2)
    assert avmp.resolve(pages[-3:]).tolist() == [0, 1, 2] and avmp.base("kv") == base
    for value, page in enumerate(pages[-3:], start=1):
        assert np.all(bytes_of(avmp, page) == value)
    assert avmp.view(pages[-1]).__dlpack_device__()[0] == 2


def test_moves_wait_for_the_work_of_a_batch(avmp: Avmp) -> None:
    pages = avmp.allocate("kv", avmp.stats().kv.capacity)
    kept = pages[-1]
    with device.current_context():
        stream = call(d.cuStreamCreate, d.CUstream_flags.CU_STREAM_NON_BLOCKING)
        (block,) = avmp.resolve(kept)
        with avmp.batch(int(stream)):
            avmp.free(pages[:-1])
            avmp.request_split(0.1)  # waits for the batch
            assert avmp.resolve(kept) == block
            call(d.cuMemsetD8Async, avmp.base("kv") + int(block) * LAYOUT.page_bytes, 9, LAYOUT.page_bytes, stream)
        assert avmp.resolve(kept) == 0
        assert np.all(bytes_of(avmp, kept) == 9)
        call(d.cuStreamDestroy, stream)


def test_a_run_that_fails_is_undone(avmp: Avmp, double: Double) -> None:
    pages = avmp.allocate("kv", 4)
    for value, page in enumerate(pages, start=1):
        fill(avmp, page, value)
    before = avmp.stats()
    for name in ("cuMemMap", "cuMemSetAccess", "cuMemUnmap"):
        double.fail(name, 0, d.CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        with pytest.raises(VmmError, match="all of them were undone"):
            avmp.request_split(0.2)
        double.heal()
    after = avmp.stats()
    assert (after.kv, after.ssm, after.kv_share_requested) == (before.kv, before.ssm, before.kv_share_requested)
    assert after.moves.rolled_back == 3
    avmp.check()
    assert [int(bytes_of(avmp, page)[0]) for page in pages] == [1, 2, 3, 4]
    avmp.request_split(0.2)
    assert avmp.stats().moves.accepted == 1


def test_a_copy_that_is_not_seen_to_end_stops_the_allocator(avmp: Avmp, double: Double) -> None:
    pages = avmp.allocate("kv", avmp.stats().kv.capacity)
    avmp.free(pages[:-2])
    avmp._vmm.fence_timeout_s = 0.02  # type: ignore[attr-defined]
    double.hold(FOREVER)
    with pytest.raises(VmmError, match=r"within 0\.02 s"):
        avmp.request_split(0.2)
    double.hold(0)
    double.finish()
    with pytest.raises(VmmError, match="refuses every operation"):
        avmp.allocate("kv")
