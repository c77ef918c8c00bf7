"""What memory control groups leave to this process: its own group's limit and those of all groups above it.

Version 1 (memory.limit_in_bytes), version 2 (memory.max; above memory.high the kernel throttles whoever asks for more),
and both beside each other; see cgroups(7). What a group uses is counted without inactive_file, as Kubernetes counts a
working set: the kernel drops these pages of files before it kills anybody. Chunks of a memfd are none of them.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class _Version(NamedTuple):
    limits: tuple[str, ...]
    used: str
    reclaimable: str
    """Field of memory.stat, of the group and all below it."""
    inherited: str
    """Field of memory.stat: the least limit, also of groups above that a container does not see."""


_V1 = _Version(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file", "hierarchical_memory_limit")
_V2 = _Version(("memory.max", "memory.high"), "memory.current", "inactive_file", "")
_USUAL_MOUNTS = ((_V1, "sys/fs/cgroup/memory"), (_V2, "sys/fs/cgroup"), (_V2, "sys/fs/cgroup/unified"))


def group_figures(root: Path) -> list[tuple[int, str]]:
    """(free bytes, where that figure comes from) of every limit that holds; `root` is where /proc and /sys lie."""
    paths = _own_paths(root)
    mounts = [*_mounts(root), *((version, root / usual, "/") for version, usual in _USUAL_MOUNTS)]
    groups = {(version, group): None for version, mount, top in mounts for group in _up(paths[version], mount, top)}
    return [figure for version, group in groups for figure in _figures(version, group)]


def _own_paths(root: Path) -> dict[_Version, str]:
    """The process's group in both hierarchies."""
    paths = {_V1: "/", _V2: "/"}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]  # a path may hold colons
        if not path:
            continue  # damaged
        if not controllers:
            paths[_V2] = path
        elif "memory" in controllers.split(","):
            paths[_V1] = path
    return paths


def _mounts(root: Path) -> Iterator[tuple[_Version, Path, str]]:
    """(version, folder, the group that it shows) of every hierarchy that has memory."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        top, folder = map(_unescaped, f"{before}     ".split(" ")[3:5])
        kind, _, options = f"{after}  ".split(" ", 2)
        if kind == "cgroup2":
            yield _V2, root / folder.lstrip("/"), top
        elif kind == "cgroup" and "memory" in options.strip().split(","):
            yield _V1, root / folder.lstrip("/"), top


def _up(path: str, mount: Path, top: str) -> Iterator[Path]:
    """The folders of a group and of those above it, up to `mount`, which shows the group `top`."""
    if not Path(path).is_relative_to(top) or ".." in path:
        yield mount  # in a container, which does not see its group by name
        return
    own = mount / Path(path).relative_to(top)
    yield from (group for group in (own, *own.parents) if group.is_relative_to(mount))


def _figures(version: _Version, group: Path) -> Iterator[tuple[int, str]]:
    stat = dict(line.split()[:2] for line in _lines(group / "memory.stat") if len(line.split()) > 1)
    used = (_number(_text(group / version.used)) or 0) - (_number(stat.get(version.reclaimable, "")) or 0)
    limits = {name: _text(group / name) for name in version.limits}
    limits[f"memory.stat, {version.inherited}"] = stat.get(version.inherited, "")
    for name, text in limits.items():
        if (limit := _number(text)) is not None:
            yield max(limit - max(used, 0), 0), f"{group / name} less what is in use"


def _number(text: str) -> int | None:
    """None of what is missing, or "max"."""
    return int(text) if text.isdecimal() else None


def _text(file: Path) -> str:
    return " ".join(_lines(file)).strip()


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _unescaped(field: str) -> str:
    r"""mountinfo writes \040 for a space."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), field)
