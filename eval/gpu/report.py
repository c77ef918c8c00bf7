"""What a check found: files that are whole after every part, constants of the cost model, a table and what it says."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from hbmgym.eval.cells import write_json
from hbmgym.memory_backend.split import CHUNK_BYTES

COST_RUN = "128_chunks"
"""The run whose figures stand for all: the engine moves chunks in runs of up to 256."""

_UNTOLD = ("seconds", "command")


class Report:
    """The parts' outcomes. With a folder, `gpu_<name>.partial.json` holds all that is known, whole at any time."""

    def __init__(self, device: Mapping[str, Any], where_from: Mapping[str, Any], folder: Path | None) -> None:
        self._device, self._where_from, self._folder = device, where_from, folder
        self.parts: dict[str, dict[str, Any]] = {}
        self._write()

    def add(self, part: str, status: str, seconds: float, found: Mapping[str, Any]) -> None:
        """Note how a part ended (done, failed, not run, interrupted)."""
        self.parts[part] = {"status": status, "seconds": seconds, **found}
        self._write()

    def finish(self) -> list[Path]:
        """All parts were run: the file becomes `gpu_<name>.json`, and the cost model's constants go to costs.json."""
        if self._folder is None:
            return []
        whole = self._folder / f"gpu_{slug(self._device['name'])}.json"
        self.partial.replace(whole)
        if not (constants := cost_constants(self.parts)):
            return [whole]
        costs = self._folder / "costs.json"
        write_json(costs, {"constants": constants, "measured_on": {**self._device, **self._where_from}})
        return [whole, costs]

    @property
    def partial(self) -> Path:
        """Where the figures are until all parts were run."""
        assert self._folder is not None
        return self._folder / f"gpu_{slug(self._device['name'])}.partial.json"

    def _write(self) -> None:
        if self._folder is not None:
            found = {"conclusions": conclusions(self.parts), "device": self._device, "parts": self.parts}
            write_json(self.partial, {**self._where_from, **found})


def slug(name: str) -> str:
    """`NVIDIA H200` as part of a file's name: nvidia_h200."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def cost_constants(parts: Mapping[str, Any]) -> dict[str, float]:
    """Those constants of the cost model (`cost_model.COST_TABLE`, seconds) that the parts have measured.

    chunk_move_s: wall time of a migration of 128 chunks / 128. block_copy_s_per_byte: device time of a copy of as many
    bytes / bytes. Both are medians.
    """
    constants = {}
    if parts.get("migrations", {}).get("status") == "done":
        constants["chunk_move_s"] = 1e-6 * parts["migrations"][COST_RUN]["per_chunk_us"]
    if parts.get("copies", {}).get("status") == "done":
        size = int(COST_RUN.split("_")[0]) * CHUNK_BYTES
        constants["block_copy_s_per_byte"] = 1e-6 * parts["copies"][COST_RUN]["p50_us"] / size
    return constants


def conclusions(parts: Mapping[str, Any]) -> list[str]:
    """What the parts that are done say, in words."""
    done = {name: part for name, part in parts.items() if part["status"] == "done"}
    lines = []
    if "blocking" in done:
        calls = {name: found["waits"] for name, found in done["blocking"].items() if isinstance(found, Mapping)}
        waiting = [name for name, waits in calls.items() if waits.startswith("yes")]
        lines.append(f"calls that wait for a running kernel: {', '.join(waiting) or 'none'} (of {', '.join(calls)})")
    if "bulk" in done:
        code = done["bulk"][COST_RUN]["one_unmap_code"]
        lines.append(f"one unmap over {COST_RUN.replace('_', ' ')} that were mapped one by one: {code}")
    if "alias" in done:
        lines.append(f"a chunk may be mapped twice at a time: {_shown(done['alias']['accepted'])}")
    if "fresh" in done:
        lines.append(f"a chunk that is created again is zero: {'always' if done['fresh']['always'] else 'not always'}")
    if "leaks" in done:
        lost = {
            name: found["lost_by_later_rounds"] for name, found in done["leaks"].items() if isinstance(found, Mapping)
        }
        lines += [f"bytes that the {name} did not give back: {_shown(size)}" for name, size in lost.items()]
    if "migrations" in done and "copies" in done:
        move, copy = done["migrations"][COST_RUN]["p50_us"], done["copies"][COST_RUN]["p50_us"]
        lines.append(f"moving {COST_RUN.replace('_', ' ')} takes {move:,.0f} us, copying their bytes {copy:,.0f} us")
    if "replay" in done:
        found = done["replay"]
        lines.append(
            f"one episode on cuda: {found['chunks_moved']:,} chunks moved, {found['stamps_checked']:,} stamps read "
            "back and right, metrics equal to accounting"
        )
    return lines


def table(device: Mapping[str, Any], parts: Mapping[str, Any]) -> Table:
    """One line per innermost group of figures."""
    result = Table(title=f"{device['name']}, CUDA driver {device['driver']}", pad_edge=False)
    result.add_column("part", no_wrap=True)
    result.add_column("what", no_wrap=True)
    result.add_column("found", overflow="fold")
    for part, outcome in {"device": device, **parts}.items():
        for what, found in _groups({key: value for key, value in outcome.items() if key not in _UNTOLD}):
            result.add_row(part, what, found)
            part = ""
        result.add_section()
    return result


def _groups(outcome: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    plain = {key: value for key, value in outcome.items() if value is not None and not isinstance(value, Mapping)}
    if plain:
        yield path, ", ".join(f"{key} {_shown(value)}" for key, value in plain.items())
    for key, value in outcome.items():
        if isinstance(value, Mapping):
            yield from _groups(value, f"{path} {key}".strip())


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
