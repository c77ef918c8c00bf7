"""Files of plain arrays (.npz): written whole or not at all, read without unpickling."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hbmgym.files import write_atomically


def read_arrays(path: Path, error: type[Exception], remedy: str) -> dict[str, np.ndarray]:
    """All arrays of a file; `error` in one line where it cannot be read, with `remedy` where there is none."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except OSError as reason:
        if not path.is_file():
            raise error(f"{path}: no such file; {remedy}") from reason
        raise error(f"{path}: cannot be read ({reason.strerror or reason}); check the file") from reason
    except Exception as reason:  # zipfile and numpy together raise ten kinds for damaged files
        raise error(f"{path}: is damaged or no archive of plain arrays; copy or write it again") from reason


def write_arrays(path: str | Path, arrays: Mapping[str, Any]) -> None:
    """Write the file whole or not at all; makes its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_atomically(path, content.getvalue())
