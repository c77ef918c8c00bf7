"""A benchmark's clients through the engine: each sends its next request when the last one has ended."""

import dataclasses

import numpy as np
import pytest

from hbmgym.envs.serving.core import Core, cost_of
from hbmgym.envs.serving.cost_model import cold_prefill_s, iteration_s
from hbmgym.envs.serving.engines import EngineProfile
from hbmgym.eval.calibration.closed_loop import Replay, closed_loop, replay
from hbmgym.eval.calibration.host import under
from hbmgym.eval.calibration.rows import Row

from .calibration_rows import SGLANG, VLLM, row

FIXED = {"length_range": "fixed"}
ALONE = row(**FIXED, concurrency=1, requests=3)
TOGETHER = row(**FIXED, concurrency=4, requests=8)
BOTH = pytest.mark.parametrize("engine", [VLLM, SGLANG], ids=lambda engine: engine.name)


def served(made: Row, engine: EngineProfile = VLLM) -> dict[str, float]:
    """Milliseconds."""
    return replay(made).figures(engine)


def cost(made: Row, engine: EngineProfile) -> np.record:
    return cost_of(under(replay(made).config, engine))


def decode_ms(made: Row, engine: EngineProfile, decoding: int) -> float:
    """Mean of the 63 iterations after the first token, by stepping."""
    steps = [iteration_s(cost(made, engine), decoding, (1025 + i) * decoding, 0, 0.0) for i in range(63)]
    return 1e3 * sum(steps) / 63


@BOTH
def test_one_client_sees_an_idle_engine_every_time(engine):
    found = served(ALONE, engine)
    whole = dataclasses.replace(engine, snapshots_end_chunks=False)  # nothing is cached, so nothing is saved
    assert found["ttft"] == pytest.approx(1e3 * cold_prefill_s(cost(ALONE, whole), 1024), rel=1e-9)
    assert found["tpot"] == pytest.approx(decode_ms(ALONE, engine, 1), rel=1e-3)


@BOTH
def test_more_requests_of_one_client_change_nothing(engine):
    assert served(dataclasses.replace(ALONE, requests=9), engine) == pytest.approx(served(ALONE, engine), rel=1e-9)


@BOTH
def test_clients_that_start_together_are_prefilled_and_decoded_together(engine):
    found = served(TOGETHER, engine)
    together_s = engine.request_s + iteration_s(cost(TOGETHER, engine), 0, 0, 4096, 4 * 1024 * 512.0)
    assert found["ttft"] == pytest.approx(1e3 * together_s, rel=1e-9)
    assert found["tpot"] == pytest.approx(decode_ms(TOGETHER, engine, 4), rel=1e-3)


def test_never_more_requests_run_than_there_are_clients():
    episode = closed_loop(row(concurrency=3, requests=8))
    assert episode.rows["needs"].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert [pair.tolist() for pair in episode.needs] == [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]]


@BOTH
def test_clients_and_throughput_obey_littles_law(engine):
    made = row(**FIXED, input_tokens=5000, concurrency=16, requests=320)
    one = replay(made)
    found = one.figures(engine)
    seconds = 1e-3 * (found["ttft"] + 63 * found["tpot"])
    short = replay(dataclasses.replace(made, requests=160))
    spans = [span_s(each, engine) for each in (one, short)]
    assert 160 / (spans[0] - spans[1]) == pytest.approx(16 / seconds, rel=0.02)


def span_s(one: Replay, engine: EngineProfile) -> float:
    """Until the last request has ended."""
    core = Core(under(one.config, engine))
    core.reset(one.episode, one.kv_share)
    while not core.done:
        core.run_window()
    return float(core.requests["ended_s"].max())


@pytest.mark.parametrize(
    ("text", "shortest"), [("0.8-1.0", 0.8), ("0.5-1", 0.5), ("0-1 uniform", 0.0), ("0.25-1.0", 0.25)]
)
def test_drawn_lengths_fill_the_range_of_the_row(text, shortest):
    episode = closed_loop(row(input_tokens=1000, output_tokens=100, length_range=text, requests=2000))
    for name, nominal in (("input_tokens", 1000), ("output_tokens", 100)):
        lengths = episode.rows[name]
        assert lengths.min() >= max(1, shortest * nominal) and lengths.max() <= nominal
        assert np.mean(lengths) == pytest.approx((shortest + 1) / 2 * nominal, rel=0.03)
        assert len(np.unique(lengths)) > 0.7 * (1 - shortest) * 100


def test_fixed_lengths_are_fixed():
    episode = closed_loop(row(**FIXED))
    assert set(episode.rows["input_tokens"]) == {1024} and set(episode.rows["output_tokens"]) == {64}


