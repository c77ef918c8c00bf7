"""Physical memory behind the op log: one protocol, one driver per kind of memory."""

import sys
from collections.abc import Callable

from hbmgym.memory_backend.split import Layout
from hbmgym.memory_backend.vmm.accounting import AccountingVmm
from hbmgym.memory_backend.vmm.protocol import Vmm, VmmError, VmmRefused

__all__ = ["BACKENDS", "Vmm", "VmmError", "VmmRefused", "open_vmm"]


def _open_host(layout: Layout, kv_chunks: int) -> Vmm:
    if not sys.platform.startswith("linux"):
        raise VmmRefused(f"host memory: memfd and mremap need Linux, this is {sys.platform}")
    from hbmgym.memory_backend.vmm.host import HostVmm  # its imports exist on Linux only

    return HostVmm(layout, kv_chunks)


_DRIVERS: dict[str, Callable[[Layout, int], Vmm]] = {"accounting": AccountingVmm, "host": _open_host}

BACKENDS = (*_DRIVERS, "auto")


def open_vmm(backend: str, layout: Layout, kv_chunks: int) -> Vmm:
    """The driver named `backend`, with chunks 0..kv_chunks-1 in KV and the rest in SSM.

    `auto` is host where this computer allows it, else accounting; `why` says which. Raises VmmRefused when the named
    driver cannot be had here, ValueError for an unknown name.
    """
    if backend == "auto":
        return _open_best(layout, kv_chunks)
    if backend not in _DRIVERS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    return _DRIVERS[backend](layout, kv_chunks)


def _open_best(layout: Layout, kv_chunks: int) -> Vmm:
    try:
        vmm = open_vmm("host", layout, kv_chunks)
        vmm.why = "host: auto, the budget fits into this computer's memory"
    except VmmRefused as refusal:
        vmm = open_vmm("accounting", layout, kv_chunks)
        vmm.why = f"accounting: auto, because host is refused ({refusal})"
    return vmm
