"""Folders for what is kept between runs: nobody but their owner and root can put anything there.

Compiled kernels are kept as pickles, which run whatever they hold: where others may write, none are read.
"""

import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_NOT_KEPT = "Could not save font_manager cache"


def cache_folder() -> Path | None:
    """The user's folder for what hbmgym keeps; None where there is no private one.

    $XDG_CACHE_HOME/hbmgym, ~/.cache/hbmgym, or hbmgym-<user's number> in the temporary folder: the first that can be
    made, can be written, and is private.
    """
    for folder in _candidates():
        try:
            private = private_folder(folder)
        except OSError:
            continue
        if os.access(private, os.W_OK | os.X_OK):
            return private
    return None


def settle_matplotlib() -> None:
    """Give matplotlib a folder where it would find none: without a home it does not import, without a writable one it
    warns, as it does in every process where the disk is full. Must come before it is imported."""
    logging.getLogger("matplotlib.font_manager").addFilter(lambda record: not str(record.msg).startswith(_NOT_KEPT))
    if "MPLCONFIGDIR" not in os.environ and not os.access(os.path.expanduser("~"), os.W_OK):
        folder = cache_folder()
        if folder is not None:
            os.environ["MPLCONFIGDIR"] = str(folder / "matplotlib")


def private_folder(folder: Path) -> Path:
    """`folder` without symlinks, made for the user alone if it is missing; OSError where others may write."""
    _make(folder)
    real = folder.resolve(strict=True)
    if os.name == "nt":
        return real  # its modes say nothing
    if (owner := real.stat().st_uid) != _user():
        raise PermissionError(f"{folder} belongs to user {owner}")
    for place in (real, *real.parents):
        _require_safe(place, real)
    return real


def _require_safe(place: Path, folder: Path) -> None:
    """Whoever may write a folder may also put another one in the place of what it holds, unless it is sticky (/tmp)."""
    facts = place.stat()
    can_others_write = facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    is_sticky = place != folder and facts.st_mode & stat.S_ISVTX
    if facts.st_uid not in (0, _user()) or (can_others_write and not is_sticky):
        raise PermissionError(f"{folder}: others may write in {place}")


def _candidates() -> Iterator[Path]:
    # A path that is not absolute says that there is none.
    for base in (Path(os.environ.get("XDG_CACHE_HOME", "")), Path(os.path.expanduser("~")) / ".cache"):
        if base.is_absolute():
            yield base / "hbmgym"
    try:
        yield Path(tempfile.gettempdir()) / f"hbmgym-{_user()}"
    except FileNotFoundError:
        return  # none can be written


def _user() -> int:
    return int(getattr(os, "geteuid", int)())


def _make(folder: Path) -> None:
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(mode=stat.S_IRWXU, exist_ok=True)
