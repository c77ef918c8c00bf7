"""Session pins and preemption by copying out once more, for the naive engine."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.envs.naive_engine import Job, NaiveEngine

BINS_S = [0.05 * 2 ** (i / 2) for i in range(25)]


class Pins:
    """What finished turns keep: turn by turn, its pages, its snapshot and the time at which that ends."""

    def __init__(self, engine: "NaiveEngine"):
        self.engine = engine
        self.acts = engine.config.policies.pin == "ttl"
        self.ends_s: dict[Job, float] = {}
        self.left: dict[Job, int] = {}
        self.follows: dict[Job, Job] = {}
        self.think_s: dict[Job, float] = {}
        self.taken = self.used = self.given_up = 0

    def next_end_s(self) -> float:
        return min(self.ends_s.values(), default=math.inf)

    def note(self, ended: "Job", follower: "Job") -> None:
        """Does a row that needs `ended` go on from what that left?"""
        pages = self.left.get(ended, 0)
        if pages and follower.ids[:pages] == ended.ids[:pages]:
            self.follows[follower] = ended

    def see(self, job: "Job") -> None:
        """A request has come."""
        if (before := self.follows.get(job)) is not None:
            self.think_s.setdefault(before, job.arrival_s - before.ended_s)

    def end_turn(self, job: "Job", tokens: int) -> None:
        if not self.acts:
            return
        names = [("id", i) for i in job.ids[: tokens // self.engine.page]]
        while names and not (names[-1] in self.engine.ssm.at and all(name in self.engine.kv.at for name in names)):
            names.pop()
        if not names:
            return
        self.left[job] = len(names)
        if not (ttl_s := self.time_to_live_s(tokens // self.engine.page)):
            return
        self.end_under(job, len(names))
        for name in names:
            self.engine.kv.pin(name)
        self.engine.ssm.pin(names[-1])
        self.ends_s[job] = self.engine.now_s + ttl_s
        self.taken += 1
        self.bound()

    def time_to_live_s(self, pages: int) -> float:
        cost, layout, turns = self.engine.cost, self.engine.layout, len(self.left)
        tokens = pages * self.engine.page
        gain_s = float(tokens * cost.prefill_s_per_token + tokens * tokens / 2 * cost.attention_s_per_pair)
        share = (pages * layout.page_bytes + layout.slot_bytes) / layout.budget_bytes
        waiting = len(self.engine.queue) + len(self.engine.aside)

        parts = [sum(think_s <= end_s for think_s in self.think_s.values()) / turns for end_s in BINS_S]
        best_s, most = 0.0, 0.0
        for i, end_s in enumerate(BINS_S):
            steps = zip([0.0, *BINS_S[:i]], BINS_S[: i + 1], [0.0, *parts[:i]], strict=True)
            held_s = sum((end - begin) * (1 - part) for begin, end, part in steps)
            worth_s = gain_s * parts[i] - self.engine.config.pin_price * share * (1 + waiting) * held_s
            if worth_s > most + 1e-12:
                best_s, most = end_s, worth_s
        return best_s

    def end_due(self) -> None:
        while self.next_end_s() <= self.engine.now_s:
            self.end(self.first())

    def first(self) -> "Job":
        return min(self.ends_s, key=lambda job: (self.ends_s[job], job.row))

    def end_under(self, job: "Job", pages: int) -> int:
        """Let go of what is kept under a row's leading pages; how many pins that were."""
        kept = {other: other.ids[: self.left[other]] for other in self.ends_s}
        under = [other for other, ids in kept.items() if ids == job.ids[: min(len(ids), pages)]]
        for other in under:
            self.end(other)
        return len(under)

    def end(self, job: "Job") -> None:
        del self.ends_s[job]
        names = [("id", i) for i in job.ids[: self.left[job]]]
        self.engine.ssm.unpin(names[-1])
        for name in reversed(names):
            self.engine.kv.unpin(name)
        self.engine.head_waits = False

    def gives_way(self) -> bool:
        """To whoever needs room; False when nothing is kept."""
        if not self.ends_s:
            return False
        self.end(self.first())
        self.given_up += 1
        return True

    def bound(self) -> None:
        kv, ssm, gave_way = self.engine.kv, self.engine.ssm, False
        while self.ends_s and (
            len(kv.pins) > kv.limit
            or len(ssm.pins) > ssm.limit
            or 2 * len(self.ends_s) > ssm.limit
            or 2 * sum(self.left[job] for job in self.ends_s) > kv.limit
        ):
            gave_way = self.gives_way()
        if gave_way:
            self.engine.go_on_shrinking()


class Host:
    """Host memory for preempted requests: tokens by request."""

    def __init__(self, engine: "NaiveEngine"):
        self.engine = engine
        acts = engine.config.policies.preemption == "offload"
        self.limit = int(engine.config.host_gib * 2**30) if acts else 0
        self.tokens: dict[Job, int] = {}
        self.copies = self.bytes_out = self.bytes_back = 0

    def size(self, tokens: int) -> int:
        return -(-tokens // self.engine.page) * self.engine.layout.page_bytes + self.engine.layout.slot_bytes

    @property
    def used(self) -> int:
        return sum(map(self.size, self.tokens.values()))

    def take(self, job: "Job", tokens: int) -> None:
        if tokens and self.used + self.size(tokens) <= self.limit:
            self.tokens[job] = tokens
            self.copies += 1
            self.bytes_out += self.size(tokens)
            self.engine.debt_s += self.size(tokens) * self.engine.cost.host_copy_s_per_byte

    def give_back(self, job: "Job", resident: int) -> int:
        """Copy what is not resident; the tokens that are computed then."""
        tokens = self.tokens.pop(job)
        missing = self.size(tokens) - resident * self.engine.layout.page_bytes
        self.bytes_back += missing
        self.engine.debt_s += missing * self.engine.cost.host_copy_s_per_byte
        return tokens
