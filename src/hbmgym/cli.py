"""Command lines from frozen dataclasses: a flag per field, and one line with exit code 2 for a user's mistake."""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")


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


def fail(message: str) -> Any:
    """Print one line and leave with exit code 2."""
    print(f"{_program()}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def _program() -> str:
    """The script's name, or the package's that runs as `python -m`."""
    path = Path(sys.argv[0])
    return path.parent.name if path.name == "__main__.py" else path.name


def user_errors(*kinds: type[Exception]) -> AbstractContextManager[None]:
    """`in_one_line` for ValueError, and further `kinds`, while what the user gave is read."""
    return in_one_line(ValueError, *kinds)


@contextmanager
def in_one_line(*kinds: type[Exception], interrupted: str = "interrupted") -> Iterator[None]:
    """Turn errors of these kinds into one line and exit code 2, and Ctrl-C into a line `interrupted` and 130."""
    try:
        yield
    except kinds as error:
        fail(str(error))
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        raise SystemExit(130) from None
