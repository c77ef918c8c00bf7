"""The tests marked gpu, run on a double of libcuda: the driver's own code without a GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.memory_backend.vmm.cuda_double.build import build, missing_compiler

ROOT = Path(__file__).parents[3]
FEWEST_TESTS = 100
NEEDS_A_GPU = ["torch needs more of libcuda than its double has"]
"""Reasons for which a test may be skipped on the double."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        pytest.skip("cuda.bindings is not installed")
    if reason := missing_compiler():
        pytest.skip(reason)
    try:
        return build(tmp_path_factory.mktemp("libcuda"))
    except subprocess.CalledProcessError as error:
        pytest.fail(f"the double does not compile: {error.stderr}")


def run_on(library: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(
        [str(library.parent), *os.environ.get("LD_LIBRARY_PATH", "").split()]
    )
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_all_tests_marked_gpu_pass_on_the_double(library: Path) -> None:
    ended = run_on(library, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist", "tests")
    assert ended.returncode == 0, f"\n{ended.stdout}\n{ended.stderr}"
    passed = re.search(r"(\d+) passed", ended.stdout)
    assert passed and int(passed.group(1)) >= FEWEST_TESTS, ended.stdout
    skipped = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", ended.stdout, re.MULTILINE)
    assert skipped == NEEDS_A_GPU, ended.stdout


def test_the_double_says_that_it_is_one(library: Path) -> None:
    script = "from hbmgym.memory_backend.vmm import cuda_calls as c; c.initialise(); print(c.device_name(c.device(0)))"
    assert run_on(library, "-c", script).stdout == "FAKE (no GPU)\n"


def test_the_package_knows_nothing_of_the_double() -> None:
    sources = (path for room in (ROOT / "hbmgym").iterdir() for path in room.rglob("*.py"))
    assert not [path for path in sources if "cuda_double" in path.read_text()]
