"""csv files by column name: chunks of rows become arrays, and a bad value is named with its line."""

import csv
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from pathlib import Path

import numpy as np

from hbmgym.envs.traces.formats.reading import read_lines
from hbmgym.envs.traces.formats.records import MAX_TOKENS
from hbmgym.envs.traces.formats.times import parse_datetimes
from hbmgym.envs.traces.trace import TraceError
from hbmgym.envs.traces.validate import MAX_SECONDS, refuse

CHUNK_ROWS, MAX_COLUMNS = 100_000, 1_000
DELIMITERS = ",;\t"


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
    """Columns by key, and the line that each row stands on."""

    columns: Mapping[str, np.ndarray]
    lines: np.ndarray


def plain_name(name: str) -> str:
    """A column's name as it is compared: Request tokens, request_tokens and RequestTokens are the same."""
    return "".join(character for character in name.lower() if character.isalnum())


def split_header(first_line: str) -> list[str]:
    """The names in a csv file's first line; none where it is no csv."""
    try:
        return next(csv.reader([first_line], delimiter=_delimiter(first_line)), [])
    except csv.Error:
        return []


def read_table(path: Path, wanted: Sequence[Column]) -> Table:
    """Read the wanted columns, at least two, that the file has. Raises `TraceError`."""
    records = _records(path)
    _, header = next(records, (0, []))
    found = _find(path, header, wanted)
    rows = _cells(path, records, [place for _, place in found])
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
    return Table(columns, np.frombuffer(lines, np.int64))


def whole_numbers(texts: Sequence[str]) -> np.ndarray:
    """int64 from 0 to MAX_TOKENS; raises ValueError."""
    values = np.array(list(map(float, texts)))
    if not ((values >= 0) & (values <= MAX_TOKENS) & (np.floor(values) == values)).all():
        raise ValueError("not whole, or out of range")
    return values.astype(np.int64)


def numbers(texts: Sequence[str]) -> np.ndarray:
    """float64, finite and >= 0; raises ValueError."""
    values = np.array(list(map(float, texts)))
    if not ((values >= 0) & (values <= MAX_SECONDS * 1e9)).all():
        raise ValueError("not finite, or negative")
    return values


def numbers_or_nan(texts: Sequence[str]) -> np.ndarray:
    """Like `numbers`; NaN where a text is empty."""
    values = numbers([text if text.strip() else "0" for text in texts])
    values[[not text.strip() for text in texts]] = np.nan
    return values


def numbers_or_dates(texts: Sequence[str]) -> np.ndarray:
    """float64 or datetime64[ns]; raises ValueError."""
    try:
        return numbers(texts)
    except ValueError:
        return parse_datetimes(texts)


class Labels:
    """Parses names to int64 numbers, equal for equal names, -1 where there is none."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {"": -1}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Number the texts in order of appearance."""
        number = self._numbers.setdefault
        return np.array([number(text.strip(), len(self._numbers) - 1) for text in texts], np.int64)


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    number = 0

    def texts() -> Iterator[str]:
        nonlocal number
        for number, line in lines:  # noqa: B007
            yield line

    lines = read_lines(path)
    number, first = next(lines, (0, ""))
    delimiter = _delimiter(first)
    try:
        yield from ((number, fields) for fields in csv.reader([first], delimiter=delimiter))
        for fields in csv.reader(texts(), delimiter=delimiter):
            yield number, fields
    except csv.Error as error:
        raise TraceError(
            f"{path}:{number}: line is no csv: {error} (the file is damaged or of another format)"
        ) from error


def _delimiter(header: str) -> str:
    return max(DELIMITERS, key=header.count)


def _find(path: Path, header: Sequence[str], wanted: Sequence[Column]) -> list[tuple[Column, int]]:
    if len(header) > MAX_COLUMNS:
        refuse(
            f"{path}:1", "number of columns", len(header), f"at most {MAX_COLUMNS}", "the file is no table of requests"
        )
    places = {plain_name(name): place for place, name in reversed(list(enumerate(header)))}
    found = []
    for column in wanted:
        place = next((places[plain_name(name)] for name in column.names if plain_name(name) in places), None)
        if place is not None:
            found.append((column, place))
        elif column.required:
            refuse(f"{path}:1", "columns", ", ".join(header), " or ".join(column.names), "add or name the column")
    return found


def _cells(
    path: Path, records: Iterator[tuple[int, list[str]]], places: Sequence[int]
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line number and the cells at `places` of each record."""
    pick = itemgetter(*places)
    for number, fields in records:
        try:
            yield number, pick(fields)
        except IndexError:
            refuse(
                f"{path}:{number}", "number of columns", len(fields), f"more than {max(places)}", "the line is cut off"
            )


def _parse(path: Path, numbers: Sequence[int], texts: Sequence[str], column: Column) -> np.ndarray:
    try:
        return column.parse(texts)
    except ValueError:
        cells = zip(numbers, texts, strict=True)
        number, text = next((cell for cell in cells if not _parses(column, cell[1])), (numbers[0], texts[0]))
        refuse(f"{path}:{number}", column.names[0], text, column.expected, "correct the value")


def _parses(column: Column, text: str) -> bool:
    try:
        column.parse([text])
    except ValueError:
        return False
    return True
