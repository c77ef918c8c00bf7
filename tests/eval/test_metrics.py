"""Each metric against requests written by hand."""

import dataclasses

import numpy as np
import pytest

from hbmgym.envs.serving.metrics import episode_metrics, slo_ratio, tpot_s, ttft_s
from hbmgym.envs.serving.state import DEADLINE, DECODING, DOES_NOT_FIT, FINISHED, REJECTED, WAITING, make_requests
from hbmgym.envs.traces.episode import ROW, Episode

TTFT_SLO_S, TPOT_SLO_S = 2.0, 0.1
NAN = float("nan")


def case(*asks: dict[str, float]) -> tuple[Episode, np.recarray]:
    """Requests that arrive one second after the other, are measured and finish in time unless told otherwise."""
    rows, requests = np.zeros(len(asks), ROW).view(np.recarray), make_requests(len(asks))
    for index, ask in enumerate(asks):
        arrival_s = float(index)
        values = {
            "arrival_s": arrival_s,
            "input_tokens": 100,
            "output_tokens": 11,
            "measured": 1,
            "status": FINISHED,
            "ttft_slo_s": TTFT_SLO_S,
            "admitted_s": arrival_s,
            "first_token_s": arrival_s + 1.0,
            "ended_s": arrival_s + 1.5,
            **ask,
        }
        for name, value in values.items():
            for records in (rows, requests):
                if name in records.dtype.names:
                    records[index][name] = value
    return Episode("by hand", 0, rows, np.zeros(0, np.int32), 0, 64, 0.0, 10.0), requests


def metrics(*asks: dict[str, float]) -> dict[str, float]:
    return episode_metrics(*case(*asks), TPOT_SLO_S)


GOOD: dict[str, float] = {}
LATE = {"first_token_s": 100.0, "ended_s": 100.5}
GONE = {"status": REJECTED, "reject_reason": DEADLINE, "admitted_s": NAN, "first_token_s": NAN, "ended_s": 9.0}
TOO_LARGE = {**GONE, "reject_reason": DOES_NOT_FIT}
UNFINISHED = {"status": DECODING, "ended_s": NAN}


def test_ttft_counts_from_arrival_and_is_ten_slos_without_a_first_token():
    _, requests = case(GOOD, GONE)
    assert ttft_s(requests).tolist() == [1.0, 10 * TTFT_SLO_S]


def test_tpot_spreads_the_rest_of_a_finished_output():
    episode, requests = case(GOOD, {"output_tokens": 1}, UNFINISHED, GONE)
    values = tpot_s(episode.rows, requests)
    assert values[0] == pytest.approx(0.05)
    assert np.isnan(values[1:]).all()


def test_the_ratio_is_the_worse_of_the_two():
    episode, requests = case(GOOD, {"ended_s": 4.0}, {"output_tokens": 1}, UNFINISHED)
    ratios = slo_ratio(episode.rows, requests, TPOT_SLO_S)
    assert ratios.tolist() == pytest.approx([0.5, 2.0, 0.5, np.inf])


def test_cost_is_the_mean_ratio_capped_at_ten():
    assert metrics(GOOD)["cost"] == pytest.approx(0.5)
    assert metrics(GOOD, LATE, GONE, UNFINISHED)["cost"] == pytest.approx((0.5 + 10 + 10 + 10) / 4)


def test_goodput_counts_requests_that_meet_both_slos_per_second_of_the_measured_part():
    measured = metrics(GOOD, GOOD, LATE, GONE, UNFINISHED)
    assert measured["slo_goodput_per_s"] == pytest.approx(2 / 10.0)
    assert measured["slo_violation_rate"] == pytest.approx(3 / 5)


def test_a_request_at_its_slo_meets_it():
    assert metrics({"first_token_s": TTFT_SLO_S, "ended_s": TTFT_SLO_S + 10 * 0.05})["slo_violation_rate"] == 0.0


def test_percentiles_are_over_all_measured_requests():
    measured = metrics(*[GOOD] * 9, GONE)
    assert measured["ttft_p50_s"] == pytest.approx(1.0)
    assert measured["ttft_mean_s"] == pytest.approx((9 * 1.0 + 20.0) / 10)
    assert measured["ttft_p99_s"] == pytest.approx(np.percentile([1.0] * 9 + [20.0], 99))


def test_hit_rate_is_over_the_prompts_of_admitted_requests():
    measured = metrics({"reused_tokens": 50}, {"input_tokens": 300, "reused_tokens": 50}, {**GONE, "input_tokens": 900})
    assert measured["hit_rate"] == pytest.approx(100 / 400)


def test_starved_requests_are_counted_once():
    measured = metrics({"preemptions": 3}, TOO_LARGE, GONE, {**TOO_LARGE, "preemptions": 1}, GOOD)
    assert (measured["preemptions"], measured["oom_requests"], measured["rejected"]) == (4, 3, 3)


def test_who_is_neither_finished_nor_rejected_is_unfinished():
    measured = metrics(GOOD, GONE, UNFINISHED, {**UNFINISHED, "status": WAITING})
    assert (measured["rejected"], measured["unfinished"]) == (1, 2)


def test_what_is_refused_or_left_counts_by_tokens_too():
    measured = metrics(GOOD, {**TOO_LARGE, "input_tokens": 1000}, {**UNFINISHED, "input_tokens": 10})
    assert measured["unserved_tokens"] == pytest.approx((1011 + 21) / (111 + 1011 + 21))
    assert metrics(GOOD, LATE)["unserved_tokens"] == 0.0


def test_a_class_that_is_given_up_shows_however_few_tokens_it_has():
    asks = [GOOD] * 98 + [GONE, GOOD]
    episode, requests = case(*asks)
    assert episode_metrics(episode, requests, TPOT_SLO_S)["worst_class_unserved"] == pytest.approx(0.01)
    few = np.array([0] * 98 + [3, 3], np.uint8)
    judged = episode_metrics(dataclasses.replace(episode, traffic_class=few), requests, TPOT_SLO_S)
    assert (judged["unserved_tokens"], judged["worst_class_unserved"]) == pytest.approx((0.01, 0.5))


def test_only_measured_rows_of_a_class_count():
    episode, requests = case(GOOD, GOOD, {**GONE, "measured": 0})
    judged = episode_metrics(dataclasses.replace(episode, traffic_class=np.array([0, 1, 1])), requests, TPOT_SLO_S)
    assert judged["worst_class_unserved"] == 0.0


def test_the_cost_by_token_weights_each_request_with_its_tokens():
    measured = metrics(GOOD, {**GONE, "input_tokens": 989})
    assert measured["token_cost"] == pytest.approx((111 * 0.5 + 1000 * 10) / 1111)
    assert measured["cost"] == pytest.approx((0.5 + 10) / 2)


def test_the_warm_up_is_not_measured():
    assert metrics({**GONE, "measured": 0}, GOOD) | {"ttft_mean_s": 0} == metrics(GOOD) | {"ttft_mean_s": 0}


def test_without_a_finished_request_tpot_is_zero():
    assert metrics(GONE)["tpot_p99_s"] == 0.0
