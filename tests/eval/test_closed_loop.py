"""A benchmark's clients through the engine: each sends its next request when the last one has ended."""

import dataclasses

import pytest

from hbmgym.envs.serving.constants import PRIORS
from hbmgym.envs.serving.cost_model import cold_prefill_s, iteration_s, make_cost
from hbmgym.envs.serving.gpus import find_gpu
from hbmgym.eval.calibration.closed_loop import closed_loop, serve
from hbmgym.memory_backend.geometry import find_model

from .calibration_rows import ROW

ALONE = dataclasses.replace(ROW, concurrency=1, requests=3)
COST = make_cost(find_model(ROW.model), find_gpu(ROW.gpu), weight_dtype="bf16", constants=PRIORS)


def decode_s(decoding: int, context: int) -> float:
    """Seconds of the 63 iterations after the first token, by stepping."""
    return sum(iteration_s(COST, decoding, context + i * decoding, 0, 0.0) for i in range(63))


def test_one_client_sees_an_idle_engine_every_time():
    served = serve(ALONE, PRIORS)
    prefill_s = cold_prefill_s(COST, 1024)
    assert served["ttft_ms"] == pytest.approx(1e3 * prefill_s, rel=1e-9)
    assert served["tpot_ms"] == pytest.approx(1e3 * decode_s(1, 1025) / 63, rel=1e-3)
    assert served["output_tokens_per_s"] == pytest.approx(64 / (prefill_s + decode_s(1, 1025)), rel=1e-3)


def test_more_requests_of_one_client_change_nothing():
    assert serve(dataclasses.replace(ALONE, requests=9), PRIORS) == pytest.approx(serve(ALONE, PRIORS), rel=1e-9)


def test_clients_that_start_together_are_prefilled_and_decoded_together():
    served = serve(ROW, PRIORS)
    together = 1e3 * iteration_s(COST, 0, 0, 4096, 4 * 1024 * 512.0)
    assert served["ttft_ms"] == pytest.approx(together, rel=1e-9)
    assert served["tpot_ms"] == pytest.approx(1e3 * decode_s(4, 4 * 1025) / 63, rel=1e-3)


def test_never_more_requests_run_than_there_are_clients():
    episode = closed_loop(dataclasses.replace(ROW, concurrency=3, requests=8))
    assert episode.rows["needs"].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert [pair.tolist() for pair in episode.needs] == [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]]


def test_clients_and_throughput_obey_littles_law():
    row = dataclasses.replace(ROW, concurrency=16, requests=320, input_tokens=5000)
    served = serve(row, PRIORS)
    seconds = 1e-3 * (served["ttft_ms"] + 63 * served["tpot_ms"])
    assert served["output_tokens_per_s"] == pytest.approx(16 * 64 / seconds, rel=0.02)
