"""Where a figure comes from: versions of the packages, of Python, and of this checkout."""

import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def provenance(packages: Sequence[str]) -> dict[str, Any]:
    """The command, the installed version of each package, Python's, and the commit; ready for JSON."""
    return {
        "command": [sys.executable, *sys.argv],
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "git": _git_hash(),
    }


def _git_hash() -> str | None:
    """Of the checkout that the code comes from, None when it is no checkout."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
