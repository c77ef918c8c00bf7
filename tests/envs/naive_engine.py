"""The serving rules once more, in plain Python and one iteration at a time: the oracle of the kernels.

Pages and slots go by names: ("id", i) for the page or the snapshot of page id i, (row, ...) for what one request holds.
"""

import copy
import heapq
import math
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from hbmgym.envs.serving.core import Core
from hbmgym.envs.serving.cost_model import iteration_s
from hbmgym.envs.serving.state import ACTION_NAMES
from hbmgym.envs.traces.episode import Episode
from hbmgym.memory_backend.resize import RUN_CHUNKS
from tests.envs.naive_marginal import Marginals, Past
from tests.envs.naive_one_pool import page_was_used_first
from tests.envs.naive_orders import Orders
from tests.envs.naive_pins import Host, Pins
from tests.envs.naive_retention import NaiveRetention
from tests.envs.naive_telemetry import NaiveTelemetry

NEVER = 1e300
FLOATS = ("float", "float-lru")
WORKING, RESERVED = "working", "reserved"


class Blocks:
    """One pool: who lies on which block, how often it is pinned, and what is cached in order of eviction."""

    def __init__(self, block_bytes: int, chunk_bytes: int, chunks: int, total_chunks: int, by_list: bool = True):
        self.block_bytes, self.chunk_bytes = block_bytes, chunk_bytes
        self.chunks = self.target = chunks
        self.at: dict[Hashable, int] = {}
        self.pins: dict[Hashable, int] = {}
        self.cached: dict[Hashable, None] = {}
        self.used: dict[Hashable, tuple[int, float]] = {}
        self.hits: dict[Hashable, tuple[int, int]] = {}
        self.now_s = 0.0
        self.scales = (0.0, 0.0)
        self._uses = 0
        self._free = list(range(total_chunks * chunk_bytes // block_bytes))
        self.past = Past(len(self._free), by_list)

    def copy(self) -> "Blocks":
        other = copy.copy(self)
        for name, facts in vars(self).items():
            if isinstance(facts, (dict, list)):
                setattr(other, name, facts.copy())
        other.past = Past(0, True)  # what would be evicted from a copy is no news
        return other

    def holds(self, chunks: int) -> int:
        return chunks * self.chunk_bytes // self.block_bytes

    @property
    def capacity(self) -> int:
        return self.holds(self.chunks)

    @property
    def limit(self) -> int:
        return min(self.capacity, self.holds(self.target))

    def take(self, name: Hashable, bound: int) -> bool:
        if len(self.at) >= bound:
            return False
        self.at[name] = heapq.heappop(self._free)
        self.pins[name] = 1
        return True

    def evict(self, name: Hashable) -> None:
        """For want of room, as the next one of the order."""
        self.past.evict(name)
        self._forget(name)

    def free(self, name: Hashable) -> None:
        if name in self.cached:
            self.past.part(name)
        self._forget(name)

    def _forget(self, name: Hashable) -> None:
        self.past.joined.pop(name, None)
        heapq.heappush(self._free, self.at.pop(name))
        for facts in (self.pins, self.cached, self.used, self.hits):
            facts.pop(name, None)

    @property
    def headroom(self) -> float:
        """Free and cached blocks / capacity."""
        return (self.limit - len(self.pins)) / self.capacity

    def rename(self, old: Hashable, new: Hashable) -> None:
        self.at[new], self.pins[new] = self.at.pop(old), self.pins.pop(old)
        self.past.joined.pop(old, None)
        self.hits.pop(old, None)

    def pin(self, name: Hashable) -> None:
        if name in self.cached:
            self.past.part(name)
            del self.cached[name]
        self.pins[name] = self.pins.get(name, 0) + 1

    def unpin(self, name: Hashable) -> None:
        self.pins[name] -= 1
        if self.pins[name] == 0:
            del self.pins[name]
            self.cached[name] = None
            self._use(name)

    def _use(self, name: Hashable) -> None:
        self.past.join(name)
        self._uses += 1
        self.used[name] = self._uses, self.now_s

    def hit(self, name: Hashable) -> None:
        now, before = self.hits.get(name, (0, 0))
        self.hits[name] = now + 1, before

    def forget_old_hits(self) -> None:
        self.hits = {name: (0, now) for name, (now, _) in self.hits.items()}

    def meet_again(self, name: Hashable) -> None:
        """Goes last, unless it is pinned."""
        if name in self.cached:
            self.past.part(name)
            del self.cached[name]
            self.cached[name] = None
            self._use(name)

    def clear_from(self, capacity: int) -> int:
        """Move what lies at or above `capacity` to the lowest free blocks; how many blocks moved."""
        high = sorted((block, name) for name, block in self.at.items() if block >= capacity)
        for block, name in high:
            self.at[name] = heapq.heappop(self._free)
            heapq.heappush(self._free, block)
        return len(high)


@dataclass(eq=False)
class Job:
    """One request."""

    row: int
    arrival_s: float
    gap_s: float
    input: int
    output: int
    needs: set[int]
    ids: list[int]
    slo_s: float
    status: str = "future"
    reason: str = ""
    goal: int = 0
    computed: int = 0
    generated: int = 0
    published: int = 0
    pages: int = 0
    reserved_depth: int = 0
    branch: int = 0
    preemptions: int = 0
    deferrals: int = 0
    reused: int = 0
    missed: bool = False
    waits_since_s: float = 0.0
    admitted_s: float | None = None
    first_token_s: float | None = None
    ended_s: float | None = None

    def __post_init__(self) -> None:
        self.goal = self.input

    @property
    def context(self) -> int:
        """Tokens in the cache while decoding: the token produced last is not in it."""
        return self.input + self.generated - 1


def age(job: Job) -> tuple[float, int]:
    """The oldest has the least."""
    return job.arrival_s, job.row


@dataclass
class Totals:
    iterations: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    skipped_snapshots: int = 0
    saved_snapshots: int = 0
    admitted_tokens: int = 0
    reused_tokens: int = 0
    kv_loss_tokens: int = 0
    ssm_loss_tokens: int = 0
    met: int = 0
    missed: int = 0
    busy_s: float = 0.0
    blocked_s: dict[str, float] = field(default_factory=lambda: {"kv": 0.0, "ssm": 0.0})
    moved_chunks: int = 0
    relocated_bytes: int = 0
    actions: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ACTION_NAMES, 0))
    ratios: list[float] = field(default_factory=list)


