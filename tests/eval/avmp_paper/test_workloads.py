"""The paper's workloads: how many requests, in which ranges."""

import numpy as np
import pytest

from hbmgym.envs.traces.avmp_workloads import load_prompt_pool, paper_requests
from hbmgym.envs.traces.trace import TraceError

from .paper import sharegpt_lengths


@pytest.mark.parametrize(
    ("name", "count", "prompts", "generated"),
    [
        ("uniform_short", 512, (128, 1024), (64, 256)),
        ("mixed_long", 256, (512, 65536), (128, 512)),
        ("agentic_burst", 256, (64, 65536), (64, 256)),
        ("sharegpt_replay", 512, (16, 4096), (32, 2048)),
    ],
)
@pytest.mark.parametrize("replicate", [0, 1, 2])
def test_lengths_lie_in_the_papers_ranges(name, count, prompts, generated, replicate):
    drawn = paper_requests(name, replicate, np.array([8, 25, 810, 6708]))
    assert len(drawn) == count
    for values, (low, high) in ((drawn.prompt, prompts), (drawn.generated, generated)):
        assert values.dtype == np.int64
        assert low <= values.min() and values.max() <= high
    assert (np.diff(drawn.arrival) >= 0).all()


@pytest.mark.parametrize("name", ["uniform_short", "mixed_long", "sharegpt_replay"])
def test_one_request_arrives_per_tick(name):
    drawn = paper_requests(name, 0, np.array([30]))
    assert drawn.arrival.tolist() == list(range(len(drawn)))


def test_the_burst_takes_26_to_30_ticks():
    assert [int(paper_requests("agentic_burst", replicate).arrival[-1]) for replicate in range(3)] == [30, 28, 26]


def test_a_fifth_of_the_mixed_requests_are_long():
    assert np.mean(paper_requests("mixed_long", 0).prompt >= 16384) == pytest.approx(0.2, abs=0.06)


def test_replicates_differ_and_are_drawn_from_consecutive_seeds():
    one, next_one = (paper_requests("uniform_short", replicate).prompt for replicate in (0, 1))
    assert one.tolist() == np.random.default_rng(1).integers(128, 1025, 512).tolist()
    assert next_one.tolist() == np.random.default_rng(2).integers(128, 1025, 512).tolist()


def test_the_lower_clamp_of_sharegpt_touches_a_third_of_the_draws():
    lengths = sharegpt_lengths()
    assert (len(lengths), np.median(lengths), lengths.max()) == (5000, 25, 6708)
    assert np.mean(lengths <= 16) == pytest.approx(0.364, abs=1e-3)
    assert (paper_requests("sharegpt_replay", 0, lengths).prompt == 16).sum() == 165


def test_an_unknown_workload_and_missing_lengths_are_refused():
    with pytest.raises(TraceError, match="expected one of uniform_short"):
        paper_requests("rush_hour", 0)
    with pytest.raises(TraceError, match="name their file"):
        paper_requests("sharegpt_replay", 0)


def test_lengths_are_read_in_file_order_from_a_list_or_an_object(tmp_path):
    path = tmp_path / "lengths.json"
    for text in ("[3, 1, 2]", '{"source": "x", "prompt_tokens": [3, 1, 2]}'):
        path.write_text(text)
        assert load_prompt_pool(path).tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"{}", "expected a list of prompt lengths"),
        (b"[]", "expected a list of prompt lengths"),
        (b"[5, 0]", "prompt length 1 is 0"),
        (b"[1.5]", "prompt length 0 is 1.5"),
        (b"[true]", "prompt length 0 is True"),
        (b'["9"]', "prompt length 0 is '9'"),
        (b"[99999999999]", "prompt length 0 is 99999999999"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_what_is_no_list_of_lengths_is_refused(tmp_path, content, named):
    path = tmp_path / "lengths.json"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=named):
        load_prompt_pool(path)
