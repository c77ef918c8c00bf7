"""Episodes made by hand, and drawn at random, for the tests of the engine."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from hbmgym.envs.serving.config import Policies, ServingConfig, with_policies
from hbmgym.envs.serving.engines import ENGINE_PROFILES
from hbmgym.envs.serving.shortage import ONE_BUFFER
from hbmgym.envs.traces.episode import LOOPS, ROW, Episode, Loop, link
from hbmgym.memory_backend.migration import MigrateOnFailure
from hbmgym.memory_backend.pricing import PricedAdmission

PLAIN_ENGINE = dataclasses.replace(
    ENGINE_PROFILES["vllm-graph"], name="plain", prefill_factor=1.0, layer_s=20e-6, prefill_floor_s=0.0, request_s=0.0
)
"""An engine whose times can be added up by hand: requests reach its queue as they arrive, and no floor hides tokens."""


@dataclass(frozen=True)
class Ask:
    """One request. `content` labels its leading pages: equal labels after an equal beginning are the same page."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    content: Sequence[object] = ()
    """One label per page that has an id, prompt first, output after it."""
    needs: Sequence[int] = ()
    """Rows that must have ended before."""
    gap_s: float = 0.0
    """In a closed loop, after the last of them."""


def with_own_pages(asks: Sequence[Ask], page_tokens: int) -> list[Ask]:
    """The same requests, where each page without a label has an id of its own, as in the episodes of a trace."""
    return [
        dataclasses.replace(ask, content=[*ask.content, *[(row, "own")] * (pages - len(ask.content))])
        for row, ask in enumerate(asks)
        for pages in [(ask.input_tokens + ask.output_tokens) // page_tokens]
    ]


def make_episode(asks: Sequence[Ask], page_tokens: int = 64, loop: Loop = "open") -> Episode:
    """The episode of `asks`, which must be in order of arrival."""
    known: dict[tuple[int, object], int] = {}
    rows = np.zeros(len(asks), ROW)
    refs: list[int] = []
    for row, ask in zip(rows, asks, strict=True):
        assert len(ask.content) <= (ask.input_tokens + ask.output_tokens) // page_tokens, ask
        row["arrival_s"], row["gap_s"] = ask.arrival_s, ask.gap_s
        row["input_tokens"], row["output_tokens"], row["measured"] = ask.input_tokens, ask.output_tokens, 1
        row["prompt_ids"] = min(ask.input_tokens // page_tokens, len(ask.content))
        row["known_ids"], row["ref_off"] = len(ask.content), len(refs)
        page = -1
        for label in ask.content:
            page = known.setdefault((page, label), len(known))
            refs.append(page)
    pairs = np.array([(before, after) for after, ask in enumerate(asks) for before in ask.needs], np.int64)
    followers = link(rows, *pairs.reshape(-1, 2).T)
    ids = np.array(refs or [0], np.int32)
    # Kernels are compiled for read-only rows and ids, as the loaders make them.
    rows.flags.writeable = ids.flags.writeable = False
    end_s = max((ask.arrival_s for ask in asks), default=0.0) + 1.0
    return Episode("by hand", 0, rows.view(np.recarray), ids, len(known), page_tokens, 0.0, end_s, followers, loop)


SMALL_PAGE = 16
RETENTIONS = ("all", "latest", "interval-40", "interval-128", "path-cap-1", "path-cap-3", "optimal-1", "optimal-4")
PADDED_PAGE = 48

_FAR = dataclasses.replace(ENGINE_PROFILES["vllm-graph"], request_s=0.3, graph_tokens=40)
ENGINES = (
    *ENGINE_PROFILES.values(),
    dataclasses.replace(_FAR, prefill="mixed", snapshots_end_chunks=False),
    dataclasses.replace(_FAR, prefill="exclusive", snapshots_end_chunks=True),
)
"""Those that come with hbmgym, and two that requests take long to reach, with the two other pairs of rules."""


@st.composite
def small_configs(draw):
    """A little engine in which pages and slots run short within a few requests; pages of SMALL_PAGE tokens."""
    slots_per_request = draw(st.integers(1, 3))
    long_prefill_tokens = draw(st.sampled_from([0, 0, 20, 64]))
    on_shortage = draw(st.sampled_from(["evict", "migrate", "float", "float-lru", "priced", "priced"]))
    orders = ["fcfs", "lpm", "slo"] + ["past-future"] * (on_shortage != "priced")
    hbm_gib = draw(st.sampled_from([0.16, 0.22, 0.3, 0.5]))
    model, part = draw(st.sampled_from([("qwen3.5-4b", 1.0), ("qwen3.5-4b", 1.0), ("gpt-oss-20b", 0.3)]))
    return ServingConfig(
        model=model,
        hbm_gib=part * hbm_gib,
        engine=draw(st.sampled_from(ENGINES)),
        page_tokens=SMALL_PAGE,
        receive_interval=draw(st.sampled_from([1, 3, 10])),
        prefill_budget=draw(st.sampled_from([48, 100, 256])),
        long_prefill_tokens=long_prefill_tokens,
        max_long_prefills=draw(st.sampled_from([0, 1, 2])) if long_prefill_tokens else 0,
        slots_per_request=slots_per_request,
        draft_tokens=draw(st.sampled_from([0, 0, 1, 2])) if hbm_gib == 0.5 else 0,
        decode_snapshot_tokens=draw(st.sampled_from([16, 40, 64])),
        max_preemptions=draw(st.sampled_from([0, 2, 16, 16])),
        deadline_slos=draw(st.sampled_from([3.0, 10.0])),
        ttft_slo_floor_s=draw(st.sampled_from([0.02, 0.3, 2.0])),
        chunk_move_s=draw(st.sampled_from([75e-6, 1e-3])),
        transfers=draw(st.sampled_from(["overlapped", "stall", "suspend"][: 1 if on_shortage in ONE_BUFFER else 3])),
        eviction_epoch_s=draw(st.sampled_from([0.09, 0.7])),
        flop_weight=draw(st.sampled_from([0.3, 2.0])),
        tlru_threshold_tokens=draw(st.sampled_from([20, 100, 300])),
        tlru_next_tokens=draw(st.sampled_from([0, 50])),
        policies=Policies(
            eviction=draw(st.sampled_from(["lru", "lpb", "flop_aware", "tlru"])),
            retention=draw(st.sampled_from(RETENTIONS)),
            admission=draw(st.sampled_from(orders)),
            on_shortage=on_shortage,
            pin=draw(st.sampled_from(["none", "ttl", "ttl"])),
            preemption=draw(st.sampled_from(["recompute", "offload"])),
        ),
        pin_price=draw(st.sampled_from([0.0, 1e-3, 0.05])),
        host_gib=draw(st.sampled_from([0.05, 0.1, 10.0])),
        window_s=draw(st.sampled_from([0.0731, 0.251, 1.07])),
        priced=PricedAdmission(
            horizon_s=draw(st.sampled_from([0.5, 20.0])),
            deferral_weight=draw(st.sampled_from([None, None, 0.0, 1e-3, 0.05])),
            max_deferrals=draw(st.sampled_from([0, 3, 1000])),
        ),
        migrate=MigrateOnFailure(
            *draw(st.sampled_from([(0.05, 0.3), (0.4, 0.5)])), draw(st.integers(0, 60)), draw(st.integers(1, 40))
        ),
    )


@st.composite
def padded_configs(draw):
    """The same little engine with vLLM's one pool: pages of PADDED_PAGE tokens, and six of them to a state."""
    config = dataclasses.replace(
        draw(small_configs()), model="zamba2-2.7b", state_dtype="bf16", hbm_gib=0.4, transfers="overlapped"
    )
    rule = draw(st.sampled_from(ONE_BUFFER))
    return with_policies(config, dataclasses.replace(config.policies, on_shortage=rule, layout="padded"))


@st.composite
def small_episodes(draw, most_sessions=10, loops=LOOPS, page_tokens=SMALL_PAGE):
    """Sessions of up to three turns over up to three shared documents, in an open or a closed loop.

    Some outputs are part of the next turn. Some turns start sub-agents, which the next turn waits for.
    """
    asks: list[Ask] = []  # whose needs are places in this list

    def turn(session, arrival_s, content, tokens, needs):
        """Ask once; the content and the tokens that the next turn continues."""
        tokens += draw(st.integers(1, 400))
        output = draw(st.integers(1, 160))
        kept = draw(st.booleans())
        prompt = content + [(session, len(asks))] * (tokens // page_tokens - len(content))
        through = prompt + [(session, len(asks), "out")] * ((tokens + output) // page_tokens - len(prompt))
        gap_s = draw(st.integers(0, 300)) * 1.0001e-3
        asks.append(Ask(arrival_s, tokens, output, through, needs, gap_s))
        return (through, tokens + output) if kept else (prompt, tokens)

    for session in range(draw(st.integers(1, most_sessions))):
        document = draw(st.integers(0, 3))
        tokens = (0, 100, 480, 1000)[document]
        content: list[object] = [f"document {document}"] * (tokens // page_tokens)
        arrival_s = draw(st.integers(0, 2000)) * 1.0007e-3
        needs: list[int] = []
        for _ in range(draw(st.integers(1, 3))):
            content, tokens = turn(session, arrival_s, content, tokens, needs)
            needs = [len(asks) - 1]
            for agent in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
                arrival_s += draw(st.integers(0, 200)) * 1.0009e-3
                turn((session, agent), arrival_s, ["sub-agent"] * 3, 3 * page_tokens, needs[:1])
                needs.append(len(asks) - 1)
            arrival_s += draw(st.integers(0, 800)) * 1.0003e-3
    return _in_order_of_arrival(draw, asks, page_tokens, loops)


def _in_order_of_arrival(draw, asks, page_tokens, loops):
    """The episode of `asks`, whose needs are places in that list."""
    order = sorted(range(len(asks)), key=lambda i: asks[i].arrival_s)
    row_of = {place: row for row, place in enumerate(order)}
    rows = [dataclasses.replace(asks[i], needs=[row_of[place] for place in asks[i].needs]) for i in order]
    return make_episode(rows, page_tokens, draw(st.sampled_from(loops)))


@st.composite
def long_sessions(draw, loops=LOOPS):
    """Up to five sessions of up to eight turns, each of which goes on from all of the last or from its prompt."""
    asks: list[Ask] = []
    for session in range(draw(st.integers(1, 5))):
        arrival_s, content, needs = draw(st.integers(0, 500)) * 1.0007e-3, ["system"] * 2, []
        for turn in range(draw(st.integers(2, 8))):
            prompt = [*content, *[(session, turn)] * draw(st.integers(1, 6))]
            output = draw(st.integers(1, 40))
            tokens = len(prompt) * SMALL_PAGE + draw(st.integers(0, SMALL_PAGE - 1))
            through = [*prompt, *[(session, turn, "out")] * ((tokens + output) // SMALL_PAGE - len(prompt))]
            gap_s = draw(st.sampled_from([0.01, 0.04, 0.09, 0.4])) * 1.0001
            asks.append(Ask(arrival_s, tokens, output, through, needs, gap_s))
            content, needs = draw(st.sampled_from([through, prompt])), [len(asks) - 1]
            arrival_s += gap_s + draw(st.integers(0, 40)) * 1.0003e-3
    return _in_order_of_arrival(draw, asks, SMALL_PAGE, loops)


@st.composite
def crowds(draw):
    """Short prompts that come together and grow far beyond them."""
    asks = [
        Ask(i * 1e-3, tokens, draw(st.integers(60, 160)), [f"user {i % 3}"] * (tokens // SMALL_PAGE))
        for i, tokens in enumerate(draw(st.lists(st.integers(1, 60), min_size=2, max_size=14)))
    ]
    return make_episode(asks, SMALL_PAGE)
