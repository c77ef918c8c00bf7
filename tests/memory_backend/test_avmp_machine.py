"""Any sequence of operations leaves the allocator, its bytes and a plain-Python model in agreement."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from hbmgym.memory_backend.avmp import Avmp, BadHandle
from hbmgym.memory_backend.split import Layout
from hbmgym.memory_backend.vmm import VmmRefused
from tests.memory_backend.allocator_model import KINDS, Comparison

SMALL = Layout(24 * 4096, 4096, 3_000, 10_000, min_slots=1, min_pages=1)
START = 0.5


class AllocatorMachine(RuleBasedStateMachine):
    """Handles go through the bundles `held` (live at first) and `freed`; evicted ones are found by the model."""

    held: Bundle[int] = Bundle("held")
    freed: Bundle[int] = Bundle("freed")
    backend = "accounting"

    def __init__(self) -> None:
        super().__init__()
        self.real = Avmp.of_layout(SMALL, kv_share=START, backend=self.backend, migrate=None)
        self.both = Comparison(self.real, START, holds_bytes=self.backend != "accounting")

    def teardown(self) -> None:
        self.real.close()

    def _pins(self, handle: int) -> int | None:
        """Holders of a block, None once it was evicted."""
        pool = self.both.model.pool(KINDS[handle >> 63])
        return pool.pins.get(handle)

    @rule(target=held, kind=st.sampled_from(KINDS), count=st.integers(0, 9))
    def allocate(self, kind: str, count: int) -> Any:
        return multiple(*self.both.allocate(kind, count))

    @rule(target=freed, handle=consumes(held))
    def free(self, handle: int) -> int:
        pins = self._pins(handle)
        if pins is None or pins > 1:
            with pytest.raises(BadHandle):
                self.real.free([handle])
            return handle if pins is None else 0
        self.both.free([handle])
        return handle

    @rule(handle=held, other=held)
    def free_two_that_may_be_one(self, handle: int, other: int) -> None:
        if handle == other:
            with pytest.raises(BadHandle):
                self.real.free([handle, other])

    @rule(handle=held)
    def pin(self, handle: int) -> None:
        self._try(self.both.pin, handle, allowed=self._pins(handle) is not None)

    @rule(handle=held)
    def unpin(self, handle: int) -> None:
        self._try(self.both.unpin, handle, allowed=bool(self._pins(handle)))

    @rule(handle=freed)
    def use_after_free(self, handle: int) -> None:
        if self._pins(handle) is None:
            for use in (self.real.free, self.real.pin, self.real.unpin, self.real.resolve):
                with pytest.raises(BadHandle):
                    use([handle])

    @rule(kv_share=st.floats(0, 1))
    def request_split(self, kv_share: float) -> None:
        self.both.request_split(kv_share)

    def _try(self, act: Callable[[list[int]], None], handle: int, allowed: bool) -> None:
        if allowed:
            act([handle])
            return
        with pytest.raises(BadHandle):
            act([handle])

    @invariant()
    def agree(self) -> None:
        self.both.compare()


class HostMachine(AllocatorMachine):
    """The same over real bytes."""

    backend = "host"


TestAccounting = AllocatorMachine.TestCase
TestAccounting.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class TestHost(HostMachine.TestCase):
    settings = settings(
        max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )

    @classmethod
    def setUpClass(cls) -> None:
        try:
            Avmp.of_layout(SMALL, backend="host").close()
        except VmmRefused as refusal:
            pytest.skip(str(refusal))
