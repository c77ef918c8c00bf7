"""What the driver answers to calls that are wrong; each is made in a process of its own, whose context it may ruin."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from hbmgym.eval.gpu.device import SUCCESS, Device, result_code
from hbmgym.eval.gpu.isolation import Failed, isolated
from hbmgym.eval.gpu.plan import Facts, Plan
from hbmgym.memory_backend.split import CHUNK_BYTES
from hbmgym.memory_backend.vmm import cuda_calls as cuda

LIMIT_S = 60.0
SIDE_BY_SIDE = 4


def unmap_half(device: Device) -> str:
    """Unmap one chunk of a mapping of two."""
    base = cuda.reserve(2 * CHUNK_BYTES)
    device.map(base, device.create(2 * CHUNK_BYTES), 2 * CHUNK_BYTES)
    return result_code(cuda.unmap, base, CHUNK_BYTES)


def unmap_twice(device: Device) -> str:
    """Unmap what has been unmapped."""
    address = device.mapped(1)
    cuda.unmap(address, CHUNK_BYTES)
    return result_code(cuda.unmap, address, CHUNK_BYTES)


def map_twice(device: Device) -> str:
    """Map a handle where another is mapped."""
    return result_code(device.map, device.mapped(1), device.create())


def map_unreserved(device: Device) -> str:
    """Map where nothing was reserved."""
    address = cuda.reserve(CHUNK_BYTES)
    cuda.free_range(address, CHUNK_BYTES)
    return result_code(device.map, address, device.create())


def map_off_granularity(device: Device) -> str:
    """Map half a granule."""
    half = device.granularity // 2
    return result_code(device.map, cuda.reserve(CHUNK_BYTES), device.create(), half)


def create_off_granularity(device: Device) -> str:
    """Create a granule and a byte."""
    return result_code(device.create, device.granularity + 1)


def create_out_of_memory(device: Device) -> str:
    """Create twice as much as the device has."""
    granularity = device.granularity
    return result_code(device.create, 2 * device.total_bytes // granularity * granularity)


def access_unmapped(device: Device) -> str:
    """Set access where nothing is mapped."""
    return result_code(device.set_access, cuda.reserve(CHUNK_BYTES))


def access_with_a_hole(device: Device) -> str:
    """Set access over two chunks of which only the first is mapped."""
    base = cuda.reserve(2 * CHUNK_BYTES)
    device.map(base, device.create())
    return result_code(device.set_access, base, 2 * CHUNK_BYTES)


def fill_without_access(device: Device) -> str:
    """Write to what is mapped, but was never made accessible."""
    base = cuda.reserve(CHUNK_BYTES)
    device.map(base, device.create())
    return result_code(device.fill, base, 1)


def fill_unmapped(device: Device) -> str:
    """Write to what is only reserved."""
    return result_code(device.fill, cuda.reserve(CHUNK_BYTES), 1)


def release_while_mapped(device: Device) -> str:
    """Release a handle whose memory is mapped: CUDA keeps the memory until it is unmapped."""
    base, handle = cuda.reserve(CHUNK_BYTES), device.create()
    device.map(base, handle)
    device.set_access(base)
    return result_code(cuda.release, handle)


def release_twice(device: Device) -> str:
    """Release what has been released."""
    handle = device.create()
    cuda.release(handle)
    return result_code(cuda.release, handle)


def free_while_mapped(device: Device) -> str:
    """Give back a range in which something is mapped."""
    return result_code(cuda.free_range, device.mapped(1), CHUNK_BYTES)


BAD_CALLS: tuple[Callable[[Device], str], ...] = (
    *(unmap_half, unmap_twice, map_twice, map_unreserved, map_off_granularity),
    *(create_off_granularity, create_out_of_memory, access_unmapped, access_with_a_hole),
    *(fill_without_access, fill_unmapped, release_while_mapped, release_twice, free_while_mapped),
)


def check_bad_calls(plan: Plan) -> Facts:
    """Per bad call the driver's answer and whether the context works afterwards, or how its process ended."""

    def answer(bad_call: Callable[[Device], str]) -> Facts:
        try:
            return isolated(try_bad_call, bad_call, limit_s=LIMIT_S)
        except Failed as failure:
            return {"code": str(failure), "context_works_afterwards": False}

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        answers = list(pool.map(answer, BAD_CALLS))
    return {bad_call.__name__: found for bad_call, found in zip(BAD_CALLS, answers, strict=True)}


def try_bad_call(bad_call: Callable[[Device], str]) -> Facts:
    """Make one, then see whether memory can still be filled."""
    device = Device()
    good = device.mapped(1)
    code = bad_call(device)
    return {"code": code, "context_works_afterwards": result_code(device.fill, good, 1) == SUCCESS}
