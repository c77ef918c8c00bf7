"""Python on the double of libcuda: it has to be there when a process starts, so it runs in processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.memory_backend.vmm.cuda_double.build import build, missing_compiler

ROOT = Path(__file__).parents[4]


def build_or_skip(folder: Path) -> Path:
    """`folder` with the double in it; skips without a compiler, fails with the compiler's words."""
    pytest.importorskip("cuda.bindings.driver", exc_type=ImportError)
    if reason := missing_compiler():
        pytest.skip(reason)
    try:
        build(folder)
    except subprocess.CalledProcessError as error:
        pytest.fail(f"the double does not compile: {error.stderr}")
    return folder


def run_on_double(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments in the repository's root, with the double for libcuda."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["LD_LIBRARY_PATH"] = os.pathsep.join([str(folder), *os.environ.get("LD_LIBRARY_PATH", "").split()])
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
