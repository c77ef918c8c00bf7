"""How long driver calls take: one by one, in bulk, on one large handle, and while a kernel runs."""

from hbmgym.eval.gpu.device import SUCCESS, Device, Spinner, Stopwatch, driver_version, figures, result_code
from hbmgym.eval.gpu.plan import RUNS, Facts, Plan
from hbmgym.memory_backend.split import CHUNK_BYTES
from hbmgym.memory_backend.vmm import cuda_calls as cuda
from hbmgym.memory_backend.vmm.cuda_calls import CudaFailure

SPIN_S = 0.02
BLOCKING_REPEATS = 5
BLOCKING_RULE = (
    f"a kernel of {1e3 * SPIN_S:g} ms is in flight when the call is made; the call waits if that kernel has ended when "
    "the call returns, in most of the repeats"
)
CHUNK_CALLS = ("create", "map", "set_access", "unmap", "release")
RANGE_CALLS = ("reserve", *CHUNK_CALLS, "free")


class Chunk:
    """One chunk's way through the driver; every method is one call."""

    def __init__(self, device: Device, address: int = 0) -> None:
        self._device, self._address = device, address

    def reserve(self) -> None:
        """Take an address of its own."""
        self._address = cuda.reserve(CHUNK_BYTES)

    def create(self) -> None:
        """Take physical memory."""
        self._handle = self._device.create()

    def map(self) -> None:
        """Show it at the address."""
        self._device.map(self._address, self._handle)

    def set_access(self) -> None:
        """Make it readable and writable."""
        self._device.set_access(self._address)

    def unmap(self) -> None:
        """Take it from the address."""
        cuda.unmap(self._address, CHUNK_BYTES)

    def release(self) -> None:
        """Give the physical memory back."""
        cuda.release(self._handle)

    def free(self) -> None:
        """Give the address back."""
        cuda.free_range(self._address, CHUNK_BYTES)


def measure_calls(plan: Plan) -> Facts:
    """Each call on one chunk after the other, `plan.chunks` of them mapped at the same time."""
    device, watch = Device(), Stopwatch()
    base = cuda.reserve(plan.chunks * CHUNK_BYTES)
    chunks = [Chunk(device, base + i * CHUNK_BYTES) for i in range(plan.chunks)]
    for name in CHUNK_CALLS:
        for chunk in chunks:
            watch.time(name, getattr(chunk, name))
    for _ in range(1000):
        watch.time("a_call_that_does_nothing", driver_version)
    return {**watch.figures()}


def measure_bulk(plan: Plan) -> Facts:
    """One set_access over several chunks, and one unmap over several mappings if the driver takes that."""
    device = Device()
    base = cuda.reserve(max(RUNS) * CHUNK_BYTES)
    handles = [device.create() for _ in range(max(RUNS))]
    return {f"{count}_chunks": _bulk(device, base, handles[:count], plan.repeats) for count in RUNS}


def _bulk(device: Device, base: int, handles: list[int], repeats: int) -> Facts:
    watch, size, code = Stopwatch(), len(handles) * CHUNK_BYTES, ""
    for _ in range(repeats):
        for i, handle in enumerate(handles):
            device.map(base + i * CHUNK_BYTES, handle)
        watch.time("one_set_access", device.set_access, base, size)
        code = watch.time("one_unmap", result_code, cuda.unmap, base, size)
        if code != SUCCESS:
            for i in range(len(handles)):
                cuda.unmap(base + i * CHUNK_BYTES, CHUNK_BYTES)
    return {**watch.figures(), "one_unmap_code": code}


def measure_handles(plan: Plan) -> Facts:
    """The same bytes under many handles of one chunk, and under one large handle; access is set once for both."""
    device, count = Device(), max(RUNS)
    size = count * CHUNK_BYTES
    base = cuda.reserve(size)
    small, large = Stopwatch(), Stopwatch()
    for _ in range(plan.repeats):
        _whole_way(device, small, base, CHUNK_BYTES, count)
        _whole_way(device, large, base, size, 1)
    return {"bytes": size, "small_handles": _sums(small, count), "large_handle": _sums(large, 1)}


def _whole_way(device: Device, watch: Stopwatch, base: int, size: int, count: int) -> None:
    """`count` handles of `size` bytes created, mapped, unmapped and given back."""
    handles = [watch.time("create", device.create, size) for _ in range(count)]
    for i, handle in enumerate(handles):
        watch.time("map", device.map, base + i * size, handle, size)
    watch.time("set_access", device.set_access, base, count * size)
    for i in range(count):
        watch.time("unmap", cuda.unmap, base + i * size, size)
    for handle in handles:
        watch.time("release", cuda.release, handle)


def _sums(watch: Stopwatch, count: int) -> Facts:
    """Microseconds of each call for all of the bytes: means over the repeats."""
    repeats = len(watch.seconds["create"]) // count
    return {f"{name}_us": 1e6 * sum(seconds) / repeats for name, seconds in watch.seconds.items()}


def measure_blocking(plan: Plan) -> Facts:
    """Each call on an idle device, and while a kernel that touches no memory runs on another stream.

    A call that ruins the context ends the part; `ended_by` names it.
    """
    device, spinner = Device(), Spinner(SPIN_S)
    idle, busy = Stopwatch(), Stopwatch()
    flights: list[tuple[bool, bool]] = []
    facts: Facts = {"rule": BLOCKING_RULE}
    try:
        for _ in range(BLOCKING_REPEATS):
            _idle_round(idle, Chunk(device))
            _busy_round(busy, Chunk(device), spinner, flights)
    except CudaFailure as failure:
        facts["ended_by"] = f"{RANGE_CALLS[len(flights) % len(RANGE_CALLS)]} while a kernel runs: {failure.result}"
    for i, name in enumerate(RANGE_CALLS):
        if own := flights[i :: len(RANGE_CALLS)]:
            times = {"idle_us": figures(idle.seconds[name])["p50_us"], "busy_us": figures(busy.seconds[name])["p50_us"]}
            facts[name] = {**times, "waits": _waits(own)}
    return facts


def _idle_round(watch: Stopwatch, chunk: Chunk) -> None:
    for name in RANGE_CALLS:
        watch.time(name, getattr(chunk, name))


def _busy_round(watch: Stopwatch, chunk: Chunk, spinner: Spinner, flights: list[tuple[bool, bool]]) -> None:
    """Appends for each call whether the kernel was in flight (before it, after it)."""
    for name in RANGE_CALLS:
        with spinner.spinning():
            before = spinner.in_flight
            watch.time(name, getattr(chunk, name))
            after = spinner.in_flight
        flights.append((before, after))


def _waits(flights: list[tuple[bool, bool]]) -> str:
    """`yes` or `no` with its count, of the repeats in which the kernel was in flight to begin with."""
    waited = [not after for before, after in flights if before]
    if not waited:
        return "unknown: the kernel was never in flight"
    return f"{'yes' if 2 * sum(waited) > len(waited) else 'no'} ({sum(waited)} of {len(waited)})"
