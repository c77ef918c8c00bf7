"""`load_trace`: one entrance for every format, recognised by content and not by name."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

from hbmgym.envs.traces.formats.azure import load_azure
from hbmgym.envs.traces.formats.bailian import load_bailian
from hbmgym.envs.traces.formats.burstgpt import load_burstgpt
from hbmgym.envs.traces.formats.claude_code import load_claude_code
from hbmgym.envs.traces.formats.compact import load_compact
from hbmgym.envs.traces.formats.damage import Damaged
from hbmgym.envs.traces.formats.generic_csv import guess_columns, load_csv
from hbmgym.envs.traces.formats.kv_cache_tester import load_kv_cache_tester
from hbmgym.envs.traces.formats.mooncake import load_mooncake
from hbmgym.envs.traces.formats.packed import NeedsPackage, plain
from hbmgym.envs.traces.formats.reading import BAD_JSON, HEAD_BYTES, head_objects, read_head
from hbmgym.envs.traces.formats.sharegpt import load_sharegpt
from hbmgym.envs.traces.formats.table import DELIMITERS, plain_name, split_header
from hbmgym.envs.traces.trace import Trace, TraceError
from hbmgym.envs.traces.validate import refuse

MAX_FILES, MAX_RECORDS = 100_000, 50
_ZIP = b"PK\x03\x04"
_WIDE = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"(\s*:)?|[][{}]')
_FORMATS = (
    "a compact npz; jsonl of Mooncake, AIPerf or Qwen-Bailian; csv of Azure, BurstGPT or with named columns;"
    " session files of kv-cache-tester or Claude Code, or a folder of them; or ShareGPT json; all also as gz, xz or zst"
)


@dataclass(frozen=True)
class Format:
    """What a file is, and what reads it."""

    name: str
    load: Callable[[Path], Trace]

    def read(self, path: Path, spread: bool) -> Trace:
        """The trace, as `load_trace` has it."""
        trace = self.load(path)
        return trace if spread else replace(trace, clock="")


# The first line decides whose keys any record of the file's head has.
_JSON_KEYS = (
    ({"chat_id", "parent_chat_id", "input_length"}, Format("Qwen-Bailian jsonl", load_bailian)),
    ({"timestamp", "input_length", "output_length"}, Format("Mooncake jsonl", load_mooncake)),
    ({"hash_ids", "input_length", "output_length"}, Format("Mooncake jsonl", load_mooncake)),
    ({"requests", "block_size"}, Format("kv-cache-tester json", load_kv_cache_tester)),
    ({"conversations"}, Format("ShareGPT json", load_sharegpt)),
    ({"sessionId"}, Format("Claude Code session log", load_claude_code)),
    ({"leafUuid"}, Format("Claude Code session log", load_claude_code)),
    ({"parentUuid", "isSidechain"}, Format("Claude Code session log", load_claude_code)),
    ({"messageId", "snapshot"}, Format("Claude Code session log", load_claude_code)),
    ({"hash_ids"}, Format("Mooncake jsonl", load_mooncake)),
    ({"input_length"}, Format("Mooncake jsonl", load_mooncake)),
    ({"text_input"}, Format("Mooncake jsonl", load_mooncake)),
    ({"timestamp"}, Format("Mooncake jsonl", load_mooncake)),
    ({"messages"}, Format("ShareGPT json", load_sharegpt)),
)
_CSV_COLUMNS = (
    ({"timestamp", "contexttokens", "generatedtokens"}, Format("Azure csv", load_azure)),
    ({"timestamp", "requesttokens", "responsetokens"}, Format("BurstGPT csv", load_burstgpt)),
)
_FOLDERS = ((load_kv_cache_tester, ".json"), (load_claude_code, ".jsonl"))
"""What a folder may be made of, and how such a file's name ends."""


def load_trace(path: str | Path, columns: Mapping[str, str] | None = None, *, spread: bool = True) -> Trace:
    """Read a trace; raises `TraceError` with one line for anything that is not one.

    `columns` names those of a csv whose own names say nothing (`generic_csv.parse_columns`). `spread`: whether arrivals
    that the format is known to round are spread when the trace is played (`jitter.CLOCKS`).
    """
    return recognise(Path(path), columns).read(Path(path), spread)


