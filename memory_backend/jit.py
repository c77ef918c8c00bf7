"""`kernel` and `subkernel`: numba's njit for code that allocates nothing, with a disk cache that sees every change.

numba's own cache looks only at the file of the outermost function, so a change in a callee would go unseen. The cache
folder is therefore named after a hash of all sources that hold kernels, intrinsics or dtypes.

Both compile without numba's runtime: reference counts of the many arrays that kernels pass to each other cost more than
the work itself (7 x, measured), and a kernel that would allocate fails to compile. What numba does for reference counts
alone is left out, and so are optimisation and machine code of what kernels inline: that was half the time.
"""

import gc
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba import types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

_PACKAGE = Path(__file__).resolve().parent.parent
_KERNEL_FOLDERS = ("memory_backend", "envs", "controllers", "eval")
_KEPT_CACHES = 8
_MARKS = (b"kernel\n", b"@intrinsic\n", b"np.dtype(")


def _source_hash() -> str:
    digest = hashlib.sha256(numba.__version__.encode())
    for folder in _KERNEL_FOLDERS:
        for source in sorted((_PACKAGE / folder).rglob("*.py")):
            text = source.read_bytes()
            if any(mark in text for mark in _MARKS):
                digest.update(text)
    return digest.hexdigest()[:16]


def _cache_folder() -> str:
    name = f"kernels-{_source_hash()}"
    for base in (Path.home() / ".cache" / "hbmgym", Path(tempfile.gettempdir()) / "hbmgym"):
        try:
            (base / name).mkdir(parents=True, exist_ok=True)
            _forget_old_caches(base)
        except OSError:
            continue
        return str(base / name)
    return tempfile.mkdtemp(prefix="hbmgym-")


def _forget_old_caches(base: Path) -> None:
    """Every edit of a kernel leaves a folder behind; a few of them serve whoever goes back and forth."""
    folders = sorted(base.glob("kernels-*"), key=lambda folder: folder.stat().st_mtime, reverse=True)
    for folder in folders[_KEPT_CACHES:]:
        shutil.rmtree(folder, ignore_errors=True)


KERNEL_CACHE = _cache_folder()
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False}


class _KernelLibrary(JITCodeLibrary):  # type: ignore[misc]  # numba has no types
    """Machine code of a kernel, optimised once: numba's passes ahead are there to pair reference counts."""

    def _optimize_functions(self, module: Any) -> None:
        module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        passes, builder = self._codegen._module_pass_manager()
        passes.run(self._final_module, builder)


class _SubkernelLibrary(_KernelLibrary):
    """What kernels inline or copy; nobody calls a subkernel itself, so it gets no machine code of its own.

    It is made small only: the kernel that takes it in optimises all of it, and LLVM would do so at every level between.
    """

    def _optimize_final_module(self) -> None:
        passes, builder = self._codegen._module_pass_manager(opt=1, loop_vectorize=False, slp_vectorize=False)
        passes.run(self._final_module, builder)

    def _finalize_final_module(self) -> None:
        self._verify_declare_only_symbols()
        self._finalized = True

    @property
    def codegen(self) -> "_SubkernelLibrary":
        return self

    def set_env(self, name: str, environment: Any) -> None:
        """Without machine code there is no environment to set; one loaded from the cache has none either."""


class _KernelCompiler(Compiler):  # type: ignore[misc]  # numba has no types
    """numba's own compiler with another library for the code it makes."""

    library_class = _KernelLibrary

    def compile_extra(self, func: Callable[..., Any]) -> Any:
        if self.state.library is None:
            self.state.library = self.library_class(self.state.targetctx.codegen(), func.__qualname__)
            self.state.library.enable_object_caching()
        collects = gc.isenabled()
        gc.disable()  # the compiler makes millions of small objects, few of them garbage
        try:
            return super().compile_extra(func)
        finally:
            if collects:
                gc.enable()


class _SubkernelCompiler(_KernelCompiler):
    library_class = _SubkernelLibrary


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function`, to be called from Python and from kernels; with NUMBA_DISABLE_JIT=1 it stays Python."""
    # The setting is read when the function is decorated; restoring it leaves other users of numba alone.
    saved = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = KERNEL_CACHE
    try:
        return _one_version(numba.njit(cache=True, pipeline_class=_KernelCompiler, **_OPTIONS)(function))
    finally:
        numba.config.CACHE_DIR = saved


def subkernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function`, to be called from kernels only: leaving its Python wrapper out halves the compile time."""
    compile_without_wrappers = numba.njit(
        no_cpython_wrapper=True, no_cfunc_wrapper=True, pipeline_class=_SubkernelCompiler, **_OPTIONS
    )
    return _one_version(compile_without_wrappers(function))


def _one_version(compiled: Any) -> Any:
    """Have calling kernels widen arguments: else every mix of int32, int64 and constants is compiled by itself."""
    if not numba.config.DISABLE_JIT:
        find_version = compiled.get_call_template
        compiled.get_call_template = lambda args, kws: find_version(tuple(map(_widened, args)), kws)
    return compiled


def _widened(kind: Any) -> Any:
    kind = types.unliteral(kind)
    return types.int64 if kind == types.int32 else kind
