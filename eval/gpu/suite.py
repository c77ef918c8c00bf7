"""The conformance suite on the GPU: `python -m pytest -m gpu tests`, where tests and pytest are at hand."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from hbmgym.eval.gpu.isolation import Failed
from hbmgym.eval.gpu.plan import Facts, Plan

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 90.0
NO_TESTS = 5
"""pytest's exit code when it has collected none."""


def check_conformance(plan: Plan) -> Facts:
    """The suite of this checkout."""
    return run_suite(ROOT)


def run_suite(root: Path) -> Facts:
    """pytest's summary for the folder `tests` in `root`; raises Failed when tests fail or take too long."""
    if not (root / "tests").is_dir():
        return {"not_run": f"there is no folder tests in {root}"}
    if importlib.util.find_spec("pytest") is None:
        return {"not_run": "pytest is not installed: pip install 'hbmgym[dev]'"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    try:
        ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired as late:
        raise Failed(f"{' '.join(command[1:])}: no end within {LIMIT_S:g} s") from late
    summary = (ended.stdout.splitlines() or [""])[-1].strip("= ")
    if ended.returncode == NO_TESTS:
        return {"not_run": f"no test is marked gpu ({summary})"}
    if ended.returncode:
        raise Failed(f"{' '.join(command[1:])} ended with {ended.returncode}: {_failures(ended.stdout, summary)}")
    return {"command": command[1:], "summary": summary}


def _failures(output: str, summary: str) -> str:
    """The summary and the names of the tests that failed."""
    names = [line.split()[1] for line in output.splitlines() if line.startswith(("FAILED", "ERROR "))]
    return "; ".join((summary, *names))
