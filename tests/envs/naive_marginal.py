"""What other pool sizes would have saved or lost, once more in plain Python: a part of the naive engine."""

import math
from collections.abc import Hashable
from typing import TYPE_CHECKING

from hbmgym.memory_backend.ages import AGES, age_bits

if TYPE_CHECKING:
    from tests.envs.naive_engine import Blocks, Job, NaiveEngine

STEPS = {"2pct": 0.02, "5pct": 0.05, "10pct": 0.1, "20pct": 0.2}


class Past:
    """How the blocks of a pool joined its order of eviction and left it, by the number of the join, and what was lost
    for it."""

    def __init__(self, most_blocks: int, by_list: bool):
        self.bits, self.by_list = age_bits(most_blocks), by_list
        self.joins = self.full_at = self.parted = self.evictions = 0
        self.joined: dict[Hashable, int] = {}
        self.counted: set[int] = set()
        self.states_lost: dict[int, tuple[str, int]] = {}

    def join(self, name: Hashable) -> None:
        self.joined[name] = self.joins
        self.counted.add(self.joins)
        self.joins += 1

    def part(self, name: Hashable) -> None:
        """Leave the order, but not as the first of it."""
        if name in self.joined:
            self.parted += self.joined[name] < self.full_at
            self.counted.discard(self.joined[name])

    def evict(self, name: Hashable) -> None:
        if not self.by_list:
            self.part(name)
        self.evictions += 1
        self.full_at, self.parted = self.joins, 0

    def later(self, number: int) -> int:
        """Those that joined after that number and have not left; exact where an age is one join (pools of less than
        256 blocks), else of the block's own age in proportion."""
        ages = [join >> self.bits for join in self.counted]
        age, newest = number >> self.bits, (self.joins - 1) >> self.bits
        if newest - age >= AGES:
            return sum(newest - AGES < other for other in ages)
        begin, end = age << self.bits, min((age + 1) << self.bits, self.joins)
        return sum(age < other for other in ages) + ages.count(age) * (end - number - 1) // (end - begin)


class Marginals:
    """Recovery seconds by counter."""

    def __init__(self, engine: "NaiveEngine"):
        self.engine = engine
        names = [f"{pool}_{side}_{step}" for pool in ("kv", "ssm") for side in ("gain", "cost") for step in STEPS]
        self.seconds = dict.fromkeys(names, 0.0)

    def lose_state(self, name: Hashable) -> None:
        """The SSM pool evicts a snapshot, or a request goes on in its slot."""
        self.engine.ssm.past.states_lost[name[1]] = "ssm", self.engine.ssm.past.evictions + 1

    def lose_state_with_page(self, name: Hashable) -> None:
        self.engine.ssm.past.states_lost[name[1]] = "kv", self.engine.kv.past.evictions + 1

    def forget(self, page_id: int) -> None:
        """The page has come again, or its snapshot was dropped because nobody wants it."""
        self.engine.ssm.past.states_lost.pop(page_id, None)

    def book(self, job: "Job", reuse: int, resident: int, seen: int) -> None:
        """A request is about to be admitted."""
        live = sum(("id", i) in self.engine.kv.pins for i in job.ids[:reuse])
        for step, part in STEPS.items():
            for pool, depths in (("kv", range(resident + 1, seen + 1)), ("ssm", range(reuse + 1, resident + 1))):
                self.book_gain(f"{pool}_gain_{step}", job, pool, self.blocks_of(pool, part), reuse, depths)
            if reuse:
                self.book_cost(f"ssm_cost_{step}", job, self.engine.ssm, self.blocks_of("ssm", part), reuse)
            if live < reuse:
                self.book_cost(f"kv_cost_{step}", job, self.engine.kv, self.blocks_of("kv", part), reuse)

    def blocks_of(self, pool: str, part: float) -> int:
        layout = self.engine.layout
        return round(part * (layout.budget_bytes / (layout.page_bytes if pool == "kv" else layout.slot_bytes)))

    def book_gain(self, name: str, job: "Job", pool: str, blocks: int, reuse: int, depths: range) -> None:
        """The deepest state that the pool lost, and with so many blocks more would not have."""
        for depth in reversed(depths):
            lost_to, number = self.engine.ssm.past.states_lost.get(job.ids[depth - 1], ("", 0))
            if lost_to == pool and getattr(self.engine, pool).past.evictions - number < blocks:
                self.seconds[name] += self.recovery_s(reuse, depth)
                return

    def book_cost(self, name: str, job: "Job", pool: "Blocks", blocks: int, reuse: int) -> None:
        """What is reused beyond the deepest snapshot that would be left of so many blocks less."""
        held = [
            depth
            for depth in range(1, reuse + 1)
            if ("id", job.ids[depth - 1]) in self.engine.ssm.at
            and self.slack(pool, ("id", job.ids[depth - 1])) >= blocks
        ]
        self.seconds[name] += self.recovery_s(max(held, default=0), reuse)

    def slack(self, pool: "Blocks", name: Hashable) -> float:
        """Blocks that the pool could do without and still hold that one."""
        if name in pool.pins:
            return math.inf
        past = pool.past
        number = past.joined[name]
        spare = max(pool.limit - len(pool.at), 0)
        # What is spare was needed when the pool was full last, but for what has left from before the block since.
        room = len(pool.cached) - 1 + (spare if number >= past.full_at else min(spare, past.parted))
        return max(room - past.later(number), 0)

    def recovery_s(self, pages: int, goal: int) -> float:
        begin, end = pages * self.engine.page, goal * self.engine.page
        cost = self.engine.cost
        return float((end - begin) * cost.prefill_s_per_token + (end**2 - begin**2) / 2 * cost.attention_s_per_pair)
