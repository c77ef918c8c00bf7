"""A hybrid prefix cache in plain Python: this engine's rules, and SGLang's where a switch says so.

Only what decides reuse: no clock, requests start and finish when the caller says so. Pages are known by their ids,
which are prefix-chained; a state is known by the page at whose end it stands.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import count

from hbmgym.eval.sglang_cache.cases import Case
from hbmgym.eval.sglang_cache.sequence import PAGE_TOKENS, Request

DECODE_SNAPSHOT_TOKENS = 256


@dataclass(frozen=True)
class Rules:
    """What SGLang does and this engine does not."""

    whole_nodes: bool = False
    """KV is evicted by radix nodes, which end where a request ended or parted; else page by page, deepest first."""
    leaves_go_whole: bool = False
    """A state that is evicted at a leaf takes the leaf's pages along."""
    tail_is_freed: bool = False
    """Pages behind the last saved state are freed, not kept, and without a new state nothing counts as used again."""
    one_state_per_chunk: bool = False
    """The chunk of a branch point saves the branch instead of its own end."""
    chunk_by_chunk: bool = False
    """Every chunk takes its own pages and saves a state; else pages at admission, a state at the prompt's end."""
    absolute_grid: bool = False
    """Decode states stand at multiples of 256 tokens of the text, not 256 output tokens apart."""
    last_token_saves: bool = False
    """A decode state that is due with the last token is saved."""
    private_text_ages: bool = False
    """Generated text that no later request repeats is evicted in its turn, not first."""
    spare_page: bool = False
    """Every allocation makes room for one page more than it takes."""
    states_are_locked: bool = False
    """The state that a running request started from or saved last is not evicted."""
    slot_before_look: bool = False
    """A prompt's state takes its slot before it is known that the state is there already."""
    split_refreshes: bool = False
    """When a request parts from a node's middle, what lies behind in the node counts as used."""


SGLANG = Rules(**{field.name: True for field in fields(Rules)})


def serve(case: Case, order: Sequence[int], rules: Rules, keeps_all: bool = True) -> list[int]:
    """Prompt tokens that each request reuses; `order` names every request where it starts and where it ends.

    `keeps_all`: no state goes before it is evicted; else only junctions stay before the last prompt's boundary.
    """
    cache = PlainCache(case.slots, case.pages, case.prefill_budget, rules, keeps_all)
    running: dict[int, Run] = {}
    reused = [0] * len(case.requests)
    for row in order:
        if row in running:
            cache.finish(running.pop(row))
        else:
            running[row] = cache.start(case.requests[row])
            reused[row] = running[row].reused * PAGE_TOKENS
    return reused


@dataclass(eq=False)
class Run:
    """A running request."""

    request: Request
    ids: tuple[int, ...]
    reused: int
    """Pages."""
    inserted: int
    """Leading pages that are in the cache, and locked."""
    pages: int
    """Inserted and own."""
    state: int | None
    """Page of the state that it started from or saved last."""


