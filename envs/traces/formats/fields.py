"""Fields and columns of a file that nobody reads: named once, never refused."""

from collections.abc import Collection, Iterable
from pathlib import Path

_MOST_SHOWN, _MOST_KEPT, _LONGEST = 8, 1000, 40


class Unused:
    """The names of a file's fields that are neither read nor known to say nothing."""

    def __init__(self, known: Iterable[str]) -> None:
        self._known = frozenset(known)
        self._names: set[str] = set()

    def note(self, names: Collection[str]) -> None:
        """Fields of one record."""
        if not self._known.issuperset(names) and len(self._names) < _MOST_KEPT:
            self._names.update(name for name in names if name not in self._known)

    def notices(self, path: Path) -> list[str]:
        """The one notice, if there is any such field."""
        if not self._names:
            return []
        shown = [repr(name[:_LONGEST])[1:-1] for name in sorted(self._names)[:_MOST_SHOWN]]
        more = f" and {len(self._names) - len(shown)} more" if len(self._names) > len(shown) else ""
        return [f"{path}: these fields are not used: {', '.join(shown)}{more}"]
