"""Qwen-Bailian's jsonl: chat_id, parent_chat_id (-1: none), timestamp (s), input_length, output_length, turn, hash_ids.

The chat that a request continues is recorded, when it ended is not.
"""

from array import array
from pathlib import Path
from typing import Any

import numpy as np

from hbmgym.envs.traces.formats.block_ids import BlockIds, unknown_ids
from hbmgym.envs.traces.formats.columns import request_columns
from hbmgym.envs.traces.formats.damage import Damage
from hbmgym.envs.traces.formats.fields import Unused
from hbmgym.envs.traces.formats.reading import name_of, read_objects
from hbmgym.envs.traces.formats.records import block_list_or_none, is_missing, name_or_none, seconds, whole
from hbmgym.envs.traces.repair import order_by_arrival
from hbmgym.envs.traces.trace import Trace
from hbmgym.envs.traces.validate import build_trace

BLOCK_TOKENS = 16
_FIELDS = ("chat_id", "parent_chat_id", "timestamp", "input_length", "output_length", "type", "turn", "hash_ids")
_NO_CHAT = (-1, None)


class _Rows:
    """What the lines say, one entry per row."""

    def __init__(self, path: Path) -> None:
        self.lines, self.arrival_s = array("q"), array("d")
        self.input_tokens, self.output_tokens, self.turn = array("q"), array("q"), array("q")
        self.parent_chats: list[str | int | None] = []
        self.row_of: dict[str | int | None, int] = {}
        self.ids = BlockIds()
        self._path = path

    def add(self, line: int, record: dict[str, Any]) -> None:
        """Raises `TraceError`."""
        path = self._path
        self.row_of.setdefault(name_or_none(record, "chat_id", path, line), len(self.lines))
        self.parent_chats.append(name_or_none(record, "parent_chat_id", path, line))
        self.arrival_s.append(seconds(record, "timestamp", path, line))
        self.input_tokens.append(whole(record, "input_length", path, line))
        self.output_tokens.append(whole(record, "output_length", path, line))
        self.turn.append(0 if is_missing(record.get("turn")) else max(0, whole(record, "turn", path, line) - 1))
        self.ids.add_row(block_list_or_none(record, path, line))
        self.lines.append(line)

    def parents(self) -> np.ndarray:
        """int64: the row of the chat that each row continues, -1 where it is none or not in the file."""
        found = [-1 if chat in _NO_CHAT else self.row_of.get(chat, -1) for chat in self.parent_chats]
        return np.array(found, np.int64)


def load_bailian(path: Path) -> Trace:
    """Read one request per line. Raises `TraceError`."""
    rows, damage, unused = _Rows(path), Damage(path), Unused(_FIELDS)
    for line, record in read_objects(path, damage):
        rows.add(line, record)
        unused.note(record)
    notices = damage.notices() + unused.notices(path)
    input_tokens = np.array(rows.input_tokens, np.int64)
    block_size = rows.ids.block_size(input_tokens, BLOCK_TOKENS, path, notices)
    notices += unknown_ids(path, rows.ids)
    known = rows.ids.code(input_tokens, block_size)
    known |= {"parent": rows.parents(), "turn": np.array(rows.turn, np.int64)}
    columns = request_columns(np.array(rows.arrival_s), input_tokens, np.array(rows.output_tokens, np.int64), **known)
    columns, order = order_by_arrival(columns, str(path), notices)
    return build_trace(
        columns | {"session_id": _roots(columns["parent"])},
        name=name_of(path),
        kind="open-loop",
        block_size=block_size,
        path=str(path),
        where=lambda row: f"{path}:{rows.lines[order[row]]}",
        notices=notices,
    )


def _roots(parent: np.ndarray) -> np.ndarray:
    """int64: number of the conversation that each row belongs to; parents are earlier rows."""
    roots: list[int] = []
    conversations = 0
    for row in parent.tolist():
        roots.append(roots[row] if row >= 0 else conversations)
        conversations += row < 0
    return np.array(roots, np.int64)
