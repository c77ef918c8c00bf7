"""The host driver: real bytes, and system calls that fail."""

import errno
import fcntl
import gc
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbmgym.memory_backend.oplog import KV, SSM
from hbmgym.memory_backend.split import Layout
from hbmgym.memory_backend.vmm import VmmError, VmmRefused, open_vmm
from tests.memory_backend.vmm.logs import (
    CHUNK,
    KV_CHUNKS,
    LAYOUT,
    SMALL,
    check,
    log,
    moves,
    open_or_skip,
    owners,
    pool_bytes,
    scatter,
    stamp,
)


@pytest.fixture
def host() -> Iterator[Any]:
    with open_or_skip("host") as driver:
        yield driver


def test_check_compares_owners_with_what_the_kernel_maps(host: Any) -> None:
    kv, ssm = (pool_bytes(host, pool).ctypes.data for pool in (KV, SSM))
    host.remap(kv, CHUNK, ssm)
    with pytest.raises(VmmError, match=r"expected byte .* of the chunks, mapped is"):
        host.check()


def failing(call: Callable[..., Any], failures: set[int]) -> Callable[..., Any]:
    """`call`, but the calls numbered in `failures` (from 0) raise ENOMEM."""
    made = iter(range(10**6))

    def attempt(*arguments: Any) -> Any:
        if next(made) in failures:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return call(*arguments)

    return attempt


@pytest.mark.parametrize("pool", [KV, SSM])
@pytest.mark.parametrize(("call", "number"), [*(("remap", n) for n in range(5)), ("reserve", 0)])
def test_any_failing_call_of_a_run_undoes_the_run(host: Any, pool: int, call: str, number: int) -> None:
    scatter(host, pool)
    for data in (pool_bytes(host, KV), pool_bytes(host, SSM)):
        data[::4096] = np.arange(data.size // 4096) % 251
    before, contents = owners(host), [pool_bytes(host, p)[::4096].copy() for p in (KV, SSM)]
    works = getattr(host, call)
    setattr(host, call, failing(works, {number}))
    with pytest.raises(VmmError, match="Cannot allocate memory; all of them were undone"):
        host.execute(log(*moves(host, pool, 5)))
    setattr(host, call, works)
    host.check()
    assert owners(host) == before and host.chunks_moved == 0
    for p in (KV, SSM):
        np.testing.assert_array_equal(pool_bytes(host, p)[::4096], contents[p])
    host.execute(log(*moves(host, pool, 5)))
    host.check()


@pytest.mark.parametrize(("remaps", "reserves"), [({2, 3}, set()), ({2, 4}, set()), ({2}, {0})])
def test_a_failing_roll_back_refuses_everything_from_then_on(host: Any, remaps: set[int], reserves: set[int]) -> None:
    scatter(host, KV)
    host.remap, host.reserve = failing(host.remap, remaps), failing(host.reserve, reserves)
    with pytest.raises(VmmError, match="and so did its roll-back"):
        host.execute(log(*moves(host, KV, 4)))
    for use in (lambda: host.execute(log(stamp(KV, 0, 1))), lambda: pool_bytes(host, KV), host.check):
        with pytest.raises(VmmError, match="refuses every operation: a move failed"):
            use()


def test_an_interrupt_between_moves_refuses_everything_from_then_on(host: Any) -> None:
    def interrupted(*arguments: int) -> None:
        raise KeyboardInterrupt

    host.remap = interrupted
    with pytest.raises(KeyboardInterrupt):
        host.execute(log(*moves(host, KV, 1)))
    with pytest.raises(VmmError, match="interrupted"):
        host.check()


def test_a_vacated_position_stays_reserved(host: Any) -> None:
    vacated = pool_bytes(host, KV).ctypes.data + (KV_CHUNKS - 1) * CHUNK
    host.execute(log(*moves(host, KV, 1)))
    rows = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
    ranges = [([int(edge, 16) for edge in row[0].split("-")], row[1]) for row in rows]
    assert [rights for (low, high), rights in ranges if low <= vacated < high] == ["---p"]


def test_the_chunks_cannot_grow_or_shrink_and_are_all_there(host: Any) -> None:
    descriptor = chunks_descriptor()
    for size in (LAYOUT.budget_bytes + CHUNK, LAYOUT.budget_bytes - CHUNK):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert os.fstat(descriptor).st_blocks * 512 == LAYOUT.budget_bytes


def chunks_descriptor() -> int:
    links = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if alive(fd)}
    (descriptor,) = (int(fd) for fd, link in links.items() if "hbmgym-chunks" in link)
    return descriptor


