"""Block entries on a GPU beyond the laws, and moves that are interrupted."""

from collections.abc import Iterator
from typing import Any

import pytest

from hbmgym.memory_backend.oplog import KV, SSM
from hbmgym.memory_backend.vmm import VmmError, cuda_calls
from tests.memory_backend.vmm.cuda_double.controls import Double
from tests.memory_backend.vmm.logs import check, copy, log, moves, open_or_skip, stamp

pytestmark = pytest.mark.gpu


@pytest.fixture
def cuda() -> Iterator[Any]:
    with open_or_skip("cuda") as driver:
        yield driver


def test_the_stale_stamp_named_is_the_first_of_the_log_not_of_the_waves(cuda: Any) -> None:
    cuda.execute(log(stamp(KV, 1, 4)))
    with pytest.raises(VmmError, match="kv block 0, byte 0: expected stamp 6, found 5"):
        cuda.execute(log(stamp(KV, 0, 5), check(KV, 0, 6), check(KV, 1, 9), check(KV, 1, 4)))
    assert cuda.stamps_checked == 0


def test_a_block_copied_onto_itself_stays_as_it_is(cuda: Any, double: Double) -> None:
    cuda.execute(log(stamp(SSM, 0, 5), copy(SSM, 0, 0), check(SSM, 0, 5)))
    assert double.calls("cuMemcpyDtoDAsync_v2") == 0


def test_an_interrupt_between_moves_refuses_everything_but_close(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(address: int, length: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cuda_calls, "unmap", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cuda.execute(log(*moves(cuda, KV, 2)))
    for use in (cuda.check, cuda.end_batch, lambda: cuda.execute(log(stamp(KV, 0, 1)))):
        with pytest.raises(VmmError, match="refuses every operation: a run of moves was interrupted"):
            use()
    cuda.close()
