"""Engine profiles: those that come with hbmgym, those read from files, and what tells two setups apart."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest

from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import setup_hash
from hbmgym.envs.serving.engines import (
    DEFAULT_ENGINE,
    ENGINE_PROFILES,
    HOST_CONSTANTS,
    EngineProfile,
    find_engine,
    read_profile,
)
from hbmgym.envs.serving.gpus import ENGINES

VLLM = ENGINE_PROFILES["vllm-graph"]
CONFIG = ServingConfig(model="qwen3.5-4b", hbm_gib=1.0)


def write(folder: Path, content: object) -> Path:
    path = folder / "mine.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def refusal_of(path: Path) -> str:
    with pytest.raises(ValueError) as refusal:
        read_profile(path)
    line = str(refusal.value)
    assert line.startswith(f"{path}: ") and "\n" not in line
    return line.removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", ENGINE_PROFILES)
def test_every_profile_says_where_it_is_from_and_is_found_by_its_name(name):
    profile = find_engine(name)
    assert profile is ENGINE_PROFILES[name] and profile.name == name
    assert len(profile.source) > 20


def test_both_engines_have_profiles_and_the_default_is_one():
    assert {profile.kernels for profile in ENGINE_PROFILES.values()} == set(ENGINES)
    assert ServingConfig().engine is ENGINE_PROFILES[DEFAULT_ENGINE]


def test_what_a_calibration_fits_are_fields_of_a_profile():
    assert set(HOST_CONSTANTS) <= {field.name for field in dataclasses.fields(EngineProfile)}


@pytest.mark.parametrize(("name", "meant"), [("vllm", "vllm-graph"), ("sglang-egar", "sglang-eager")])
def test_a_near_miss_is_told_what_was_meant(name, meant):
    with pytest.raises(ValueError) as refusal:
        find_engine(name)
    known = ", ".join(ENGINE_PROFILES)
    assert str(refusal.value) == f"unknown engine {name!r} (did you mean {meant!r}?): known are {known}"


@pytest.mark.parametrize("profile", ENGINE_PROFILES.values(), ids=ENGINE_PROFILES)
def test_a_profile_that_was_written_is_read_as_it_was(tmp_path, profile):
    path = write(tmp_path, dataclasses.asdict(profile))
    assert read_profile(path) == profile
    assert find_engine(str(path)) == profile


# What is no profile.


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert refusal_of(tmp_path / "none.json") == "cannot be read: No such file or directory"
    assert refusal_of(tmp_path) == "cannot be read: Is a directory"


@pytest.mark.parametrize("content", [b"", b"\xff", b"{", b"vllm-graph", b"[" * 100_000, b'{"name": "a"}}'])
def test_what_is_not_json_is_named(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    assert refusal_of(path).startswith("is not JSON: ")


@pytest.mark.parametrize("content", [[], [{}], {}, "vllm-graph", 3, None, {"name": "mine"}])
def test_what_is_no_object_of_its_fields_is_named(tmp_path, content):
    assert refusal_of(write(tmp_path, content)).startswith(
        "is no engine profile: expected an object with the fields name, kernels, prefill_factor, "
    )


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(EngineProfile)])
def test_a_missing_field_is_refused(tmp_path, field):
    content = dataclasses.asdict(VLLM)
    del content[field]
    assert refusal_of(write(tmp_path, content)).startswith("is no engine profile: ")


def test_an_unknown_field_is_refused(tmp_path):
    content = {**dataclasses.asdict(VLLM), "layer_us": 47}
    assert refusal_of(write(tmp_path, content)).startswith("is no engine profile: ")


NO_NUMBER = (None, True, "1e-3", [1e-3], {})
NO_SECONDS = (*NO_NUMBER, -1e-9, 10.1, 47_000, float("nan"), float("inf"), 10**400)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("name", value) for value in (None, "", 3, ["a"])),
        *(("source", value) for value in (None, "", 3)),
        *(("kernels", value) for value in ("trtllm", "", None, 1, ["vllm"])),
        *(("prefill", value) for value in ("chunked", None, True)),
        *(("prefill_factor", value) for value in (*NO_NUMBER, 0, -1, 0.09, 10.1, float("nan"), float("inf"))),
        *((name, value) for name in ("layer_s", "prefill_floor_s", "request_s") for value in NO_SECONDS),
        *(("graph_tokens", value) for value in (None, True, "512", 512.0, -1, 2**20 + 1, 10**30, float("nan"))),
        *(("snapshots_end_chunks", value) for value in (None, 0, 1, "true")),
    ],
)
def test_a_bad_value_is_refused_by_its_name(tmp_path, field, value):
    line = refusal_of(write(tmp_path, {**dataclasses.asdict(VLLM), field: value}))
    assert line.startswith(f"{field} is {value!r}, expected ")


@pytest.mark.parametrize(
    ("field", "value"),
    [("prefill_factor", 1), ("layer_s", 0), ("prefill_floor_s", 10), ("request_s", 0.0), ("graph_tokens", 0)],
)
def test_whole_numbers_and_the_ends_of_a_range_are_taken(tmp_path, field, value):
    assert getattr(read_profile(write(tmp_path, {**dataclasses.asdict(VLLM), field: value})), field) == value


# What tells setups apart.


def test_setups_under_different_profiles_differ():
    hashes = {setup_hash(replace(CONFIG, engine=profile)) for profile in ENGINE_PROFILES.values()}
    assert len(hashes) == len(ENGINE_PROFILES)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kernels", "sglang"),
        ("prefill_factor", 1.7),
        ("layer_s", 48e-6),
        ("prefill_floor_s", 0.75e-3),
        ("request_s", 14e-3),
        ("prefill", "exclusive"),
        ("graph_tokens", 513),
        ("snapshots_end_chunks", False),
    ],
)
def test_every_fact_of_a_profile_tells_setups_apart(field, value):
    assert setup_hash(replace(CONFIG, engine=replace(VLLM, **{field: value}))) != setup_hash(CONFIG)


def test_neither_name_nor_source_tells_setups_apart():
    assert CONFIG.engine == VLLM
    for other in (replace(VLLM, name="mine"), replace(VLLM, source="a file of mine")):
        assert setup_hash(replace(CONFIG, engine=other)) == setup_hash(CONFIG)
