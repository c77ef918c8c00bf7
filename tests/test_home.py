"""Tests have a home of their own, so that they change no rates of whoever runs them, but no kernels of their own."""

import subprocess
import sys
from pathlib import Path

from hbmgym.memory_backend.jit import KERNEL_CACHE


def test_what_tests_keep_at_home_stays_among_them(tmp_path_factory):
    assert Path.home().is_relative_to(tmp_path_factory.getbasetemp())


def test_scripts_that_tests_start_find_the_kernels_that_are_compiled():
    script = "from hbmgym.memory_backend.jit import KERNEL_CACHE; print(KERNEL_CACHE)"
    ended = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert Path(ended.stdout.strip()).samefile(KERNEL_CACHE)
