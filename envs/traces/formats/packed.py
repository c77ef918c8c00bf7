"""Compressed files: told by their first bytes, read as what is in them."""

import gzip
import importlib
import lzma
import sys
from pathlib import Path
from typing import Any, BinaryIO, cast

from hbmgym.envs.traces.trace import TraceError

ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
SUFFIXES = (".gz", ".xz", ".zst")
_GZIP, _XZ, _ZST = b"\x1f\x8b", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"
LONGEST_MARK = max(map(len, (_GZIP, _XZ, _ZST)))


class NeedsPackage(TraceError):
    """A file may be sound, but a package is missing that reads it."""


def unpacked(file: BinaryIO, head: bytes, path: Path) -> BinaryIO:
    """`file`, which begins with `head`, or its content where it is compressed. Raises `TraceError`."""
    if head.startswith(_GZIP):
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if head.startswith(_XZ):
        return cast(BinaryIO, lzma.LZMAFile(file))
    if head.startswith(_ZST):
        return cast(BinaryIO, _zstd(path).ZstdFile(file))
    return file


def plain(path: Path) -> Path:
    """The name without what a compressor adds."""
    return path.with_suffix("") if path.suffix.lower() in SUFFIXES else path


def _zstd(path: Path) -> Any:
    try:
        return importlib.import_module(ZSTD)
    except ModuleNotFoundError as error:
        remedy = "run pip install backports.zstd, which the extra zst has too, or unpack the file"
        raise NeedsPackage(
            f"{path}: is compressed with zst, which Python itself reads from 3.14 on ({remedy})"
        ) from error