def test_lengths_whose_range_is_not_stated_have_the_nominal_one_as_mean():
    episode = closed_loop(row(length_range="unknown", requests=2000))
    assert np.mean(episode.rows["input_tokens"]) == pytest.approx(1024, rel=0.03)
    assert len(np.unique(episode.rows["input_tokens"])) > 500


def test_lengths_are_drawn_alike_every_time():
    assert (closed_loop(row()).rows == closed_loop(row()).rows).all()


def test_lengths_that_are_known_are_used_as_they_are():
    lengths = ((700, 900, 300, 1000), (5, 9, 30, 1))
    episode = closed_loop(dataclasses.replace(row(), concurrency=2, requests=4, lengths=lengths))
    assert (tuple(episode.rows["input_tokens"]), tuple(episode.rows["output_tokens"])) == lengths


def test_runs_of_single_tokens_have_no_time_per_token():
    lengths = ((1000,) * 4, (1,) * 4)
    assert served(dataclasses.replace(ALONE, requests=4, lengths=lengths)).keys() == {"ttft"}


def test_more_clients_than_memory_admits_wait():
    full = {"gpu": "h100", "weight_dtype": "fp8", "model": "qwen3.5-27b", "input_tokens": 16_000, "output_tokens": 256}
    few, many = row(**full, concurrency=8, requests=16), row(**full, concurrency=96, requests=192)
    assert replay(many).config.hbm_gib == pytest.approx(0.9 * 80e9 / 2**30 - 27e9 / 2**30, rel=0.1)
    assert served(many)["ttft"] > 20 * served(few)["ttft"]


def test_states_of_more_clients_than_memory_holds_do_not_crowd_out_the_rest():
    many = row(model="qwen3.5-4b", weight_dtype="bf16", concurrency=4000, requests=4000)
    one = replay(many)
    assert 0.05 < one.kv_share < 0.95
    assert one.config.hbm_gib < 141e9 / 2**30


def test_a_run_that_memory_holds_gets_no_more_of_it_than_it_needs():
    assert replay(row(concurrency=4)).config.hbm_gib < 1.5


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model": "qwen3.5-397b-a17b"}, "row 1: qwen3.5-397b-a17b has .* GB of weights per GPU, .* hold no request"),
        ({"tensor_parallel": 4, "expert_parallel": 3}, "row 1: expert_parallel is 3, but .* has 512 experts"),
    ],
)
def test_a_deployment_that_cannot_be_is_refused_by_its_row(changes, complaint):
    with pytest.raises(ValueError, match=complaint) as raised:
        replay(row(**changes))
    assert "\n" not in str(raised.value)


def test_a_request_larger_than_memory_is_refused_by_its_row():
    lengths = ((1000,) * 9 + (5_000_000,), (64,) * 10)
    with pytest.raises(ValueError, match="row 1: a request is larger than the memory that the weights leave"):
        served(dataclasses.replace(ALONE, requests=10, lengths=lengths))


def test_experts_are_shared_out_as_the_row_says_among_no_more_gpus_than_there_are():
    given = [replay(row(tensor_parallel=4, expert_parallel=count)).config.expert_parallel for count in (1, 2, 4, 16)]
    assert given == [1, 2, 4, 4]


def test_new_requests_wait_until_the_engine_looks_for_them():
    lengths = ((1000, 1000, 1000), (64, 400, 64))  # the third comes while the second one decodes
    runs = [
        dataclasses.replace(row(**FIXED, concurrency=2, recv_interval=n), requests=3, lengths=lengths) for n in (1, 50)
    ]
    prompt, late = (served(run, SGLANG)["ttft"] for run in runs)
    assert 0 < 3 * (late - prompt) < 50 * decode_ms(ALONE, SGLANG, 2)


def test_chunks_are_as_the_row_says():
    assert served(row(input_tokens=8192, prefill_chunk=1024))["ttft"] > 1.1 * served(row(input_tokens=8192))["ttft"]


def test_a_row_of_medians_is_judged_by_medians():
    lengths = ((500,) * 9 + (50_000,), (64,) * 10)
    mean, median = (
        served(dataclasses.replace(ALONE, requests=10, statistic=statistic, lengths=lengths))
        for statistic in ("mean", "median")
    )
    assert median["ttft"] == pytest.approx(served(row(**FIXED, input_tokens=500, concurrency=1, requests=2))["ttft"])
    assert mean["ttft"] > 2 * median["ttft"]
    assert mean["tpot"] > median["tpot"]


def test_a_replay_gives_the_same_again():
    assert served(row(concurrency=8)) == served(row(concurrency=8))
