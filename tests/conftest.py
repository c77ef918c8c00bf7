"""Tests marked gpu run on a GPU or, where libcuda is its double, on that: then each on a fresh device. All have a home
of their own."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest

from hbmgym.memory_backend.jit import KERNEL_CACHE
from tests.memory_backend.vmm.cuda_double.build import LIBRARY
from tests.memory_backend.vmm.cuda_double.controls import Double


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := missing_gpu()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def missing_gpu() -> str | None:
    """Why tests marked gpu cannot run here, None if they can."""
    try:
        error = ctypes.CDLL(LIBRARY).cuInit(0)
    except OSError:
        return f"no {LIBRARY}: there is neither an NVIDIA driver nor its double"
    return f"cuInit says {error}: there is an NVIDIA driver, but no GPU" if error else None


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Rates that tests calibrate are kept here, also by the scripts that they start. What is slow to make and the same
    everywhere stays shared: compiled kernels, matplotlib's list of fonts."""
    home = tmp_path_factory.mktemp("home")
    caches = home / ".cache"
    (caches / "hbmgym").mkdir(parents=True)
    if KERNEL_CACHE is not None:
        (caches / "hbmgym" / KERNEL_CACHE.name).symlink_to(KERNEL_CACHE)
    (caches / "matplotlib").symlink_to(matplotlib.get_cachedir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.delenv("XDG_CACHE_HOME", raising=False)
        yield home


@pytest.fixture(autouse=True)
def fresh_device(request: pytest.FixtureRequest) -> Iterator[Double | None]:
    """The double, reset, or None on a GPU; a test must give back all it took from a double that still works."""
    library = ctypes.CDLL(LIBRARY) if request.node.get_closest_marker("gpu") else None
    if not hasattr(library, "double_reset"):
        yield None
        return
    double = Double(library)
    double.reset()
    yield double
    left = {} if double.is_poisoned else double.live
    double.reset()
    assert left == {}


@pytest.fixture
def double(fresh_device: Double | None) -> Double:
    """The double's controls; skips on a GPU, which cannot be told to fail."""
    if fresh_device is None:
        pytest.skip("only the double of libcuda can be told to fail or to stand still")
    return fresh_device
