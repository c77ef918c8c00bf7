"""csv files by column name: chunks of rows become arrays, and a bad value is named with its line.

A row with too few or too many cells is damaged: it is left out, as it may have been cut anywhere.
"""

import csv
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from pathlib import Path

import numpy as np

from hbmgym.envs.traces.formats.damage import Damage
from hbmgym.envs.traces.formats.fields import Unused
from hbmgym.envs.traces.formats.reading import read_lines
from hbmgym.envs.traces.formats.records import MAX_TOKENS, is_missing
from hbmgym.envs.traces.formats.times import epoch_hint, parse_datetimes
from hbmgym.envs.traces.trace import TraceError
from hbmgym.envs.traces.validate import MAX_SECONDS, refuse

CHUNK_ROWS, MAX_COLUMNS = 100_000, 1_000
DELIMITERS = ",;\t"
NO_NAME = -1


@dataclass(frozen=True)
class Column:
    """What is wanted of a file: the first of `names` that it has, under `key`."""

    key: str
    names: tuple[str, ...]
    parse: Callable[[Sequence[str]], np.ndarray]
    """From texts to one value each; raises ValueError."""
    expected: str
    required: bool = True


@dataclass(frozen=True)
class Table:
    """Columns by key, the line that each row stands on, and what there is to say of the file."""

    columns: Mapping[str, np.ndarray]
    lines: np.ndarray
    notices: list[str]


def plain_name(name: str) -> str:
    """A column's name as it is compared: Request tokens, request_tokens and RequestTokens are the same."""
    return "".join(character for character in name.lower() if character.isalnum())


def split_header(first_line: str) -> list[str]:
    """The names in a csv file's first line; none where it is no csv."""
    try:
        return next(csv.reader([first_line], delimiter=_delimiter(first_line)), [])
    except csv.Error:
        return []


def read_table(path: Path, wanted: Sequence[Column], silent: Sequence[str] = ()) -> Table:
    """Read the wanted columns, at least two, that the file has; others are named unless they are `silent`.

    Raises `TraceError`.
    """
    damage = Damage(path)
    records = _records(path, damage)
    _, _, header = next(records)
    found = _find(path, header, wanted)
    places = [place for _, place in found]
    rows = _cells(path, records, len(header), places, damage)
    lines = array("q")
    pieces: dict[str, list[np.ndarray]] = {column.key: [] for column, _ in found}
    while chunk := list(islice(rows, CHUNK_ROWS)):
        numbers, *cells = zip(*((number, *cells) for number, cells in chunk), strict=True)
        lines.extend(numbers)
        for (column, _), texts in zip(found, cells, strict=True):
            pieces[column.key].append(_parse(path, numbers, texts, column))
    for key, parts in pieces.items():
        if len({part.dtype.kind for part in parts}) > 1:
            raise TraceError(f"{path}: {key} are numbers in some lines and dates in others, expected one of the two")
    columns = {key: np.concatenate(parts) if parts else np.zeros(0) for key, parts in pieces.items()}
    unused = Unused(name for name in header if not name.strip() or plain_name(name) in map(plain_name, silent))
    unused.note([name for place, name in enumerate(header) if place not in places])
    return Table(columns, np.frombuffer(lines, np.int64), damage.notices() + unused.notices(path))


def whole_numbers(texts: Sequence[str]) -> np.ndarray:
    """int64 from 0 to MAX_TOKENS; raises ValueError."""
    values = np.array(list(map(float, texts)))
    if not ((values >= 0) & (values <= MAX_TOKENS) & (np.floor(values) == values)).all():
        raise ValueError("not whole, or out of range")
    return values.astype(np.int64)


def whole_numbers_or_none(texts: Sequence[str]) -> np.ndarray:
    """Like `whole_numbers`; 0 where a text says that there is none."""
    return whole_numbers(["0" if is_missing(text) else text for text in texts])


def numbers(texts: Sequence[str], per_second: float = 1.0) -> np.ndarray:
    """float64, times from 0 to MAX_SECONDS in 1 / `per_second` seconds; raises ValueError."""
    values = np.array(list(map(float, texts)))
    if not ((values >= 0) & (values <= MAX_SECONDS * per_second)).all():
        raise ValueError("not finite, negative, or too large")
    return values


