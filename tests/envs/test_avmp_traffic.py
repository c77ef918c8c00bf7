"""The AVMP paper's workloads as traffic of the serving engine."""

import numpy as np
import pytest

from hbmgym.envs import calibration
from hbmgym.envs.calibration import LOAD_FACTOR, calibration_key, remember_rate
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.traces.avmp_traffic import MAX_REQUESTS, PAPER_SCENARIOS, PaperTraffic, find_traffic
from hbmgym.envs.traces.seeds import SeedError
from hbmgym.envs.traces.trace import ID_COLUMNS, ROW_COLUMNS, TraceError
from hbmgym.envs.traces.validate import build_trace
from hbmgym.envs.workload import PaperTrafficWorkload, open_workloads

CONFIG = ServingConfig(model="qwen3.5-4b", hbm_gib=1.0)
POOL = (20, 300, 5000)
ALL = [PaperTraffic(workload, POOL) for workload in PAPER_SCENARIOS.values()]
every = pytest.mark.parametrize("traffic", ALL, ids=lambda traffic: traffic.name)


@every
def test_its_trace_passes_the_checks_of_every_loader(traffic):
    trace = traffic.trace(1, 2.0, 500.0)
    columns = {key: getattr(trace, key) for key in (*ROW_COLUMNS, *ID_COLUMNS)}
    checked = build_trace(columns, name=traffic.name, kind="open-loop", block_size=0, path=traffic.name, where=str)
    assert checked.notices == ()
    assert not trace.block_counts.any() and (trace.parent == -1).all()
    assert trace.arrival_s[0] >= 0.0 and trace.arrival_s[-1] < trace.span_s == 500.0


@every
def test_requests_arrive_at_the_rate_and_up_to_the_end(traffic):
    trace = traffic.trace(2, 5.0, 4000.0)
    assert len(trace) == pytest.approx(20_000, rel=0.03)
    assert trace.arrival_s[-1] > 3990.0


@every
def test_a_seed_makes_one_trace(traffic):
    one, same, other = (traffic.trace(seed, 2.0, 500.0) for seed in (3, 3, 4))
    assert one.input_tokens.tolist() == same.input_tokens.tolist()
    assert one.arrival_s.tolist() == same.arrival_s.tolist()
    assert one.input_tokens.tolist() != other.input_tokens[: len(one)].tolist()


@pytest.mark.parametrize("workload", ["uniform_short", "mixed_long", "sharegpt_replay"])
def test_one_request_arrives_per_tick(workload):
    trace = PaperTraffic(workload, POOL).trace(0, 0.5, 100.0)
    assert trace.arrival_s.tolist() == [2.0 * tick for tick in range(50)]


