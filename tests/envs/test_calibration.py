"""The rates of scenario classes: keys, tables, and the search for the largest one."""

import dataclasses
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from hbmgym.controllers.static import StaticController
from hbmgym.envs import calibration
from hbmgym.envs.calibration import (
    GOODPUT,
    LOAD_FACTOR,
    calibration_key,
    class_rate,
    class_rates,
    find_largest_load,
    find_largest_rate,
    remember_rate,
    trace_load,
)
from hbmgym.envs.serving.config import Policies, ServingConfig, with_policies
from hbmgym.envs.serving.core import Core
from hbmgym.envs.traces.classes import BOOK, CHAT
from hbmgym.envs.traces.compose import compose_generated
from hbmgym.envs.traces.distributions import GeometricTurns, LogNormal, Mixture
from hbmgym.envs.traces.load import load_trace
from hbmgym.envs.traces.scenarios import generate_class
from hbmgym.envs.traces.session_class import SessionClass
from hbmgym.eval.comparison import static_shares
from hbmgym.eval.rollout import run_episode
from hbmgym.files import locked, write_atomically

from ..eval.traffic import write_trace

CONFIG = ServingConfig(model="qwen3.5-4b", hbm_gib=0.4)
BRIEF = SessionClass(
    name="brief",
    first_prompt=LogNormal(np.log(6000.0), 0.2),
    later_text=Mixture(((1.0, LogNormal(4.0, 0.5)),)),
    output=LogNormal(np.log(100.0), 0.2),
    gap_s=LogNormal(1.0, 0.5),
    turns=GeometricTurns(2.0, 4),
)


@pytest.fixture
def shipped(tmp_path, monkeypatch) -> Path:
    """An empty table in place of the shipped one."""
    monkeypatch.setattr(calibration, "SHIPPED", tmp_path / "rates.json")
    return calibration.SHIPPED


@pytest.mark.parametrize("change", [{"model": "qwen3.5-9b"}, {"hbm_gib": 0.5}, {"gpu": "h100"}, {"kv_dtype": "fp8"}])
def test_another_configuration_has_another_key(change):
    assert calibration_key(BRIEF, CONFIG) != calibration_key(BRIEF, dataclasses.replace(CONFIG, **change))


def test_another_class_has_another_key():
    longer = dataclasses.replace(BRIEF, turns=GeometricTurns(3.0, 4))
    assert calibration_key(BRIEF, CONFIG) != calibration_key(longer, CONFIG)


def test_window_and_split_at_start_do_not_change_the_rates(shipped):
    for group, rate in ((CHAT, 3.0), (BOOK, 0.5)):
        remember_rate(shipped, group, CONFIG, rate)
    for change in ({"window_s": 1.0}, {"initial_kv_share": 0.9}):
        rates = class_rates("mix-shift", dataclasses.replace(CONFIG, **change))
        assert rates == {"chat": LOAD_FACTOR * 3.0, "document": LOAD_FACTOR * 0.5}


def test_rules_of_the_engine_do_not_change_the_rates(shipped):
    padded = Policies(eviction="tlru", on_shortage="float-lru", layout="padded")
    other = with_policies(dataclasses.replace(CONFIG, tlru_next_tokens=7), padded)
    remember_rate(shipped, BRIEF, CONFIG, 7.0)
    assert class_rate(BRIEF, other) == LOAD_FACTOR * 7.0


def test_a_table_keeps_what_it_has(shipped):
    remember_rate(shipped, CHAT, CONFIG, 3.0)
    remember_rate(shipped, BOOK, CONFIG, 0.5)
    remember_rate(shipped, CHAT, CONFIG, 4.0)
    rows = json.loads(shipped.read_text()).values()
    assert sorted((row["of"], row["model"], row["requests_per_s"]) for row in rows) == [
        ("class chat", "qwen3.5-4b", 4.0),
        ("class document", "qwen3.5-4b", 0.5),
    ]


def test_a_rate_is_kept_only_when_no_other_process_changes_the_table(shipped):
    """Else one of two rates that are found at the same time would be lost."""
    with locked(shipped.parent):
        keeping = threading.Thread(target=remember_rate, args=(shipped, CHAT, CONFIG, 3.0))
        keeping.start()
        keeping.join(0.2)
        assert keeping.is_alive()
        write_atomically(shipped, b'{"other": {}}')
    keeping.join()
    assert len(json.loads(shipped.read_text())) == 2


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_table_is_written_anew(shipped, content):
    shipped.write_text(content)
    remember_rate(shipped, CHAT, CONFIG, 3.0)
    assert class_rates("steady-chat", CONFIG) == {"chat": LOAD_FACTOR * 3.0}


def test_a_table_that_cannot_be_written_is_no_failure(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    remember_rate(tmp_path / "file" / "rates.json", CHAT, CONFIG, 3.0)
    assert "could not be kept" in capsys.readouterr().err


def least_violation(rate_per_s: float) -> float:
    """Of any static split, the worse of the two calibration seeds."""
    core = Core(CONFIG)
    episodes = [
        compose_generated(generate_class(BRIEF, seed, rate_per_s, 300.0, 600.0), seed=seed, page_tokens=64)
        for seed in (0, 1)
    ]
    return min(
        max(run_episode(StaticController(share), core, episode).cell["slo_violation_rate"] for episode in episodes)
        for share in static_shares(core.layout)
    )


def test_the_goodput_holds_at_the_rate_that_is_found_and_not_far_above():
    rate_per_s = find_largest_rate(BRIEF, CONFIG)
    assert least_violation(rate_per_s) <= 1.0 - GOODPUT
    assert least_violation(1.2 * rate_per_s) > 1.0 - GOODPUT


def test_a_class_that_always_misses_is_refused_and_not_searched_again(shipped, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    hopeless = dataclasses.replace(CONFIG, tpot_slo_floor_s=1e-9, tpot_slo_factor=1e-6)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"class brief misses its SLOs at any rate with qwen3\.5-4b on h200"):
            class_rate(BRIEF, hopeless)
    assert capsys.readouterr().err.count("calibrating class brief") == 1


def test_a_recorded_trace_that_fits_keeps_its_load(tmp_path):
    trace = load_trace(write_trace(tmp_path / "own.jsonl", rate_per_s=0.1))
    assert find_largest_load(trace, dataclasses.replace(CONFIG, hbm_gib=2.0)) == 1.0


def test_the_load_of_a_trace_is_found_once(shipped, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    trace = load_trace(write_trace(tmp_path / "own.jsonl", rate_per_s=0.1))
    config = dataclasses.replace(CONFIG, hbm_gib=2.0)
    assert [trace_load(trace, config) for _ in range(2)] == [LOAD_FACTOR, LOAD_FACTOR]
    assert capsys.readouterr().err.count("calibrating own") == 1


def test_a_trace_that_always_misses_is_refused(shipped, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    trace = load_trace(write_trace(tmp_path / "own.jsonl", rate_per_s=0.1))
    with pytest.raises(ValueError, match="own misses its SLOs at any rate"):
        trace_load(trace, dataclasses.replace(CONFIG, tpot_slo_floor_s=1e-9, tpot_slo_factor=1e-6))
