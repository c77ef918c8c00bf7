"""Ablations: arms that share nothing but their seeds, judged on the same episodes, told against the full one."""

import json
from pathlib import Path

import numpy as np
import pytest

from hbmgym.envs.traces.seeds import seeds_for
from hbmgym.eval.regret import MAP
from hbmgym.eval.regrets.cases import sane_cases
from hbmgym.eval.regrets.measure import measure
from hbmgym.train import ablate
from hbmgym.train.ablate import AblateOptions, main, print_ablations

from .test_choice import holding


@pytest.fixture
def trained(tmp_path):
    """Two policies of two arms, as if their training had ended."""
    options = AblateOptions(arms="absolute", seeds=2, episodes=1, jobs=1, out=str(tmp_path), progress=False)
    for arm, share in (("full", 0.0), ("absolute", -0.2)):
        for seed in range(2):
            file = options.policy(arm, seed)
            file.parent.mkdir(parents=True)
            holding(share + 0.1 * seed).save(file)
    return options


def test_all_arms_are_judged_on_the_same_episodes(trained):
    cases = sane_cases(Path(MAP), ["qwen3-next-80b-a3b@h200"], ["idle", "trend"])
    costs, best = ablate._judge(trained, cases, seeds_for("validation", 1))
    assert list(costs) == ["full", "absolute"]
    names = [f"ppo:{trained.policy(arm, seed)}" for arm in costs for seed in range(2)]
    for place, regret in enumerate(measure(cases, names, seeds_for("validation", 1), 1, 1, False)):
        found = [costs[arm][seed, place] for arm in costs for seed in range(2)]
        assert found == [regret.mean(name, "cost") for name in names]
        assert best[place] == regret.mean(regret.case.best_static, "cost")


def test_what_is_trained_is_not_trained_again(trained, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "_domains", lambda options, recipe: ([], []))
    seen = []
    monkeypatch.setattr(ablate, "learn_each", lambda runs, jobs: seen.extend(runs) or [])
    trained.policy("absolute", 1).unlink()
    ablate._train(trained)
    assert [(run.folder, run.options.seed, run.options.absolute) for run in seen] == [
        (trained.folder("absolute", 1), 1, True)
    ]
    assert seen[0].options.total_timesteps == trained.total_timesteps


def test_without_a_checkpoint_nothing_learns_on(trained, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "_domains", lambda options, recipe: ([], []))
    monkeypatch.setattr(ablate, "sane_cases", lambda path: sane_cases(path, ["qwen3-next-80b-a3b@h200"], ["idle"]))
    with pytest.raises(SystemExit) as stop:
        main(["--arms", "online", "--seeds", "1", "--episodes", "1", "--jobs", "1", "--out", trained.out])
    assert stop.value.code == 2
    assert f"{trained.folder('full', 0)} has a policy but no checkpoint" in capsys.readouterr().err


def test_the_table_tells_arms_over_the_full_one(capsys):
    costs = {"full": np.array([[1.0, 2.0], [1.2, 2.2]]), "absolute": np.array([[1.21, 2.1], [1.21, 2.1]])}
    print_ablations(costs, np.array([1.0, 2.0]), 3)
    lines = capsys.readouterr().out.splitlines()
    (full,) = (line for line in lines if line.lstrip("│ ").startswith("full"))
    (absolute,) = (line for line in lines if line.lstrip("│ ").startswith("absolute"))
    assert full.replace("│", " ").split()[1:] == ["+0.0", "+15.0", "+7.5", "+10"]
    # 1.21 over 1.1 and 2.1 over 2.1.
    assert absolute.replace("│", " ").split()[1:] == ["+13.0", "+13.0", "+13.0", "+21", "+5.0", "+-", "8.5", "0", "1"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--arms", "none"], "--arms has 'none', expected some of: full, absolute, shifting, without-shares"),
        (["--seeds", "0"], "--seeds is 0, expected an integer >= 1"),
        (["--episodes", "999"], "--episodes is 999, expected 998 at most"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(flags, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_whole_command_ends_with_the_table(trained, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "_domains", lambda options, recipe: ([], []))
    monkeypatch.setattr(ablate, "sane_cases", lambda path: sane_cases(path, ["qwen3-next-80b-a3b@h200"], ["idle"]))
    main(["--arms", "absolute", "--seeds", "2", "--episodes", "1", "--jobs", "1", "--out", trained.out])
    kept = json.loads((trained.folder("full", 0).parents[1] / "ablations.json").read_text())
    assert list(kept)[:5] == ["cases", "best static", "full", "absolute", "options"]
    assert kept["options"]["total_timesteps"] == 300_000
    assert "idle" in kept["cases"][0] and np.shape(kept["absolute"]) == (2, 1)
    assert "absolute" in capsys.readouterr().out
