"""Empty packages in place of those that SGLang imports for its GPU kernels, where they are not installed.

Its cache never calls them. Whatever is asked of one is a class that takes anything; as a decorator it changes nothing.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

GPU_PACKAGES = ("triton", "sgl_kernel", "tvm_ffi", "torchvision")


class _Anything(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        decorates = len(args) == 1 and callable(args[0]) and not kwargs
        return args[0] if decorates else cls

    def __getattr__(cls, name: str) -> Any:
        return _anything(name)

    def __getitem__(cls, key: Any) -> Any:
        return cls


def _anything(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything(name, (), {})


class _Empty(types.ModuleType):
    __version__ = "3.4.0"  # of triton, which torch reads

    def __getattr__(self, name: str) -> Any:
        return _anything(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] in GPU_PACKAGES:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def stand_in_for_gpu_packages() -> None:
    """From now on, those of GPU_PACKAGES that are not installed can be imported."""
    sys.meta_path.append(_Finder())  # behind the finders of what is installed
