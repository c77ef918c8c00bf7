"""One episode: the rows that arrive, who waits for whom, and the dense page ids of their prefixes."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np

Loop = Literal["open", "closed"]
LOOPS: tuple[Loop, ...] = ("open", "closed")

ROW = np.dtype(
    [
        ("arrival_s", "f8"),  # in a closed loop it acts for rows without needs only
        ("gap_s", "f4"),  # closed loop: seconds from the end of the last of its needs to its arrival
        ("input_tokens", "i4"),
        ("output_tokens", "i4"),
        ("followers", "i4"),  # how many rows need this one: Episode.followers[followers_off :][: followers]
        ("followers_off", "i4"),
        ("prompt_ids", "i4"),  # leading full pages of the prompt whose ids come from a trace
        ("known_ids", "i4"),  # leading full pages of prompt and output that have ids; a trace's rows: all of them
        ("needs", "i2"),  # how many rows must have ended before this one may start
        ("measured", "i2"),  # 0 during warm-up
        ("ref_off", "i8"),  # page j of this row has id refs[ref_off + j], j < known_ids
    ],
    align=True,
)


def _nobody() -> np.ndarray:
    return link(np.zeros(0, ROW), np.zeros(0, np.int64), np.zeros(0, np.int64))


@dataclass(frozen=True)
class Episode:
    """Rows sorted by arrival_s; read-only. Ids are dense: 0 <= refs < id_count."""

    name: str
    seed: int
    rows: np.recarray
    """ROW records, shape (n,)."""
    refs: np.ndarray
    """int32, shape (r,): page ids; rows that continue each other share their stretch."""
    id_count: int
    page_tokens: int
    warmup_s: float
    """Rows that arrive earlier are not measured; in a closed loop rows of sessions that start earlier."""
    horizon_s: float
    """No row has an arrival_s at or after this time."""
    followers: np.ndarray = dataclasses.field(default_factory=_nobody)
    """int32: the rows that wait for a row, row by row, as `link` returns them."""
    loop: Loop = "open"
    """open: every row arrives at its arrival_s, and is held until its needs have ended; closed: a row with needs
    arrives its gap_s after the last of them has ended."""
    traffic_class: np.ndarray | None = None
    """uint8, shape (n,): rows of one number are judged together, whatever is served of others; None: all are."""

    @property
    def rate_per_s(self) -> float:
        """Measured arrivals per second."""
        return int(self.rows["measured"].sum()) / (self.horizon_s - self.warmup_s)

    @property
    def needs(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 (p,) each: row before[i] must have ended before row after[i] may start."""
        return np.repeat(np.arange(len(self.rows)), self.rows["followers"]), self.followers.astype(np.int64)

    def until(self, end_s: float, warmup_s: float) -> "Episode":
        """Its rows with an arrival_s before `end_s`, measured after another warm-up."""
        rows = self.rows[: np.searchsorted(self.rows["arrival_s"], end_s)].copy().view(np.recarray)
        before, after = self.needs
        kept = after < len(rows)
        followers = link(rows, before[kept], after[kept])
        rows["measured"] = is_measured(rows, before[kept], after[kept], warmup_s, self.loop)
        horizon_s = min(end_s, self.horizon_s)
        classes = None if self.traffic_class is None else self.traffic_class[: len(rows)]
        return dataclasses.replace(
            self, rows=rows, followers=followers, warmup_s=warmup_s, horizon_s=horizon_s, traffic_class=classes
        )


def link(rows: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Write into `rows` that row before[i] must have ended before row after[i] may start; returns Episode.followers."""
    assert np.all((before >= 0) & (before < after)), "a row can only wait for rows before it"
    rows["needs"] = np.bincount(after, minlength=len(rows))
    assert rows["needs"].sum() == len(after), "a row waits for too many"
    rows["followers"] = np.bincount(before, minlength=len(rows))
    rows["followers_off"] = np.cumsum(rows["followers"]) - rows["followers"]
    followers: np.ndarray = after[np.lexsort((after, before))].astype(np.int32)
    followers.flags.writeable = False
    return followers


def is_measured(rows: np.ndarray, before: np.ndarray, after: np.ndarray, warmup_s: float, loop: Loop) -> np.ndarray:
    """bool (n,): the rows that arrive after the warm-up; in a closed loop the rows of sessions that start after it,
    since when a later row arrives depends on the controller."""
    first = np.arange(len(rows))
    if loop == "closed":
        first[after] = before  # whichever of them: a session begins with one row
        while np.any(first[first] != first):
            first = first[first]
    return np.asarray(rows["arrival_s"][first] >= warmup_s)
