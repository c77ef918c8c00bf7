"""Eviction orders in the engine: when they agree with lru, and what each keeps."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hbmgym.envs.serving.config import Policies, ServingConfig
from hbmgym.envs.serving.core import Core, make_layout
from hbmgym.memory_backend.eviction import eviction_order
from hbmgym.memory_backend.pools import NONE
from hbmgym.memory_backend.prefix_cache import Memory
from tests.envs.episodes import SMALL_PAGE, Ask, make_episode, small_configs, small_episodes

SMALL = ServingConfig(model="qwen3.5-4b", hbm_gib=0.6, page_tokens=SMALL_PAGE, prefill_budget=256, window_s=0.5)
VALUES = ("own_s_per_page", "own_s_per_page2", "state_s_per_page")

some_examples = settings(max_examples=40, derandomize=True, deadline=None)


def with_eviction(config, eviction, **changes):
    fields = {field: getattr(config, field) for field in config.__dataclass_fields__}
    return ServingConfig(**{**fields, **changes, "policies": Policies(eviction=eviction)})


def replay(config, episode, share, *, free_recovery=False):
    """The core after the episode, and the order of eviction at the end of every window."""
    core = Core(config, check=True)
    core.reset(episode, share)
    if free_recovery:
        for pool in (core.memory.kv, core.memory.ssm):
            for name in VALUES:
                pool.meta[name] = 0.0
    orders = []
    while not core.done:
        core.run_window()
        orders.append([_last_to_go(core.memory, pool) for pool in (core.memory.kv, core.memory.ssm)])
    return core, orders


def _last_to_go(memory: Memory, pool):
    order = eviction_order(pool)
    return (int(pool.meta.evictions), int(pool.meta.cached), int(pool.entries["key"][order[0]]) if order else None)


def assert_equal_episodes(first, second):
    (core, orders), (other, other_orders) = first, second
    for field in ("status", "reject_reason", "preemptions", "missed", "reused_tokens"):
        assert np.array_equal(core.requests[field], other.requests[field]), field
    for field in ("admitted_s", "first_token_s", "ended_s"):  # epochs cut decode spans, so times are rounded otherwise
        assert np.allclose(core.requests[field], other.requests[field], rtol=1e-9, atol=0, equal_nan=True), field
    assert orders == other_orders


@some_examples
@given(config=small_configs(), episode=small_episodes(), share=st.floats(0, 1))
def test_lpb_with_constant_cost_equals_lru(config, episode, share):
    lpb = replay(with_eviction(config, "lpb"), episode, share, free_recovery=True)
    assert_equal_episodes(lpb, replay(with_eviction(config, "lru"), episode, share))


@some_examples
@given(config=small_configs(), lengths=st.lists(st.integers(20, 600), min_size=2, max_size=12), share=st.floats(0, 1))
def test_lpb_without_hits_equals_lru(config, lengths, share):
    asks = [Ask(0.01 * i, n, 20, [f"own {i}"] * (n // SMALL_PAGE)) for i, n in enumerate(lengths)]
    episode = make_episode(asks, SMALL_PAGE)
    # Whoever is preempted comes back to the pages it left, which are hits.
    lpb, lru = (replay(with_eviction(config, order, max_preemptions=0), episode, share) for order in ("lpb", "lru"))
    assert lpb[0].counters.reused_tokens == 0
    assert_equal_episodes(lpb, lru)


@some_examples
@given(config=small_configs(), episode=small_episodes(), share=st.floats(0, 1))
def test_flop_aware_of_weight_0_equals_lru(config, episode, share):
    flop_aware = replay(with_eviction(config, "flop_aware", flop_weight=0.0), episode, share)
    assert_equal_episodes(flop_aware, replay(with_eviction(config, "lru"), episode, share))


@some_examples
@given(config=small_configs(), episode=small_episodes(), share=st.floats(0, 1))
def test_tlru_without_tokens_to_spare_equals_lru(config, episode, share):
    tlru = replay(with_eviction(config, "tlru", tlru_threshold_tokens=49, tlru_next_tokens=50), episode, share)
    assert_equal_episodes(tlru, replay(with_eviction(config, "lru"), episode, share))


@some_examples
@given(config=small_configs(), episode=small_episodes(), share=st.floats(0, 1))
def test_tlru_that_can_spare_everything_equals_lru(config, episode, share):
    tlru = replay(with_eviction(config, "tlru", tlru_threshold_tokens=10**6), episode, share)
    assert_equal_episodes(tlru, replay(with_eviction(config, "lru"), episode, share))


def document(name, pages):
    return [name] * pages


def reused_after_pressure(eviction, hits_before, fillers):
    """Tokens that a last request reuses of a document that was asked for `hits_before` times, after other traffic."""
    asks = [Ask(0.2 * i, 20 * SMALL_PAGE + 1, 2, document("kept", 20)) for i in range(1 + hits_before)]
    begin = asks[-1].arrival_s + 0.2
    asks += [Ask(begin + 0.2 * i, 20 * SMALL_PAGE + 1, 2, document(f"once {i}", 20)) for i in range(fillers)]
    asks.append(Ask(asks[-1].arrival_s + 0.2, 20 * SMALL_PAGE + 1, 2, document("kept", 20)))
    core, _ = replay(with_eviction(SMALL, eviction), make_episode(asks, SMALL_PAGE), 0.5)
    assert core.counters.rejected == 0
    return int(core.requests["reused_tokens"][-1])


def test_lpb_keeps_what_was_hit_where_lru_keeps_what_was_used_last():
    assert reused_after_pressure("lru", 3, 30) == 0
    assert reused_after_pressure("lpb", 3, 30) == 20 * SMALL_PAGE
    assert reused_after_pressure("lpb", 0, 30) == 0


def test_lpb_forgets_hits_after_two_epochs():
    asks = [Ask(0.2 * i, 20 * SMALL_PAGE + 1, 2, document("kept", 20)) for i in range(4)]
    asks.append(Ask(200.0, 20 * SMALL_PAGE + 1, 2, document("other", 20)))
    core, _ = replay(with_eviction(SMALL, "lpb"), make_episode(asks, SMALL_PAGE), 0.5)
    assert core.counters.epoch_end_s > 200.0
    assert np.all(core.memory.kv.ranks["value"][eviction_order(core.memory.kv)] <= 0.0)


def test_flop_aware_keeps_a_long_prefix_longer_than_a_short_one_of_the_same_age():
    def reused(eviction):
        asks = [Ask(0.0, 40 * SMALL_PAGE + 1, 2, document("long", 40))]
        asks += [Ask(1.0 + i, 4 * SMALL_PAGE + 1, 2, document(f"short {i}", 4)) for i in range(60)]
        asks.append(Ask(62.0, 40 * SMALL_PAGE + 1, 2, document("long", 40)))
        config = with_eviction(SMALL, eviction, eviction_epoch_s=0.5, flop_weight=5.0)
        core, _ = replay(config, make_episode(asks, SMALL_PAGE), 0.5)
        return int(core.requests["reused_tokens"][-1])

    assert reused("lru") == 0
    assert reused("flop_aware") == 40 * SMALL_PAGE


def left_of_two(eviction, spare_tokens, pages_out=0, slots=6):
    """A prompt of 20 pages and a later one of 5, then two others that take 4 of `slots` slots and, together, so many
    pages more than are free: of both prompts the pages that are left, and whether the state is."""
    config = with_eviction(SMALL, eviction, tlru_threshold_tokens=spare_tokens + 10, tlru_next_tokens=10)
    layout = make_layout(config)
    rest = layout.pages(slots) - 25 + pages_out if pages_out else 2
    asks = [Ask(0.0, 20 * SMALL_PAGE, 1, document("long", 20)), Ask(1.0, 5 * SMALL_PAGE, 1, document("short", 5))]
    asks += [Ask(3.0, SMALL_PAGE, 1), Ask(3.0, (rest - 1) * SMALL_PAGE, 1)]
    core, _ = replay(config, make_episode(asks, SMALL_PAGE), layout.share(slots))
    assert core.counters.finished == 4
    ids = core.memory.ids
    left = [int((ids["page"][part] != NONE).sum()) for part in (slice(20), slice(20, 25))]
    return left, [bool(ids["snapshot"][end] != NONE) for end in (19, 24)]


def test_tlru_drops_a_short_prefix_before_an_older_one_that_takes_too_long_to_compute():
    assert left_of_two("lru", 80, pages_out=3)[0] == [17, 5]
    assert left_of_two("tlru", 80, pages_out=3)[0] == [20, 2]
    assert left_of_two("tlru", 79, pages_out=3)[0] == [17, 5], "80 tokens are too many"


def test_tlru_goes_on_as_lru_where_nothing_is_safe():
    assert left_of_two("tlru", 80, pages_out=7)[0] == [18, 0]


def test_tlru_drops_the_state_of_a_short_prefix_first():
    assert left_of_two("lru", 80, slots=5)[1] == [False, True]
    assert left_of_two("tlru", 80, slots=5)[1] == [True, False]