def numbers_or_nan(texts: Sequence[str]) -> np.ndarray:
    """Like `numbers`; NaN where a text says that there is none."""
    missing = list(map(is_missing, texts))
    values = numbers(["0" if none else text for none, text in zip(missing, texts, strict=True)])
    values[missing] = np.nan
    return values


def numbers_or_dates(texts: Sequence[str], per_second: float = 1.0) -> np.ndarray:
    """float64 as of `numbers`, or datetime64[ns]; raises ValueError."""
    try:
        return numbers(texts, per_second)
    except ValueError:
        return parse_datetimes(texts)


class Labels:
    """Parses names to int64 numbers, equal for equal names, -1 where there is none."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._named = 0

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Number the texts in order of appearance."""
        return np.array([self._number(text.strip()) for text in texts], np.int64)

    def _number(self, name: str) -> int:
        found = self._numbers.get(name)
        if found is None:
            found = NO_NAME if is_missing(name) else self._named
            self._named += found != NO_NAME
            self._numbers[name] = found
        return found


def _records(path: Path, damage: Damage) -> Iterator[tuple[int, int, list[str]]]:
    """Last line, number of lines and cells of each record, the header first."""
    number = begun = 0

    def texts() -> Iterator[str]:
        nonlocal number
        for number, line in lines:
            if "\0" in line:
                damage.leave_out(path, f"{path}:{number}: line has null bytes (the line is damaged)")
            else:
                yield line

    lines = read_lines(path, damage)
    number, first = next(lines, (0, ""))
    if not (header := split_header(first)):
        raise TraceError(f"{path}:{number}: line is no csv (the file is damaged or of another format)")
    yield number, 1, header
    damage.seen = 0
    reader, begun = csv.reader(texts(), delimiter=_delimiter(first)), number
    while True:
        try:
            for fields in reader:
                yield number, number - begun, fields
                begun = number
            return
        except csv.Error as error:
            reason = f"{path}:{number}: line is no csv: {error} (the file is damaged or of another format)"
            damage.leave_out(path, reason, number - begun)
            begun = number


def _delimiter(header: str) -> str:
    return max(DELIMITERS, key=header.count)


def _find(path: Path, header: Sequence[str], wanted: Sequence[Column]) -> list[tuple[Column, int]]:
    if len(header) > MAX_COLUMNS:
        refuse(
            f"{path}:1", "number of columns", len(header), f"at most {MAX_COLUMNS}", "the file is no table of requests"
        )
    plain = list(map(plain_name, header))
    found = []
    for column in wanted:
        name = next((name for name in map(plain_name, column.names) if name in plain), None)
        if name is not None:
            if plain.count(name) > 1:
                names = ", ".join(header)
                refuse(f"{path}:1", "columns", names, f"{header[plain.index(name)]} once", "rename or remove one")
            found.append((column, plain.index(name)))
        elif column.required:
            refuse(f"{path}:1", "columns", ", ".join(header), " or ".join(column.names), "add or name the column")
    return found


def _cells(
    path: Path, records: Iterator[tuple[int, int, list[str]]], width: int, places: Sequence[int], damage: Damage
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line number and the cells at `places` of each record that has `width` of them, or empty ones more."""
    pick = itemgetter(*places)
    for number, lines, fields in records:
        if len(fields) == width or (len(fields) > width and not "".join(fields[width:]).strip()):
            yield number, pick(fields)
        else:
            # A stray quote makes one record of all lines up to the next one.
            place, columns = f"{path}:{number - lines + 1}", f"number of columns is {len(fields)}, expected {width}"
            damage.leave_out(path, f"{place}: {columns} (the line is damaged)", lines)


def _parse(path: Path, numbers: Sequence[int], texts: Sequence[str], column: Column) -> np.ndarray:
    try:
        return column.parse(texts)
    except ValueError:
        cells = zip(numbers, texts, strict=True)
        number, text = next((cell for cell in cells if not _parses(column, cell[1])), (numbers[0], texts[0]))
        remedy = epoch_hint(text) or "correct the value"
        refuse(f"{path}:{number}", column.names[0], text, column.expected, remedy)


def _parses(column: Column, text: str) -> bool:
    try:
        column.parse([text])
    except ValueError:
        return False
    return True
