"""`kernel` and `subkernel`: numba's njit for code that allocates nothing, with a disk cache that sees every change.

numba's own cache looks only at the file of the outermost function, so a change in a callee would go unseen. The cache
folder is therefore named after a hash of all sources that decide what kernels do (`_MARKS`).

Both compile without numba's runtime: reference counts of the many arrays that kernels pass to each other cost more than
the work itself (7 x, measured), and a kernel that would allocate fails to compile. numba's own compiler would optimise
every subkernel with all that it calls, once more at each level; here a kernel and all below it are linked and optimised
once, and passes that change no kernel are left out: together two thirds of the time.
"""

import functools
import gc
import hashlib
import importlib
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core.caching import FunctionCache, NullCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase
from numba.core.compiler_machinery import PassManager
from numba.core.typed_passes import (
    IRLegalization,
    NativeLowering,
    NoPythonBackend,
    NopythonTypeInference,
    PreLowerStripPhis,
)
from numba.core.untyped_passes import FixupArgs, GenericRewrites, IRProcessing, ReconstructSSA, TranslateByteCode
from numba.np import linalg

from hbmgym.private import cache_folder, private_folder
from hbmgym.processes import unstopped
from hbmgym.streams import say

_PACKAGE = Path(__file__).resolve().parent.parent
_KERNEL_FOLDERS = ("memory_backend", "envs", "controllers", "eval")
_KEPT_CACHES = 8
_KEPT_S = 24 * 3600.0
# Of sources that hold kernels, intrinsics, dtypes, or dataclasses whose fields become those of a record.
_MARKS = (b"kernel\n", b"@intrinsic\n", b"np.dtype(", b"Parameters:\n")


def _source_hash() -> str:
    digest = hashlib.sha256(numba.__version__.encode())
    for folder in _KERNEL_FOLDERS:
        for source in sorted((_PACKAGE / folder).rglob("*.py")):
            text = source.read_bytes()
            if any(mark in text for mark in _MARKS):
                digest.update(text)
    return digest.hexdigest()[:16]


def _cache_folder() -> Path | None:
    """Where kernels are kept; None where nothing private can be written."""
    base = cache_folder()
    if base is None:
        return None
    try:
        folder = private_folder(base / f"kernels-{_source_hash()}")
        _forget_old_caches(base, folder)
    except OSError:
        return None
    return folder


def _forget_old_caches(base: Path, own: Path) -> None:
    """Every edit of a kernel leaves a folder behind; those used last serve whoever goes back and forth. A process that
    started within _KEPT_S may still read and write one of them."""
    os.utime(own)
    others = (folder for folder in base.glob("kernels-*") if folder != own)
    for folder in sorted(others, key=_used_at, reverse=True)[_KEPT_CACHES - 1 :]:
        if _used_at(folder) < time.time() - _KEPT_S:
            shutil.rmtree(folder, ignore_errors=True)


def _used_at(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:  # another process has just forgotten it
        return 0.0


class _KernelCache(FunctionCache):  # type: ignore[misc]  # numba has no types
    """numba's cache on the disk in `KERNEL_CACHE`; where it cannot be read or written, kernels are compiled."""

    def load_overload(self, signature: Any, context: Any) -> Any:
        try:
            with unstopped():
                return super().load_overload(signature, context)
        except Exception:  # the disk's errors, and a dozen kinds for a damaged file
            return None

    def save_overload(self, signature: Any, overload: Any) -> None:
        try:
            super().save_overload(signature, overload)
        except OSError as error:
            _note_not_kept(f"{self.cache_path}: {error.strerror}")


def _cache_of(function: Callable[..., Any]) -> Any:
    """Where a kernel is kept: in KERNEL_CACHE or not at all, while numba would try other folders."""
    if KERNEL_CACHE is not None:
        saved = numba.config.CACHE_DIR  # is read now; restoring it leaves other users of numba alone
        numba.config.CACHE_DIR = str(KERNEL_CACHE)
        try:
            cache = _KernelCache(function)
        except RuntimeError:
            cache = None
        finally:
            numba.config.CACHE_DIR = saved
        if cache is not None and Path(cache.cache_path).is_relative_to(KERNEL_CACHE):
            return cache
    _note_not_kept("there is no private folder" if KERNEL_CACHE is None else f"not in {KERNEL_CACHE}")
    return NullCache()


@functools.cache
def _note_not_kept(reason: str) -> None:
    """Once, and not again in every worker process."""
    if multiprocessing.parent_process() is None:
        say(f"compiled kernels are not kept, every start compiles them again: {reason}")


def _import_arrays_without_scipy() -> None:
    """numba imports all of scipy.linalg, only to see that it is there: a seventh of a start with kernels cached."""
    find_blas = linalg.ensure_blas
    linalg.ensure_blas = lambda: None
    try:
        importlib.import_module("numba.np.arraymath")
    finally:
        linalg.ensure_blas = find_blas


KERNEL_CACHE = _cache_folder()
_import_arrays_without_scipy()
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False}


