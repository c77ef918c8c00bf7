"""Which part of a trace is replayed, and that it is as busy and as connected as the whole."""

import numpy as np
import pytest

from hbmgym.envs.traces.load import load_trace
from hbmgym.envs.traces.trace import TraceError
from hbmgym.envs.workload import TraceWorkload
from hbmgym.eval.advising import traffic as module
from hbmgym.eval.advising.traffic import of_scenario, of_trace

from ..traffic import CHAT, CONFIG, write_trace

RATE = 0.5


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    path = write_trace(tmp_path_factory.mktemp("long") / "long.jsonl", span_s=20_000.0, rate_per_s=RATE)
    return TraceWorkload(load_trace(path), 1.0, CONFIG.page_tokens)


def test_a_trace_that_is_not_too_large_is_replayed_whole(long):
    found = of_trace(long, 3)
    assert [seed for _, seed in found.cases] == [10_000, 10_001, 10_002]
    assert found.shared_rows and not found.notes
    assert found.episodes[0].rows.tobytes() == long.episode("all", 10_000).rows.tobytes()


@pytest.mark.parametrize("most", [8000, 3000, 900])
def test_a_larger_one_is_cut_into_stretches_at_its_own_rate(long, most, monkeypatch):
    monkeypatch.setattr(module, "MOST_REQUESTS", most)
    found = of_trace(long, 3)
    rows = sum(len(episode.rows) for episode in found.episodes)
    assert most / 2 < rows <= 1.1 * most, "an episode starts somewhere in its stretch's first tenth"
    assert len(found.workloads) == (4 if most >= 2 * 670 else len(found.workloads))
    assert found.rate_per_s == pytest.approx(RATE, rel=0.15)
    assert f"of the trace's {len(long.trace):,} requests {rows:,} are replayed" in found.notes[0]
    assert not found.shared_rows
    assert len({episode.name for episode in found.episodes}) == len(found.episodes)


def test_too_many_page_ids_cut_as_well(long, monkeypatch):
    ids = long.trace.block_counts.sum() * long.trace.block_size / CONFIG.page_tokens
    monkeypatch.setattr(module, "MOST_IDS", round(ids / 4))
    assert 0 < sum(len(episode.refs) for episode in of_trace(long, 3).episodes) <= ids / 3


def test_a_stretch_that_no_engine_is_asked_for_is_refused(long, monkeypatch):
    monkeypatch.setattr(module, "MOST_REQUESTS", 100)
    with pytest.raises(TraceError, match=r"a smaller --load, or .*thin"):
        of_trace(long, 3)


def test_means_are_of_the_measured_requests():
    found = of_scenario(CHAT, 2)
    rows = [episode.rows[episode.rows["measured"] == 1] for episode in found.episodes]
    assert found.requests == sum(map(len, rows))
    assert found.mean("input_tokens") == np.concatenate([own["input_tokens"] for own in rows]).mean()
    assert found.rate_per_s == pytest.approx(found.requests / 3000.0)
