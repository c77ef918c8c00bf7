"""Look at a trace, or write it in the compact format.

python -m hbmgym.envs.traces inspect PATH [--out PICTURE.png]
python -m hbmgym.envs.traces convert PATH OUT.npz
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hbmgym.cli import fail, option, parse_options, user_errors, words
from hbmgym.envs.traces.formats.compact import compact_bytes
from hbmgym.envs.traces.formats.generic_csv import KEYS, parse_columns
from hbmgym.envs.traces.load import recognise
from hbmgym.envs.traces.summary import describe
from hbmgym.envs.traces.trace import Trace
from hbmgym.files import write_atomically

_COLUMNS = f"which columns of a csv are which: key=column,... with keys of {', '.join(KEYS)}"


@dataclass(frozen=True)
class InspectOptions:
    """What is looked at."""

    path: tuple[str, ...] = words("trace file, or a folder of session files", metavar="PATH")
    columns: str = option("", _COLUMNS, metavar="COLUMNS")
    out: str = option("", "also draw it, to this PNG file", metavar="FILE")

    def __post_init__(self) -> None:
        if len(self.path) != 1:
            raise ValueError(f"inspect takes one PATH, not {len(self.path)}")
        if self.out and not self.out.endswith(".png"):
            raise ValueError(f"--out is {self.out}, expected the name of a .png file")
        _check_folder(self.out)


@dataclass(frozen=True)
class ConvertOptions:
    """What becomes what."""

    paths: tuple[str, ...] = words("trace file or folder of session files, and the npz to write", metavar="PATH")
    columns: str = option("", _COLUMNS, metavar="COLUMNS")

    def __post_init__(self) -> None:
        if len(self.paths) != 2:
            raise ValueError(f"convert takes PATH and OUT.npz, not {len(self.paths)} names")
        if Path(self.paths[1]).exists():
            raise ValueError(f"{self.paths[1]} exists, expected the name of a new file (choose another, or remove it)")
        _check_folder(self.paths[1])


def inspect(arguments: Sequence[str]) -> None:
    """Print what a trace holds."""
    options = parse_options(InspectOptions, "Print, and draw, what a trace holds.", arguments)
    with user_errors(OSError):
        name, trace = _load(options.path[0], options.columns)
        for label, text in [("format", name), *describe(trace)]:
            print(f"{label:<25}{text}")
        if options.out:
            from hbmgym.envs.traces.draw import picture  # matplotlib takes half a second

            write_atomically(Path(options.out), picture(trace))
            print(f"{'picture':<25}{options.out}")


def convert(arguments: Sequence[str]) -> None:
    """Write a trace in the compact format."""
    options = parse_options(ConvertOptions, "Write a trace in the compact format.", arguments)
    with user_errors(OSError):
        name, trace = _load(options.paths[0], options.columns)
        write_atomically(Path(options.paths[1]), compact_bytes(trace))
    for notice in trace.notices:
        print(notice, file=sys.stderr)
    print(f"{options.paths[1]}: {len(trace):,} rows of {name}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that comes first."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in (["-h"], ["--help"]):
        print(__doc__)
    elif given[:1] == ["inspect"]:
        inspect(given[1:])
    elif given[:1] == ["convert"]:
        convert(given[1:])
    else:
        fail(f"the command is {' '.join(given[:1]) or 'missing'}, expected inspect or convert (see --help)")


def _load(path: str, columns: str) -> tuple[str, Trace]:
    found = recognise(Path(path), parse_columns(columns) if columns else None)
    return found.name, found.load(Path(path))


def _check_folder(out: str) -> None:
    """Before anything is loaded in vain."""
    if out and not Path(out).absolute().parent.is_dir():
        raise ValueError(f"{out}: its folder does not exist (make it first)")


if __name__ == "__main__":
    main()