# No closures, generators, array expressions or inline="always", so numba's passes for these are left out.
_PASSES = (
    TranslateByteCode,
    FixupArgs,
    IRProcessing,
    GenericRewrites,
    ReconstructSSA,
    NopythonTypeInference,
    PreLowerStripPhis,
    IRLegalization,
    NativeLowering,
    NoPythonBackend,
)


class _KernelLibrary(JITCodeLibrary):  # type: ignore[misc]  # numba has no types
    """Machine code of a kernel and of all that it calls."""

    def finalize(self) -> None:
        own = {function.name for function in self.get_defined_functions()}
        subkernels, self._linking_libraries = self._all_callees()
        for library in subkernels:
            self._final_module.link_in(library._final_module, preserve=True)
        for function in self.get_defined_functions():
            if function.name not in own:
                function.linkage = "internal"
        super().finalize()

    def _all_callees(self) -> tuple[list["_SubkernelLibrary"], list[Any]]:
        """Subkernels at any depth, and what numba brings along for them, which is linked already."""
        found: dict[Any, None] = {}
        waiting: list[_KernelLibrary] = [self]
        while waiting:
            new = [library for library in waiting.pop()._linking_libraries if library not in found]
            found.update(dict.fromkeys(new))
            waiting += [library for library in new if isinstance(library, _SubkernelLibrary)]
        subkernels = [library for library in found if isinstance(library, _SubkernelLibrary)]
        return subkernels, [library for library in found if not isinstance(library, _SubkernelLibrary)]

    def _optimize_functions(self, module: Any) -> None:
        """numba's passes ahead are there to pair reference counts."""
        module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        passes, builder = self._codegen._module_pass_manager()
        passes.run(self._final_module, builder)


class _SubkernelLibrary(_KernelLibrary):
    """One subkernel as it was written, for kernels to link: without its callees, and without machine code."""

    def finalize(self) -> None:
        self._finalized = True

    def _get_module_for_linking(self) -> Any:
        raise TypeError(f"{self.name} can be called from a @kernel or @subkernel only, not from a plain numba.njit")

    @property
    def codegen(self) -> "_SubkernelLibrary":
        return self

    def set_env(self, name: str, environment: Any) -> None:
        """Without machine code there is no environment to set; one loaded from the cache has none either."""


class _RareSubkernelLibrary(_SubkernelLibrary):
    """One that stays a call."""

    def _optimize_functions(self, module: Any) -> None:
        super()._optimize_functions(module)
        for function in module.functions:
            if not function.is_declaration:
                function.add_function_attribute("noinline")


class _KernelCompiler(CompilerBase):  # type: ignore[misc]  # numba has no types
    """numba's compiler with another library for the code it makes, and only those passes that change kernels."""

    library_class = _KernelLibrary

    def define_pipelines(self) -> list[PassManager]:
        passes = PassManager("kernel")
        for step in _PASSES:
            passes.add_pass(step, step.__name__)
        passes.finalize()
        return [passes]

    def compile_extra(self, func: Callable[..., Any]) -> Any:
        if self.state.library is None:
            self.state.library = self.library_class(self.state.targetctx.codegen(), func.__qualname__)
            self.state.library.enable_object_caching()
        collects = gc.isenabled()
        gc.disable()  # the compiler makes millions of small objects, few of them garbage
        try:
            with unstopped():
                return super().compile_extra(func)
        finally:
            if collects:
                # To the oldest generation, or the next collection would visit them all.
                gc.freeze()
                gc.unfreeze()
                gc.enable()


class _SubkernelCompiler(_KernelCompiler):
    library_class = _SubkernelLibrary


class _RareSubkernelCompiler(_KernelCompiler):
    library_class = _RareSubkernelLibrary


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function`, to be called from Python and from kernels; with NUMBA_DISABLE_JIT=1 it stays Python."""
    if numba.config.DISABLE_JIT:
        return np.errstate(all="ignore")(function)  # machine code does not warn either
    compiled = numba.njit(pipeline_class=_KernelCompiler, **_OPTIONS)(function)
    compiled._cache = _cache_of(function)
    # To kernels that call it, it is a subkernel.
    inlined: Any = subkernel(function)
    compiled.get_call_template, compiled.get_overload = inlined.get_call_template, inlined.get_overload
    return compiled


def subkernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function`, to be called from kernels only: leaving its Python wrapper out halves the compile time."""
    return _without_wrappers(function, _SubkernelCompiler)


def rare_subkernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for what is seldom called from where much time goes: it is never copied into its callers, which are then
    small enough to be copied into theirs."""
    return _without_wrappers(function, _RareSubkernelCompiler)


def _without_wrappers(function: Callable[..., Any], compiler: type[_KernelCompiler]) -> Any:
    compiled = numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, pipeline_class=compiler, **_OPTIONS)(function)
    return _one_version(compiled)


def _one_version(compiled: Any) -> Any:
    """Have calling kernels widen arguments: else every mix of int32, int64 and constants is compiled by itself."""
    if not numba.config.DISABLE_JIT:
        find_version = compiled.get_call_template
        compiled.get_call_template = lambda args, kws: find_version(tuple(map(_widened, args)), kws)
    return compiled


def _widened(kind: Any) -> Any:
    kind = types.unliteral(kind)
    return types.int64 if kind == types.int32 else kind