def recognise(path: Path, columns: Mapping[str, str] | None = None) -> Format:
    """The format of a file or folder. Raises `TraceError`."""
    if columns:
        return Format("csv with the named columns", partial(load_csv, columns=columns))
    if path.is_dir():
        return _recognise_folder(path)
    head = read_head(path)
    if head.startswith(_ZIP):
        return Format("compact npz", load_compact)
    if head.startswith(_WIDE):
        remedy = "convert it, for example with iconv -t UTF-8"
        raise TraceError(f"{path}: text is in UTF-16 or UTF-32, expected UTF-8 ({remedy})")
    text = head.decode("utf-8-sig", errors="replace").replace("\0", "").lstrip()
    if not text:
        raise TraceError(f"{path}: the file is empty, expected {_FORMATS}")
    found = _by_keys(head, text)
    if found is None and text[0] not in "{[":
        first_line, line_end, _ = text.partition("\n")
        found = _recognise_csv(path, first_line) if line_end or len(head) < HEAD_BYTES else None
    if found is None:
        raise TraceError(f"{path}: format is not recognised, expected {_FORMATS} (convert the file)")
    return found


def _by_keys(head: bytes, text: str) -> Format | None:
    keys = [keys for keys in _keys(head, text) if keys]
    return next((found for wanted, found in _JSON_KEYS if any(wanted <= there for there in keys)), None)


def _keys(head: bytes, text: str) -> Iterator[Set[str]]:
    """The keys of a text's first value, or of what an array begins with; where it is no whole line, those of lines."""
    first, _, _ = text.partition("\n")
    if text[0] in "{[" and not _is_object(first):
        yield _first_keys(text)
        if "\n{" not in text:
            return
    yield from (record.keys() for record in islice(head_objects(head), MAX_RECORDS))


def _is_object(line: str) -> bool:
    try:
        return type(json.loads(line)) is dict
    except BAD_JSON:
        return False


def _first_keys(text: str) -> set[str]:
    """Keys of the first object, however far it goes on: at the top, or within the array at the top."""
    keys: set[str] = set()
    depth, top = 0, 1 + text.startswith("[")
    for token in _TOKEN.finditer(text):
        if token[0] in "{[":
            depth += 1
        elif token[0] in "]}":
            depth -= 1
            if depth < top and keys:
                break
        elif depth == top and token[2]:
            keys.add(token[1])
    return keys


def _recognise_csv(path: Path, first_line: str) -> Format | None:
    if not any(delimiter in first_line for delimiter in DELIMITERS) or set(first_line) & {"\0", "\ufffd"}:
        return None
    header = split_header(first_line)
    names = set(map(plain_name, header))
    for wanted, found in _CSV_COLUMNS:
        if wanted <= names:
            return found
    if columns := guess_columns(header):
        return Format("csv with common column names", partial(load_csv, columns=columns))
    remedy = "say which is which: python -m hbmgym.envs.traces convert --columns"
    refuse(f"{path}:1", "columns", ", ".join(header), "those of a known csv", remedy)


def _recognise_folder(folder: Path) -> Format:
    """The one format of session files in a folder, at any depth; other files there are left alone."""
    files: dict[Format, list[Path]] = {}
    damaged: list[Path] = []
    below = _files_below(folder)
    for file in below:
        try:
            found = _session_file(file)
        except Damaged:
            damaged.append(file)
            continue
        if found is not None:
            files.setdefault(found, []).append(file)
    if len(files) != 1:
        shown = " and ".join(f"{len(group)} of {found.name}" for found, group in files.items()) or "no session files"
        expected = "session files of kv-cache-tester or of Claude Code"
        raise TraceError(f"{folder}: the folder holds {shown}, expected {expected} (name a file, or another folder)")
    ((found, group),) = files.items()
    group += [file for file in damaged if (found.load, _suffix(file)) in _FOLDERS]  # the loader counts them
    load = partial(_load_folder, load=found.load, files=group, others=len(below) - len(group))
    return Format(f"{found.name}, {len(group)} files", load)


def _session_file(file: Path) -> Format | None:
    """The format of a file in a folder, None where it is no session file. Raises `Damaged` for a compressed one that
    cannot be unpacked, and `NeedsPackage`."""
    if _suffix(file) not in (ending for _, ending in _FOLDERS):
        return None
    try:
        found = recognise(file)
    except (Damaged, NeedsPackage):
        raise
    except TraceError:
        return None
    return found if (found.load, _suffix(file)) in _FOLDERS else None


def _suffix(file: Path) -> str:
    return plain(file).suffix.lower()


def _files_below(folder: Path) -> list[Path]:
    files = list(islice((file for file in folder.rglob("*") if file.is_file()), MAX_FILES + 1))
    if len(files) > MAX_FILES:
        raise TraceError(f"{folder}: the folder holds more than {MAX_FILES} files (name one of less)")
    return sorted(files)


def _load_folder(folder: Path, load: Callable[..., Trace], files: list[Path], others: int) -> Trace:
    trace = load(folder, files=files)
    if not others:
        return trace
    return replace(trace, notices=(*trace.notices, f"{folder}: {others} files of other kinds are left out"))
