"""Traffic from scrapes: what they tell comes back, and what they do not tell is varied until the replay agrees."""

import numpy as np
import pytest

from hbmgym.controllers.static import StaticController
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core, make_layout
from hbmgym.eval.advising.metered import (
    AGREES,
    KEPT_PAUSES,
    Conversations,
    Lengths,
    of_scrapes,
    read_metered,
)
from hbmgym.eval.rollout import run_episode

from ..test_prometheus import EARLIER, vllm_page
from ..test_prometheus import NEW as LOAD
from .pages import AFTER, BEFORE, PROMPTS, SECONDS, scrapes, sglang_page, sglang_scrapes

CONFIG = ServingConfig(model="qwen3.5-4b", hbm_gib=12.0)
LAYOUT = make_layout(CONFIG)
NEW = slice(BEFORE, AFTER)


def tokens_at(share: float) -> float:
    return share * LAYOUT.budget_bytes / LAYOUT.page_bytes * CONFIG.page_tokens


@pytest.fixture
def metered(tmp_path):
    return read_metered(sglang_scrapes(tmp_path, 0.5, max_total_num_tokens=tokens_at(0.4), mamba_usage=0.98))


def test_what_scrapes_tell(metered):
    assert metered.rate_per_s == pytest.approx((AFTER - BEFORE) / SECONDS)
    assert metered.reused == pytest.approx(0.5)
    assert metered.prompts.mean == pytest.approx(PROMPTS[NEW].mean())
    assert metered.outputs.counts.sum() == AFTER - BEFORE
    assert metered.gauges == {"running": 9.0, "state_usage": 0.98, "kv_tokens": pytest.approx(tokens_at(0.4))}


def test_lengths_drawn_have_the_histogram_s_mean_and_spread(metered):
    drawn = metered.prompts.draw(np.random.default_rng(1), 50_000)
    assert drawn.mean() == pytest.approx(PROMPTS[NEW].mean(), rel=0.01)
    for quantile in (10, 50, 90):
        assert np.percentile(drawn, quantile) == pytest.approx(np.percentile(PROMPTS[NEW], quantile), rel=0.25)


def test_lengths_without_a_histogram_are_all_alike():
    assert set(Lengths(np.array([1.0, 2.0]), np.zeros(1), 812.4).draw(np.random.default_rng(0), 5)) == {812}


def test_ranks_of_one_engine_are_not_counted_twice(tmp_path):
    pages = (sglang_page(count, 0.5, ranks=4, num_queue_reqs=12.0) for count in (BEFORE, AFTER))
    found = read_metered(scrapes(tmp_path, *pages))
    assert (found.replicas, found.gauges["running"], found.gauges["waiting"]) == (1, 9.0, 12.0)


@pytest.mark.parametrize("often", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("pause_s", [10.0, 300.0])
def test_conversations_repeat_all_that_was_said_and_rest_as_long(metered, often, pause_s):
    rng = np.random.default_rng(2)
    starts_s = np.sort(rng.uniform(0.0, 3000.0, 6000))
    rows = Conversations("world", metered, pause_s, often).draw(starts_s, rng, 3000.0, 64)
    assert sorted(rows.arrival_s) == starts_s.tolist()
    follows = rows.parent >= 0
    assert 0.5 * often < follows.mean() <= often + 0.02
    assert (rows.input_tokens > rows.input_tokens[rows.parent] + rows.output_tokens[rows.parent])[follows].all()
    assert rows.input_tokens.mean() == pytest.approx(PROMPTS[NEW].mean(), rel=0.05)
    assert (np.bincount(rows.parent[follows]) <= 1).all(), "a conversation goes on once"
    assert (rows.repeated[follows] == rows.input_tokens[rows.parent[follows]] // 64).all()
    assert (rows.turn[follows] == rows.turn[rows.parent[follows]] + 1).all()
    assert (rows.gap_s[follows] <= KEPT_PAUSES * pause_s).all()
    assert np.mean(rows.gap_s[follows]) > 0.3 * pause_s


@pytest.mark.parametrize("reused", [0.3, 0.6])
def test_worlds_that_are_kept_reuse_what_the_server_did_at_its_split(tmp_path, reused):
    text = sglang_scrapes(tmp_path, reused, max_total_num_tokens=tokens_at(0.4))
    found = of_scrapes(read_metered(text), CONFIG)
    assert found.kv_share == pytest.approx(0.4)
    core = Core(CONFIG)
    for episode in found.episodes:
        cell = run_episode(StaticController(found.kv_share), core, episode).cell
        assert cell["hit_rate"] == pytest.approx(reused, abs=1.5 * AGREES), "episodes are not as long as those tried"
    assert found.rate_per_s == pytest.approx((AFTER - BEFORE) / SECONDS, rel=0.1)
    assert "let the replay reuse what the server did, at the server's split" in found.notes[-1]


def test_where_nothing_was_reused_there_is_nothing_to_guess(tmp_path):
    found = of_scrapes(read_metered(sglang_scrapes(tmp_path, 0.0)), CONFIG)
    assert [episode.name for episode in found.episodes] == ["pause-10s"]
    assert not found.episodes[0].rows["needs"].any()


def test_what_no_world_reuses_is_said(tmp_path):
    small = ServingConfig(model="qwen3.5-4b", hbm_gib=0.6)
    found = of_scrapes(read_metered(sglang_scrapes(tmp_path, 0.9)), small)
    assert len(found.episodes) == 1
    assert "no pause lets the replay reuse what the server did at SGLang's default split" in found.notes[-1]


def test_a_pool_that_is_not_of_this_memory_is_said(tmp_path):
    found = of_scrapes(read_metered(sglang_scrapes(tmp_path, 0.5, max_total_num_tokens=1e9)), CONFIG)
    assert found.kv_share is None
    assert any("give --hbm-gib" in note for note in found.notes)


def test_vllm_s_pages_are_read_as_well(tmp_path):
    found = read_metered(scrapes(tmp_path, vllm_page(EARLIER), vllm_page(EARLIER, LOAD), 60.0))
    assert (found.window.engine, found.gauges["running"]) == ("vLLM", 9.0)
    assert found.reused == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("one.txt", "expected two files: BEFORE,AFTER"),
        ("a,b,c", "expected two files: BEFORE,AFTER"),
        ("missing.txt,missing.txt", "missing.txt: cannot be read"),
    ],
)
def test_what_are_no_two_scrapes_is_refused(text, named):
    with pytest.raises(ValueError, match=named):
        read_metered(text)


def test_scrapes_without_a_time_between_them_are_refused(tmp_path):
    pages = (sglang_page(count, 0.5) for count in (BEFORE, AFTER))
    with pytest.raises(ValueError, match=r"after.txt: does not tell seconds since .*curl -si"):
        read_metered(scrapes(tmp_path, *pages, seconds=0.0))
