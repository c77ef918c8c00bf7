"""Look at a trace, write it in the compact format, or make one of others.

python -m hbmgym.envs.traces inspect PATH [--out PICTURE.png]
python -m hbmgym.envs.traces convert PATH OUT.npz
python -m hbmgym.envs.traces merge PATH PATH ... --out OUT.npz
python -m hbmgym.envs.traces concatenate PATH PATH ... --out OUT.npz
python -m hbmgym.envs.traces scale PATH --load LOAD --out OUT.npz
python -m hbmgym.envs.traces thin PATH --keep SHARE [--seed SEED] --out OUT.npz
python -m hbmgym.envs.traces cut PATH --from-s SECONDS --to-s SECONDS --out OUT.npz
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from hbmgym.cli import command, fail, option, parse_options, user_errors, words
from hbmgym.envs.traces.combine import concatenate, cut, merge, scale, thin
from hbmgym.envs.traces.formats.compact import compact_bytes
from hbmgym.envs.traces.formats.generic_csv import KEYS, parse_columns
from hbmgym.envs.traces.jitter import SPREAD
from hbmgym.envs.traces.load import recognise
from hbmgym.envs.traces.summary import describe
from hbmgym.envs.traces.trace import Trace
from hbmgym.files import write_atomically

_OUT = "the new file, in the compact format"
_COLUMNS = f"which columns of a csv are which: key=column,... with keys of {', '.join(KEYS)}"


@dataclass(frozen=True)
class InspectOptions:
    """What is looked at."""

    path: tuple[str, ...] = words("trace file, or a folder of session files", metavar="PATH")
    columns: str = option("", _COLUMNS, metavar="COLUMNS")
    out: str = option("", "also draw it, to this PNG file", metavar="FILE")
    spread: bool = option(True, SPREAD)

    def __post_init__(self) -> None:
        _check_one("inspect", self.path)
        if self.out and not self.out.endswith(".png"):
            raise ValueError(f"--out is {self.out}, expected the name of a .png file")
        _check_folder(self.out)


@dataclass(frozen=True)
class ConvertOptions:
    """What becomes what."""

    paths: tuple[str, ...] = words("trace file or folder of session files, and the npz to write", metavar="PATH")
    columns: str = option("", _COLUMNS, metavar="COLUMNS")
    spread: bool = option(True, SPREAD)

    def __post_init__(self) -> None:
        if len(self.paths) != 2:
            raise ValueError(f"convert takes PATH and OUT.npz, not {len(self.paths)} names")
        _check_new(self.paths[1])


@dataclass(frozen=True)
class CombineOptions:
    """What becomes one trace."""

    paths: tuple[str, ...] = words("trace files, or folders of session files", metavar="PATH")
    out: str = option("", _OUT, metavar="OUT.npz")
    spread: bool = option(True, SPREAD)

    def __post_init__(self) -> None:
        _check_new(self.out)


@dataclass(frozen=True)
class ScaleOptions:
    """Which trace, and how fast."""

    path: tuple[str, ...] = words("trace file", metavar="PATH")
    load: float = option(1.0, "multiplies the rate at which requests arrive")
    out: str = option("", _OUT, metavar="OUT.npz")
    spread: bool = option(True, SPREAD)

    def __post_init__(self) -> None:
        _check_one("scale", self.path)
        _check_new(self.out)


@dataclass(frozen=True)
class ThinOptions:
    """Which trace, and how much of it."""

    path: tuple[str, ...] = words("trace file, or a folder of session files", metavar="PATH")
    keep: float = option(1.0, "probability with which a session stays")
    seed: int = option(0, "of the draw")
    out: str = option("", _OUT, metavar="OUT.npz")
    spread: bool = option(True, SPREAD)

    def __post_init__(self) -> None:
        _check_one("thin", self.path)
        _check_new(self.out)


@dataclass(frozen=True)
class CutOptions:
    """Which trace, and which stretch of it."""

    path: tuple[str, ...] = words("trace file", metavar="PATH")
    from_s: float = option(0.0, "start of the stretch, seconds after the first request")
    to_s: float = option(float("inf"), "end of the stretch, seconds after the first request")
    out: str = option("", _OUT, metavar="OUT.npz")
    spread: bool = option(True, SPREAD)

    def __post_init__(self) -> None:
        _check_one("cut", self.path)
        _check_new(self.out)


def inspect(arguments: Sequence[str]) -> None:
    """Print what a trace holds."""
    options = parse_options(InspectOptions, "Print, and draw, what a trace holds.", arguments)
    with user_errors(OSError):
        name, trace = _load(options.path[0], options.spread, options.columns)
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
        name, trace = _load(options.paths[0], options.spread, options.columns)
        _write(trace, options.paths[1])
    print(f"{options.paths[1]}: {len(trace):,} rows of {name}")


def combine(verb: str, arguments: Sequence[str]) -> None:
    """Write the trace that several make together."""
    make = {"merge": merge, "concatenate": concatenate}[verb]
    options = parse_options(CombineOptions, _summary(make), arguments)
    _make(options.out, lambda: make([_load(path, options.spread)[1] for path in options.paths]))


def rescale(arguments: Sequence[str]) -> None:
    """Write a trace at another rate."""
    options = parse_options(ScaleOptions, _summary(scale), arguments)
    _make(options.out, lambda: scale(_load(options.path[0], options.spread)[1], options.load))


def thin_out(arguments: Sequence[str]) -> None:
    """Write a part of a trace's sessions."""
    options = parse_options(ThinOptions, _summary(thin), arguments)
    _make(options.out, lambda: thin(_load(options.path[0], options.spread)[1], options.keep, options.seed))


