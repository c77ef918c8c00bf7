"""ConvexController: the slow half of HiMA, a Budgeter that moves bytes to where they save most.

Re-implemented from HiMA's abstract (OpenReview KEf0qZPF95) and public notes on development forks; what differs may be
ours. Every window it learns from Telemetry what bytes are worth to either pool (`utility`), solves the convex program
(`budgeter`), and asks for the split that it finds, rounded towards the present one. All rates are per second, so that
decisions do not depend on the length of a window.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from hbmgym.controllers.base import MARGINAL_STEPS, PRICES, TELEMETRY, Decision, Setup
from hbmgym.controllers.convex.budgeter import charge_moves, fill
from hbmgym.controllers.convex.utility import CELLS, OFFSETS, POINTS, concave_slopes, erlang_b, recall, remember
from hbmgym.memory_backend.jit import kernel, subkernel
from hbmgym.memory_backend.split import Layout


@dataclass(frozen=True)
class ConvexParameters:
    """Ours, chosen on validation seeds of the scenarios mix-shift and steady-chat, unless a source is given."""

    average_s: float = 60.0
    """Time constant, in seconds, with which the worth of bytes and the load are learned (window of HiMA's LPB)."""
    horizon_s: float = 60.0
    """Seconds within which a move has to pay; what is saved counts for so long."""
    move_s_per_budget: float = 1.0
    """Prefill seconds that moving bytes costs beside their transfer, per whole budget: moved bytes are empty at first."""
    blocked_s: float = 1.0
    """Prefill seconds that a request which finds no slot or page is worth."""
    margin: float = 0.1
    """A pool keeps its live bytes and so many of them more (the forks' active-usage guard)."""
    least_gain: float = 0.05
    """A move must lower the seconds that more bytes would save by this part, or the next has to wait longer (forks)."""
    cooldown_s: float = 10.0
    """Seconds between two moves (the forks' payback planner)."""
    most_cooldowns: float = 16.0
    """A wait is never longer than so many cooldowns (forks)."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0.0 <= value < math.inf:
                raise ValueError(f"convex: {name} is {value}, expected a finite number of at least 0")
        if self.average_s == 0.0 or self.horizon_s == 0.0:
            raise ValueError("convex: average_s and horizon_s must be above 0")


_TELEMETRY = np.dtype((np.record, TELEMETRY))
_FIELDS = tuple(field.name for field in dataclasses.fields(ConvexParameters))
_PARAMETERS = np.dtype((np.record, [(name, "f8") for name in _FIELDS]))
# What is learned of the load, in requests and per second.
_LOAD = np.dtype((np.record, [("running", "f8"), ("arrivals", "f8"), ("finished", "f8"), ("busy", "f8")]))
# kv_bytes to ask for; worth of a byte (s/s/byte) and its slope (s/s/byte^2); gains of both pools together (s/s).
_ANSWER = np.dtype((np.record, [("kv_bytes", "f8"), ("price", "f8"), ("curvature", "f8"), ("harm", "f8")]))
POOLS = 2
# Where a pool's gains and costs begin in a Telemetry record.
_GAINS = tuple(TELEMETRY.names.index(f"{pool}_gain_2pct") for pool in ("kv", "ssm"))
MIDDLE, STEPS = POINTS // 2, len(MARGINAL_STEPS)
_COSTS = tuple(TELEMETRY.names.index(f"{pool}_cost_2pct") for pool in ("kv", "ssm"))


@subkernel
def _learn(values, t, p, cells, load):
    seconds = max(t.window_s, 0.0)
    weight = -math.expm1(-seconds / p.average_s)
    load.running += weight * (t.running - load.running)
    load.arrivals += weight * (t.arrivals_per_s - load.arrivals)
    load.finished += weight * (t.finished_per_s - load.finished)
    load.busy += weight * (t.busy_fraction - load.busy)
    shares = (t.kv_share_effective, 1.0 - t.kv_share_effective)
    for pool in range(POOLS):
        gains = values[_GAINS[pool] : _GAINS[pool] + STEPS]
        costs = values[_COSTS[pool] : _COSTS[pool] + STEPS]
        remember(cells[pool], shares[pool], gains, costs, weight)


@subkernel
def _add_admission(values, size_bytes, budget_bytes, request_bytes, load, blocked_s):
    """Less what requests cost that find no room: `size_bytes` is the pool, of which a request takes `request_bytes`."""
    if load.running <= 0.0 or load.finished <= 0.0 or request_bytes <= 0.0:
        return
    # By Little's law; what is held back now would run as well.
    offered = load.running * min(max(load.arrivals / load.finished, 1.0), 2.0)
    for i in range(POINTS):
        servers = max(size_bytes + OFFSETS[i] * budget_bytes, 0.0) / request_bytes
        values[i] -= blocked_s * load.arrivals * erlang_b(servers, offered)


@subkernel
def _cut(now, least, most, budget_bytes, widths, pool):
    """Pieces between the points around `now`, cut to what the pool may have; what lies below them it keeps."""
    begin = min(max(now + OFFSETS[0] * budget_bytes, least[pool]), most[pool])
    least[pool] = begin
    for j in range(POINTS - 1):
        end = min(max(now + OFFSETS[j + 1] * budget_bytes, least[pool]), most[pool])
        widths[pool, j] = end - begin
        begin = end


@kernel
def _decide(values, parameters, sizes, request_bytes, least, most, cells, load_values, points, pieces, answer_values):
    """Learn from the window that ends, then divide the budget.

    float64: `sizes`, `request_bytes`, `least`, `most` (pools,) are bytes of a pool: now, of one request, and its bounds;
    `points` (POINTS,), `pieces` (2, pools, POINTS - 1) and `sizes` are written over.
    """
    t = values.view(_TELEMETRY)[0]
    p = parameters.view(_PARAMETERS)[0]
    load = load_values.view(_LOAD)[0]
    answer = answer_values.view(_ANSWER)[0]
    _learn(values, t, p, cells, load)
    answer.harm, answer.curvature = 0.0, 0.0
    widths, slopes = pieces[0], pieces[1]
    for pool in range(POOLS):
        recall(cells[pool], sizes[pool] / t.budget_bytes, points)
        answer.harm += points[POINTS - 1]
        _add_admission(points, sizes[pool], t.budget_bytes, request_bytes[pool], load, p.blocked_s)
        concave_slopes(OFFSETS, points, slopes[pool])
        before, after = slopes[pool, MIDDLE - 1], slopes[pool, MIDDLE]
        answer.curvature += (before - after) / (0.5 * (OFFSETS[MIDDLE + 1] - OFFSETS[MIDDLE - 1]))
        _cut(sizes[pool], least, most, t.budget_bytes, widths, pool)
        for j in range(POINTS - 1):
            slopes[pool, j] *= p.horizon_s / t.budget_bytes
    charge_moves(2.0 * p.move_s_per_budget / t.budget_bytes, sizes, least, widths, slopes)
    level = fill(t.budget_bytes, least, widths, slopes, sizes)
    answer.kv_bytes = sizes[0]
    answer.price = level / p.horizon_s
    answer.curvature /= t.budget_bytes * t.budget_bytes


class ConvexController:
    """Divides the budget anew when that pays, and publishes the prices at which it does."""

    name = "convex"
    fixed_share: float | None = None

    def __init__(self, parameters: ConvexParameters | None = None) -> None:
        self.parameters = parameters or ConvexParameters()

    def reset(self, setup: Setup) -> None:
        self._setup = setup
        self._parameters = np.array(dataclasses.astuple(self.parameters))
        self._cells = np.zeros((POOLS, CELLS))
        self._load, self._answer = np.zeros(len(_LOAD)), np.zeros(len(_ANSWER))
        self._sizes, self._request_bytes = np.zeros(POOLS), np.zeros(POOLS)
        self._least, self._most = np.zeros(POOLS), np.zeros(POOLS)
        self._points, self._pieces = np.zeros(POINTS), np.zeros((2, POOLS, POINTS - 1))
        self._prices = np.zeros(1, PRICES).view(np.recarray)[0]
        self._moved_s, self._harm, self._cooldowns = -math.inf, math.inf, 1.0

    def act(self, telemetry: np.record) -> Decision:
        self._look(telemetry)
        _decide(
            np.frombuffer(telemetry, np.float64),
            self._parameters,
            self._sizes,
            self._request_bytes,
            self._least,
            self._most,
            self._cells,
            self._load,
            self._points,
            self._pieces,
            self._answer,
        )
        return Decision(self._share(telemetry), self._publish())

    def _look(self, telemetry: np.record) -> None:
        """Bytes of both pools: what they have, what a request takes, what they must and may have."""
        layout, setup = self._setup.layout, self._setup
        budget = float(layout.budget_bytes)
        kv, low, high = (budget * x for x in (float(telemetry["kv_share_effective"]), *setup.kv_share_bounds))
        live = float(telemetry["kv_live"]) * layout.page_bytes, float(telemetry["ssm_live"]) * layout.slot_bytes
        keep = 1.0 + self.parameters.margin
        self._sizes[:] = kv, budget - kv
        running = float(telemetry["running"])
        self._request_bytes[:] = live[0] / running if running else 0.0, setup.slots_per_request * layout.slot_bytes
        # A pool that already has less than it should keep is at least not shrunk.
        self._least[:] = min(max(low, live[0] * keep), kv), min(max(budget - high, live[1] * keep), budget - kv)
        self._most[:] = high, budget - low

    def _share(self, telemetry: np.record) -> float | None:
        """The share to ask for, None to keep the present one."""
        layout, p = self._setup.layout, self.parameters
        kv_bytes, now_s = float(self._answer[0]), float(telemetry["time_s"])
        if telemetry["moving_chunks"] or now_s - self._moved_s < p.cooldown_s * self._cooldowns:
            return None
        slots = _rounded(layout.slots(float(telemetry["kv_share_requested"])), kv_bytes, layout)
        share = layout.share(slots)
        if share == telemetry["kv_share_requested"]:
            return None
        harm = float(self._answer[3])
        helped = harm <= (1.0 - p.least_gain) * self._harm
        self._cooldowns = 1.0 if helped else min(2.0 * self._cooldowns, max(p.most_cooldowns, 1.0))
        self._harm, self._moved_s = harm, now_s
        return share

    def _publish(self) -> np.record:
        prices = self._prices
        prices.shadow_price, prices.curvature = self._answer[1], self._answer[2]
        finished = self._load[2]
        prices.deferral_weight = self._load[3] / finished if finished > 0.0 else 0.0
        return prices


def _rounded(slots: int, kv_bytes: float, layout: Layout) -> int:
    """The slots of the split that is nearest to `kv_bytes` on the side of the present one, which has `slots`."""
    wanted = (layout.budget_bytes - kv_bytes) / layout.slot_bytes
    rounded = math.floor(wanted + 1e-9) if wanted > slots else math.ceil(wanted - 1e-9)
    return min(max(rounded, layout.min_slots), layout.max_slots)
