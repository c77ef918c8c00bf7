"""Text files as lines, as JSON objects or as JSON values, with a progress bar; anything else is a `TraceError`."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from json import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from hbmgym.envs.traces.trace import TraceError
from hbmgym.envs.traces.validate import refuse

CHUNK_BYTES = 2**24
MAX_LINE = 2**26
"""Characters; a longer line is taken for a file of another kind before it fills the memory."""
BAR_BYTES, BAR_FILES = 2**25, 50
"""What is less is read before a progress bar could be seen."""
_BAD_JSON = (ValueError, RecursionError)
_DAMAGED = "the file is damaged or of another format"
_SPACE = re.compile(r"\s*")


def open_file(path: Path) -> BinaryIO:
    """The file, opened to read bytes. Raises `TraceError`, also for a pipe or a device, which might never end."""
    try:
        if path.exists() and not path.is_dir() and not path.is_file():
            raise TraceError(f"{path}: is no regular file, expected a trace file (write it to a file first)")
        return path.open("rb")
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}, expected a trace file") from error


def read_head(path: Path, count: int) -> bytes:
    """The first bytes of a file. Raises `TraceError`."""
    with open_file(path) as file:
        return _read(file, path, count)


def each_file(path: Path, files: Sequence[Path]) -> Iterable[Path]:
    """The `files` of a folder with a progress bar, or the one file `path` if there are none."""
    quiet = True if len(files) < BAR_FILES else None
    return tqdm(files or (path,), desc=path.name, unit=" files", leave=False, disable=quiet)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of every line that is not blank. Raises `TraceError`."""
    number, rest = 0, ""
    for piece in _text_pieces(path):
        lines = (rest + piece).split("\n")
        rest = lines.pop()
        if len(rest) > MAX_LINE:
            raise TraceError(f"{path}:{number + 1}: line is longer than {MAX_LINE} characters ({_DAMAGED})")
        for line in lines:
            number += 1
            if line and not line.isspace():
                yield number, line
    if rest and not rest.isspace():
        yield number + 1, rest


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and JSON object of every line that is not blank. Raises `TraceError`."""
    loads = json.loads
    for number, line in read_lines(path):
        try:
            record = loads(line)
        except _BAD_JSON as error:
            raise TraceError(f"{path}:{number}: line is not JSON, expected one object per line ({_DAMAGED})") from error
        if type(record) is not dict:
            refuse(f"{path}:{number}", "line", type(record).__name__, "a JSON object", "one record per line")
        yield number, record


def read_values(path: Path) -> Iterator[Any]:
    """The JSON values that follow each other in a file, those of a leading array one by one. Raises `TraceError`."""
    text = _Window(path)
    if text.next_character() == "[":
        text.place += 1
        while text.next_character() != "]":
            yield text.next_value()
            if text.next_character() == ",":
                text.place += 1
            elif text.next_character() != "]":
                raise TraceError(f"{path}:{text.line()}: the array does not go on with , or ] ({_DAMAGED})")
        text.place += 1
    while text.next_character():
        yield text.next_value()


class _Window:
    """The part of a text that has been read and not yet been used; `place` is where its next value begins."""

    def __init__(self, path: Path) -> None:
        self.place = 0
        self._path, self._pieces = path, _text_pieces(path)
        self._text, self._line, self._decode = "", 1, JSONDecoder().raw_decode

    def next_character(self) -> str:
        """The next character that is no space, which stays the next one; empty at the end."""
        while True:
            self.place = _SPACE.match(self._text, self.place).end()  # type: ignore[union-attr]
            if self.place < len(self._text) or not self._grow():
                return self._text[self.place : self.place + 1]

    def next_value(self) -> Any:
        """Decode and pass the next value. Raises `TraceError`."""
        while True:
            try:
                value, self.place = self._decode(self._text, self.place)
                return value
            except _BAD_JSON as error:
                if not self._grow():
                    self.place = error.pos if isinstance(error, JSONDecodeError) else self.place
                    raise TraceError(f"{self._path}:{self.line()}: text is not JSON ({_DAMAGED})") from error

    def line(self) -> int:
        """Number of the line that `place` lies in."""
        return self._line + self._text.count("\n", 0, self.place)

    def _grow(self) -> bool:
        """Drop what was used and read at least as much as is left, so that a long value is not tried too often."""
        more: list[str] = []
        while sum(map(len, more)) <= len(self._text) - self.place:
            piece = next(self._pieces, "")
            if not piece:
                break
            more.append(piece)
        self._line = self.line()
        self._text, self.place = self._text[self.place :] + "".join(more), 0
        return bool(more)


def _text_pieces(path: Path) -> Iterator[str]:
    decoder, line = codecs.getincrementaldecoder("utf-8-sig")(), 1
    for chunk in _chunks(path):
        try:
            piece = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            line += error.object.count(b"\n", 0, error.start)
            raise TraceError(f"{path}:{line}: line is not UTF-8 text (convert the file to UTF-8)") from error
        line += piece.count("\n")
        if piece:
            yield piece


def _chunks(path: Path) -> Iterator[bytes]:
    """The file's bytes; the last chunk, and only that one, is empty."""
    with open_file(path) as file:
        size = path.stat().st_size
        quiet = True if size < BAR_BYTES else None  # None: where stderr is no terminal
        with tqdm(total=size, desc=path.name, unit="B", unit_scale=True, leave=False, disable=quiet) as bar:
            chunk = b" "
            while chunk:
                chunk = _read(file, path, CHUNK_BYTES)
                bar.update(len(chunk))
                yield chunk


def _read(file: BinaryIO, path: Path, count: int) -> bytes:
    try:
        return file.read(count)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}, expected a trace file") from error