class NaiveEngine:
    """Same settings and episode as `core`, which must have been reset at `kv_share` and not run yet."""

    def __init__(self, core: Core, episode: Episode, kv_share: float):
        self.config, self.layout, self.cost = core.config, core.layout, core.cost
        self.page, self.spr = self.config.page_tokens, self.config.running_slots
        self.attention_s_per_page2 = float(self.cost.attention_s_per_pair) * self.page**2 / 2
        self.state_s_per_page = self.page * float(self.cost.prefill_s_per_token)
        self.tpot_slo_s, self.kv_token_bytes = core.setup.tpot_slo_s, core.setup.kv_token_bytes
        layout, slots = self.layout, self.layout.slots(kv_share)
        kv_chunks = layout.kv_chunks(slots)
        self.rule, self.migrate = self.config.policies.on_shortage, self.config.migrate
        self.in_one_buffer = self.rule in FLOATS
        self.by_list = by_list = self.config.policies.eviction == "lru" and self.rule != "float-lru"
        ssm_chunks = layout.chunks - kv_chunks
        self.kv = Blocks(layout.page_bytes, layout.chunk_bytes, kv_chunks, layout.chunks, by_list)
        self.ssm = Blocks(layout.slot_bytes, layout.chunk_bytes, ssm_chunks, layout.chunks, by_list)
        self.marginals = Marginals(self)
        self.max_pages = layout.pages(layout.min_slots)
        self.taken = 0  # pages and slots
        self.migrated_after: int | None = None
        self.may_migrate = True
        self.priced, self.deferral_weight, self.curvature = self.config.priced, self.config.priced.deferral_weight, 0.0
        self.chosen: tuple[int, int, int | None] = (0, 0, None)
        self.head_waits = False
        self.orders = Orders(self)
        self.requested_slots = slots
        self.retention = NaiveRetention(self.config.policies.retention, self.page)
        needs: dict[int, set[int]] = defaultdict(set)
        for before, after in zip(*episode.needs, strict=True):
            needs[int(after)].add(int(before))
        self.jobs = [
            Job(i, float(row.arrival_s), float(row.gap_s), int(row.input_tokens), int(row.output_tokens), needs[i],
                episode.refs[row.ref_off : row.ref_off + row.known_ids].tolist(), float(core.requests[i].ttft_slo_s))
            for i, row in enumerate(episode.rows)
        ]  # fmt: skip
        self.depth_of = {i: depth + 1 for job in self.jobs for depth, i in enumerate(job.ids)}
        self.parent_of = {
            after: before for job in self.jobs for before, after in zip(job.ids, job.ids[1:], strict=False)
        }
        self.epoch_end_s = self.config.eviction_epoch_s
        self.closed = episode.loop == "closed"
        self.coming = [job for job in self.jobs if not (self.closed and job.needs)]
        self.unheard = 0  # decode iterations since the engine looked for new rows
        self.queue: list[Job] = []
        self.aside: list[Job] = []
        self.idle_pages = 0
        self.held: list[Job] = []
        self.prefilling: list[Job] = []
        self.decoding: list[Job] = []
        self.seen: set[int] = set()
        self.now_s = self.debt_s = self.worker_free_s = 0.0
        self.tick_s = NEVER
        self.under_way: tuple[Blocks | None, int] = (None, 0)
        self.worker_chunk_s = self.config.chunk_move_s if self.config.transfers == "overlapped" else 0.0
        self.blocked_on: str | None = None
        self.pins, self.host = Pins(self), Host(self)
        self.totals = Totals()
        self.telemetry = NaiveTelemetry(self)
        self.ends: list[int] = []

    # --- the loop

    def advance(self, until_s: float) -> None:
        while True:
            self.pull_arrivals()
            if self.config.transfers == "suspend":
                self.preempt_for_split()
            while self.tick_s <= self.now_s:
                self.chunks_arrive()
            while self.config.policies.eviction != "lru" and self.epoch_end_s <= self.now_s:
                self.turn_epoch()
            self.pins.end_due()
            if self.now_s >= until_s:
                break
            self.may_migrate, self.orders.refused = True, False
            for job in [job for job in self.aside if self.now_s >= self.deadline_s(job)]:
                self.aside.remove(job)
                self.reject(job, "deadline", self.now_s)
            preempted = self.grow_decoding()
            self.pins.bound()
            if self.orders.changes:
                self.reject_late_waiting()
                self.head_waits = self.head_waits and self.now_s < self.orders.reorder_s
            chunks = self.plan(preempted)
            if chunks or self.decoding:
                self.iterate(chunks)
            else:
                self.idle(until_s)
        for job in self.queue + self.aside + self.prefilling:
            if job.first_token_s is None and (self.now_s - job.arrival_s) / job.slo_s > 1.0:
                self.miss(job)

    def most_pages_needed(self) -> int:
        jobs = self.aside + self.queue[:1] + self.prefilling + self.decoding
        return max(map(self.most_pages, jobs), default=0) if self.rule == "evict" else 0

    def take_kv_needed(self) -> int:
        """As Telemetry tells it at the end of a window."""
        pages, self.idle_pages = max(self.most_pages_needed(), self.idle_pages), 0
        return pages

    def idle(self, until_s: float) -> None:
        if self.aside and self.kv.chunks == self.kv.target:
            self.idle_pages = self.most_pages_needed()
            fits = [slots for slots in range(self.layout.min_slots, self.layout.max_slots + 1)
                    if self.layout.pages(slots) >= self.most_pages_needed()]  # fmt: skip
            self.request_split(self.layout.share(max(fits)))
        assert self.tick_s < NEVER or not (self.queue or self.aside), "nobody waits beside an engine that does nothing"
        times = [until_s, self.tick_s, self.pins.next_end_s()]
        if self.config.policies.eviction != "lru":
            times.append(self.epoch_end_s)
        if self.orders.changes and self.queue:
            times += [self.orders.reorder_s, *map(self.deadline_s, self.queue)]
        elif self.queue:
            times.append(self.deadline_s(self.queue[0]))
        times += [self.deadline_s(job) for job in self.aside]
        times += [self.receipt_s(job) for job in self.coming]
        self.book_blocked(min(times) - self.now_s)
        self.debt_s = max(self.debt_s - (min(times) - self.now_s), 0.0)
        self.set_time(min(times))

    def set_time(self, now_s: float) -> None:
        self.now_s = self.kv.now_s = self.ssm.now_s = now_s

    def iterate(self, chunks: list[tuple[Job, int]]) -> None:
        tokens = sum(chunk for _, chunk in chunks)
        attention = sum(chunk * (job.computed + 0.5 * chunk) for job, chunk in chunks)
        alone = bool(chunks) and self.config.engine.prefill == "exclusive"
        decoding = [] if alone else list(self.decoding)
        context = sum(job.context for job in decoding)
        seconds = self.debt_s + iteration_s(self.cost, len(decoding), context, tokens, float(attention))
        self.debt_s = 0.0
        self.set_time(self.now_s + seconds)
        self.totals.busy_s += seconds
        self.book_blocked(seconds)
        self.pull_arrivals()
        self.totals.iterations += not alone
        self.decode(decoding)
        for job, chunk in chunks:
            self.apply_chunk(job, chunk)
        self.unheard = self.config.receive_interval if chunks else self.unheard + 1
        self.head_waits = self.head_waits and not chunks

    def decode(self, jobs: list[Job]) -> None:
        for job in jobs:
            job.generated += 1
        for job in sorted(jobs, key=lambda job: job.row):
            if job.generated == job.output:
                self.finish(job)
            elif self.decode_snapshot_due(job):
                self.save_in_reserved(job, job.context // self.page)

    def book_blocked(self, seconds: float) -> None:
        for pool in ("kv", "ssm"):
            if (self.queue and self.blocked_on == pool) or (self.aside and pool == "kv"):
                self.totals.blocked_s[pool] += seconds

    # --- arrival

    def receipt_s(self, job: Job) -> float:
        return job.arrival_s + self.config.engine.request_s

    def pull_arrivals(self) -> None:
        if 1 < self.config.receive_interval > self.unheard and self.decoding:
            return
        self.unheard = 0
        while self.coming and self.receipt_s(job := min(self.coming, key=age)) <= self.now_s:
            self.coming.remove(job)
            job.waits_since_s = job.arrival_s
            if self.most_pages(job) > self.max_pages:
                self.pins.see(job)
                self.reject(job, "does_not_fit", job.arrival_s)
            elif job.needs:
                job.status = "held"
                self.held.append(job)
            else:
                self.enqueue(job)

    def most_pages(self, job: Job) -> int:
        return -(-(job.input + job.output - 1) // self.page)

    def enqueue(self, job: Job) -> None:
        self.pins.see(job)
        job.status = "waiting"
        self.queue.append(job)
        self.head_waits = False

    def release_followers(self, ended: Job) -> None:
        for job in [job for job in self.jobs if ended.row in job.needs]:
            job.needs.remove(ended.row)
            self.pins.note(ended, job)
            if job.needs:
                continue
            if self.closed:
                job.arrival_s = ended.ended_s + job.gap_s
                self.coming.append(job)
            elif job in self.held:
                self.held.remove(job)
                self.enqueue(job)

    # --- admission

    def deadline_s(self, job: Job) -> float:
        return job.waits_since_s + self.config.deadline_slos * job.slo_s

    def plan(self, preempted: bool) -> list[tuple[Job, int]]:
        left, chunks = self.config.prefill_budget, []
        most = self.config.long_prefill_tokens or math.inf
        for job in self.prefilling:
            chunk = min(left, most, self.next_stop(job) - job.computed)
            left -= chunk
            if chunk:
                chunks.append((job, chunk))
        if preempted and (self.decoding or self.prefilling):
            return chunks
        while self.queue and left > 0:
            if self.orders.changes and not self.head_waits and not self.orders.bring_next_first():
                self.head_waits, self.blocked_on = True, None
                break
            job = self.queue[0]
            if self.now_s >= self.deadline_s(job):
                self.leave_queue()
                self.reject(job, "deadline", self.now_s)
            elif self.rule == "evict" and self.most_pages(job) > self.kv.limit:
                self.aside.append(self.leave_queue())
            elif not self.head_waits and self.admit_head():
                chunk = min(left, most, self.next_stop(job) - job.computed)
                left -= chunk
                chunks.append((job, chunk))
            else:
                # By price, or in another order, it would choose anew at every edge, so it is said when it does.
                chooses = self.rule == "priced" or self.orders.changes
                self.head_waits = chooses and self.may_migrate and not self.orders.refused
                break
        return chunks

    def leave_queue(self, place: int = 0) -> Job:
        self.blocked_on = None
        self.head_waits = False
        return self.queue.pop(place)

    def reject_late_waiting(self) -> None:
        while late := [job for job in self.queue if self.now_s >= self.deadline_s(job)]:
            for job in late:
                self.leave_queue(self.queue.index(job))
                self.reject(job, "deadline", self.now_s)

    def admit_head(self) -> bool:
        job = self.queue[0]
        on_host = self.host.tokens.get(job, 0)
        pages = [("id", i) for i in job.ids[: (on_host or job.goal - 1) // self.page]]
        seen = _leading(name[1] in self.seen for name in pages)
        needed = -(-job.goal // self.page)
        while True:
            resident = _leading(name in self.kv.at for name in pages)
            reuse = max((j for j in range(1, resident + 1) if pages[j - 1] in self.ssm.at), default=0)
            reuse = resident if on_host else reuse
            new_pages = needed - sum(name in self.kv.pins for name in pages[:reuse])
            idle = not self.decoding and not self.prefilling
            if idle and self.lacking(self.spr, new_pages, needed) and self.pins.gives_way():
                continue
            if self.rule == "priced":
                lacking = self.waits_by_price(job, pages[:reuse], new_pages)
            else:
                lacking = self.lacking(self.spr, new_pages, needed)
            if lacking is None:
                break
            if self.rule == "priced" or not self.migrates(lacking, self.spr, new_pages, needed):
                self.blocked_on = lacking
                return False
        if self.orders.rule == "past-future" and not self.orders.peak_fits(job, pages[:reuse], new_pages):
            self.orders.refused, self.blocked_on = True, "kv"
            return False
        self.leave_queue()
        computed = max(reuse, on_host // self.page)
        self.retention.admit(job, self.boundary(job), computed, seen, self.snapshots_on_path(job))
        if not on_host:
            self.totals.kv_loss_tokens += (seen - resident) * self.page
            self.totals.ssm_loss_tokens += (resident - reuse) * self.page
            self.marginals.book(job, reuse, resident, seen)
        for name in pages[:reuse]:
            self.kv.hit(name)
            self.kv.pin(name)
        self.pins.used += self.pins.end_under(job, reuse)
        self.take_slots(job, pages[reuse - 1] if reuse and not on_host else None)
        job.published = job.pages = reuse
        self.float_to(0, needed - reuse)
        while job.pages < needed:
            assert self.grow(job, self.kv.limit)
        job.computed = self.host.give_back(job, reuse) if on_host else reuse * self.page
        if job.admitted_s is None:
            job.admitted_s, job.reused = self.now_s, job.computed
            self.totals.admitted_tokens += job.goal
            self.totals.reused_tokens += job.computed
        else:
            self.totals.recomputed_tokens += job.goal - job.computed
        job.branch = resident if resident > reuse else 0
        job.status = "prefilling"
        self.prefilling.append(job)
        return True

    def take_slots(self, job: Job, snapshot: Hashable | None) -> None:
        if snapshot:
            self.ssm.hit(snapshot)
            self.ssm.pin(snapshot)
        self.do_as_chosen()
        for name in (RESERVED, *range(2, self.spr))[: self.spr - 1]:
            assert self.take_slot((job.row, name))
        working = (job.row, WORKING)
        self.float_to(1, 0)
        if snapshot and len(self.ssm.pins) >= self.ssm.limit:
            self.marginals.lose_state(snapshot)
            self.ssm.rename(snapshot, working)
            self.taken += 1
            return
        assert self.take_slot(working)
        if snapshot:
            self.ssm.unpin(snapshot)
            self.debt_s += self.cost.slot_copy_s

    def take_slot(self, name: Hashable) -> bool:
        self.float_to(1, 0)
        while not self.ssm.take(name, self.ssm.limit):
            if not self.ssm.cached:
                return False
            self.evict_snapshot()
        self.taken += 1
        return True

    def grow(self, job: Job, bound: int) -> bool:
        while not self.kv.take((job.row, job.pages), bound):
            if not self.kv.cached:
                return False
            self.evict_page()
        job.pages += 1
        self.taken += 1
        return True

    def evict_page(self) -> None:
        name = self.victim(self.kv)
        if name in self.ssm.at:
            self.marginals.lose_state_with_page(name)
            self.ssm.past.evictions += 1
            self.ssm.free(name)
        self.kv.evict(name)

    def evict_snapshot(self) -> None:
        name = self.victim(self.ssm)
        self.marginals.lose_state(name)
        self.ssm.evict(name)

    # --- the order of eviction

    def victim(self, pool: Blocks) -> Hashable:
        return next(iter(pool.cached)) if self.by_list else self.eviction_order(pool)[0]

    def eviction_order(self, pool: Blocks) -> list[Hashable]:
        """What may be evicted now, next one first."""
        if self.by_list:
            return list(pool.cached)
        continued = {("id", self.parent_of.get(name[1])) for name in self.kv.at if name[0] == "id"}
        may_go = [name for name in pool.cached if pool is self.ssm or name not in continued]
        return sorted(may_go, key=lambda name: (self.value(pool, name), pool.used[name][0]))

    def value(self, pool: Blocks, name: Hashable) -> float:
        if self.config.policies.eviction == "lru":
            return 0.0
        if self.config.policies.eviction == "lpb":
            return sum(pool.hits.get(name, (0, 0))) * self.saved_s_per_byte(pool, name)
        if self.config.policies.eviction == "tlru":
            lost = self.depth_of[name[1]] * self.page if name in self.ssm.at else 0
            return float(lost + self.config.tlru_next_tokens > self.config.tlru_threshold_tokens)
        recency, saving = pool.scales
        return float(np.float32(recency * pool.used[name][1] + saving * self.saved_s_per_byte(pool, name)))

    def saved_s_per_byte(self, pool: Blocks, name: Hashable) -> float:
        pages = self.depth_of[name[1]]
        attention_s = pages * (pages * self.attention_s_per_page2)
        state_s = pages * self.state_s_per_page
        if pool is self.ssm:
            return state_s / pool.block_bytes
        return (attention_s + (state_s if name in self.ssm.at else 0.0)) / pool.block_bytes

    def turn_epoch(self) -> None:
        self.epoch_end_s += self.config.eviction_epoch_s
        for pool in (self.kv, self.ssm):
            names = list(pool.cached)
            used_s = [pool.used[name][1] for name in names]
            saved = [self.saved_s_per_byte(pool, name) for name in names]
            span_s, range_of_saved = (max(v) - min(v) if names else 0.0 for v in (used_s, saved))
            pool.scales = (
                1.0 / span_s if span_s > 0 else 0.0,
                self.config.flop_weight / range_of_saved if range_of_saved > 0 else 0.0,
            )
            pool.forget_old_hits()

    # --- prefill and snapshots

    def depths_to_save(self, job: Job) -> list[int]:
        """Of pages, after which the prompt's state is saved: the branch point, the last boundary, and what retention
        asks for."""
        last = self.boundary(job)
        return sorted({job.branch, last} | self.retention.depths_to_save(job, last))

    def boundary(self, job: Job) -> int:
        return min(job.goal // self.page, len(job.ids))

    def snapshots_on_path(self, job: Job) -> set[int]:
        return {depth for depth, i in enumerate(job.ids, 1) if ("id", i) in self.ssm.at}

    def drop_superseded(self, job: Job, depth: int) -> None:
        held = {d for d, i in enumerate(job.ids, 1) if ("id", i) in self.ssm.pins}
        for i in self.retention.dropped(job, depth, self.boundary(job), self.snapshots_on_path(job), held):
            self.ssm.free(("id", i))
            self.marginals.forget(i)

    def next_stop(self, job: Job) -> int:
        stops = [depth * self.page for depth in self.depths_to_save(job) if self.config.engine.snapshots_end_chunks]
        return next((stop for stop in stops if stop > job.computed), job.goal)

    def publish(self, job: Job, tokens: int) -> None:
        while job.published < min(tokens // self.page, len(job.ids)):
            private, name = (job.row, job.published), ("id", job.ids[job.published])
            if name in self.kv.at:
                self.kv.free(private)
                self.kv.pin(name)
            else:
                self.kv.rename(private, name)
                self.seen.add(name[1])
                self.marginals.forget(name[1])
                self.retention.publish(name[1], job.ids[job.published - 1] if job.published else None)
            job.published += 1

    def apply_chunk(self, job: Job, chunk: int) -> None:
        before = job.computed // self.page
        job.computed += chunk
        self.publish(job, job.computed)
        for depth in self.depths_to_save(job):
            if before < depth <= job.computed // self.page:
                self.save_prefill_snapshot(job, depth)
        if job.computed < job.goal:
            return
        if job.first_token_s is None:
            job.first_token_s = self.now_s
            if (self.now_s - job.arrival_s) / job.slo_s > 1.0:
                self.miss(job)
        job.generated += 1
        self.prefilling.remove(job)
        self.decoding.append(job)
        job.status = "decoding"
        if job.generated == job.output:
            self.finish(job)

    def save_prefill_snapshot(self, job: Job, depth: int) -> None:
        name = ("id", job.ids[depth - 1])
        if name in self.ssm.at:
            self.ssm.meet_again(name)
            self.drop_superseded(job, depth)
        elif self.take_slot(name):
            self.ssm.unpin(name)
            self.drop_superseded(job, depth)
            self.saved()
        elif self.spr > 1:
            self.save_in_reserved(job, depth)
        else:
            self.totals.skipped_snapshots += 1

    def save_in_reserved(self, job: Job, depth: int) -> None:
        job.reserved_depth = depth
        self.saved()

    def saved(self) -> None:
        self.totals.saved_snapshots += 1
        self.debt_s += self.cost.slot_copy_s

    def decode_snapshot_due(self, job: Job) -> bool:
        """Is this the last page boundary at or before input + n * decode_snapshot_tokens for some n >= 1?"""
        if self.spr == 1 or job.context % self.page:
            return False
        every = self.config.decode_snapshot_tokens
        periods = -(-(job.context - job.input) // every)
        return periods >= 1 and job.context > job.input + periods * every - self.page

    # --- the end

    def tokens_of(self, job: Job) -> int:
        return job.context if job.status == "decoding" else job.computed

    def give_back(self, job: Job) -> None:
        (self.decoding if job.status == "decoding" else self.prefilling).remove(job)
        self.publish(job, self.tokens_of(job))
        for j in range(job.published, job.pages):
            self.kv.free((job.row, j))
        if 0 < job.reserved_depth <= job.published:
            name = ("id", job.ids[job.reserved_depth - 1])
            if name in self.ssm.at:
                self.ssm.meet_again(name)
            else:
                self.ssm.rename((job.row, RESERVED), name)
                self.ssm.unpin(name)
            self.drop_superseded(job, job.reserved_depth)
        for name in [name for name in self.ssm.pins if name[0] == job.row]:
            self.ssm.free(name)
        for i in reversed(job.ids[: job.published]):
            self.kv.unpin(("id", i))
        job.published = job.pages = job.reserved_depth = 0
        self.head_waits = False
        self.pins.bound()
        self.go_on_shrinking()

    def finish(self, job: Job) -> None:
        tokens = self.tokens_of(job)
        self.give_back(job)
        self.pins.end_turn(job, tokens)
        job.status, job.ended_s = "finished", self.now_s
        self.ends.append(job.row)
        self.orders.lengths.append(job.output)
        slow = job.output > 1 and (self.now_s - job.first_token_s) / (job.output - 1) > self.tpot_slo_s
        if slow or job.missed:
            self.miss(job)
        else:
            self.totals.met += 1
        self.release_followers(job)

    def reject(self, job: Job, reason: str, at_s: float) -> None:
        job.status, job.reason, job.ended_s = "rejected", reason, at_s
        self.host.tokens.pop(job, None)
        self.ends.append(job.row)
        self.miss(job)
        self.release_followers(job)

    def miss(self, job: Job) -> None:
        self.totals.missed += not job.missed
        job.missed = True

    # --- growth and preemption

    def grow_decoding(self) -> bool:
        preempted = False
        while True:
            needy = next((job for job in self.decoding if job.pages * self.page == job.context), None)
            if needy is None:
                return preempted
            if self.rule == "migrate":
                self.head_waits = False  # a page taken may tip a threshold or end the throttle
            if not self.extend(needy) and not (self.migrates("kv", 0, 1, needy.pages + 1) and self.extend(needy)):
                preempted |= self.make_room(needy)

    def extend(self, needy: Job) -> bool:
        while True:
            self.float_to(0, 1)
            if self.grow(needy, self.kv.capacity):
                return True
            if not self.pins.gives_way():
                return False

    def make_room(self, needy: Job) -> bool:
        victim = self.youngest_that_may_go()
        if victim is None:
            self.give_back(needy)
            self.reject(needy, "does_not_fit", self.now_s)
            return False
        self.preempt(victim)
        return True

    def preempt_for_split(self) -> None:
        """Nobody is waited for: whoever does not fit the split that was asked for goes, the youngest first."""
        self.pins.bound()
        while len(self.kv.pins) > self.kv.limit or len(self.ssm.pins) > self.ssm.limit:
            victim = self.youngest_that_may_go()
            if victim is None:
                break
            self.preempt(victim)

    def youngest_that_may_go(self) -> Job | None:
        running = self.prefilling + self.decoding
        victims = [job for job in running if job.preemptions < self.config.max_preemptions]
        victim = max(victims, key=age, default=None)
        return None if victim is min(running, key=age, default=None) else victim

    def preempt(self, victim: Job) -> None:
        self.host.take(victim, self.tokens_of(victim))
        self.give_back(victim)
        victim.status, victim.goal, victim.computed = "waiting", victim.input + victim.generated, 0
        victim.waits_since_s = self.now_s
        victim.preemptions += 1
        self.totals.preemptions += 1
        self.queue.insert(0, victim)
        self.head_waits = False
        self.blocked_on = "kv"

    # --- shortage

    def lacking(self, slots: int, pages: int, in_all: int) -> str | None:
        live_slots, live_pages = len(self.ssm.pins) + slots, len(self.kv.pins) + pages
        if self.in_one_buffer:
            if self.holding(live_slots, live_pages):
                return None
            return "ssm" if slots * self.layout.slot_bytes > in_all * self.layout.page_bytes else "kv"
        if live_slots > self.ssm.limit:
            return "ssm"
        return "kv" if live_pages > self.kv.limit else None

    def holding(self, slots: int, pages: int) -> range | None:
        """The slot counts of all splits with room for so many blocks, None if there are none."""
        counts = [
            k
            for k in range(max(slots, self.layout.min_slots), self.layout.max_slots + 1)
            if self.layout.pages(k) >= pages
        ]
        return range(counts[0], counts[-1] + 1) if counts else None

    def migrates(self, lacking: str, slots: int, pages: int, in_all: int) -> bool:
        """AVMP: may chunks of the other pool come at once, and do they? By price, whoever grows asks as well."""
        if self.rule == "priced":
            found = self.split_after_cross(lacking, slots, pages, pages)
            if found is None or not self.may_migrate:
                return False
            self.pay_for_split(found)
            return True
        if self.rule != "migrate" or not self.may_migrate or self.kv.chunks != self.kv.target:
            return False
        short, other = (self.kv, self.ssm) if lacking == "kv" else (self.ssm, self.kv)
        rule = self.migrate
        if lacking == "ssm" or in_all <= self.kv.capacity:
            if self.migrated_after is not None and self.taken - self.migrated_after < rule.interval_ops:
                return False
            if not short.headroom < rule.low or not other.headroom > rule.high:
                return False
        found = self.holding(len(self.ssm.pins) + slots, len(self.kv.pins) + pages)
        if found is None:
            return False
        # The split within reach that gives most, up to the batch.
        sign = 1 if lacking == "ssm" else -1
        wanted = self.ssm.holds(max(self.ssm.chunks + sign * rule.chunks, 0))
        self.pay_for_split(min(max(wanted, found[0]), found[-1]))
        return True

    def pay_for_split(self, slots: int) -> None:
        copied, moved = self.change_split_now(slots)
        self.debt_s += moved * self.config.chunk_move_s + copied * self.cost.block_copy_s_per_byte
        self.may_migrate, self.migrated_after = False, self.taken

    # --- by price

    def waits_by_price(self, job: Job, own: list[Hashable], new_pages: int) -> str | None:
        """HiMA's Admitter: the pool that the head waits for, None when it gets in."""
        kv, ssm, action_s, plans = self.kv, self.ssm, {}, {}
        take = -(-job.goal // self.page) - len(own)
        out = self.out_for(self.spr, take, ssm.limit, kv.limit)
        if out == (0, 0):
            self.totals.actions["own_free"] += 1
            return None
        lacking = [pool for pool, blocks, count in (("ssm", ssm, self.spr), ("kv", kv, new_pages))
                   if len(blocks.pins) + count > blocks.limit]  # fmt: skip
        short = lacking[0] if lacking else None
        if not lacking:
            states_s, pages_s = self.losses_s(*out, own)
            action_s["own_evict"], plans["own_evict"] = states_s + pages_s, (*out, None)
            short = "ssm" if states_s > pages_s else "kv"
        found = self.split_after_cross(short, self.spr, new_pages, take) if len(lacking) < 2 else None
        if found is not None and action_s.get("own_evict") != 0.0:
            moved = abs(self.layout.kv_chunks(found) - kv.chunks)
            limits = ssm.holds(self.layout.chunks - self.layout.kv_chunks(found)), self.layout.pages(found)
            away = self.out_for(self.spr, take, *limits)
            source, needs = (kv, take) if short == "ssm" else (ssm, self.spr)
            free = max(source.limit - len(source.at) - needs, 0) * source.block_bytes
            worth_s = self.priced.horizon_s * self.curvature / 2 * min(moved * self.layout.chunk_bytes, free) ** 2
            action = "cross_evict" if any(away) else "cross_free"
            action_s[action] = sum(self.losses_s(*away, own)) + (moved * self.config.chunk_move_s + worth_s)
            plans[action] = (*away, found)
        busy = self.decoding or self.prefilling or kv.chunks != kv.target
        if action_s and busy and job.deferrals < self.priced.max_deferrals:
            lasts_s = self.totals.busy_s / max(sum(job.status == "finished" for job in self.jobs), 1)
            action_s["defer"] = len(self.queue) * (lasts_s if self.deferral_weight is None else self.deferral_weight)
        action = min(action_s, key=lambda name: (action_s[name], ACTION_NAMES.index(name)), default="no_choice")
        if action.startswith("cross") and not self.may_migrate:
            return short
        if len(action_s) > 1:
            first_s, second_s = sorted(action_s.values())[:2]
            self.totals.ratios.append(second_s / first_s if first_s else math.inf)
        self.totals.actions[action] += 1
        job.deferrals += action == "defer"
        if action in plans:
            self.chosen = plans[action]
            return None
        return short

    def out_for(self, slots: int, pages: int, slot_limit: int, page_limit: int) -> tuple[int, int]:
        """Snapshots and pages that have to go before so many slots and pages are taken."""
        return max(len(self.ssm.at) + slots - slot_limit, 0), max(len(self.kv.at) + pages - page_limit, 0)

    def do_as_chosen(self) -> None:
        states, pages, split = self.chosen
        self.chosen = (0, 0, None)
        for _ in range(states):
            if self.ssm.cached:
                self.evict_snapshot()
        for _ in range(pages):
            self.evict_page()
        if split is not None:
            self.pay_for_split(split)

    def split_after_cross(self, failing: str, slots: int, pages: int, take: int) -> int | None:
        """Slots of the split that moves least and has room for all that is cached as well; if none has, of the one that
        moves most."""
        possible = self.holding(len(self.ssm.pins) + slots, len(self.kv.pins) + pages) or ()
        if self.kv.chunks != self.kv.target:
            return None
        if failing == "kv":
            nearest_first = [k for k in reversed(possible) if self.layout.kv_chunks(k) > self.kv.chunks]
            ample = [k for k in nearest_first if self.layout.pages(k) >= len(self.kv.at) + take]
        else:
            nearest_first = [k for k in possible if self.layout.kv_chunks(k) < self.kv.chunks]
            ample = [k for k in nearest_first if k >= len(self.ssm.at) + slots]
        return (ample or nearest_first[-1:] or [None])[0]

    def losses_s(self, states: int, pages: int, own: list[Hashable]) -> tuple[float, float]:
        """What would be lost: found by evicting so many from copies, the states first."""
        kept, states_s, pages_s = (self.kv, self.ssm), 0.0, 0.0
        self.kv, self.ssm = self.kv.copy(), self.ssm.copy()
        for name in own:
            self.kv.pin(name)
        if own:
            self.ssm.pin(own[-1])
        for _ in range(states):
            name = self.victim(self.ssm) if self.ssm.cached else own[-1]
            states_s += self.loss_s(self.ssm, name)
            self.ssm.free(name)
        for _ in range(pages):
            name = self.victim(self.kv)
            pages_s += self.loss_s(self.kv, name)
            if name in self.ssm.at:
                pages_s += self.loss_s(self.ssm, name)
            self.evict_page()
        self.kv, self.ssm = kept
        return states_s, pages_s

    def loss_s(self, pool: Blocks, name: Hashable) -> float:
        """Expected hits x seconds of recovery."""
        hits, depth = 1.0, self.depth_of[name[1]]
        if self.config.policies.eviction != "lru":
            counted_over_s = 2 * self.config.eviction_epoch_s - (self.epoch_end_s - self.now_s)
            hits = (1 + sum(pool.hits.get(name, (0, 0)))) * (self.priced.horizon_s / counted_over_s)
        if pool is self.ssm:
            return hits * depth * self.state_s_per_page
        return hits * self.attention_s_per_page2 * (depth**2 - (depth - 1) ** 2)

    def float_to(self, slots: int, pages: int) -> None:
        """One buffer: room from whatever is free, else from cached pages, else from snapshots."""
        live_slots, live_pages = len(self.ssm.pins) + slots, len(self.kv.pins) + pages
        if not self.in_one_buffer or not self.holding(live_slots, live_pages):
            return
        while len(self.ssm.at) + slots > self.ssm.capacity or len(self.kv.at) + pages > self.kv.capacity:
            if found := self.holding(len(self.ssm.at) + slots, len(self.kv.at) + pages):
                copied, _ = self.change_split_now(min(max(self.ssm.capacity, found[0]), found[-1]))
                self.debt_s += copied * self.cost.block_copy_s_per_byte
            elif self.page_makes_way(slots, pages):
                self.evict_page()
            else:
                self.evict_snapshot()

    def page_makes_way(self, slots: int, pages: int) -> bool:
        if self.rule == "float":
            return bool(self.kv.cached and (pages or self.holding(len(self.ssm.at) + slots, len(self.kv.pins))))
        return page_was_used_first(
            *((pool, self.victim(pool) if pool.cached else None) for pool in (self.kv, self.ssm))
        )

    def change_split_now(self, slots: int) -> tuple[int, int]:
        """(bytes copied, chunks moved)"""
        self.requested_slots = slots
        self.kv.target = self.layout.kv_chunks(slots)
        self.ssm.target = self.layout.chunks - self.kv.target
        while len(self.ssm.at) > self.ssm.limit:
            self.evict_snapshot()
        while len(self.kv.at) > self.kv.limit:
            self.evict_page()
        donor, recipient = (self.kv, self.ssm) if self.kv.chunks > self.kv.target else (self.ssm, self.kv)
        copied = donor.clear_from(donor.holds(donor.target)) * donor.block_bytes
        moved = donor.chunks - donor.target
        donor.chunks, recipient.chunks = donor.target, recipient.target
        self.totals.moved_chunks += moved
        self.totals.relocated_bytes += copied
        return copied, moved

    # --- resize

    def request_split(self, kv_share: float) -> None:
        if self.in_one_buffer:
            return
        slots = self.layout.slots(kv_share)
        if slots == self.requested_slots:
            return
        self.requested_slots = slots
        self.kv.target = self.layout.kv_chunks(slots)
        self.ssm.target = self.layout.chunks - self.kv.target
        self.head_waits = False
        self.take_back_those_aside()
        donor = self.kv if self.kv.chunks > self.kv.target else self.ssm
        if donor.chunks == donor.target or donor is not self.under_way[0]:
            self.tick_s = NEVER
        self.go_on_shrinking()
        self.pins.bound()

    def take_back_those_aside(self) -> None:
        fit = [job for job in self.aside if self.most_pages(job) <= self.kv.limit]
        self.aside = [job for job in self.aside if job not in fit]
        self.queue = fit + self.queue

    def go_on_shrinking(self) -> None:
        while len(self.ssm.at) > self.ssm.limit and self.ssm.cached:
            self.evict_snapshot()
        while len(self.kv.at) > self.kv.limit and self.kv.cached:
            self.evict_page()
        self.schedule_run()

    def next_run(self) -> tuple[Blocks, int]:
        donor = self.kv if self.kv.chunks > self.kv.target else self.ssm
        if donor is self.kv and len(donor.pins) > donor.limit:
            return donor, 0
        in_use = -(-len(donor.at) * donor.block_bytes // donor.chunk_bytes)
        return donor, min(max(donor.chunks - max(donor.target, in_use), 0), RUN_CHUNKS)

    def schedule_run(self, start_s: float | None = None) -> None:
        if self.tick_s == NEVER and self.kv.chunks != self.kv.target:
            donor, count = self.next_run()
            if count:
                start_s = self.now_s if start_s is None else start_s
                self.under_way = donor, count
                self.tick_s = max(start_s, self.worker_free_s) + count * self.worker_chunk_s

    def chunks_arrive(self) -> None:
        due_s, self.tick_s = self.tick_s, NEVER
        donor, movable = self.next_run()
        count = min(movable, self.under_way[1])
        copied = donor.clear_from(donor.holds(donor.chunks - count)) * donor.block_bytes
        donor.chunks -= count
        (self.ssm if donor is self.kv else self.kv).chunks += count
        self.head_waits = False
        self.take_back_those_aside()
        self.totals.moved_chunks += count
        self.totals.relocated_bytes += copied
        copy_s = copied * self.cost.block_copy_s_per_byte
        stalls = self.config.transfers != "overlapped"
        self.worker_free_s = due_s + (0.0 if stalls else copy_s)
        self.schedule_run(due_s)
        if stalls:
            self.debt_s += count * self.config.chunk_move_s + copy_s


def _leading(flags) -> int:
    """How many leading flags are true."""
    count = 0
    for flag in flags:
        if not flag:
            break
        count += 1
    return count
