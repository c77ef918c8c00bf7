"""What a GPU's memory mapping does and what it costs, in one run meant to take two minutes: `python eval/gpu_check.py`.

Exit codes: 0 all parts done; 1 a part failed; 2 no GPU, or a bad flag; 3 all parts done on the double of libcuda that
tests use, of which no figure is written; 130 interrupted.
"""

import sys

try:
    from hbmgym.cli import command, option, parse_options, user_errors, words
    from hbmgym.eval.gpu.device import Device, NoGpu, driver_version
except ModuleNotFoundError as error:
    print(f"{error}: run `make train` once, or use .venv/bin/python {__file__}", file=sys.stderr)
    raise SystemExit(2) from None

import dataclasses
import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from hbmgym.envs.serving.config import GIB
from hbmgym.eval.cells import shown_anyway
from hbmgym.eval.gpu import contents, latency, moves, refusals
from hbmgym.eval.gpu.isolation import Failed, isolated
from hbmgym.eval.gpu.plan import Facts, Plan
from hbmgym.eval.gpu.report import Report, conclusions, table
from hbmgym.eval.gpu.suite import check_conformance
from hbmgym.eval.provenance import provenance
from hbmgym.eval.table import UNBOUNDED_WIDTH

PART_LIMIT_S = 100.0
PACKAGES = ("hbmgym", "cuda-bindings", "numpy", "numba")
ISOLATED: dict[str, tuple[str, Callable[[Plan], Facts]]] = {
    "calls": ("each driver call on a chunk", latency.measure_calls),
    "bulk": ("one call over many chunks", latency.measure_bulk),
    "handles": ("many small handles, one large one", latency.measure_handles),
    "blocking": ("calls while a kernel runs", latency.measure_blocking),
    "alias": ("one chunk at two addresses", contents.check_alias),
    "fresh": ("what lies in a new chunk", contents.check_fresh),
    "leaks": ("free memory before and after", contents.check_leaks),
    "copies": ("copies inside the memory", moves.measure_copies),
    "migrations": ("runs of chunks from pool to pool", moves.measure_migrations),
    "replay": ("one episode on cuda and on accounting", moves.replay_episode),
}
DIRECT: dict[str, tuple[str, Callable[[Plan], Facts]]] = {
    "bad_calls": ("answers to calls that are wrong", refusals.check_bad_calls),
    "conformance": ("python -m pytest -m gpu tests", check_conformance),
}
"""These start processes of their own."""
PARTS = {**ISOLATED, **DIRECT}


@dataclass(frozen=True)
class GpuCheckOptions:
    """What is checked, on how much memory, and where the figures go."""

    parts: tuple[str, ...] = words(f"what to check (default: all): {', '.join(PARTS)}", "PART")
    out: str = option("results", "folder for gpu_<name>.json and costs.json; gpu_<name>.partial.json until all is run")
    gib: float = option(2.0, "GiB of GPU memory that the check may take at a time")
    quick: bool = option(False, "fewer repetitions and a shorter episode")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Look at the device, run the parts, write after each of them, print what was found."""
    options = parse_options(GpuCheckOptions, __doc__ or "", arguments)
    with user_errors(NoGpu, Failed):
        plan = Plan(options.gib, options.quick)
        if unknown := set(options.parts) - set(PARTS):
            raise ValueError(f"part {', '.join(sorted(unknown))} is unknown, expected one of: {', '.join(PARTS)}")
        device = _look_at_device(plan)
        report = _open_report(options, plan, device)
    with shown_anyway(lambda: _print(device, report)):
        for part in options.parts or PARTS:
            run_part(part, plan, report)
        files = [] if device["fake"] else report.finish() if not options.parts else [report.partial]
    if device["fake"]:
        print(f"{device['name']} is a double of libcuda for tests: no figure is written")
    else:
        _print(device, report)
        print(f"figures: {', '.join(map(str, files))}")
    if failed := [part for part, outcome in report.parts.items() if outcome["status"] == "failed"]:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)
    if device["fake"]:
        raise SystemExit(3)


def describe_device() -> dict[str, Any]:
    """Name, versions and sizes of device 0, or {no_gpu: why}; `fake` says that it is the double of the tests."""
    try:
        device = Device()
    except NoGpu as refusal:
        return {"no_gpu": str(refusal)}
    return {
        "name": device.name,
        "fake": device.fake,
        "driver": f"{driver_version() // 1000}.{driver_version() % 1000 // 10}",
        "compute_capability": device.compute_capability,
        "total_bytes": device.total_bytes,
        "free_bytes": device.free_bytes,
        "granularity_minimum": device.granularity,
        "granularity_recommended": device.recommended_granularity,
    }


def _look_at_device(plan: Plan) -> dict[str, Any]:
    device: dict[str, Any] = isolated(describe_device, limit_s=PART_LIMIT_S)
    if "no_gpu" in device:
        raise NoGpu(device["no_gpu"])
    if plan.gib * GIB > device["free_bytes"]:
        raise ValueError(f"--gib is {plan.gib:g}, but {device['name']} has {device['free_bytes'] / GIB:.1f} GiB free")
    return device


def _open_report(options: GpuCheckOptions, plan: Plan, device: dict[str, Any]) -> Report:
    time_utc = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    where_from = {**provenance(PACKAGES), "time_utc": time_utc, "plan": dataclasses.asdict(plan)}
    if device["fake"]:
        return Report(device, where_from, None)
    try:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        return Report(device, where_from, Path(options.out))
    except OSError as error:
        raise ValueError(f"--out {options.out} cannot be written: {error.strerror}") from error


def run_part(part: str, plan: Plan, report: Report) -> None:
    """Run one of PARTS and report how it ended; what fails in it is the part's result, not ours."""
    title, function = PARTS[part]
    print(f"{part}: {title} ...", end=" ", flush=True)
    started = time.perf_counter()

    def end(status: str, found: Facts) -> None:
        spent_s = time.perf_counter() - started
        report.add(part, status, spent_s, found)
        print(f"{status} ({spent_s:.1f} s)", *(str(found[key]) for key in ("error", "not_run") if key in found))

    try:
        found = function(plan) if part in DIRECT else isolated(function, plan, limit_s=PART_LIMIT_S)
        end("not run" if "not_run" in found else "done", found)
    except Failed as failure:
        end("failed", {"error": str(failure)})
    except KeyboardInterrupt:
        end("interrupted", {})
        raise


def _print(device: dict[str, Any], report: Report) -> None:
    width = None if sys.stdout.isatty() else UNBOUNDED_WIDTH
    Console(width=width, soft_wrap=True).print(table(device, report.parts))
    for line in conclusions(report.parts):
        print(line)


if __name__ == "__main__":
    main()
