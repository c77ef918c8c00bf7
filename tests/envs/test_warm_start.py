"""A warm cache against a cold one: what came before can only help, and only what it left."""

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core
from tests.envs.episodes import SMALL_PAGE, Ask, make_episode

CONFIG = ServingConfig(model="qwen3.5-4b", hbm_gib=8.0, page_tokens=SMALL_PAGE, prefill_budget=256, window_s=5.0)
APART_S = 5.0
"""Requests come one after the other, and memory never runs short: only the cache tells them apart."""


@st.composite
def asks_of_documents(draw, count):
    """One after the other; each a beginning of one of three documents, then text of its own."""
    asks = []
    for i in range(draw(st.integers(1, count))):
        document, pages, own = draw(st.integers(0, 2)), draw(st.integers(0, 30)), draw(st.integers(1, 200))
        content = [f"document {document}"] * pages + [("own", draw(st.integers(0, 10**6)))] * (own // SMALL_PAGE)
        asks.append(Ask(i * APART_S, pages * SMALL_PAGE + own, draw(st.integers(1, 40)), content))
    return asks


def later(asks, by_s):
    return [dataclasses.replace(ask, arrival_s=ask.arrival_s + by_s) for ask in asks]


def reused(asks):
    """Prompt tokens that each request reuses."""
    core = Core(CONFIG, check=True)
    core.reset(make_episode(asks, SMALL_PAGE), 0.5)
    while not core.done:
        core.run_window()
    assert core.counters.rejected == core.counters.preemptions == 0
    assert core.memory.kv.meta.evictions == core.memory.ssm.meta.evictions == 0
    return core.requests["reused_tokens"].copy()


@settings(max_examples=40, derandomize=True, deadline=None)
@given(before=asks_of_documents(6), asks=asks_of_documents(6))
def test_a_warm_cache_never_reuses_less_than_a_cold_one(before, asks):
    cold = reused(asks)
    warm = reused(before + later(asks, len(before) * APART_S))[len(before) :]
    assert (warm >= cold).all()


@settings(max_examples=20, derandomize=True, deadline=None)
@given(before=asks_of_documents(4), asks=asks_of_documents(4))
def test_what_shares_nothing_leaves_the_cache_as_cold_as_it_was(before, asks):
    strangers = [
        dataclasses.replace(ask, content=[("stranger", label) for label in ask.content], arrival_s=ask.arrival_s)
        for ask in before
    ]
    warm = reused(strangers + later(asks, len(before) * APART_S))[len(before) :]
    assert np.array_equal(warm, reused(asks))


def test_the_same_requests_again_find_all_but_their_last_tokens():
    asks = [Ask(i * APART_S, 20 * SMALL_PAGE + 5, 2, [f"document {i}"] * 20) for i in range(3)]
    again = reused(asks + later(asks, len(asks) * APART_S))
    assert again.tolist() == [0] * 3 + [20 * SMALL_PAGE] * 3
