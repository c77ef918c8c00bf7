"""Telemetry records for the tests of controllers."""

import numpy as np
from hypothesis import strategies as st

from hbmgym.controllers.base import TELEMETRY, Setup
from hbmgym.memory_backend.split import Layout

LAYOUT = Layout(
    budget_bytes=1000 * 2**20, chunk_bytes=2 * 2**20, page_bytes=2**20, slot_bytes=9 * 2**20, min_slots=2, min_pages=10
)
SETUP = Setup(
    layout=LAYOUT,
    kv_token_bytes=2**14,
    slots_per_request=2,
    window_s=5.0,
    kv_share_bounds=LAYOUT.share_bounds,
    chunk_move_s=75e-6,
    tpot_slo_s=0.05,
)
AMOUNTS = st.just(0.0) | st.floats(1e-9, 1e12)
SHARES = st.integers(LAYOUT.min_slots, LAYOUT.max_slots).map(LAYOUT.share)


def record(**fields: float) -> np.record:
    """A TELEMETRY record of zeros but for `fields`."""
    telemetry = np.zeros(1, TELEMETRY).view(np.recarray)[0]
    for name, value in fields.items():
        telemetry[name] = value
    return telemetry


def served(kv_share: float = 0.5, **fields: float) -> np.record:
    """A record of an idle engine at `kv_share` with empty pools, but for `fields`."""
    slots = LAYOUT.slots(kv_share)
    pages, low_high = LAYOUT.pages(slots), LAYOUT.share_bounds
    usual = {
        "window_s": SETUP.window_s,
        "budget_bytes": LAYOUT.budget_bytes,
        "slot_bytes": LAYOUT.slot_bytes,
        "kv_token_bytes": SETUP.kv_token_bytes,
        "slots_per_request": SETUP.slots_per_request,
        "kv_share_requested": LAYOUT.share(slots),
        "kv_share_effective": LAYOUT.share(slots),
        "kv_share_min": low_high[0],
        "kv_share_max": low_high[1],
        "kv_capacity": pages,
        "kv_free": pages,
        "ssm_capacity": slots,
        "ssm_free": slots,
        "concurrency_cap": slots // SETUP.slots_per_request,
    }
    return record(**{**usual, **fields})


@st.composite
def served_records(draw: st.DrawFn) -> np.record:
    """Anything an engine under SETUP might report: pools are shared out consistently, the rest is free."""
    share = draw(SHARES)
    slots = LAYOUT.slots(share)
    fields = {name: draw(AMOUNTS) for name in TELEMETRY.names[TELEMETRY.names.index("waiting") :]}
    for pool, capacity in (("kv", LAYOUT.pages(slots)), ("ssm", slots)):
        live = draw(st.integers(0, capacity))
        cached = draw(st.integers(0, capacity - live))
        fields |= {f"{pool}_live": live, f"{pool}_cached": cached, f"{pool}_free": capacity - live - cached}
    return served(share, moving_chunks=draw(st.integers(0, 1)), **fields)
