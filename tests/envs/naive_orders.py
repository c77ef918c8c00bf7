"""The orders of admission once more, in plain Python: what they say of a naive engine and its waiting jobs."""

import math
from collections import deque

LPM_LIMIT, HISTORY, ENOUGH = 128, 200, 10


class Orders:
    """Who is next of an engine's queue, and whether the forecast lets it in."""

    def __init__(self, engine):
        self.engine, self.config = engine, engine.config
        self.rule = self.config.policies.admission
        self.most_long = self.config.max_long_prefills or math.inf
        self.changes = self.rule in ("lpm", "slo") or self.most_long < math.inf
        self.reorder_s = math.inf
        self.lengths = deque(maxlen=HISTORY)
        self.refused = False

    def bring_next_first(self) -> bool:
        """Put whoever is next at the queue's head; False when nobody may be."""
        engine = self.engine
        self.reorder_s = math.inf
        long_ones = sum(self.is_long(job, job.computed) for job in engine.prefilling)
        allowed = [
            job
            for job in engine.queue
            if long_ones < self.most_long or not self.is_long(job, self.reusable_tokens(job))
        ]
        if not allowed:
            return False
        # All of them are looked at, since each may change its place.
        places = {id(job): self.place(job) for job in allowed}
        first = min(allowed, key=lambda job: places[id(job)])
        engine.queue.remove(first)
        engine.queue.insert(0, first)
        return True

    def reusable_tokens(self, job) -> int:
        if on_host := self.engine.host.tokens.get(job):
            return on_host
        names = [("id", i) for i in job.ids[: (job.goal - 1) // self.engine.page]]
        found = 0
        for depth, name in enumerate(names, 1):
            if name not in self.engine.kv.at:
                break
            if name in self.engine.ssm.at:
                found = depth
        return found * self.engine.page

    def is_long(self, job, done: int) -> bool:
        return job.goal - done > self.config.long_prefill_tokens

    def place(self, job) -> tuple:
        age = job.arrival_s, job.row
        if job.preemptions:
            return (0, *age)
        if self.rule != "slo":
            matched = self.rule == "lpm" and len(self.engine.queue) <= LPM_LIMIT
            return (1, -self.reusable_tokens(job) if matched else 0, *age)
        aged_s = job.arrival_s + self.config.deadline_slos * job.slo_s / 2
        if self.engine.now_s >= aged_s:
            return (1, *age)
        start_by_s = job.arrival_s + job.slo_s - self.prefill_s(job)
        if self.engine.now_s >= start_by_s:
            self.reorder_s = min(self.reorder_s, aged_s)
            return (3, *age)
        self.reorder_s = min(self.reorder_s, aged_s, start_by_s)
        return (2, start_by_s, *age)

    def prefill_s(self, job) -> float:
        pages, reused = -(-job.goal // self.engine.page), self.reusable_tokens(job) // self.engine.page
        attention_s = self.engine.attention_s_per_page2 * (pages**2 - reused**2)
        return attention_s + (pages - reused) * self.engine.state_s_per_page

    # --- the forecast

    def expected(self, job) -> int:
        """Tokens of the whole answer."""
        if len(self.lengths) < ENOUGH:
            return job.output
        longer = [length for length in self.lengths if length > job.generated]
        return math.ceil(sum(longer) / len(longer)) if longer else 2 * job.generated

    def peak_fits(self, head, reused: list, needed: int) -> bool:
        """Step by step: will the running jobs and the head, which reuses the pages of these names, ever lack room?"""
        engine = self.engine
        running = engine.prefilling + engine.decoding
        if not running:
            return True
        left, tokens, pages, own = {}, {}, {}, {}
        for job in [*running, head]:
            decodes = job in engine.decoding
            left[job] = self.expected(job) - job.generated - (not decodes)
            tokens[job] = job.context if decodes else job.goal
            pages[job] = -(-job.goal // engine.page) if job is head else job.pages
            names = [("id", i) for i in job.ids[: job.published]]
            shared = sum(engine.kv.pins[name] > 1 or name in reused for name in names)
            own[job] = needed if job is head else job.pages - shared
        for step in range(max(left.values()) + 1):
            there = [job for job in left if left[job] >= step]
            gone = [job for job in left if left[job] < step]
            grown = sum(max(-(-(tokens[job] + step) // engine.page) - pages[job], 0) for job in there)
            slots = engine.spr * (1 - len(gone))
            pages_more = needed + grown - sum(own[job] for job in gone)
            if engine.lacking(slots, pages_more, pages_more):
                return False
        return True
