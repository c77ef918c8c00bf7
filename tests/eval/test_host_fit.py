"""Which runs are fitted, and that the fit finds the host that made them."""

import dataclasses
import random

import pytest

from hbmgym.envs.serving.engines import ENGINE_PROFILES
from hbmgym.eval.calibration.closed_loop import replay
from hbmgym.eval.calibration.fit import MOST_FITTED, calibrate, errors, fit, pick_rows, ratios, starting_profile
from hbmgym.eval.calibration.host import middle_profile
from hbmgym.eval.calibration.rows import PUBLISHED, by_deployment, read_rows

from .calibration_rows import CONSTANTS, DEPLOYMENTS, VLLM, constants, measured_fields, row, rows_of


@pytest.mark.parametrize("name", ["vLLM, two GPUs", "vLLM, without states", "SGLang, exclusive"])
def test_the_constants_that_made_the_rows_are_found(name):
    rows = rows_of(measured_fields(**DEPLOYMENTS[name]))
    deployment = rows[0].deployment
    found = calibrate(deployment, rows, starting_profile(deployment))
    assert constants(found.judged) == pytest.approx(CONSTANTS, rel=0.02)
    assert found.profile == found.judged
    assert (len(found.fitted), len(found.held_out)) == (4, 2)
    for error in errors(found.held_out).values():
        assert error.p90 < 0.02


def test_what_no_row_shows_stays_as_in_the_profile_it_starts_from():
    single = row(concurrency=1, requests=3, ttft_ms=None)
    found = fit([single], VLLM)
    assert found.request_s == pytest.approx(VLLM.request_s, rel=1e-6)
    assert found.prefill_floor_s == pytest.approx(VLLM.prefill_floor_s, rel=1e-6)
    assert replay(single).figures(found)["tpot"] == pytest.approx(10.0, rel=0.01)


def test_nothing_but_the_host_changes():
    found = fit(rows_of(measured_fields())[:1], VLLM)
    assert dataclasses.replace(found, **constants(VLLM)) == VLLM


def test_a_few_rows_are_judged_without_one_and_shipped_with_all():
    rows = [one for one in rows_of(measured_fields()) if one.concurrency < 4]
    found = calibrate(rows[0].deployment, rows, VLLM)
    assert (len(found.fitted), len(found.held_out)) == (2, 1)
    assert found.profile != found.judged
    assert all(one.name in found.profile.source for one in rows)
    assert sum(one.name in found.judged.source for one in rows) == 2


def test_a_single_row_is_fitted_and_nothing_is_held_out():
    single = row()
    found = calibrate(single.deployment, [single], VLLM)
    assert found.fitted == (single,) and found.held_out == []


def test_ratios_are_modelled_over_measured_of_what_may_be_used():
    one = row(ttft_ms=50.0, tpot_ms=4.0, speculative=1)
    times = replay(one).figures(VLLM)
    assert ratios(replay(one), VLLM) == {"ttft": times["ttft"] / 50.0}


def test_errors_are_of_the_size_and_the_bias_keeps_its_sign():
    found = errors([{"ttft": 0.8, "tpot": 1.5}, {"ttft": 1.1}, {"ttft": 1.4}])
    assert (found["ttft"].rows, found["tpot"].rows) == (3, 1)
    assert found["ttft"].median == pytest.approx(0.2) and found["ttft"].p90 == pytest.approx(0.36)
    assert found["ttft"].bias == pytest.approx(0.1) and found["tpot"].bias == pytest.approx(0.5)
    assert errors([{"tpot": 1.0}]).keys() == {"tpot"}


def published() -> list:
    return list(by_deployment(read_rows(PUBLISHED)).values())


def test_at_most_four_rows_are_picked_and_never_all_of_several():
    for rows in published():
        picked = pick_rows(rows)
        assert len(picked) == len(set(picked)) == min(MOST_FITTED, max(len(rows) - 1, 1))
        assert set(picked) <= set(rows)


def test_what_was_measured_has_no_say_in_which_rows_are_picked():
    for rows in published():
        blind = [dataclasses.replace(one, measured={name: 1.0 for name in one.measured}) for one in rows]
        assert [one.where for one in pick_rows(blind)] == [one.where for one in pick_rows(rows)]


def test_the_order_and_the_place_of_rows_have_no_say_either():
    shuffler = random.Random(0)
    for rows in published():
        picked = [(one.name, one.measured) for one in pick_rows(rows)]
        shuffled = shuffler.sample(rows, len(rows))
        moved = [dataclasses.replace(one, where=f"mine.csv row {n}") for n, one in enumerate(shuffled, start=1)]
        assert [(one.name, one.measured) for one in pick_rows(moved)] == picked


def test_the_rows_picked_span_prompts_and_clients():
    rows = [row(input_tokens=tokens, concurrency=clients) for tokens in (1024, 4096, 8192) for clients in (1, 4, 16)]
    assert [(one.input_tokens, one.concurrency) for one in pick_rows(rows)] == [
        *((1024, 1), (8192, 16), (8192, 1), (1024, 4))
    ]


@pytest.mark.parametrize(
    ("engine", "version", "name"),
    [
        ("vLLM", "0.11.0", "vllm-graph"),
        ("vLLM", "", "vllm-graph"),
        ("SGLang", "", "sglang-eager"),
        ("SGLang", "0.5.9", "sglang-eager"),
        ("SGLang", "0.5.10.post1", "sglang-eager"),
        ("SGLang", "0.5.15", "sglang-graph"),
        ("SGLang", "v0.5.15rc1", "sglang-graph"),
        ("SGLang", "0.6", "sglang-graph"),
        ("SGLang", "1.0.0", "sglang-graph"),
        ("SGLang", "2026-06", "sglang-eager"),
        ("SGLang", "2026-07", "sglang-graph"),
        ("SGLang", "main 2026-03", "sglang-eager"),
        ("SGLang", "nightly-dev-20260402-d7256eb6", "sglang-eager"),
        ("SGLang", "nightly-dev-20260802-d7256eb6", "sglang-graph"),
    ],
)
def test_the_profile_to_start_from_goes_by_engine_and_version(engine, version, name):
    assert starting_profile(row(engine=engine, version=version).deployment) is ENGINE_PROFILES[name]


def test_the_middle_profile_has_the_median_of_every_constant():
    hosts = [dataclasses.replace(VLLM, layer_s=1e-6 * n, request_s=1e-3 * (4 - n)) for n in (1, 2, 3)]
    found = middle_profile(hosts, VLLM)
    assert (found.layer_s, found.request_s, found.prefill_factor) == (2e-6, 2e-3, VLLM.prefill_factor)