class PlainCache:
    """So many slots and pages; two slots for each running request."""

    def __init__(self, slots: int, pages: int, prefill_budget: int, rules: Rules, keeps_all: bool):
        self.slots, self.pages, self.prefill_budget, self.rules = slots, pages, prefill_budget, rules
        self.keeps_all = keeps_all
        self.first_child: dict[int, int] = {}
        self.junctions: set[int] = set()
        self.used_at: dict[int, int] = {}  # of each cached page
        self.before: dict[int, int | None] = {}
        self.children: dict[int, int] = {}
        self.node_ends: set[int] = set()
        self.states: dict[int, None] = {}  # least recently used first
        self.runs: list[Run] = []
        self._clock = count()
        self._private = count(2**40)

    # --- a request

    def start(self, request: Request) -> Run:
        """Match, take memory, prefill."""
        ids = self._page_ids(request)
        most = (request.prompt_tokens - 1) // PAGE_TOKENS  # at least the last token is recomputed
        matched = _leading(page in self.used_at for page in ids[:most])
        reused = max((j for j in range(1, matched + 1) if ids[j - 1] in self.states), default=0)
        run = Run(request, ids, reused, reused, reused, ids[reused - 1] if reused else None)
        if matched:
            self._end_node(ids[matched - 1])
        if run.state is not None:
            self._touch_state(run.state)
        self._touch(ids[:reused])
        self._take_slots(run)
        self._prefill(run, matched if matched > reused else 0)
        return run

    def _page_ids(self, request: Request) -> tuple[int, ...]:
        """Of the pages that will be full: the last output token is never computed."""
        full = (request.prompt_tokens + request.output_tokens - 1) // PAGE_TOKENS
        ids = request.pages[:full]
        if self.rules.private_text_ages:
            ids += tuple(next(self._private) for _ in range(full - len(ids)))
        return ids

    def _take_slots(self, run: Run) -> None:
        self.runs.append(run)
        own = run.state is not None and list(self.states) == [run.state] and not self.rules.states_are_locked
        if own and self._free_slots() < 0:
            self.states.clear()  # the request goes on in the slot of the state that it reuses
        self._make_slots(0)

    def _prefill(self, run: Run, branch: int) -> None:
        prompt = run.request.prompt_tokens
        step = self.prefill_budget if self.rules.chunk_by_chunk else prompt
        for begin in range(run.reused * PAGE_TOKENS, prompt, step):
            end = min(begin + step, prompt)
            self._take_pages(run, -(-end // PAGE_TOKENS))
            for depth in self._saved_depths(run, begin // PAGE_TOKENS, end // PAGE_TOKENS, branch):
                self._insert(run, depth)
                self._save(run.ids[depth - 1])
                run.state = run.ids[depth - 1]
                self._drop_superseded(run, depth)

    def _saved_depths(self, run: Run, begin: int, end: int, branch: int) -> list[int]:
        end = min(end, len(run.ids))
        depths = {end} if end > begin else set()
        if begin < branch <= end:
            depths = {branch} if self.rules.one_state_per_chunk else depths | {branch}
        return sorted(depths)

    def finish(self, run: Run) -> None:
        """Decode and give back."""
        request = run.request
        computed = request.prompt_tokens + request.output_tokens - 1
        saved = 0
        for tokens in range(request.prompt_tokens + 1, computed + 1):
            self._take_pages(run, -(-tokens // PAGE_TOKENS))
            if self._decode_state_due(request, tokens) and (tokens < computed or self.rules.last_token_saves):
                saved = tokens // PAGE_TOKENS
        if not self.rules.tail_is_freed:
            self._insert(run, min(computed // PAGE_TOKENS, len(run.ids)))
        if 0 < saved <= len(run.ids):
            self._insert(run, saved)
        self.runs.remove(run)
        if 0 < saved <= len(run.ids):
            self._touch_state(run.ids[saved - 1])
            self._drop_superseded(run, saved)

    def _drop_superseded(self, run: Run, depth: int) -> None:
        boundary = min(run.request.prompt_tokens // PAGE_TOKENS, len(run.ids))
        if not self.keeps_all and depth >= boundary:
            for page in set(run.ids[: boundary - 1]) - self.junctions:
                self.states.pop(page, None)

    def _decode_state_due(self, request: Request, tokens: int) -> bool:
        if self.rules.absolute_grid:
            return tokens % DECODE_SNAPSHOT_TOKENS == 0
        into = (tokens - request.prompt_tokens - 1) % DECODE_SNAPSHOT_TOKENS
        return tokens % PAGE_TOKENS == 0 and into >= DECODE_SNAPSHOT_TOKENS - PAGE_TOKENS

    # --- states

    def _save(self, page: int) -> None:
        if page not in self.states or self.rules.slot_before_look:
            self._make_slots(1)
        self._touch_state(page)

    def _touch_state(self, page: int) -> None:
        self.states.pop(page, None)
        self.states[page] = None

    def _free_slots(self) -> int:
        return self.slots - 2 * len(self.runs) - len(self.states)

    def _make_slots(self, wanted: int) -> None:
        while self._free_slots() < wanted:
            locked = {run.state for run in self.runs} if self.rules.states_are_locked else set()
            page = next(page for page in self.states if page not in locked)
            if self.rules.leaves_go_whole and page in self._leaves():
                self._evict_leaf(page, whole_node=True)
            else:
                del self.states[page]

    # --- pages

    def _take_pages(self, run: Run, wanted: int) -> None:
        spare = int(self.rules.spare_page)
        while self._free_pages() < max(wanted - run.pages, 0) + spare:
            oldest = min(self._leaves(), key=self.used_at.__getitem__)
            self._evict_leaf(oldest, self.rules.whole_nodes)
        run.pages = max(run.pages, wanted)

    def _free_pages(self) -> int:
        return self.pages - len(self.used_at) - sum(run.pages - run.inserted for run in self.runs)

    def _leaves(self) -> list[int]:
        locked = {page for run in self.runs for page in run.ids[: run.inserted]}
        return [page for page in self.used_at if not self.children[page] and page not in locked]

    def _evict_leaf(self, page: int, whole_node: bool) -> None:
        self._evict_page(page)
        above = self.before[page]
        if whole_node and above is not None and above not in self.node_ends:
            self._evict_leaf(above, whole_node)

    def _evict_page(self, page: int) -> None:
        del self.used_at[page]
        self.first_child.pop(page, None)
        self.junctions.discard(page)
        self.states.pop(page, None)
        self.node_ends.discard(page)
        above = self.before[page]
        if above is not None:
            self.children[above] -= 1

    def _insert(self, run: Run, depth: int) -> None:
        """Put the run's first `depth` pages into the cache; those that are there already are freed."""
        path = run.ids[:depth]
        present = _leading(page in self.used_at for page in path)
        if 0 < present < depth:
            self._end_node(path[present - 1])
        for j in range(present, depth):
            self.before[path[j]] = path[j - 1] if j else None
            self.children[path[j]] = int(j + 1 < depth)
            if j and self.first_child.setdefault(path[j - 1], path[j]) != path[j]:
                self.junctions.add(path[j - 1])
        if 0 < present < depth:
            self.children[path[present - 1]] += 1
        run.inserted = max(run.inserted, depth)
        self._touch(path)
        if path:
            self._end_node(path[-1])

    def _end_node(self, page: int) -> None:
        if page not in self.node_ends:
            self.node_ends.add(page)
            if self.rules.split_refreshes:
                self._touch(self._rest_of_node(page))

    def _rest_of_node(self, page: int) -> list[int]:
        """What lay behind `page` in its node."""
        rest = []
        while self.children[page]:
            page = next(below for below in self.used_at if self.before[below] == page)
            rest.append(page)
            if page in self.node_ends:
                break
        return rest

    def _touch(self, pages: Sequence[int]) -> None:
        for page in reversed(pages):
            self.used_at[page] = next(self._clock)


def _leading(flags) -> int:
    """How many leading flags are true."""
    total = 0
    for flag in flags:
        if not flag:
            break
        total += 1
    return total
