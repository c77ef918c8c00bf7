"""Waiting on the host for what a GPU may still be doing to our bytes."""

from time import perf_counter, sleep

from hbmgym.memory_backend.vmm import cuda_calls as cuda
from hbmgym.memory_backend.vmm.protocol import VmmError

_SPIN_S = 200e-6
_PAUSE_S = 50e-6


class Fence:
    """Every batch of foreign work has an event of its own until it is seen to have passed.

    Waiting happens on the host: a wait between streams would not stop the host from unmapping. All methods need the
    context to be current.
    """

    def __init__(self, stream: int, timeout_s: float):
        self.timeout_s = timeout_s
        self.stream = stream
        self._pending: list[int] = []
        self._spare: list[int] = []

    def record(self, stream: int | None) -> None:
        """A batch ends here: work launched so far on `stream` (None: the legacy default stream)."""
        self._collect()
        if not self._spare:
            self._spare.append(cuda.make_event())
        cuda.record_event(self._spare[-1], stream)
        self._pending.append(self._spare.pop())

    def wait(self) -> None:
        """Return when all batches and our own stream have ended, or raise VmmError after `timeout_s` seconds."""
        started = perf_counter()
        while not self._is_passed():
            waited = perf_counter() - started
            if waited > self.timeout_s:
                raise VmmError(f"the GPU has not ended the work launched so far within {self.timeout_s} s")
            if waited > _SPIN_S:
                sleep(_PAUSE_S)

    def close(self) -> None:
        """Destroy the events."""
        for events in (self._pending, self._spare):
            while events:
                cuda.destroy_event(events.pop())

    def _is_passed(self) -> bool:
        self._collect()
        return not self._pending and cuda.stream_is_idle(self.stream)

    def _collect(self) -> None:
        """Take back the events of batches that have ended."""
        passed = [event for event in self._pending if cuda.event_has_passed(event)]
        self._pending = [event for event in self._pending if event not in passed]
        self._spare += passed
