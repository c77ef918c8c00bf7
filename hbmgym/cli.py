"""Command lines from frozen dataclasses: a flag per field, and one line with exit code 2 for a user's mistake."""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


def parse_options(kind: type[T], description: str, arguments: Sequence[str] | None = None) -> T:
    """An instance of the dataclass `kind` from the command line; exits with 2 and one line on a bad one."""
    parser = _Parser(prog=_program(), description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        _add_flag(parser, field, hints[field.name])
    given = vars(parser.parse_args(arguments))
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    try:
        return kind(**{name: value for name, value in values.items() if value is not None})
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


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn ValueError, and further `kinds`, raised while reading what the user gave into one line and exit code 2."""
    mistakes: tuple[type[Exception], ...] = (ValueError, *kinds)
    try:
        yield
    except mistakes as error:
        fail(str(error))
