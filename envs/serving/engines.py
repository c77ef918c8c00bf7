"""EngineProfile: what an engine's host adds to its kernels, and how it fits prompts into iterations.

engines.json beside this file has the profiles that come with hbmgym, each with its source; `python eval/calibrate.py`
writes one for an engine of your own, which `--engine FILE` takes.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from hbmgym.envs.serving.gpus import ENGINES, is_number
from hbmgym.memory_backend.geometry import pick

FILE = Path(__file__).with_name("engines.json")
DEFAULT_ENGINE = "vllm-graph"
PREFILLS = ("mixed", "exclusive")
MOST_S = 10.0
"""No constant is longer; a larger one is in another unit."""
LEAST_FACTOR, MOST_FACTOR = 0.1, 10.0
MOST_GRAPH_TOKENS = 2**20
HOST_CONSTANTS = ("prefill_factor", "layer_s", "prefill_floor_s", "request_s")
"""What a calibration fits, per deployment."""


@dataclass(frozen=True)
class EngineProfile:
    """One engine's host. Layers are pairs of blocks, a mixer and an MLP: half of `HybridModel.blocks`."""

    name: str
    kernels: str
    """Whose kernels it runs (gpus.ENGINES)."""
    prefill_factor: float
    """Prefill takes so many times its kernels: gaps between them, quantisation, communication that is not hidden."""
    layer_s: float
    """Every iteration and layer, beside its kernels."""
    prefill_floor_s: float
    """An iteration with prefill takes so long per layer at least: launching kernels that no graph has captured."""
    request_s: float
    """From a request's arrival to the engine's queue: HTTP, tokeniser, and the first token's way back."""
    prefill: str
    """Prompts are computed together with decoding (mixed) or in iterations of their own (exclusive)."""
    graph_tokens: int
    """An iteration of at most so many tokens is captured as a graph, so the floor does not apply to it."""
    snapshots_end_chunks: bool
    """A chunk of a prompt ends where a snapshot is saved, and what is left of a page is computed by itself (vLLM's
    align mode); otherwise kernels save states on their way (SGLang)."""
    source: str

    def __post_init__(self) -> None:
        for name in ("name", "source"):
            if not isinstance(value := getattr(self, name), str) or not value:
                raise ValueError(f"{name} is {value!r}, expected a text")
        if self.kernels not in ENGINES:
            raise ValueError(f"kernels is {self.kernels!r}, expected one of: {', '.join(ENGINES)}")
        if self.prefill not in PREFILLS:
            raise ValueError(f"prefill is {self.prefill!r}, expected one of: {', '.join(PREFILLS)}")
        if not is_number(self.prefill_factor) or not LEAST_FACTOR <= self.prefill_factor <= MOST_FACTOR:
            expected = f"a number from {LEAST_FACTOR:g} to {MOST_FACTOR:g}"
            raise ValueError(f"prefill_factor is {self.prefill_factor!r}, expected {expected}")
        for name in ("layer_s", "prefill_floor_s", "request_s"):
            if not is_number(value := getattr(self, name)) or not 0 <= value <= MOST_S:
                raise ValueError(f"{name} is {value!r}, expected seconds from 0 to {MOST_S:g}")
        whole = isinstance(self.graph_tokens, int) and not isinstance(self.graph_tokens, bool)
        if not whole or not 0 <= self.graph_tokens <= MOST_GRAPH_TOKENS:
            raise ValueError(
                f"graph_tokens is {self.graph_tokens!r}, expected an integer from 0 to {MOST_GRAPH_TOKENS}"
            )
        if not isinstance(self.snapshots_end_chunks, bool):
            raise ValueError(f"snapshots_end_chunks is {self.snapshots_end_chunks!r}, expected true or false")


ENGINE_PROFILES: Mapping[str, EngineProfile] = MappingProxyType(
    {row["name"]: EngineProfile(**row) for row in json.loads(FILE.read_text(encoding="utf-8"))}
)


def find_engine(name: str) -> EngineProfile:
    """The profile of that name, or the one in a file of that name (*.json); ValueError in one line."""
    return read_profile(Path(name)) if name.endswith(".json") else pick(ENGINE_PROFILES, name, "engine")


def read_profile(path: Path) -> EngineProfile:
    """Read a profile that `eval/calibrate.py` wrote; ValueError names file, field and value in one line."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    fields = [field.name for field in dataclasses.fields(EngineProfile)]
    if not isinstance(content, dict) or sorted(content) != sorted(fields):
        raise ValueError(f"{path}: is no engine profile: expected an object with the fields {', '.join(fields)}")
    try:
        return EngineProfile(**content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
