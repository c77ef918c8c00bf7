"""The hand-made DLPack capsule, over host memory."""

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from hbmgym.memory_backend.vmm import dlpack
from hbmgym.memory_backend.vmm.dlpack import CPU, CUDA, ByteView

HOST = (CPU, 0)


class Owner:
    """Has bytes of its own, and can be watched."""

    def __init__(self) -> None:
        self.data = np.arange(100, dtype=np.uint8)

    def view(self, start: int, length: int) -> ByteView:
        return ByteView(self.data.ctypes.data + start, length, HOST, self)


@pytest.fixture(autouse=True)
def nothing_stays_exported() -> Any:
    gc.collect()
    before = len(dlpack._exported)
    yield
    gc.collect()
    assert len(dlpack._exported) == before


def test_numpy_sees_the_bytes_themselves() -> None:
    owner = Owner()
    array = np.from_dlpack(owner.view(10, 5))
    np.testing.assert_array_equal(array, [10, 11, 12, 13, 14])
    assert array.dtype == np.uint8 and len(owner.view(10, 5)) == 5
    owner.data[12] = 255
    assert array[2] == 255


def test_torch_sees_the_bytes_themselves() -> None:
    torch = pytest.importorskip("torch")
    owner = Owner()
    tensor = torch.from_dlpack(owner.view(10, 5))
    assert tensor.dtype == torch.uint8 and tensor.tolist() == [10, 11, 12, 13, 14]
    tensor[1] = 77
    assert owner.data[11] == 77


def test_nothing_may_be_seen_as_well() -> None:
    assert np.from_dlpack(Owner().view(100, 0)).shape == (0,)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_whoever_holds_the_bytes_keeps_their_owner(library: str) -> None:
    consumer = pytest.importorskip(library)
    owner = Owner()
    watched = weakref.ref(owner)
    taken = consumer.from_dlpack(owner.view(0, 50))
    part = taken[20:]
    del owner, taken
    gc.collect()
    assert watched() is not None and part[0] == 20
    del part
    gc.collect()
    assert watched() is None


def test_a_capsule_that_nobody_takes_lets_its_owner_go() -> None:
    owner = Owner()
    watched = weakref.ref(owner)
    capsule = owner.view(0, 50).__dlpack__()
    del owner
    gc.collect()
    assert watched() is not None and 'capsule object "dltensor"' in repr(capsule)
    del capsule
    gc.collect()
    assert watched() is None


def test_the_device_is_stated_and_not_asked_for() -> None:
    view = ByteView(0, 10, (CUDA, 3), None)
    assert view.__dlpack_device__() == (2, 3)
    view.__dlpack__(stream=1, max_version=(1, 0), dl_device=(CUDA, 3), copy=False)


def test_another_device_or_a_copy_is_refused() -> None:
    view = Owner().view(0, 10)
    with pytest.raises(BufferError, match=r"lie on device \(1, 0\), they cannot be exported to \(2, 0\)"):
        view.__dlpack__(dl_device=(CUDA, 0))
    with pytest.raises(BufferError, match="without a copy"):
        view.__dlpack__(copy=True)
