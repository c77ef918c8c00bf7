import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbmgym.controllers.base import HOLD, Controller
from hbmgym.controllers.helm.policy import Header, Policy, PolicyError
from hbmgym.controllers.helm.ppo import PpoController
from hbmgym.controllers.helm.variants import SHIPPED, VARIANTS, make_variant, shipped_policy
from hbmgym.controllers.observation import OBSERVATION_SIZE
from hbmgym.controllers.registry import MOVING_CONTROLLERS, is_static, make_controller

from .records import LAYOUT, SETUP, served, served_records


def constant_policy(action: float, kind: str = "incremental") -> Policy:
    """A policy of one layer that always answers `action`."""
    return Policy.from_layers([(np.zeros((1, OBSERVATION_SIZE)), np.array([action]))], Header(action_kind=kind))


def random_policy() -> Policy:
    rng = np.random.default_rng(0)
    return Policy.from_layers(
        [(rng.normal(size=(8, OBSERVATION_SIZE)), rng.normal(size=8)), (rng.normal(size=(1, 8)), rng.normal(size=1))]
    )


CONTROLLERS = [
    *(make_controller(spec) for spec in ("static-.5", "sglang-0.9")),
    *(make_controller(spec) for spec in MOVING_CONTROLLERS),
    PpoController(random_policy()),
    PpoController(constant_policy(0.3, "absolute")),
    *(make_variant(name, random_policy()) for name in VARIANTS),
    make_variant("helm", constant_policy(0.3, "absolute")),
]


@pytest.mark.parametrize("controller", CONTROLLERS, ids=lambda c: c.name)
@settings(deadline=None, max_examples=50)  # the first call compiles
@given(telemetries=st.lists(served_records(), min_size=1, max_size=4))
def test_every_decision_is_legal(controller: Controller, telemetries):
    low, high = (0.0, 1.0) if controller.fixed_share is not None else SETUP.kv_share_bounds
    controller.reset(SETUP)
    for telemetry in telemetries:
        share = controller.act(telemetry).kv_share
        assert share is None or (isinstance(share, float) and low <= share <= high)


@pytest.mark.parametrize("controller", CONTROLLERS, ids=lambda c: c.name)
@settings(deadline=None, max_examples=50)  # the first call compiles
@given(telemetries=st.lists(served_records(), min_size=1, max_size=4))
def test_reset_forgets_the_past(controller: Controller, telemetries):
    def decisions():
        controller.reset(SETUP)
        return [controller.act(telemetry) for telemetry in telemetries]

    assert decisions() == decisions()


def test_a_policy_of_zeros_holds():
    controller = PpoController(constant_policy(0.0))
    controller.reset(SETUP)
    assert controller.act(served(0.4)) is HOLD


def test_ppo_steps_from_the_share_it_finds():
    controller = PpoController(constant_policy(0.5))
    for share in (LAYOUT.share(30), LAYOUT.share(60)):
        controller.reset(SETUP)
        assert controller.act(served(share)).kv_share == pytest.approx(share + 0.05)
        assert controller.act(served(share)).kv_share == pytest.approx(share + 0.10)


@pytest.mark.parametrize(
    ("spec", "name", "fixed_share"),
    [
        ("static-.5", "static-0.500", 0.5),
        ("static-0.25", "static-0.250", 0.25),
        ("sglang-0.9", "sglang-0.9", 1 / 1.9),
        *((spec, spec, None) for spec in MOVING_CONTROLLERS),
    ],
)
def test_controllers_are_made_by_name(spec, name, fixed_share):
    controller = make_controller(spec)
    assert (controller.name, controller.fixed_share) == (name, fixed_share)


@pytest.mark.parametrize("name", [*VARIANTS, "ppo"])
def test_policies_take_no_windows_but_those_of_their_training(tmp_path, name):
    constant_policy(0.1).save(tmp_path / "policy.npz")
    spec = f"{name}:{tmp_path}"
    make_controller(spec, 5.0)
    with pytest.raises(ValueError, match=f"{name} was trained on windows of 5 s, window_s is 30: "):
        make_controller(spec, 30.0)
    with pytest.raises(ValueError, match=f"{name} was trained on windows of 5 s, window_s is 30: "):
        make_controller(spec).reset(dataclasses.replace(SETUP, window_s=30.0))


@pytest.mark.parametrize("spec", [*MOVING_CONTROLLERS, "static-.5", "sglang-0.9"])
def test_rules_take_windows_of_any_length(spec):
    make_controller(spec, 30.0).reset(dataclasses.replace(SETUP, window_s=30.0))


@pytest.mark.parametrize("file", ["policy.npz", "best/policy.npz"])
def test_a_run_folder_stands_for_its_policy(tmp_path, file):
    constant_policy(0.1).save(tmp_path / file)
    for path in (tmp_path, tmp_path / file):
        assert make_controller(f"ppo:{path}").name == "ppo"


def test_a_folder_without_policy_is_named(tmp_path):
    with pytest.raises(PolicyError, match=r"holds neither policy\.npz"):
        make_controller(f"ppo:{tmp_path}")


@pytest.mark.parametrize("spec", ["", "magic", "static", "static-", "ppo", "ppo:", "demand-1", "threshold:x"])
def test_unknown_names_list_the_known_ones(spec):
    with pytest.raises(ValueError, match="expected one of: static-<kv share>, sglang-") as error:
        make_controller(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", VARIANTS)
def test_helm_and_its_ablations_take_a_file_or_the_shipped_one(tmp_path, monkeypatch, name):
    constant_policy(0.1).save(tmp_path / "policy.npz")
    assert make_controller(f"{name}:{tmp_path}").name == name
    monkeypatch.setattr("hbmgym.controllers.helm.variants.SHIPPED", tmp_path / "policy.npz")
    assert make_controller(name).name == name


def test_the_shipped_policy_is_the_one_that_the_page_describes():
    policy = shipped_policy()
    page = (Path(__file__).parents[2] / "docs" / "helm.md").read_text(encoding="utf-8")
    assert policy.digest() in page
    assert f"{policy.header.training['validation_cost']:.4f}" in page
    assert SHIPPED.stat().st_size <= 2**20
    assert (policy.low < policy.high).sum() > 60


@pytest.mark.parametrize("spec", ["static-half", "static-1.5", "static--1", "sglang--0.9", "static-nan"])
def test_bad_numbers_are_refused(spec):
    with pytest.raises(ValueError, match="number"):
        make_controller(spec)


def test_static_is_who_keeps_the_split_it_starts_at():
    for controller in CONTROLLERS:
        assert is_static(controller.name) == (controller.fixed_share is not None)
