"""The compact columnar format: one npz of plain arrays and a JSON `meta`, never pickle."""

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hbmgym.envs.traces.coding import no_ids
from hbmgym.envs.traces.formats.reading import name_of, open_file
from hbmgym.envs.traces.jitter import CLOCKS
from hbmgym.envs.traces.trace import ID_COLUMNS, ROW_COLUMNS, SESSION_COLUMNS, Kind, Trace, TraceError
from hbmgym.envs.traces.validate import build_trace, refuse

_REMEDY = "the file is damaged, pickled or of another format"
MAX_UNPACKED_BYTES, MAX_EXPANSION = 2**28, 200
"""An archive may unpack to the first, or to that many times its size, whichever is more."""


def load_compact(path: Path) -> Trace:
    """Read an npz written in the compact format; raises `TraceError`."""
    columns, meta = _read(path)
    block_size = meta.get("block_size")
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 0:
        refuse(str(path), "meta block_size", block_size, "an integer >= 0", "0 means no ids")
    if block_size == 0 and not set(columns) & set(ID_COLUMNS) and "arrival_s" in columns:
        columns |= no_ids(columns["arrival_s"].size)
    name = meta.get("name", name_of(path))
    if not isinstance(name, str) or not name:
        refuse(str(path), "meta name", name, "a text", "name the trace")
    notices = meta.get("notices", [])
    if not isinstance(notices, list) or not all(isinstance(notice, str) for notice in notices):
        refuse(str(path), "meta notices", notices, "a list of texts", "correct or remove it")
    id_file = meta.get("id_file", "")
    if not isinstance(id_file, str):
        refuse(str(path), "meta id_file", id_file, "a text", "correct or remove it")
    return build_trace(
        columns,
        name=name,
        kind=_kind(meta, str(path)),
        block_size=block_size,
        path=str(path),
        where=lambda row: f"{path}:row {row}",
        notices=notices,
        repaired=meta.get("repaired") is True,
        id_file=id_file,
        clock=_clock(meta, str(path)),
    )


def compact_bytes(trace: Trace) -> bytes:
    """A recorded trace as the content of a file; `load_compact` gives it back as it is. Raises `TraceError`."""
    if trace.trace_kind == "generated":
        raise TraceError(
            f"{trace.name}: trace is generated, expected a recorded one (its scenario and seed say it all)"
        )
    columns = {
        name: getattr(trace, name) for name in (*ROW_COLUMNS, *ID_COLUMNS, *SESSION_COLUMNS) if hasattr(trace, name)
    }
    meta = {
        "name": trace.name,
        "block_size": trace.block_size,
        trace.trace_kind.replace("-", "_"): True,
        "notices": trace.notices,
        "repaired": True,
        "id_file": trace.id_file,
        "clock": trace.clock,
    }
    arrays = {"meta": np.array(json.dumps(meta)), **columns}
    return _packed({name: array for name, array in arrays.items() if array is not None})


def _packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    """As np.savez_compressed, which pickles objects, and can be forbidden to from numpy 2.2 on only."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return content.getvalue()


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with open_file(path) as file:
        try:
            _check_size(file, path)
            # Opened here: when the archive is damaged, numpy leaves a file that it opened itself open.
            with np.load(file, allow_pickle=False) as archive:
                columns = {name: _array(archive[name], name) for name in archive.files}
            meta = json.loads(str(columns.pop("meta")))
        except TraceError:
            raise
        except Exception as error:  # numpy, zipfile and zlib document no end of what hostile bytes make them raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TraceError(f"{path}: cannot be read as a compact npz: {reason[:160]} ({_REMEDY})") from error
    if not isinstance(meta, dict):
        refuse(str(path), "meta", meta, "a JSON object", _REMEDY)
    return columns, meta


def _array(member: Any, name: str) -> np.ndarray:
    """What numpy made of a member: bytes where it is no npy file."""
    if not isinstance(member, np.ndarray):
        raise ValueError(f"{name} is no array")
    return member


def _check_size(file: Any, path: Path) -> None:
    """Refuse an archive that would fill the memory; zipfile reads no more of a member than its entry says."""
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    packed = file.seek(0, io.SEEK_END)
    file.seek(0)
    if unpacked > max(MAX_UNPACKED_BYTES, MAX_EXPANSION * packed):
        refuse(str(path), "unpacked size", unpacked, f"at most {MAX_EXPANSION} times its {packed} bytes", _REMEDY)


def _clock(meta: dict[str, Any], path: str) -> str:
    """What recorded the arrivals; where the file does not say, its source may."""
    source = str(meta.get("source", ""))
    clock = meta.get("clock", next((name for name, clock in CLOCKS.items() if clock.source in source), ""))
    if clock not in ("", *CLOCKS):
        refuse(path, "meta clock", clock, f"one of {', '.join(CLOCKS)}, or empty", "correct or remove it")
    return str(clock)


def _kind(meta: dict[str, Any], path: str) -> Kind:
    flags = (bool(meta.get("open_loop")), bool(meta.get("session_library")))
    if flags == (True, False):
        return "open-loop"
    if flags == (False, True):
        return "session-library"
    remedy = "a file of lengths or rates only cannot be replayed"
    refuse(path, "meta (open_loop, session_library)", flags, "exactly one to be true", remedy)
