"""Episodes made by hand, and drawn at random, for the tests of the engine."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from hbmgym.envs.serving.config import Policies, ServingConfig
from hbmgym.envs.traces.episode import ROW, Episode
from hbmgym.memory_backend.migration import MigrateOnFailure


@dataclass(frozen=True)
class Ask:
    """One request. `content` labels its leading pages: equal labels after an equal beginning are the same page."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    content: Sequence[object] = ()
    """One label per page that has an id, prompt first, output after it."""
    parent: int = -1


def make_episode(asks: Sequence[Ask], page_tokens: int = 64) -> Episode:
    """The episode of `asks`, which must be in order of arrival."""
    known: dict[tuple[int, object], int] = {}
    rows = np.zeros(len(asks), ROW)
    refs: list[int] = []
    for i, ask in enumerate(asks):
        assert len(ask.content) <= (ask.input_tokens + ask.output_tokens) // page_tokens, ask
        prompt_ids = min(ask.input_tokens // page_tokens, len(ask.content))
        pages = (prompt_ids, len(ask.content), len(refs))
        rows[i] = (ask.arrival_s, ask.input_tokens, ask.output_tokens, ask.parent, *pages, 1)
        page = -1
        for label in ask.content:
            page = known.setdefault((page, label), len(known))
            refs.append(page)
    ids = np.array(refs or [0], np.int32)
    # Kernels are compiled for read-only rows and ids, as the loaders make them.
    rows.flags.writeable = ids.flags.writeable = False
    last_s = max((ask.arrival_s for ask in asks), default=0.0)
    return Episode("by hand", 0, rows.view(np.recarray), ids, len(known), page_tokens, 0.0, last_s + 1.0)


SMALL_PAGE = 16


@st.composite
def small_configs(draw):
    """A little engine in which pages and slots run short within a few requests; pages of SMALL_PAGE tokens."""
    slots_per_request = draw(st.integers(1, 3))
    return ServingConfig(
        model="qwen3.5-4b",
        hbm_gib=draw(st.sampled_from([0.16, 0.22, 0.3, 0.5])),
        page_tokens=SMALL_PAGE,
        prefill_budget=draw(st.sampled_from([48, 100, 256])),
        slots_per_request=slots_per_request,
        decode_snapshot_tokens=draw(st.sampled_from([16, 40, 64])),
        max_preemptions=draw(st.sampled_from([0, 2, 16, 16])),
        deadline_slos=draw(st.sampled_from([3.0, 10.0])),
        ttft_slo_floor_s=draw(st.sampled_from([0.02, 0.3, 2.0])),
        chunk_move_s=draw(st.sampled_from([75e-6, 1e-3])),
        transfers=draw(st.sampled_from(["overlapped", "stall"])),
        eviction_epoch_s=draw(st.sampled_from([0.09, 0.7])),
        flop_weight=draw(st.sampled_from([0.3, 2.0])),
        policies=Policies(
            eviction=draw(st.sampled_from(["lru", "lpb", "flop_aware"])),
            on_shortage=draw(st.sampled_from(["evict", "migrate", "float"])),
        ),
        window_s=draw(st.sampled_from([0.0731, 0.251, 1.07])),
        migrate=MigrateOnFailure(
            *draw(st.sampled_from([(0.05, 0.3), (0.4, 0.5)])), draw(st.integers(0, 60)), draw(st.integers(1, 40))
        ),
    )


@st.composite
def small_episodes(draw, most_sessions=10):
    """Sessions of up to three turns over up to three shared documents; some outputs are known from the next turn."""
    asks = []
    for session in range(draw(st.integers(1, most_sessions))):
        document = draw(st.integers(0, 3))
        tokens = (0, 100, 480, 1000)[document]
        content: list[object] = [f"document {document}"] * (tokens // SMALL_PAGE)
        arrival_s = draw(st.integers(0, 2000)) * 1.0007e-3
        parent = None
        for turn in range(draw(st.integers(1, 3))):
            tokens += draw(st.integers(1, 400))
            output = draw(st.integers(1, 160))
            kept = draw(st.booleans())
            prompt = content + [(session, turn)] * (tokens // SMALL_PAGE - len(content))
            through = prompt + [(session, turn, "out")] * ((tokens + output) // SMALL_PAGE - len(prompt))
            asks.append((arrival_s, session, turn, tokens, output, through if kept else prompt, parent))
            parent = (session, turn)
            content, tokens = (through, tokens + output) if kept else (prompt, tokens)
            arrival_s += draw(st.integers(0, 800)) * 1.0003e-3
    asks.sort(key=lambda ask: ask[0])
    row_of = {(ask[1], ask[2]): row for row, ask in enumerate(asks)}
    return make_episode(
        [
            Ask(arrival_s, tokens, output, content, -1 if parent is None else row_of[parent])
            for arrival_s, _, _, tokens, output, content, parent in asks
        ],
        SMALL_PAGE,
    )