def cut_out(arguments: Sequence[str]) -> None:
    """Write a stretch of a trace."""
    options = parse_options(CutOptions, _summary(cut), arguments)
    _make(options.out, lambda: cut(_load(options.path[0], options.spread)[1], options.from_s, options.to_s))


COMMANDS: Mapping[str, Callable[[Sequence[str]], None]] = {
    "inspect": inspect,
    "convert": convert,
    "merge": partial(combine, "merge"),
    "concatenate": partial(combine, "concatenate"),
    "scale": rescale,
    "thin": thin_out,
    "cut": cut_out,
}


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that comes first."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in (["-h"], ["--help"]):
        print(__doc__)
    elif given and given[0] in COMMANDS:
        COMMANDS[given[0]](given[1:])
    else:
        expected = ", ".join(COMMANDS)
        fail(f"the command is {' '.join(given[:1]) or 'missing'}, expected one of {expected} (see --help)")


def _load(path: str, spread: bool, columns: str = "") -> tuple[str, Trace]:
    found = recognise(Path(path), parse_columns(columns) if columns else None)
    return found.name, found.read(Path(path), spread)


def _make(out: str, make: Callable[[], Trace]) -> None:
    """The new trace goes by the name of its file."""
    with user_errors(OSError):
        trace = replace(make(), name=Path(out).stem)
        _write(trace, out)
    print(f"{out}: {len(trace):,} rows")


def _write(trace: Trace, out: str) -> None:
    write_atomically(Path(out), compact_bytes(trace))
    for notice in trace.all_notices:
        print(notice, file=sys.stderr)


def _summary(make: Callable[..., Trace]) -> str:
    return (make.__doc__ or "").partition("\n")[0]


def _check_one(command: str, path: Sequence[str]) -> None:
    if len(path) != 1:
        raise ValueError(f"{command} takes one PATH, not {len(path)}")


def _check_new(out: str) -> None:
    if not out:
        raise ValueError("--out is missing, expected the name of a new file")
    if Path(out).exists():
        raise ValueError(f"{out} exists, expected the name of a new file (choose another, or remove it)")
    _check_folder(out)


def _check_folder(out: str) -> None:
    """Before anything is loaded in vain."""
    if out and not Path(out).absolute().parent.is_dir():
        raise ValueError(f"{out}: its folder does not exist (make it first)")


if __name__ == "__main__":
    main()
