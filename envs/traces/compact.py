"""Loader for the compact columnar format: one npz of plain arrays and a JSON `meta`, never pickle."""

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from hbmgym.envs.traces.coding import no_ids
from hbmgym.envs.traces.trace import ID_COLUMNS, Kind, Trace, TraceError
from hbmgym.envs.traces.validate import build_trace, refuse

_REMEDY = "the file is damaged, pickled or of another format"
_UNREADABLE = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, RuntimeError, MemoryError)


def load_compact(path: str | Path) -> Trace:
    """Read an npz written in the compact format; raises `TraceError`."""
    columns, meta = _read(Path(path))
    block_size = meta.get("block_size")
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 0:
        refuse(str(path), "meta block_size", block_size, "an integer >= 0", "0 means no ids")
    if block_size == 0 and not set(columns) & set(ID_COLUMNS) and "arrival_s" in columns:
        columns |= no_ids(columns["arrival_s"].size)
    name = meta.get("name", Path(path).stem)
    if not isinstance(name, str) or not name:
        refuse(str(path), "meta name", name, "a text", "name the trace")
    return build_trace(
        columns,
        name=name,
        kind=_kind(meta, str(path)),
        block_size=block_size,
        path=str(path),
        where=lambda row: f"{path}:row {row}",
    )


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        # Opened here: when the archive is damaged, numpy leaves a file that it opened itself open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            columns = {name: archive[name] for name in archive.files}
        meta = json.loads(str(columns.pop("meta")))
    except (*_UNREADABLE, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TraceError(f"{path}: cannot be read as a compact npz: {reason[:160]} ({_REMEDY})") from error
    if not isinstance(meta, dict):
        refuse(str(path), "meta", meta, "a JSON object", _REMEDY)
    return columns, meta


def _kind(meta: dict[str, Any], path: str) -> Kind:
    flags = (bool(meta.get("open_loop")), bool(meta.get("session_library")))
    if flags == (True, False):
        return "open-loop"
    if flags == (False, True):
        return "session-library"
    remedy = "a file of lengths or rates only cannot be replayed"
    refuse(path, "meta (open_loop, session_library)", flags, "exactly one to be true", remedy)
