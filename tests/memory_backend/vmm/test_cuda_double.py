"""The tests marked gpu, run on a double of libcuda: the driver's own code without a GPU."""

import re
from pathlib import Path

import pytest

from tests.memory_backend.vmm.cuda_double.processes import ROOT, build_or_skip, run_on_double

FEWEST_TESTS = 100
NEEDS_A_GPU = ["torch needs more of libcuda than its double has"]
"""Reasons for which a test may be skipped on the double."""


@pytest.fixture(scope="module")
def double_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_or_skip(tmp_path_factory.mktemp("libcuda"))


@pytest.mark.slow
def test_all_tests_marked_gpu_pass_on_the_double(double_folder: Path) -> None:
    ended = run_on_double(
        double_folder, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist", "tests"
    )
    assert ended.returncode == 0, f"\n{ended.stdout}\n{ended.stderr}"
    passed = re.search(r"(\d+) passed", ended.stdout)
    assert passed and int(passed.group(1)) >= FEWEST_TESTS, ended.stdout
    skipped = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", ended.stdout, re.MULTILINE)
    assert skipped == NEEDS_A_GPU, ended.stdout


def test_the_double_says_that_it_is_one(double_folder: Path) -> None:
    script = "from hbmgym.memory_backend.vmm import cuda_calls as c; c.initialise(); print(c.device_name(c.device(0)))"
    assert run_on_double(double_folder, "-c", script).stdout == "FAKE (no GPU)\n"


def test_the_package_knows_nothing_of_the_double() -> None:
    sources = (path for room in (ROOT / "src" / "hbmgym").iterdir() for path in room.rglob("*.py"))
    assert not [path for path in sources if "cuda_double" in path.read_text()]
