"""What lies in physical memory: is it zero when it is new, does an alias show it, does all of it come back."""

from collections.abc import Callable

from hbmgym.eval.gpu.device import Device
from hbmgym.eval.gpu.moves import plain_layout
from hbmgym.eval.gpu.plan import Facts, Plan
from hbmgym.memory_backend.oplog import KV, SSM
from hbmgym.memory_backend.split import CHUNK_BYTES
from hbmgym.memory_backend.vmm import cuda_calls as cuda
from hbmgym.memory_backend.vmm import open_vmm
from hbmgym.memory_backend.vmm.cuda_calls import CudaFailure
from hbmgym.memory_backend.vmm.ownership import top_moves

PATTERN = 0xA5
LEAK_ROUNDS = 4


def check_alias(plan: Plan) -> Facts:
    """One chunk at two addresses: is that accepted, and is what is written at either read at the other?"""
    device = Device()
    base, handle = cuda.reserve(2 * CHUNK_BYTES), device.create()
    first, second = base, base + CHUNK_BYTES
    try:
        for address in (first, second):
            device.map(address, handle)
            device.set_access(address)
    except CudaFailure as refusal:
        return {"accepted": False, "code": refusal.result}
    same = []
    for written, read, value in ((first, second, PATTERN), (second, first, 255 - PATTERN)):
        device.fill(written, value)
        same.append(bool((device.read(read) == value).all()))
    cuda.unmap(first, CHUNK_BYTES)
    return {
        "accepted": True,
        "reads_the_same_bytes": all(same),
        "survives_the_end_of_the_other": bool((device.read(second) == 255 - PATTERN).all()),
    }


def check_fresh(plan: Plan) -> Facts:
    """Chunks that are filled, given back and created again: how many are zero in every byte?"""
    device = Device()
    base = cuda.reserve(plan.chunks * CHUNK_BYTES)
    first = _zero_chunks(device, base, plan.chunks)
    again = _zero_chunks(device, base, plan.chunks)
    return {"chunks": plan.chunks, "zero_at_first": first, "zero_after_use": again, "always": again == plan.chunks}


def _zero_chunks(device: Device, base: int, count: int) -> int:
    """Of `count` new chunks, those that hold only zeros; all are filled before they are given back."""
    addresses = [base + i * CHUNK_BYTES for i in range(count)]
    handles = [device.create() for _ in addresses]
    zero = 0
    for address, handle in zip(addresses, handles, strict=True):
        device.map(address, handle)
        device.set_access(address)
        zero += not device.read(address).any()
        device.fill(address, PATTERN)
    for address, handle in zip(addresses, handles, strict=True):
        cuda.unmap(address, CHUNK_BYTES)
        cuda.release(handle)
    return zero


def check_leaks(plan: Plan) -> Facts:
    """Free memory before and after rounds that give everything back; what the first round keeps is the driver's own."""
    device = Device()
    return {
        "calls": _rounds(device, lambda: _use_chunks(device, plan.chunks)),
        "backend": _rounds(device, lambda: _use_backend(plan.chunks)),
    }


def _rounds(device: Device, use: Callable[[], None]) -> Facts:
    free = [device.free_bytes]
    for _ in range(LEAK_ROUNDS):
        use()
        free.append(device.free_bytes)
    return {"free_bytes": free, "kept_by_first_round": free[0] - free[1], "lost_by_later_rounds": free[1] - free[-1]}


def _use_chunks(device: Device, count: int) -> None:
    size = count * CHUNK_BYTES
    base = cuda.reserve(size)
    _zero_chunks(device, base, count)
    cuda.free_range(base, size)


def _use_backend(chunks: int) -> None:
    with open_vmm("cuda", plain_layout(chunks), chunks // 2) as vmm:
        for pool in (KV, SSM):
            vmm.execute(top_moves(vmm, pool, chunks // 4))
