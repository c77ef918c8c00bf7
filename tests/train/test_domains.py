"""What policies are trained on: references from fixed splits, recipes that leave out what teaches nothing."""

import dataclasses
import json

import numpy as np
import pytest

from hbmgym.controllers.helm.variants import shipped_policy
from hbmgym.controllers.static import StaticController
from hbmgym.envs.platforms import Platform, find_platform
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.eval.rollout import evaluate
from hbmgym.train import ppo
from hbmgym.train.collect import LEAST_REWARD, for_learning
from hbmgym.train.domains import Domain, Reference, Traffic, VariedLoad, find_references
from hbmgym.train.options import TrainOptions
from hbmgym.train.ppo import main
from hbmgym.train.recipes import RECIPES, at_costs, open_traffic, served
from hbmgym.train.runs import new_run

from ..eval.traffic import CHAT, HBM_GIB, MIX, MODEL

CONFIG = ServingConfig(model=MODEL, hbm_gib=HBM_GIB)


@pytest.fixture(scope="module")
def domain(tmp_path_factory) -> Domain:
    file = tmp_path_factory.mktemp("run") / "references.json"
    return find_references([Traffic(CONFIG, (CHAT,))], "train", [0, 1], file, 1, False)[0]


def test_a_reference_is_the_best_of_the_fixed_splits_on_those_seeds(domain):
    found = domain.references[CHAT.name]
    core, episodes = Core(CONFIG), [CHAT.episode("train", seed) for seed in (0, 1)]

    def cost(share: float) -> float:
        return float(np.mean([r.cell["cost"] for r in evaluate(StaticController(share), core, episodes)]))

    assert found.cost == pytest.approx(cost(found.kv_share))
    assert all(found.cost <= cost(share) for share in (found.kv_share - 0.08, 0.5, found.kv_share + 0.08))


def test_references_that_are_known_are_not_sought_again(domain, tmp_path):
    file = tmp_path / "references.json"
    first = find_references([Traffic(CONFIG, (CHAT,))], "train", [0, 1], file, 1, False)
    marked = file.read_text().replace(str(first[0].references[CHAT.name].cost), "0.125")
    file.write_text(marked)
    again = find_references([Traffic(CONFIG, (CHAT,))], "train", [0, 1], file, 1, False)
    assert again[0].references[CHAT.name].cost == 0.125
    other_seeds = find_references([Traffic(CONFIG, (CHAT,))], "train", [2], file, 1, False)
    assert other_seeds[0].references[CHAT.name].cost != 0.125


def test_only_workloads_that_are_new_are_run(tmp_path):
    """A recipe may have gained or lost scenarios since the run was interrupted."""
    file = tmp_path / "references.json"
    find_references([Traffic(CONFIG, (CHAT,))], "train", [0], file, 1, False)
    chat = json.loads(file.read_text())
    both = find_references([Traffic(CONFIG, (CHAT, MIX))], "train", [0], file, 1, False)[0]
    assert set(both.references) == {CHAT.name, MIX.name}
    assert json.loads(file.read_text()).items() > chat.items()
    written = file.read_text()
    assert set(find_references([Traffic(CONFIG, (MIX,))], "train", [0], file, 1, False)[0].references) == {MIX.name}
    assert file.read_text() == written


@pytest.mark.parametrize("change", [{"rates": {"chat": 0.3}}, {"load": 0.5}, {"loop": "closed"}])
def test_references_are_those_of_the_traffic_that_arrives_now(change, tmp_path):
    """Rates may have been calibrated anew since the run was interrupted."""
    file = tmp_path / "references.json"
    changed = dataclasses.replace(CHAT, **change)
    found = [
        find_references([Traffic(CONFIG, (workload,))], "train", [0], file, 1, False)[0].references[CHAT.name]
        for workload in (CHAT, changed)
    ]
    assert found[0].cost != found[1].cost


def test_rewards_are_clipped_from_below_for_learning():
    rewards = np.array([-1000.0, LEAST_REWARD - 0.5, -3.0, 0.0, 500.0])
    np.testing.assert_allclose(for_learning(rewards), [-2.0, -2.0, -0.3, 0.0, 50.0], rtol=1e-6)
    assert for_learning(rewards).dtype == np.float32


