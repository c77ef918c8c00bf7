"""What of a file or folder cannot be read: it is left out, counted, and named once; too much of it is refused.

Written lines end anywhere when a program is killed or a disk is full. A value that is wrong in a whole line is no such
damage: it is refused by whoever reads it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hbmgym.envs.traces.trace import TraceError

MAX_SHARE = 0.1
"""A trace that lacks more of its lines is another workload than the one that was recorded."""
FEW = 10
"""So many lines may be damaged in a small file too, as long as half of it is sound: that is what a crash leaves."""
HOPELESS = 10_000
"""After so many, and more damaged than sound ones, the rest is not read."""


class Damaged(TraceError):
    """A file, a line or a record cannot be read, while others may be."""


class Damage:
    """Counts the damaged ones among the `unit` (lines, conversations, ...) of the file or folder `path`."""

    def __init__(self, path: Path, unit: str = "lines") -> None:
        self.seen = 0
        """So far, damaged ones too; counted by whoever reads."""
        self._path, self._unit = path, unit
        self._damaged: dict[Path, int] = {}
        self._total = 0
        self._first = ""

    def leave_out(self, file: Path, reason: object, count: int = 1) -> None:
        """`reason` is the line that names the first of the `count` damaged ones, and what is wrong with it."""
        self._first = self._first or str(reason)
        self._damaged[file] = self._damaged.get(file, 0) + count
        self._total += count
        if self._total > HOPELESS and 2 * self._total > self.seen:
            raise self._too_much()

    @contextmanager
    def left_out(self, file: Path) -> Iterator[None]:
        """A file of a folder that is `Damaged` is left out from there on, and counts as one; a single file is not."""
        try:
            yield
        except Damaged as reason:
            if file == self._path:
                raise
            self.seen += 1
            self.leave_out(file, reason)

    def notices(self) -> list[str]:
        """What was left out, if anything. Raises `TraceError` where it was too much."""
        if not self._damaged:
            return []
        if 2 * self._total > self.seen or self._total > max(FEW, MAX_SHARE * self.seen):
            raise self._too_much()
        files = f", in {len(self._damaged):,} files" if len(self._damaged) > 1 else ""
        found = f"{self._total:,} of {self.seen:,}{files}"
        return [f"{self._path}: damaged {self._unit} are left out: {found}; the first: {self._first}"]

    def _too_much(self) -> TraceError:
        return TraceError(f"{self._first}; {self._total:,} of {self.seen:,} {self._unit} are damaged")
