"""`load_trace`: one entrance for every format, recognised by content and not by name."""

from pathlib import Path

from hbmgym.envs.traces.compact import load_compact
from hbmgym.envs.traces.mooncake import load_mooncake
from hbmgym.envs.traces.trace import Trace, TraceError

_ZIP = b"PK\x03\x04"
_FORMATS = "a compact npz or Mooncake jsonl"


def load_trace(path: str | Path) -> Trace:
    """Read a trace; raises `TraceError` with one line for anything that is not one."""
    head = _head(Path(path))
    if head.startswith(_ZIP):
        return load_compact(path)
    if head.lstrip().startswith(b"{"):
        return load_mooncake(path)
    if not head.strip():
        raise TraceError(f"{path}: the file is empty, expected {_FORMATS}")
    raise TraceError(f"{path}: format is not recognised, expected {_FORMATS} (convert the file)")


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4096)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}, expected {_FORMATS}") from error
