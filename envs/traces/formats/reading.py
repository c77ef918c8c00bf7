"""Text files as lines, as JSON objects or as JSON values, with a progress bar; compressed ones as what is in them.

A damaged line is left out (`damage.py`); a file that cannot be read to its end is `Damaged`.
"""

import codecs
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from json import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from hbmgym.envs.traces.formats.damage import Damage, Damaged
from hbmgym.envs.traces.formats.packed import LONGEST_MARK, plain, unpacked
from hbmgym.envs.traces.trace import TraceError

CHUNK_BYTES = 2**24
MAX_LINE = 2**26
"""Bytes; a longer line is passed over before it fills the memory."""
HEAD_BYTES = 2**16
BAR_BYTES, BAR_FILES = 2**25, 50
"""What is less is read before a progress bar could be seen."""
BAD_JSON = (ValueError, RecursionError)
_DAMAGED = "the file is damaged or of another format"
_SPACE = re.compile(r"\s*")
_MARK = b"\xef\xbb\xbf"
_decode: Callable[..., tuple[Any, int]] = JSONDecoder().raw_decode


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """The file, opened to read bytes, unpacked ones. Raises `TraceError`, also for a pipe, which might never end."""
    with _open(path) as file, _unpacked(file, path) as content:
        yield content


def read_head(path: Path) -> bytes:
    """The first HEAD_BYTES of a file, of its content if it is compressed. Raises `TraceError`."""
    with open_file(path) as file:
        return _read(file, path, HEAD_BYTES)


def name_of(path: Path) -> str:
    """What a trace that is read from `path` is called."""
    return plain(Path(os.path.abspath(path))).stem


def each_file(path: Path, files: Sequence[Path]) -> Iterable[Path]:
    """The `files` of a folder with a progress bar, or the one file `path` if there are none."""
    quiet = True if len(files) < BAR_FILES else None
    return tqdm(files or (path,), desc=path.name, unit=" files", leave=False, disable=quiet)


def read_lines(path: Path, damage: Damage) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of every line that is not blank. Raises `Damaged` where there is none to be read."""
    number = 0
    for block in _readable(_blocks(path), path, damage):
        if block is None:
            number += 1
            damage.seen += 1
            damage.leave_out(path, f"{path}:{number}: line is longer than {MAX_LINE} bytes ({_DAMAGED})")
            continue
        for line in _lines(path, block, number + 1, damage):
            number += 1
            if line and not line.isspace():
                damage.seen += 1
                yield number, line


def _readable(blocks: Iterator[bytes | None], path: Path, damage: Damage) -> Iterator[bytes | None]:
    """The blocks up to where a compressed file breaks off, which counts as a damaged line."""
    some = False
    try:
        for block in blocks:
            yield block
            some = True
    except Damaged as reason:
        if not some:
            raise
        damage.seen += 1
        damage.leave_out(path, f"{reason}; what comes after is missing")


def read_objects(path: Path, damage: Damage) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and JSON object of every line that is not blank; several where a newline is missing."""
    loads = json.loads
    for number, line in read_lines(path, damage):
        try:
            record = loads(line)
        except BAD_JSON:
            reason = f"{path}:{number}: line is not JSON, expected one object per line ({_DAMAGED})"
            # What a file system had not yet written when the power failed reads as null bytes.
            records, whole = _whole_objects(line.strip("\0"))
            if not (records and whole):
                damage.leave_out(path, reason)
            yield from ((number, record) for record in records)
            continue
        if type(record) is dict:
            yield number, record
        else:
            kind = type(record).__name__
            damage.leave_out(path, f"{path}:{number}: line is {kind!r}, expected a JSON object (one record per line)")


def read_values(path: Path, damage: Damage) -> Iterator[Any]:
    """The JSON values that follow each other in a file, those of a leading array one by one. Raises `Damaged`.

    Where they are written one per line, a damaged line is left out.
    """
    if _is_one_per_line(path):
        yield from (record for _, record in read_objects(path, damage))
        return
    for value in _values(path):
        damage.seen += 1
        yield value


def _values(path: Path) -> Iterator[Any]:
    text = _Window(path)
    if text.next_character() == "[":
        text.place += 1
        while text.next_character() != "]":
            yield text.next_value()
            if text.next_character() == ",":
                text.place += 1
            elif text.next_character() != "]":
                raise Damaged(f"{path}:{text.line()}: the array does not go on with , or ] ({_DAMAGED})")
        text.place += 1
    while text.next_character():
        yield text.next_value()