def test_a_burst_is_spread_over_its_tick_and_stays_in_order():
    trace = PaperTraffic("agentic_burst").trace(0, 1.0, 10_000.0)  # a tick of 10 s
    assert (np.diff(trace.arrival_s) > 0).all()
    per_tick = np.bincount((trace.arrival_s // 10.0).astype(int))
    # Poisson: as many in a tick on average as they vary.
    assert per_tick[1:].mean() == pytest.approx(10.0, rel=0.05) == pytest.approx(per_tick[1:].var(), rel=0.2)


def test_lengths_are_the_papers():
    trace = PaperTraffic("mixed_long").trace(0, 1.0, 5000.0)
    long = trace.input_tokens >= 16384
    assert long.mean() == pytest.approx(0.2, abs=0.02)
    assert trace.input_tokens[~long].max() <= 4096 and trace.input_tokens.max() <= 65536
    assert (trace.output_tokens.min(), trace.output_tokens.max()) == (128, 512)
    assert set(PaperTraffic("sharegpt_replay", POOL).trace(0, 1.0, 500.0).input_tokens.tolist()) == {20, 300, 4096}


@pytest.mark.parametrize(
    ("rate_per_s", "span_s", "named"),
    [(1e6, 500.0, f"expected at most {MAX_REQUESTS}"), (1e-6, 500.0, "0 requests arrive within 500 s")],
)
def test_too_many_and_too_few_requests_are_refused(rate_per_s, span_s, named):
    with pytest.raises(TraceError, match=named):
        PaperTraffic("agentic_burst").trace(0, rate_per_s, span_s)


@pytest.fixture
def lengths(tmp_path):
    path = tmp_path / "lengths.json"
    path.write_text(str(list(POOL)))
    return path


def test_scenarios_are_found_by_name(lengths):
    assert find_traffic("avmp-uniform-short") == PaperTraffic("uniform_short")
    assert find_traffic(f"avmp-sharegpt-replay:{lengths}") == PaperTraffic("sharegpt_replay", POOL)
    assert find_traffic("mix-shift") is None


@pytest.mark.parametrize(
    ("scenario", "named"),
    [
        ("avmp-sharegpt-replay", "give avmp-sharegpt-replay:FILE"),
        ("avmp-sharegpt-replay:nowhere.json", "nowhere.json: cannot be read"),
        ("avmp-mixed-long:lengths.json", "avmp-mixed-long reads no file"),
        ("avmp-rush-hour", "inelastic, avmp-uniform-short"),
    ],
)
def test_what_is_no_scenario_is_refused(scenario, named):
    with pytest.raises(TraceError, match=named):
        open_workloads(CONFIG, scenarios=[scenario], tick_s=1.0)


@pytest.mark.parametrize("tick_s", [0.0, -1.0, 1e-5, 1e5, float("nan"), float("inf")])
def test_a_bad_tick_is_refused(tick_s):
    with pytest.raises(ValueError, match="tick_s is"):
        open_workloads(CONFIG, scenarios=["avmp-mixed-long"], tick_s=tick_s)


def test_a_closed_loop_is_refused():
    with pytest.raises(ValueError, match="loop is 'closed', but no request of avmp-mixed-long follows another one"):
        open_workloads(CONFIG, scenarios=["avmp-mixed-long"], tick_s=1.0, loop="closed")


def test_a_tick_for_scenarios_without_one_is_refused():
    with pytest.raises(ValueError, match="only avmp- scenarios have ticks"):
        open_workloads(CONFIG, scenarios=["steady-chat"], tick_s=1.0)


def test_a_tick_says_how_fast_requests_arrive(lengths):
    names = ["avmp-uniform-short", "avmp-agentic-burst", f"avmp-sharegpt-replay:{lengths}"]
    workloads = open_workloads(CONFIG, scenarios=names, tick_s=4.0, load=2.0)
    assert [workload.name for workload in workloads] == [name.partition(":")[0] for name in names]
    assert all(isinstance(workload, PaperTrafficWorkload) for workload in workloads)
    assert [workload.rate_per_s for workload in workloads] == [0.5, 5.0, 0.5]
    assert [workload.tick_s for workload in workloads] == [2.0, 2.0, 2.0]


def test_without_a_tick_the_rate_is_calibrated(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "SHIPPED", tmp_path / "rates.json")
    remember_rate(calibration.SHIPPED, PaperTraffic("mixed_long"), CONFIG, 3.0)
    workload = open_workloads(CONFIG, scenarios=["avmp-mixed-long"])[0]
    assert isinstance(workload, PaperTrafficWorkload)
    assert workload.rate_per_s == pytest.approx(LOAD_FACTOR * 3.0)


def test_other_lengths_have_another_rate():
    keys = {calibration_key(PaperTraffic("sharegpt_replay", pool), CONFIG) for pool in ((1,), (2,), (1, 2))}
    assert len(keys) == 3


@every
def test_its_episodes_belong_to_parts_and_share_nothing(traffic):
    workload = PaperTrafficWorkload(traffic, 0.2, CONFIG.page_tokens)
    episode = workload.episode("validation", 10_000)
    assert (episode.name, episode.seed) == (traffic.name, 10_000)
    assert episode.id_count == len(episode.refs) == episode.rows["known_ids"].sum() > 0
    with pytest.raises(SeedError):
        workload.episode("train", 10_000)
