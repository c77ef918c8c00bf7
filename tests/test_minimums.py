"""The least versions in pyproject.toml are those of minimums.txt, with which `make test-minimums` runs smoke.py."""

import tomllib
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
RUN_BY_HAND = {"torch"}


def test_every_requirement_has_its_least_version_in_minimums():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # Whoever develops has the versions of constraints.txt.
    extras = (named for extra, named in project["optional-dependencies"].items() if extra != "dev")
    least = {
        requirement.name: [clause.version for clause in requirement.specifier if clause.operator == ">="]
        for requirement in map(Requirement, chain(project["dependencies"], *extras))
    }
    lines = (ROOT / "minimums.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert RUN_BY_HAND <= least.keys() <= pinned.keys()
    for name in least.keys() - RUN_BY_HAND:
        assert least[name] == [pinned[name]], name
