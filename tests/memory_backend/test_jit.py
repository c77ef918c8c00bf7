"""What `kernel` and `subkernel` promise beside speed."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

from hbmgym.controllers.convex import controller as convex
from hbmgym.controllers.helm import parameters as helm
from hbmgym.memory_backend.jit import _KEPT_CACHES, _MARKS, _forget_old_caches, kernel, subkernel


@subkernel
def _deepest(x):
    return x + 1


@subkernel
def _left(x):
    return _deepest(x) * 2


@kernel
def _right(x):
    return _deepest(x) * 3


@kernel
def _both_sides(x):
    """Reaches one subkernel on two ways, one of them through a kernel."""
    return _left(x) + _right(x)


def test_of_old_caches_the_last_used_are_kept_and_the_own_one_in_any_case(tmp_path):
    folders = [tmp_path / f"kernels-{number:02}" for number in range(_KEPT_CACHES + 3)]
    for age, folder in enumerate(folders):
        folder.mkdir()
        os.utime(folder, (1000 - age, 1000 - age))
    _forget_old_caches(tmp_path, folders[-1])
    assert sorted(tmp_path.iterdir()) == [*folders[: _KEPT_CACHES - 1], folders[-1]]
    _forget_old_caches(tmp_path, folders[0])
    assert folders[-1].exists(), "it was used just before"


def test_no_cache_is_taken_from_a_process_that_may_still_run(tmp_path):
    folders = [tmp_path / f"kernels-{number:02}" for number in range(_KEPT_CACHES + 3)]
    for folder in folders:
        folder.mkdir()
    _forget_old_caches(tmp_path, folders[0])
    assert sorted(tmp_path.iterdir()) == folders


def test_a_kernel_takes_in_what_it_calls_at_any_depth():
    assert (_both_sides(1), _right(1)) == (10, 6)


@kernel
def _allocates():
    return len(np.zeros(3))


def test_a_kernel_that_allocates_does_not_compile():
    with pytest.raises(numba.core.errors.NumbaError, match="zeros"):
        _allocates()


@numba.njit
def _foreign(x):
    return _left(x)


def test_a_function_that_is_no_kernel_cannot_call_a_subkernel():
    with pytest.raises(TypeError, match="_left can be called from a @kernel or @subkernel only"):
        _foreign(1)


@kernel
def _never_called_before(x):
    return x


@pytest.mark.parametrize("collects", [True, False])
def test_compiling_leaves_the_garbage_collector_as_it_was(collects):
    was = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        _never_called_before(1 if collects else 1.0)
        assert gc.isenabled() == collects
        assert gc.get_freeze_count() == 0
    finally:
        (gc.enable if was else gc.disable)()


def test_the_first_kernel_of_a_process_imports_no_scipy_linalg():
    script = """
import sys
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core
from hbmgym.envs.serving.cost_model import tpot_reference_s

Core(ServingConfig())
assert tpot_reference_s.signatures, "no kernel has run"
print("scipy.linalg" in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert ended.stdout == "False\n"


def test_without_the_compiler_kernels_overflow_as_quietly():
    script = """
import warnings

import numpy as np
from hbmgym.memory_backend.jit import kernel, subkernel

warnings.simplefilter("error")

@subkernel
def _ten_times(x):
    return 10.0 * x

@kernel
def tenfold(values):
    values[0] = _ten_times(values[0])

values = np.array([1e308])
tenfold(values)
print(values[0])
"""
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert ended.stdout == "inf\n", ended.stderr


def test_a_rare_subkernel_stays_a_call():
    script = """
from hbmgym.memory_backend.jit import kernel, rare_subkernel, subkernel

@subkernel
def _often(x):
    return 3 * x

@rare_subkernel
def _seldom(x):
    return 5 * x

@kernel
def either(x):
    return _often(x) if x > 0 else _seldom(x)

print(either(1), either(-1))
(code,) = either.inspect_llvm().values()
calls = [line for line in code.splitlines() if " call " in line]
print(*(sum(name in line for line in calls) for name in ("_often", "_seldom")))
"""
    ended = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert ended.stdout == "3 -5\n0 1\n"


@pytest.mark.parametrize("source", [convex, helm])
def test_the_cache_notices_another_parameter(source):
    """Kernels read parameters by their place in a record: with a stale one they would read their neighbours."""
    text = Path(source.__file__).read_bytes()
    assert any(mark in text for mark in _MARKS)
