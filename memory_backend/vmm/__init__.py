"""Physical memory behind the op log: one protocol, one driver per kind of memory."""

import sys
from collections.abc import Callable
from functools import partial

from hbmgym.memory_backend.split import Layout
from hbmgym.memory_backend.vmm.accounting import AccountingVmm
from hbmgym.memory_backend.vmm.protocol import Vmm, VmmError, VmmRefused

__all__ = ["BACKENDS", "Vmm", "VmmError", "VmmRefused", "open_vmm"]


def _open_host(layout: Layout, kv_chunks: int, huge_pages: bool = False) -> Vmm:
    if not sys.platform.startswith("linux"):
        raise VmmRefused(f"host memory: memfd and mremap need Linux, this is {sys.platform}")
    from hbmgym.memory_backend.vmm.host import HostVmm  # its imports exist on Linux only

    return HostVmm(layout, kv_chunks, huge_pages)


def _open_cuda(layout: Layout, kv_chunks: int) -> Vmm:
    try:
        from hbmgym.memory_backend.vmm.cuda import CudaVmm  # needs a package that only GPUs need
    except ImportError as error:
        raise VmmRefused(f"cuda memory: {error}: install cuda-python 13, or take backend host or accounting") from error
    return CudaVmm(layout, kv_chunks)


_DRIVERS: dict[str, Callable[[Layout, int], Vmm]] = {
    "accounting": AccountingVmm,
    "host": _open_host,
    "host-huge": partial(_open_host, huge_pages=True),
    "cuda": _open_cuda,
}
_BEST_FIRST = ("cuda", "host", "accounting")

BACKENDS = (*_DRIVERS, "auto")


def open_vmm(backend: str, layout: Layout, kv_chunks: int) -> Vmm:
    """The driver named `backend`, with chunks 0..kv_chunks-1 in KV and the rest in SSM.

    `host-huge` is host on huge pages. `auto` is cuda where there is a GPU that can hold the budget, else host, else
    accounting; `why` says which, and why none before it. Raises VmmRefused when the named driver cannot be had here,
    ValueError for an unknown name.
    """
    if backend == "auto":
        return _open_best(layout, kv_chunks)
    if backend not in _DRIVERS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    return _DRIVERS[backend](layout, kv_chunks)


def _open_best(layout: Layout, kv_chunks: int) -> Vmm:
    refusals = ""
    for backend in _BEST_FIRST:
        try:
            vmm = open_vmm(backend, layout, kv_chunks)
            break
        except VmmRefused as refusal:
            refusals += f", {backend} is refused ({refusal})"
    vmm.why = f"{backend}: auto{refusals}"
    return vmm
