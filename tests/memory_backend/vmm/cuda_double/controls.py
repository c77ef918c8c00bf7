"""The double's controls: what fails and when, what stays in flight, what was called and what is left."""

import ctypes

KINDS = ("reservations", "handles", "mappings", "allocations", "pinned", "streams", "events", "modules")
FOREVER = -1
MIB = 2**20


class Double:
    """The double that this process runs on; functions are named as the library exports them (`cuMemAlloc_v2`)."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library
        library.double_reset.argtypes = (ctypes.c_size_t,)
        library.double_fail.argtypes = (ctypes.c_char_p, ctypes.c_long, ctypes.c_long, ctypes.c_int)
        library.double_hold.argtypes = (ctypes.c_long,)
        library.double_call_at.restype = ctypes.c_char_p
        library.double_is_poisoned.restype = ctypes.c_int
        for count in ("calls", "call_count", "in_flight", "live", "context_references", "early_releases"):
            getattr(library, f"double_{count}").restype = ctypes.c_long

    def reset(self, memory_bytes: int = 512 * MIB) -> None:
        """Forget everything; a device of `memory_bytes`."""
        self._library.double_reset(memory_bytes)

    def fail(self, function: str, after: int, result: int, times: int = 1) -> None:
        """`after` calls of `function` go through; the next `times` return `result` and do nothing."""
        self._library.double_fail(function.encode(), after, times, result)

    def heal(self) -> None:
        """Forget the failures that were asked for."""
        self._library.double_heal()

    def hold(self, queries: int) -> None:
        """Work launched from now on answers NOT_READY `queries` times; FOREVER: until `finish`."""
        self._library.double_hold(queries)

    def finish(self) -> None:
        """All work in flight comes to its end."""
        self._library.double_finish()

    @property
    def in_flight(self) -> int:
        return int(self._library.double_in_flight())

    def calls(self, function: str) -> int:
        """How often `function` was called since `reset`."""
        return int(self._library.double_calls(function.encode()))

    @property
    def log(self) -> list[str]:
        """Every call since `reset`, in order."""
        return [self._library.double_call_at(i).decode() for i in range(self._library.double_call_count())]

    @property
    def live(self) -> dict[str, int]:
        """What has been made and not given back; kinds of which nothing is left are left out."""
        counts = {kind: int(self._library.double_live(number)) for number, kind in enumerate(KINDS)}
        counts["contexts"] = int(self._library.double_context_references())
        return {kind: count for kind, count in counts.items() if count}

    @property
    def is_poisoned(self) -> bool:
        """Does every call fail, as on a GPU after a fault?"""
        return bool(self._library.double_is_poisoned())

    @property
    def early_releases(self) -> int:
        """Handles released while mapped: legal, but then a later mistake would free memory under its user."""
        return int(self._library.double_early_releases())
