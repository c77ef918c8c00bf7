"""Block ids as files give them, of any size and kind, kept in 8 bytes each and coded at the end."""

from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hbmgym.envs.traces.coding import IdColumns, encode_flat, new_ids, no_ids

_POWERS_OF_TWO = tuple(2**power for power in range(14, -1, -1))
_LEAST, _MOST = -(2**63), 2**63 - 1


class BlockIds:
    """The ids of one row after another."""

    def __init__(self) -> None:
        self._ids, self._row_end = array("q"), array("q", [0])
        self._numbers: dict[str | int, int] = {}
        self._numbered = array("q")
        self._unknown = array("q")

    @property
    def unknown(self) -> int:
        """Rows whose ids are unknown."""
        return len(self._unknown)

    def __len__(self) -> int:
        return len(self._row_end) - 1

    def add_row(self, ids: Sequence[str | int] | None) -> None:
        """None: the row's ids are unknown, so it gets ids that no other row has."""
        if ids is None:
            self._unknown.append(len(self))
        else:
            try:
                self._ids.fromlist(ids)  # type: ignore[arg-type]
            except (OverflowError, TypeError):
                self._add_numbered(ids)
        self._row_end.append(len(self._ids))

    def block_size(self, input_tokens: np.ndarray, usual: int, path: Path, notices: list[str]) -> int:
        """Tokens per block: `usual` unless only another power of two fits the numbers of ids; 0 without ids."""
        known = self._known()
        if not known.any():
            return 0
        counts = np.diff(np.frombuffer(self._row_end, np.int64))
        size = _fitting_size(input_tokens[known].astype(np.int64), counts[known], usual)
        if size != usual:
            notices.append(f"{path}: taken for {size} tokens per block id, not {usual}: no other power of two fits")
        return size

    def code(self, input_tokens: np.ndarray, block_size: int) -> IdColumns:
        """Id columns of the rows so far."""
        if not block_size:
            return no_ids(len(self))
        row_end = np.frombuffer(self._row_end, np.int64)
        columns = encode_flat(self._all_ids(), row_end)
        unknown = np.frombuffer(self._unknown, np.int64)
        own = np.diff(row_end) - columns["h_lcp"]
        own[unknown] = input_tokens[unknown] // block_size
        return new_ids(columns["h_ref"], columns["h_lcp"], own)

    def _known(self) -> np.ndarray:
        known = np.ones(len(self), bool)
        known[np.frombuffer(self._unknown, np.int64)] = False
        return known

    def _add_numbered(self, ids: Sequence[str | int]) -> None:
        """Texts and integers of more than 64 bits: what the array cannot hold is numbered."""
        for block in ids:
            if type(block) is int and _LEAST <= block <= _MOST:
                self._ids.append(block)
            else:
                self._numbered.append(len(self._ids))
                self._ids.append(self._numbers.setdefault(block, len(self._numbers)))

    def _all_ids(self) -> np.ndarray:
        ids = np.frombuffer(self._ids, np.int64)
        if not self._numbered:
            return ids
        plain = np.ones(len(ids), bool)
        plain[np.frombuffer(self._numbered, np.int64)] = False
        unique, dense = np.unique(ids[plain], return_inverse=True)
        ids = ids + len(unique)
        ids[plain] = dense
        return ids


def unknown_ids(path: Path, *parts: BlockIds) -> list[str]:
    """The notice about rows whose ids are unknown while those of others are not; empty if there are none."""
    unknown, rows = sum(part.unknown for part in parts), sum(map(len, parts))
    return [f"{path}: {unknown} rows have no block ids, so they share nothing"] if 0 < unknown < rows else []


def _fitting_size(tokens: np.ndarray, counts: np.ndarray, usual: int) -> int:
    """`usual`; where it does not fit each row's number of ids, up or down, the largest power of two that does."""
    for size in (usual, *_POWERS_OF_TWO):
        if ((counts + 1) * size > tokens).all() and ((counts - 1) * size < np.maximum(tokens, 1)).all():
            return size
    return usual
