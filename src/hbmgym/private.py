"""Folders for what is kept between runs: nobody but their owner and root can put anything there.

Compiled kernels are kept as pickles, which run whatever they hold: where others may write, none are read.
"""

import functools
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
    """`folder` without symlinks, made for the user alone if it is missing; OSError where others may write.

    Nothing is made in a place that is not the user's own.
    """
    if not folder.is_dir():
        _require_private(next(place for place in folder.parents if place.exists()), is_whole=False)
        _make(folder)
    real = _require_private(folder, is_whole=True)
    if os.name != "nt" and (owner := real.stat().st_uid) != _user():
        raise PermissionError(f"{folder} belongs to user {owner}")
    return real


def _require_private(folder: Path, *, is_whole: bool) -> Path:
    """`folder` without symlinks; OSError where others may write in it or above it. Where it is not the whole path,
    another folder will be made in it."""
    real = folder.resolve(strict=True)
    if os.name == "nt":
        return real  # its modes say nothing
    for place in (*reversed(real.parents), real):
        facts = place.stat()
        # Whoever may write a folder may also put another one in the place of what it holds, unless it is sticky (/tmp).
        is_sticky = facts.st_mode & stat.S_ISVTX and (place != real or not is_whole)
        if facts.st_uid not in (*_administrators(), _user()) or (_others_write(facts) and not is_sticky):
            raise PermissionError(f"{folder}: others may write in {place}")
    return real


def _others_write(facts: os.stat_result) -> bool:
    mode = facts.st_mode
    return bool(mode & stat.S_IWOTH or (mode & stat.S_IWGRP and not _is_own_group(facts.st_gid)))


def _is_own_group(number: int) -> bool:
    """A group that was made for the user, as many systems have it, and has no other member."""
    import grp  # Windows has neither
    import pwd

    try:
        name, group = pwd.getpwuid(_user()).pw_name, grp.getgrgid(number)
    except KeyError:
        return False
    return group.gr_name == name and set(group.gr_mem) <= {name}


@functools.cache
def _administrators() -> tuple[int, ...]:
    """Root; in a container that does not map it, root's folders belong to the number that stands for all such users."""
    try:
        mapped = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
        if any(int(first) == 0 for first, _, _ in mapped):
            return (0,)
        return 0, int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return (0,)


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
