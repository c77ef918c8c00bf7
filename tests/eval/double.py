"""Scripts on the double of libcuda: it has to be there when a process starts, so they run in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.memory_backend.vmm.cuda_double.build import build, missing_compiler

ROOT = Path(__file__).parents[2]


def build_or_skip(folder: Path) -> Path:
    """`folder` with the double in it."""
    pytest.importorskip("cuda.bindings.driver", exc_type=ImportError)
    if reason := missing_compiler():
        pytest.skip(reason)
    build(folder)
    return folder


def run_on_double(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script of this repository with the double for libcuda."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)