def head_objects(head: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects that stand whole, one per line, in the first bytes of a file."""
    for line in head.removeprefix(_MARK).split(b"\n"):
        try:
            record, _ = _decode(line.strip(b"\0 \r").decode())
        except BAD_JSON:
            continue
        if type(record) is dict:
            yield record


def _whole_objects(line: str) -> tuple[list[dict[str, Any]], bool]:
    """The JSON objects on a line that is no object, and whether they are all that is on it.

    A writer that was killed is followed, on the same line, by the one that came next: a last object counts if it
    reaches the line's end.
    """
    found: list[dict[str, Any]] = []
    place, end = len(line) - len(line.lstrip()), len(line.rstrip())
    while place < end:
        try:
            value, after = _decode(line, place)
        except JSONDecodeError as error:
            return found + _last_object(line, place + 1, error.pos, end), False
        except BAD_JSON:
            return found, False
        if type(value) is not dict:
            return found, False
        found.append(value)
        place = _SPACE.match(line, after).end()  # type: ignore[union-attr]
    return found, True


def _last_object(line: str, begin: int, broken: int, end: int) -> list[dict[str, Any]]:
    """The object that begins where the one before it breaks off, if it is whole."""
    begin = line.rfind('{"', begin, broken + 2)
    try:
        value, after = _decode(line, begin) if begin >= 0 else (None, 0)
    except BAD_JSON:
        return []
    return [value] if after == end and type(value) is dict else []


def _is_one_per_line(path: Path) -> bool:
    first, newline, _ = read_head(path).removeprefix(_MARK).lstrip().partition(b"\n")
    try:
        return bool(newline) and first.startswith(b"{") and type(_decode(first.decode())[0]) is dict
    except BAD_JSON:
        return False


class _Window:
    """The part of a text that has been read and not yet been used; `place` is where its next value begins."""

    def __init__(self, path: Path) -> None:
        self.place = 0
        self._path, self._pieces = path, _text_pieces(path)
        self._text, self._line = "", 1

    def next_character(self) -> str:
        """The next character that is no space, which stays the next one; empty at the end."""
        while True:
            self.place = _SPACE.match(self._text, self.place).end()  # type: ignore[union-attr]
            if self.place < len(self._text) or not self._grow():
                return self._text[self.place : self.place + 1]

    def next_value(self) -> Any:
        """Decode and pass the next value. Raises `Damaged`."""
        while True:
            try:
                value, self.place = _decode(self._text, self.place)
                return value
            except BAD_JSON as error:
                if not self._grow():
                    self.place = error.pos if isinstance(error, JSONDecodeError) else self.place
                    raise Damaged(f"{self._path}:{self.line()}: text is not JSON ({_DAMAGED})") from error

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
            raise Damaged(f"{path}:{line}: line is not UTF-8 text (convert the file to UTF-8)") from error
        line += piece.count("\n")
        if piece:
            yield piece


def _lines(path: Path, block: bytes, number: int, damage: Damage) -> list[str]:
    """The lines of a block that begins with line `number`; one that is no text is empty."""
    try:
        return block.decode().split("\n")
    except UnicodeDecodeError:
        lines = enumerate(block.split(b"\n"), number)
        return [_text(line, f"{path}:{place}", path, damage) for place, line in lines]


def _text(line: bytes, place: str, path: Path, damage: Damage) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        damage.seen += 1
        damage.leave_out(path, f"{place}: line is not UTF-8 text ({_DAMAGED})")
        return ""


def _blocks(path: Path) -> Iterator[bytes | None]:
    """The file in pieces of whole lines, without the last one's end; None for a line that is too long."""
    rest, first, skipping = b"", True, False
    for chunk in _chunks(path):
        rest += chunk
        if first and chunk and len(rest) < len(_MARK):
            continue
        rest, first = rest.removeprefix(_MARK) if first else rest, False
        passed = rest.find(b"\n") + 1 if chunk else len(rest)
        if skipping and passed:
            rest, skipping = rest[passed:], False
        end = rest.rfind(b"\n") if chunk else len(rest)
        if end >= 0 and (chunk or rest):
            yield rest[:end]
            rest = rest[end + 1 :]
        if len(rest) > MAX_LINE:
            if not skipping:
                yield None
            rest, skipping = b"", True


def _chunks(path: Path) -> Iterator[bytes]:
    """The content's bytes; the last chunk, and only that one, is empty."""
    with _open(path) as packed, _unpacked(packed, path) as file:
        size = path.stat().st_size
        quiet = True if size < BAR_BYTES else None  # None: where stderr is no terminal
        with tqdm(total=size, desc=path.name, unit="B", unit_scale=True, leave=False, disable=quiet) as bar:
            chunk = b" "
            while chunk:
                chunk = _read(file, path, CHUNK_BYTES) if file is packed else _read_some(file, path)
                bar.update(packed.tell() - bar.n)
                yield chunk


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    try:
        if path.exists() and not path.is_dir() and not path.is_file():
            raise TraceError(f"{path}: is no regular file, expected a trace file (write it to a file first)")
        file = path.open("rb")
    except OSError as error:
        raise Damaged(f"{path}: cannot be read: {error.strerror}, expected a trace file") from error
    with file:
        yield file


def _unpacked(file: BinaryIO, path: Path) -> BinaryIO:
    head = _read(file, path, LONGEST_MARK)
    file.seek(0)
    return unpacked(file, head, path)


def _read(file: BinaryIO, path: Path, count: int) -> bytes:
    return _or_damaged(lambda: file.read(count), path)


def _read_some(file: BinaryIO, path: Path) -> bytes:
    """As much as can be unpacked before an error."""
    return _or_damaged(lambda: file.read1(CHUNK_BYTES), path)  # type: ignore[attr-defined]


def _or_damaged(read: Callable[[], bytes], path: Path) -> bytes:
    try:
        return read()
    except Exception as error:  # each compressor has errors of its own
        if isinstance(error, OSError) and error.strerror:
            raise Damaged(f"{path}: cannot be read: {error.strerror}, expected a trace file") from error
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise Damaged(f"{path}: cannot be unpacked: {reason} (the file is cut off or damaged)") from error
