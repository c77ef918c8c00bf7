import math

import pytest

from hbmgym.controllers.arrivals import ArrivalCounter
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.envs.workload import open_workloads

from .records import served


def test_the_windows_are_found_in_the_average_over_them():
    counter, average = ArrivalCounter(), 0.0
    counter.reset()
    for window_s, requests, tokens in ((5.0, 10, 3000.0), (5.3, 1, 90_000.0), (4.8, 0, 0.0), (5.0, 7, 200.0)):
        average += -math.expm1(-window_s / 10.0) * (requests * tokens / window_s - average)
        record = served(window_s=window_s, arrivals_per_s=requests / window_s, prompt_tokens_per_s_10s=average)
        assert counter.count(record) == pytest.approx((requests, tokens))


def test_before_the_first_window_nothing_has_arrived():
    counter = ArrivalCounter()
    counter.reset()
    assert counter.count(served(window_s=0.0)) == (0.0, 0.0)


def test_reset_forgets_the_average():
    counter = ArrivalCounter()
    record = served(arrivals_per_s=2.0, prompt_tokens_per_s_10s=1000.0)
    counter.reset()
    first = counter.count(record)
    assert counter.count(record) != first
    counter.reset()
    assert counter.count(record) == first


def test_the_engine_s_own_arrivals_are_found():
    config, counter = ServingConfig(), ArrivalCounter()
    core = Core(config)
    episode = open_workloads(config)[0].episode("train", 0).until(100.0, 0.0)
    counter.reset()
    core.reset(episode)
    begin_s = 0.0
    while core.now_s < 100.0:
        telemetry = core.run_window()
        arrived = (episode.rows.arrival_s > begin_s) & (episode.rows.arrival_s <= telemetry.time_s)
        requests, tokens = arrived.sum(), episode.rows.input_tokens[arrived].sum()
        assert counter.count(telemetry) == pytest.approx((requests, tokens / max(requests, 1)))
        begin_s = telemetry.time_s
