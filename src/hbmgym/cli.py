"""Command lines from frozen dataclasses: a flag per field, and one line where something goes wrong.

Exit codes: 2 for a user's mistake; 1 where a worker was killed, memory ran out, or something could not be written; 130,
143 and 129 after Ctrl-C, SIGTERM and SIGHUP; 141 where nobody reads what is printed.
"""

import argparse
import dataclasses
import errno
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar, get_type_hints

from hbmgym.processes import STOPPING, WorkerDied, stopped_by
from hbmgym.streams import FAILED, say, usable_streams

T = TypeVar("T")
P = ParamSpec("P")
_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
_REMEDIES = {
    errno.EAGAIN: "no further process can be started: give fewer --jobs",
    errno.EMFILE: "too many files are open: give fewer --jobs, or raise ulimit -n",
    **dict.fromkeys(_FULL, "free some space, or write elsewhere"),
}


def option(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field that becomes a flag; `extra` goes to argparse (choices, metavar, ...)."""
    return dataclasses.field(default=default, metadata={"help": help, **extra})


def words(help: str, metavar: str) -> Any:
    """A field of type `tuple[str, ...]` that takes the words that belong to no flag."""
    return dataclasses.field(default=(), metadata={"help": help, "metavar": metavar, "nargs": "*"})


def integer(text: str) -> int:
    """An integer, also written as 2e5."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
    if not value.is_integer():
        raise ValueError(text)
    return int(value)


_UNSET = object()


def parse_options(kind: type[T], description: str, arguments: Sequence[str] | None = None) -> T:
    """An instance of the dataclass `kind` from the command line; exits with 2 and one line on a bad one."""
    return parse_named(kind, description, arguments)[0]


def parse_named(kind: type[T], description: str, arguments: Sequence[str] | None = None) -> tuple[T, set[str]]:
    """As `parse_options`, and the fields that the command line names, also where it says what is the default."""
    parser = _Parser(prog=_program(), description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    hints = get_type_hints(kind)
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    for field in fields:
        _add_flag(parser, field, hints[field.name])
    # What has a value already gets no default from argparse; flags that are repeated would append to it.
    unset = {field.name: _UNSET for field in fields if not isinstance(field.default, tuple)}
    given = vars(parser.parse_args(arguments, argparse.Namespace(**unset)))
    named = {name: value for name, value in given.items() if value is not _UNSET and value is not None}
    try:
        return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in named.items()}), set(named)
    except ValueError as error:
        return fail(str(error))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        fail(f"{message} (see --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)  # argparse does not say when it fails


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], hint: Any) -> None:
    flag, default, extra = "--" + field.name.replace("_", "-"), field.default, dict(field.metadata)
    if hint is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, **extra)
    elif "nargs" in extra:
        parser.add_argument(field.name, **extra)
    elif hint == tuple[str, ...]:
        # Without a default: argparse would append to it.
        parser.add_argument(flag, action="append", **extra)
    else:
        parser.add_argument(flag, type=integer if hint is int else hint, default=default, **extra)


def command(main: Callable[P, None]) -> Callable[P, None]:
    """Around every `main`: SIGTERM and SIGHUP stop it as Ctrl-C does, and what goes wrong outside of it is one line."""

    @functools.wraps(main)
    def run(*arguments: P.args, **named: P.kwargs) -> None:
        with usable_streams(), stopped_by(*STOPPING), in_one_line():
            _require_place()
            main(*arguments, **named)

    return run


def _require_place() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        fail("the current folder is gone: change to another one")


def fail(message: str) -> Any:
    """Print one line and leave with exit code 2."""
    _leave(message, 2)


def _leave(message: str, code: int) -> NoReturn:
    say(f"{_program()}: {' '.join(message.split())}")
    raise SystemExit(code)


def _program() -> str:
    """The script's name, or the package's that runs as `python -m`."""
    path = Path(sys.argv[0])
    return path.parent.name if path.name == "__main__.py" else path.name


def user_errors(*kinds: type[Exception]) -> AbstractContextManager[None]:
    """`in_one_line` for ValueError, and further `kinds`, while what the user gave is read."""
    return in_one_line(ValueError, *kinds)


@contextmanager
def in_one_line(*kinds: type[Exception], kept: str = "") -> Iterator[None]:
    """Turn errors of these kinds into one line and exit code 2, and what stops or fails any command into one line with
    its own code, which says what is `kept`."""
    try:
        yield
    except kinds as error:
        _require_stdout(error)
        fail(_described(error) if isinstance(error, OSError) else str(error))
    except KeyboardInterrupt as stop:
        say(_and(str(stop) or "interrupted", kept))
        raise SystemExit(getattr(stop, "code", 130)) from None
    except WorkerDied as end:
        _leave(_and(str(end), kept), FAILED)
    except OSError as error:
        _require_stdout(error)
        _leave(_and(_described(error), kept), FAILED)
    except MemoryError as error:
        what = f"memory ran out ({error})" if str(error) else "memory ran out"
        _leave(_and(f"{what}: give fewer --jobs, or more memory", kept), FAILED)


def _described(error: OSError) -> str:
    """What failed, why, and what helps, as far as the error says it."""
    if error.strerror is None:
        return str(error)
    what = error.filename or "what was to be written" if error.errno in _FULL else error.filename
    remedy = _REMEDIES.get(error.errno or 0, "")
    return f"{f'{what}: ' if what else ''}{error.strerror}{f' ({remedy})' if remedy else ''}"


def _require_stdout(error: Exception) -> None:
    """Where it is stdout that could not be written, let `usable_streams` say so."""
    if isinstance(error, BrokenPipeError):
        raise error
    if isinstance(error, OSError) and not error.filename:
        sys.stdout.flush()


def _and(what: str, kept: str) -> str:
    return f"{what}; {kept}" if kept else what
