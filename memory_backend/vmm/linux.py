"""The few Linux calls of the host driver; all raise OSError. Addresses and lengths are bytes."""

import ctypes
import fcntl
import mmap
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hbmgym.memory_backend.vmm.cgroups import group_figures
from hbmgym.memory_backend.vmm.protocol import VmmRefused

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MREMAP_MAYMOVE, _MREMAP_FIXED, _MREMAP_DONTUNMAP = 1, 2, 4
_MADV_COLLAPSE = 25
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class FileMapping(NamedTuple):
    """One line of /proc/self/maps: addresses [start, stop) show a file from byte `offset` on."""

    start: int
    stop: int
    offset: int


def sealed_memory(name: str, length: int) -> int:
    """Descriptor of a memfd with all its pages present and its size fixed for good."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, length)
        # Pages made on demand would cost far more than a move, and running out of them would be a SIGBUS.
        os.posix_fallocate(descriptor, 0, length)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def reserve_anywhere(length: int) -> int:
    """Address of a new range that can be neither read nor written and takes no memory."""
    return _mmap(None, length, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)


def reserve(address: int, length: int) -> None:
    """Turn a range we own back into mere reserved addresses."""
    _mmap(address, length, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED, -1, 0)


def map_file(address: int, length: int, descriptor: int, offset: int) -> None:
    """Map a file's bytes readable, writable and present over a range we own."""
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE | _MAP_FIXED
    _mmap(address, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, offset)


def keep_from_children(address: int, length: int) -> None:
    """Let a forked child have a hole where this mapping is; the mark moves with the mapping."""
    if _libc.madvise(address, length, mmap.MADV_DONTFORK):
        raise _last_error()


def collapse(address: int, length: int) -> None:
    """Put a mapping's pages together into huge ones (Linux 6.1), whatever the system's setting for shared memory."""
    if _libc.madvise(address, length, _MADV_COLLAPSE):
        raise _last_error()


def huge_page_bytes() -> int:
    """Bytes of a transparent huge page; one page of the system where there are none."""
    try:
        return int(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text())
    except OSError:
        return mmap.PAGESIZE


def remap(source: int, length: int, target: int) -> None:
    """Move a mapping with its page table entries over `target`; `source` stays mapped to the same bytes.

    MREMAP_DONTUNMAP (Linux 5.13 for files) keeps the source's addresses ours: without it another thread's malloc
    could take them before they are reserved again.
    """
    flags = _MREMAP_MAYMOVE | _MREMAP_FIXED | _MREMAP_DONTUNMAP
    if _libc.mremap(source, length, length, flags, target) == _MAP_FAILED:
        raise _last_error()


def unmap(address: int, length: int) -> None:
    """Give a range back to the process."""
    if _libc.munmap(address, length):
        raise _last_error()


def bytes_at(address: int, length: int, owner: object = None) -> np.ndarray:
    """uint8[length] over a range, which keeps `owner` alive; touching what is not mapped kills the process."""
    memory = (ctypes.c_uint8 * length).from_address(address)
    memory.owner = owner  # type: ignore[attr-defined]
    return np.ctypeslib.as_array(memory)


def file_mappings(descriptor: int) -> list[FileMapping]:
    """Where the process has mapped the file, as the kernel tells it."""
    inode = str(os.fstat(descriptor).st_ino)
    rows = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
    return [
        FileMapping(int(row[0].split("-")[0], 16), int(row[0].split("-")[1], 16), int(row[2], 16))
        for row in rows
        if row[4] == inode and "memfd:" in row[-1]
    ]


def free_memory(root: Path = Path("/")) -> tuple[int, str]:
    """(bytes that can be had without swapping, where that figure comes from); `root` is where /proc and /sys lie."""
    rows = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
    figures = [(int(row[1]) * 1024, "MemAvailable") for row in rows if row[:1] == ["MemAvailable:"]]
    if not figures:
        raise VmmRefused("/proc/meminfo does not say how much memory is available")
    return min(figures + group_figures(root))


def mapping_limit() -> tuple[int, int]:
    """(mappings a process may have, mappings this one has)."""
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    return limit, Path("/proc/self/maps").read_text().count("\n")


def _mmap(address: int | None, length: int, protection: int, flags: int, descriptor: int, offset: int) -> int:
    result: int | None = _libc.mmap(address, length, protection, flags, descriptor, offset)
    if result is None or result == _MAP_FAILED:
        raise _last_error()
    return result


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