def test_workloads_that_no_fixed_split_serves_teach_nothing(domain):
    other = dataclasses.replace(CHAT, name="other")
    references = {CHAT.name: Reference(0.5, 1.0, 0.0), "other": Reference(0.5, 1.0, 0.02)}
    both = Domain(CONFIG, (CHAT, other), "train", (0,), references)
    assert [workload.name for workload in served(both).workloads] == [CHAT.name]
    assert set(served(both).references) == {CHAT.name}


def test_a_platform_without_a_rate_for_a_scenario_leaves_it_out(capsys):
    traffic = open_traffic(["qwen3.5-9b@rtx3060"], ["steady-chat", "steady-agent"])
    assert [workload.name for workload in traffic[0].workloads] == ["steady-chat"]
    assert "steady-agent on qwen3.5-9b@rtx3060 is left out" in capsys.readouterr().err


def test_the_recipe_keeps_a_shape_and_a_budget_for_validation():
    recipe = RECIPES["release"]
    seen = {Platform(*name.split("@")[:2]).model for name in recipe.training}
    assert {name.split("@")[0] for name in recipe.validation} - seen == {"falcon-h1-34b"}
    assert set(recipe.validation) & set(recipe.training) == {"qwen3-next-80b-a3b@h200"}
    trained = shipped_policy().header.training["platforms"]
    assert [find_platform(name).config for name in trained] == [find_platform(name).config for name in recipe.training]
    assert not any("jamba" in name for name in (*recipe.training, *recipe.validation))


def test_every_seed_has_a_load_of_its_own_within_the_bounds():
    varied = VariedLoad(CHAT, 0.5, 1.5)
    rows = [len(varied.episode("train", seed).rows) for seed in range(8)]
    bounds = [
        len(dataclasses.replace(CHAT, load=load).episode("train", seed).rows) for load in (0.5, 1.5) for seed in (0, 1)
    ]
    assert len(set(rows)) == 8 and 0.7 * min(bounds) < min(rows) < max(rows) < 1.3 * max(bounds)
    again = varied.episode("train", 3)
    assert np.array_equal(again.rows, varied.episode("train", 3).rows) and again.name == CHAT.name
    exact = dataclasses.replace(CHAT, load=0.5 * CHAT.load).episode("train", 3)
    assert np.array_equal(VariedLoad(CHAT, 0.5, 0.5).episode("train", 3).rows, exact.rows)


def test_moves_cost_more_or_less_and_fixed_splits_the_same(domain):
    dear, cheap = at_costs([domain], (4.0, 0.25))
    assert (dear.config.chunk_move_s, cheap.config.chunk_move_s) == (4 * CONFIG.chunk_move_s, CONFIG.chunk_move_s / 4)
    assert dear.references == cheap.references == domain.references
    costs = [
        evaluate(StaticController(0.5), Core(own.config), [CHAT.episode("train", 0)])[0].cell["cost"]
        for own in (dear, cheap)
    ]
    assert costs[0] == costs[1]


@pytest.mark.parametrize("flags", [["--scenario", "mix-shift"], ["--hbm-gib", "8"], ["--backend", "accounting"]])
def test_a_recipe_has_traffic_of_its_own(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--recipe", "release", *flags])
    assert stop.value.code == 2
    assert f"--recipe release has platforms and traffic of its own: leave {flags[0]} out" in capsys.readouterr().err


def test_flags_go_before_a_recipe_also_where_they_say_the_default(monkeypatch, tmp_path):
    seen = []

    def prepare(options: TrainOptions):
        seen.append(options)
        raise ValueError("seen")

    monkeypatch.setattr(ppo, "prepare", prepare)
    monkeypatch.chdir(tmp_path)
    settings = dict(RECIPES["release"].settings)
    default = TrainOptions().total_timesteps
    assert settings["total_timesteps"] != default
    for flags in ([], ["--total-timesteps", str(default)]):
        with pytest.raises(SystemExit):
            main(["--recipe", "release", *flags])
    assert [options.total_timesteps for options in seen] == [settings["total_timesteps"], default]
    assert {options.n_envs for options in seen} == {settings["n_envs"]}
    assert new_run(seen[0]).name == "ppo-release-1"


@pytest.mark.parametrize(
    ("flags", "said"), [(["--smoke"], "has no small run"), (["--n-envs", "8"], "--n-envs is 8, but --recipe release")]
)
def test_a_recipe_trains_on_all_its_platforms(flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--recipe", "release", *flags])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
