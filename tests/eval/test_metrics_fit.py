"""Windows of a server's metrics, made by serving Poisson traffic: what they say of the host."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import cost_of
from hbmgym.envs.serving.cost_model import cold_prefill_s
from hbmgym.envs.serving.engines import EngineProfile
from hbmgym.eval.calibration.host import under
from hbmgym.eval.calibration.metrics_fit import LEAST_S, fit_windows, measured_of, modelled_of
from hbmgym.eval.calibration.prometheus import MetricsWindow

from .calibration_rows import CONSTANTS, SGLANG, VLLM, constants
from .open_traffic import CONFIG, LOADS, Load, served

ENGINES = pytest.mark.parametrize("engine", [VLLM, SGLANG], ids=lambda engine: engine.name)


def window(load: Load, engine: EngineProfile, **changes: Any) -> MetricsWindow:
    """Of such traffic, as `read_window` gives it."""
    requests = served(load, engine)
    means = {name: float(np.mean(values)) for name, values in requests.columns.items()}
    tokens = requests.columns["output_tokens"] - 1
    found = MetricsWindow(
        engine="vLLM",
        model_id="m",
        seconds=requests.seconds,
        clock="file times",
        requests=float(len(tokens)),
        itl_s=float(np.average(requests.columns["itl_s"], weights=tokens)),
        cached_share=0.0,
        running=len(tokens) * (means["e2e_s"] - means["queue_s"]) / requests.seconds,
        iteration_tokens=math.nan,
        iterations=math.nan,
        **{name: value for name, value in means.items() if name != "itl_s"},
    )
    return dataclasses.replace(found, **changes)


def host(engine: EngineProfile) -> EngineProfile:
    return dataclasses.replace(engine, **CONSTANTS)


def config(engine: EngineProfile) -> ServingConfig:
    return under(CONFIG, engine)


@ENGINES
def test_windows_of_all_loads_give_the_host_back(engine):
    found = fit_windows([window(load, host(engine)) for load in LOADS], config(engine))
    assert constants(found.profile) == pytest.approx(CONSTANTS, rel=0.05)
    assert dataclasses.replace(found.profile, **constants(engine)) == engine


@ENGINES
@pytest.mark.parametrize("load", LOADS, ids=str)
def test_the_model_of_a_window_is_near_what_was_served(engine, load):
    made = window(load, host(engine))
    assert modelled_of(made, config(host(engine))) == pytest.approx(measured_of(made), rel=0.04)


def test_the_time_of_a_request_is_what_queue_and_prefill_leave_of_ttft():
    made = window(LOADS[0], host(VLLM))
    assert measured_of(made)["request"] == pytest.approx(CONSTANTS["request_s"], rel=1e-6)
    assert measured_of(dataclasses.replace(made, ttft_s=0.0))["request"] == LEAST_S


def test_an_idle_engine_prefills_as_the_cost_model_has_it():
    made = dataclasses.replace(window(LOADS[0], VLLM), prompt_tokens=9000.0, running=0.0)
    whole = dataclasses.replace(VLLM, snapshots_end_chunks=False)
    expected_s = cold_prefill_s(cost_of(config(whole)), 9000) - VLLM.request_s
    assert modelled_of(made, config(VLLM))["prefill"] == pytest.approx(expected_s)


def test_a_cache_that_is_used_ends_chunks_where_states_are_saved_and_spares_what_it_has():
    made = dataclasses.replace(window(LOADS[0], VLLM), prompt_tokens=1000.0, running=0.0)
    hit = dataclasses.replace(made, prompt_tokens=2000.0, cached_share=0.5)
    plain_s, cached_s = (modelled_of(one, config(VLLM))["prefill"] for one in (made, hit))
    assert plain_s < cached_s < plain_s + VLLM.prefill_floor_s * 48  # 40 tokens by themselves, from a graph
    kernels_save = dataclasses.replace(VLLM, snapshots_end_chunks=False)
    assert modelled_of(hit, config(kernels_save))["prefill"] == pytest.approx(plain_s, rel=0.02)


def test_a_load_beyond_what_can_be_has_a_finite_time_per_token():
    crowded = dataclasses.replace(window(LOADS[0], VLLM), requests=1e6)
    assert 0 < modelled_of(crowded, config(VLLM))["itl"] < math.inf


SILENT = {
    "no prefill time": ({"prefill_s": math.nan}, {"itl"}),
    "no time per token": ({"itl_s": math.nan}, {"request", "prefill"}),
    "no clock": ({"running": math.nan, "seconds": math.nan}, {"request"}),
    "no share of the cache": ({"cached_share": math.nan}, {"request"}),
    "no prompt tokens": ({"prompt_tokens": math.nan}, {"request"}),
    "no output tokens": ({"output_tokens": math.nan}, {"request"}),
}


@pytest.mark.parametrize(("changes", "told"), SILENT.values(), ids=SILENT.keys())
def test_what_a_window_does_not_tell_is_not_fitted(changes, told):
    made = window(LOADS[0], VLLM, **changes)
    assert measured_of(made).keys() == modelled_of(made, config(VLLM)).keys() == told
    found = fit_windows([made], config(VLLM))
    assert all(math.isfinite(value) for value in constants(found.profile).values())
    assert found.measured[0].keys() == found.modelled[0].keys() == told


def test_windows_that_tell_nothing_are_refused():
    silent = window(LOADS[0], VLLM, queue_s=math.nan)
    with pytest.raises(ValueError, match="the windows tell no TTFT with queue and prefill time, and no inter-token"):
        fit_windows([silent, silent], config(VLLM))
    assert fit_windows([silent, window(LOADS[1], VLLM)], config(VLLM)).measured[0] == {}


def test_what_windows_leave_open_stays_as_it_was():
    other = window(LOADS[0], host(VLLM), prefill_s=math.nan)
    assert fit_windows([other], config(VLLM)).profile.request_s == pytest.approx(VLLM.request_s, rel=1e-6)


def test_windows_of_several_deployments_are_refused_in_one_line():
    made = window(LOADS[0], VLLM)
    with pytest.raises(ValueError, match="windows of vLLM b, vLLM m: fit those of one deployment"):
        fit_windows([made, dataclasses.replace(made, model_id="b")], config(VLLM))
    with pytest.raises(ValueError, match="windows of nothing"):
        fit_windows([], config(VLLM))
