"""ConvexController: the slow half of HiMA, a Budgeter that moves bytes to where they save most.

Re-implemented from HiMA's abstract (OpenReview KEf0qZPF95) and public notes on development forks; what differs may be
ours. Every window it learns from Telemetry what bytes are worth to either pool (`utility`), solves the convex program
(`budgeter`), and asks for the split that it finds, rounded towards the present one. All rates are per second, so that
decisions do not depend on the length of a window.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hbmgym.controllers.base import PRICES, TELEMETRY, Decision, Setup
from hbmgym.controllers.convex.budgeter import charge_moves, fill
from hbmgym.controllers.convex.utility import CELLS, OFFSETS, POINTS, concave_slopes, erlang_b, recall, remember
from hbmgym.memory_backend.jit import kernel, subkernel
from hbmgym.memory_backend.split import Layout


@dataclass(frozen=True)
class ConvexParameters:
    """Ours, chosen on validation seeds of the scenarios mix-shift and steady-chat, unless a source is given."""

    average_s: float = 30.0
    """Time constant, in seconds, with which the worth of bytes and the load are learned."""
    horizon_s: float = 60.0
    """Seconds within which a move has to pay: what it saves counts for so long (the window of HiMA's LPB)."""
    move_s_per_budget: float = 2.0
    """Prefill seconds that moving a whole budget costs: what moves is empty at first."""
    blocked_s: float = 1.0
    """Prefill seconds that a request which finds no slot or page is worth."""
    margin: float = 0.1
    """A pool keeps its live bytes and so many of them more (the forks' active-usage guard)."""
    cooldown_s: float = 5.0
    """Seconds between two moves (the early fork reversed none within 5 s)."""
    least_gain: float = 0.05
    """Two moves in one direction: unless the first has lowered by this part what its pool could still gain, the wait
    before the second doubles (the forks' convergence back-off)."""
    most_cooldowns: float = 4.0
    """A wait is never longer than so many cooldowns (forks: 16, which costs 1.5 % on mix-shift)."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0.0 <= value < math.inf:
                raise ValueError(f"convex: {name} is {value}, expected a finite number of at least 0")
        if self.average_s == 0.0 or self.horizon_s == 0.0:
            raise ValueError("convex: average_s and horizon_s must be above 0")


POOLS, MIDDLE = 2, POINTS // 2
MOST_SERVERS = 4096.0  # requests at once; with more, room for another one is worth nothing
# Where a pool's gains and costs begin in a Telemetry record.
_PLACES = {name: place for place, name in enumerate(TELEMETRY.names or ())}
_GAINS = (_PLACES["kv_gain_2pct"], _PLACES["ssm_gain_2pct"])
_COSTS = (_PLACES["kv_cost_2pct"], _PLACES["ssm_cost_2pct"])
_TIME, _MOVING, _REQUESTED = (_PLACES[name] for name in ("time_s", "moving_chunks", "kv_share_requested"))

_TELEMETRY = np.dtype((np.record, TELEMETRY))
_PARAMETERS = tuple(field.name for field in dataclasses.fields(ConvexParameters))
_SETTINGS = np.dtype((np.record, [(name, "f8") for name in (*_PARAMETERS, "page_bytes", "least_share", "most_share")]))
# What is learned of the load, then what the last decision found: bytes of the KV pool to ask for, the worth of a byte
# (s/s/byte), how fast that falls, both pools together (s/s/byte^2), and what either pool could still gain (s/s).
_REMEMBERED = ("running", "arrivals", "finished", "busy")
_FOUND = ("kv_bytes", "price", "curvature", "kv_gain", "ssm_gain")
_MEMORY = np.dtype((np.record, [(name, "f8") for name in (*_REMEMBERED, *_FOUND)]))
# Reading a field of a record costs Python ten times as much as a number of an array.
_, _, _FINISHED, _BUSY, _KV_BYTES, _PRICE, _CURVATURE, _KV_GAIN, _SSM_GAIN = range(len(_REMEMBERED) + len(_FOUND))


class _Work(NamedTuple):
    """Arrays that a decision writes over; bytes of a pool have shape (POOLS,)."""

    sizes: np.ndarray
    least: np.ndarray
    most: np.ndarray
    request_bytes: np.ndarray
    values: np.ndarray
    """(POINTS,)"""
    widths: np.ndarray
    """(POOLS, POINTS - 1), as the next."""
    slopes: np.ndarray


def _make_work() -> _Work:
    sizes, least, most, request_bytes = np.zeros((4, POOLS))
    widths, slopes = np.zeros((2, POOLS, POINTS - 1))
    return _Work(sizes, least, most, request_bytes, np.zeros(POINTS), widths, slopes)


@subkernel
def _learn(record, t, settings, cells, memory):
    weight = -math.expm1(-max(t.window_s, 0.0) / settings.average_s)
    memory.running += weight * (t.running - memory.running)
    memory.arrivals += weight * (t.arrivals_per_s - memory.arrivals)
    memory.finished += weight * (t.finished_per_s - memory.finished)
    memory.busy += weight * (t.busy_fraction - memory.busy)
    for pool in range(POOLS):
        share = t.kv_share_effective if pool == 0 else 1.0 - t.kv_share_effective
        remember(cells[pool], share, record, _GAINS[pool], _COSTS[pool], weight)


@subkernel
def _look_at_pools(t, settings, work):
    """Bytes of both pools: what they have, what a request takes, the least and the most that they may have."""
    keep = 1.0 + settings.margin
    kv_live, ssm_live = t.kv_live * settings.page_bytes, t.ssm_live * t.slot_bytes
    work.sizes[0] = t.kv_share_effective * t.budget_bytes
    work.sizes[1] = t.budget_bytes - work.sizes[0]
    work.request_bytes[0] = kv_live / t.running if t.running > 0.0 else 0.0
    work.request_bytes[1] = t.slots_per_request * t.slot_bytes
    work.most[0] = settings.most_share * t.budget_bytes
    work.most[1] = (1.0 - settings.least_share) * t.budget_bytes
    # A pool that has less than it should keep is at least not shrunk.
    work.least[0] = min(max(t.budget_bytes - work.most[1], kv_live * keep), work.sizes[0])
    work.least[1] = min(max(t.budget_bytes - work.most[0], ssm_live * keep), work.sizes[1])


@subkernel
def _add_admission(values, size_bytes, budget_bytes, request_bytes, memory, blocked_s):
    """Less what requests cost that find no room: `size_bytes` is the pool, of which a request takes `request_bytes`."""
    if memory.running <= 0.0 or memory.finished <= 0.0 or request_bytes <= 0.0:
        return
    # Little's law; what is held back now would run as well.
    offered = memory.running * min(max(memory.arrivals / memory.finished, 1.0), 2.0)
    whole, blocked = 0, 1.0
    for i in range(POINTS):
        servers = min(max(size_bytes + OFFSETS[i] * budget_bytes, 0.0) / request_bytes, MOST_SERVERS)
        blocked = erlang_b(offered, whole, blocked, int(servers))
        whole = int(servers)
        following = erlang_b(offered, whole, blocked, whole + 1)
        # In straight lines between whole numbers of servers, the loss stays convex.
        values[i] -= blocked_s * memory.arrivals * (blocked + (servers - whole) * (following - blocked))


@subkernel
def _cut(pool, budget_bytes, work):
    """Pieces between the points around the present size, cut to what the pool may have; below them it keeps all."""
    now, least, most = work.sizes[pool], work.least[pool], work.most[pool]
    begin = min(max(now + OFFSETS[0] * budget_bytes, least), most)
    work.least[pool] = begin
    for j in range(POINTS - 1):
        end = min(max(now + OFFSETS[j + 1] * budget_bytes, least), most)
        work.widths[pool, j] = end - begin
        begin = end


@kernel
def _decide(record, setting_values, cells, memory_values, work):
    """Learn from the window that ends, then divide the budget; see _MEMORY for what is found."""
    t = record.view(_TELEMETRY)[0]
    settings = setting_values.view(_SETTINGS)[0]
    memory = memory_values.view(_MEMORY)[0]
    _learn(record, t, settings, cells, memory)
    _look_at_pools(t, settings, work)
    budget = t.budget_bytes
    memory.curvature = 0.0
    for pool in range(POOLS):
        recall(cells[pool], work.sizes[pool] / budget, work.values)
        if pool == 0:
            memory.kv_gain = work.values[POINTS - 1]
        else:
            memory.ssm_gain = work.values[POINTS - 1]
        _add_admission(work.values, work.sizes[pool], budget, work.request_bytes[pool], memory, settings.blocked_s)
        slopes = work.slopes[pool]
        concave_slopes(OFFSETS, work.values, slopes)
        bend = (slopes[MIDDLE - 1] - slopes[MIDDLE]) / (0.5 * (OFFSETS[MIDDLE + 1] - OFFSETS[MIDDLE - 1]))
        memory.curvature += max(bend, 0.0) / (budget * budget)  # rounding may bend a straight line upwards
        _cut(pool, budget, work)
        for j in range(POINTS - 1):
            slopes[j] *= settings.horizon_s / budget
    charge_moves(settings.move_s_per_budget / budget, work.sizes, work.least, work.widths, work.slopes)
    memory.price = fill(budget, work.least, work.widths, work.slopes, work.sizes) / settings.horizon_s
    memory.kv_bytes = work.sizes[0]


class ConvexController:
    """Divides the budget anew when that pays, and publishes the prices at which it does."""

    name = "convex"
    fixed_share: float | None = None

    def __init__(self, parameters: ConvexParameters | None = None) -> None:
        self.parameters = parameters or ConvexParameters()

    def reset(self, setup: Setup) -> None:
        self._setup = setup
        layout, bounds = setup.layout, setup.kv_share_bounds
        self._settings = np.array([*dataclasses.astuple(self.parameters), layout.page_bytes, *bounds], np.float64)
        self._cells = np.zeros((POOLS, CELLS))
        self._memory = np.zeros(len(_REMEMBERED) + len(_FOUND))
        self._work = _make_work()
        self._price_values = np.zeros(PRICES.itemsize // 8)
        self._prices: np.record = self._price_values.view(PRICES).view(np.recarray)[0]
        self._brake = _Brake(self.parameters)

    def act(self, telemetry: np.record) -> Decision:
        values = np.frombuffer(telemetry, np.float64)
        _decide(values, self._settings, self._cells, self._memory, self._work)
        self._publish()
        return Decision(self._share(values), self._prices)

    def _share(self, telemetry: np.ndarray) -> float | None:
        """The share to ask for, None to keep the present one."""
        if telemetry[_MOVING]:
            return None
        layout, now = self._setup.layout, float(telemetry[_REQUESTED])
        slots = _rounded(now, float(self._memory[_KV_BYTES]), layout)
        if slots is None or (share := layout.share(slots)) == now:
            return None
        gain = float(self._memory[_KV_GAIN if share > now else _SSM_GAIN])
        return share if self._brake.allows(share > now, gain, float(telemetry[_TIME])) else None

    def _publish(self) -> None:
        memory, finished = self._memory, float(self._memory[_FINISHED])
        self._price_values[0] = memory[_PRICE]
        self._price_values[1] = memory[_CURVATURE]
        self._price_values[2] = float(memory[_BUSY]) / finished if finished > 0.0 else 0.0


class _Brake:
    """Waits between moves, longer while they do not help."""

    def __init__(self, parameters: ConvexParameters) -> None:
        self._parameters = parameters
        self._moved_s, self._to_kv, self._gain, self._waits = -math.inf, False, math.inf, 1.0

    def allows(self, to_kv: bool, gain: float, now_s: float) -> bool:
        """May bytes move now, and to that pool, which could still gain so much? If so, they do."""
        p = self._parameters
        stuck = to_kv == self._to_kv and gain > (1.0 - p.least_gain) * self._gain
        waits = min(2.0 * self._waits, max(p.most_cooldowns, 1.0)) if stuck else 1.0
        if now_s - self._moved_s < p.cooldown_s * waits:
            return False
        self._moved_s, self._to_kv, self._gain, self._waits = now_s, to_kv, gain, waits
        return True


def _rounded(share: float, kv_bytes: float, layout: Layout) -> int | None:
    """Slots of the split nearest to `kv_bytes` on the side of the realised `share`; None where that is less than a slot
    away."""
    wanted = (layout.budget_bytes - kv_bytes) / layout.slot_bytes
    present = (1.0 - share) * layout.budget_bytes // layout.slot_bytes  # whole chunks may hold less than a slot more
    if abs(wanted - present) < 1.0:
        return None
    return min(max(math.floor(wanted) if wanted > present else math.ceil(wanted), layout.min_slots), layout.max_slots)