def alive(descriptor: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{descriptor}")


def footprint() -> tuple[int, int]:
    """(open descriptors of chunks, mappings of chunks)."""
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if alive(fd)]
    return sum("hbmgym-chunks" in link for link in links), Path("/proc/self/maps").read_text().count("hbmgym-chunks")


@pytest.mark.parametrize("end", ["close", "drop"])
def test_nothing_of_a_driver_is_left(end: str) -> None:
    host = open_or_skip("host")
    host.execute(log(*moves(host, KV, 5)))
    bases = [pool_bytes(host, pool).ctypes.data for pool in (KV, SSM)]
    assert footprint() == (1, footprint()[1]) and footprint()[1] > 2
    if end == "close":
        host.close()
    else:
        del host
        gc.collect()
    assert footprint() == (0, 0)
    reserved = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.split()[1] == "---p"]
    starts = [[int(edge, 16) for edge in line.split()[0].split("-")] for line in reserved]
    assert not any(high - low >= LAYOUT.budget_bytes and low <= base < high for low, high in starts for base in bases)


def address_space() -> int:
    """Bytes of addresses that the process has reserved or mapped."""
    rows = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(row[1]) * 1024 for row in rows if row[0] == "VmSize:")


def linux_or_skip() -> Any:
    linux = pytest.importorskip("hbmgym.memory_backend.vmm.linux", exc_type=ImportError)
    open_or_skip("host").close()
    return linux


CONSTRUCTOR_CALLS = [
    ("sealed_memory", 1),
    ("reserve_anywhere", 2),
    ("map_file", 3),
    ("remap", 1),
    ("reserve", 2),
    ("keep_from_children", 2),
]


