"""One episode: the rows that arrive, and the dense page ids of their prefixes."""

from dataclasses import dataclass

import numpy as np

ROW = np.dtype(
    [
        ("arrival_s", "f8"),
        ("input_tokens", "i4"),
        ("output_tokens", "i4"),
        ("parent", "i4"),  # row that must have ended before this one may start, -1 none
        ("prompt_ids", "i4"),  # leading full pages of the prompt that have ids
        ("known_ids", "i4"),  # the same for prompt and output together; >= prompt_ids
        ("ref_off", "i8"),  # page j of this row has id refs[ref_off + j], j < known_ids
        ("measured", "i4"),  # 0 during warm-up
    ],
    align=True,
)


@dataclass(frozen=True)
class Episode:
    """Rows sorted by arrival; read-only. Ids are dense: 0 <= refs < id_count."""

    name: str
    seed: int
    rows: np.recarray
    """ROW records, shape (n,)."""
    refs: np.ndarray
    """int32, shape (r,): page ids; rows that continue each other share their stretch."""
    id_count: int
    page_tokens: int
    warmup_s: float
    """Rows that arrive earlier are not measured."""
    horizon_s: float
    """No row arrives at or after this time."""

    @property
    def rate_per_s(self) -> float:
        """Measured arrivals per second."""
        return int(self.rows["measured"].sum()) / (self.horizon_s - self.warmup_s)
