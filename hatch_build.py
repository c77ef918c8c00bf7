"""The build hook: nothing is built of a part of the package, and an editable install has the links it lives on.

Git without symlinks, and most programs that unpack a zip, leave text files in the place of links.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOMS = ("controllers", "envs", "eval", "memory_backend", "train")


class WholePackage(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        for room in ROOMS:
            if not (root / room / "__init__.py").is_file():
                raise SystemExit(f"hbmgym cannot be built: the folder {root / room} is missing or empty")
            if version == "editable":
                _link(root / "src" / "hbmgym" / room, root / room)


def _link(link: Path, room: Path) -> None:
    if link.exists() and link.samefile(room):
        return
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(Path("..", "..", room.name), target_is_directory=True)
    except OSError as error:
        raise SystemExit(
            f"hbmgym cannot be installed as editable: {link} must be a link to {room}, and it cannot be made "
            f"({error.strerror}): make it, or install without -e"
        ) from None
