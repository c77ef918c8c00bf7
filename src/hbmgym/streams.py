"""The standard streams of a command, also where they are closed, full, or nobody reads them."""

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

NOBODY_READS = 141
"""Exit code of a program whose reader has gone, as in `| head`: 128 + SIGPIPE, with no word, as shells have it."""
FAILED = 1
"""Exit code where nobody has made a mistake, but something went wrong."""


def say(line: str) -> None:
    """A line on stderr, if anything can be written there."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


@contextmanager
def usable_streams() -> Iterator[None]:
    """Open the closed streams; what stdout did not take is a line and exit code FAILED, or NOBODY_READS."""
    _open_closed()
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):  # rich leaves so
            raise SystemExit(NOBODY_READS) from None
        raise
    except BrokenPipeError:
        _discard_output()
        raise SystemExit(NOBODY_READS) from None
    except OSError as error:
        _discard_output()
        say(f"stdout cannot be written: {error.strerror}")
        raise SystemExit(FAILED) from None


def _open_closed() -> None:
    """Else files take their descriptors, and are written to as if they were these streams; Python has None for them."""
    for name, flags in (("stdin", os.O_RDONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            # Writing to stdout fails, as it would if it were still closed.
            setattr(sys, name, open(os.open(os.devnull, flags), "r" if name == "stdin" else "w"))  # noqa: SIM115


def _discard_output() -> None:
    """Python would try to write it once more at the end."""
    with contextlib.suppress(OSError):  # stdout may be no file, as in a notebook
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