@pytest.mark.parametrize(("call", "number"), [(call, n) for call, calls in CONSTRUCTOR_CALLS for n in range(calls)])
def test_any_failing_call_of_the_constructor_leaves_nothing(
    call: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    linux = linux_or_skip()
    before = address_space()
    monkeypatch.setattr(linux, call, failing(getattr(linux, call), {number}))
    with pytest.raises(VmmRefused, match=r"Cannot allocate memory( while mapping|; Linux 5.13 or later is needed)"):
        open_vmm("host", LAYOUT, KV_CHUNKS)
    assert footprint() == (0, 0) and address_space() - before < LAYOUT.budget_bytes


def test_the_constructor_makes_no_other_call_that_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    linux = linux_or_skip()
    for call, calls in CONSTRUCTOR_CALLS:
        monkeypatch.setattr(linux, call, failing(getattr(linux, call), {calls}))
    with open_vmm("host", LAYOUT, KV_CHUNKS) as host:
        host.check()


@pytest.mark.parametrize("step", ["os.ftruncate", "os.posix_fallocate", "fcntl.fcntl"])
def test_a_memfd_that_cannot_be_filled_or_sealed_is_closed(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    linux_or_skip()
    monkeypatch.setattr(step, failing(lambda *arguments: None, {0}))
    with pytest.raises(VmmRefused, match="Cannot allocate memory while mapping 67108864 bytes: give a smaller budget"):
        open_vmm("host", LAYOUT, KV_CHUNKS)
    assert footprint() == (0, 0)


@pytest.mark.parametrize("layout", [Layout(10**6, 1000, 100, 100, 1, 1), Layout(2**50, 2**40, 2**40, 2**40, 1, 1)])
def test_a_refused_layout_leaves_nothing(layout: Layout) -> None:
    linux_or_skip()
    before = address_space()
    with pytest.raises(VmmRefused, match=r": give (\d+|a smaller budget or take the accounting backend)$"):
        open_vmm("host", layout, 1)
    assert footprint() == (0, 0) and address_space() - before < LAYOUT.budget_bytes


def test_adjacent_chunks_are_one_mapping_however_they_came_together(host: Any) -> None:
    linux = pytest.importorskip("hbmgym.memory_backend.vmm.linux", exc_type=ImportError)
    rng = np.random.default_rng(3)
    while host.chunks_moved < 2000:
        pool = int(rng.integers(2))
        count = int(rng.integers(0, len(host.chunk_at(pool)))) + 1 if len(host.chunk_at(pool)) else 0
        single = bool(rng.integers(2))
        for _ in range(count if single else 1):
            host.execute(log(*moves(host, pool, 1 if single else count)) if count else log())
        stretches = sum(1 + np.count_nonzero(np.diff(chunks) != 1) for chunks in owners(host) if chunks)
        assert len(linux.file_mappings(chunks_descriptor())) == stretches


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # other threads of the test run do not matter here
def test_a_forked_child_is_refused_and_the_parent_goes_on(host: Any) -> None:
    host.execute(log(stamp(KV, 0, 3), stamp(SSM, 0, 4), *moves(host, KV, 2)))
    expected = f"opened in process {os.getpid()}, this is process "
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        os.close(told)
        try:
            os.write(tell, json.dumps(seen_by_child(host)).encode())
        finally:
            os._exit(0)
    os.close(tell)
    with open(told) as pipe:
        seen = json.loads(pipe.read())
    os.waitpid(child, 0)
    assert len(seen["refusals"]) == 6
    for refusal in seen["refusals"]:
        assert refusal == f"host memory refuses every operation: {expected}{child}: open one per process"
    assert seen["footprint"] == [0, 0] and seen["closed"].endswith("it is closed")
    assert seen["kept"] == "of the child"
    host.execute(log(check(KV, 0, 3), check(SSM, 0, 4), *moves(host, SSM, 2)))
    host.check()


def seen_by_child(host: Any) -> dict[str, Any]:
    """What a forked child finds; it maps memory of its own where the parent has a pool, and must keep it."""
    from hbmgym.memory_backend.vmm import linux

    def refusal(use: Callable[[], Any]) -> str:
        try:
            return f"not refused: {use()}"
        except VmmError as error:
            return str(error)

    address = host._bases[KV]
    uses = (
        lambda: host.execute(log(check(KV, 0, 3))),
        lambda: host.chunk_at(KV),
        lambda: host.base(KV),
        lambda: host.view(KV, 0, 8),
        host.end_batch,
        host.check,
    )
    seen = {"refusals": [refusal(use) for use in uses], "footprint": footprint()}
    own = os.memfd_create("of-the-child")
    os.ftruncate(own, CHUNK)
    linux.map_file(address, CHUNK, own, 0)
    memory = linux.bytes_at(address, 12)
    memory[:] = np.frombuffer(b"of the child", np.uint8)
    host.close()
    seen["closed"] = refusal(host.check)
    host._release()
    seen["kept"] = memory.tobytes().decode()
    return seen


def test_chunks_off_the_huge_page_are_refused_and_leave_nothing() -> None:
    with pytest.raises(VmmRefused, match=r"not a multiple of the \d+ bytes of a huge page: give a multiple, or take"):
        open_vmm("host-huge", SMALL, KV_CHUNKS)
    assert footprint() == (0, 0)


def test_huge_pages_are_really_huge() -> None:
    with open_or_skip("host-huge") as host:
        assert host.why == "host: asked for by name, on huge pages"
        host.execute(log(*moves(host, KV, 5)))
        smaps = Path("/proc/self/smaps").read_text().split("hbmgym-chunks")[1:]
        mapped = sum(int(re.findall(r"(?:Shmem|File)PmdMapped: +(\d+) kB", part)[0]) for part in smaps)
    assert mapped * 1024 == LAYOUT.budget_bytes
