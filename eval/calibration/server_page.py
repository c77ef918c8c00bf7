"""A scrape as the page of one server: which engine it is, and the samples of one model that it serves."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hbmgym.eval.calibration.exposition import Key, Scrape, read_scrape

ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}
_NAME = re.compile(r"(vllm|sglang)[:_](.+)")
"""OpenMetrics pages have an underscore for the colon."""
_BIRTHS = ("process_start_time_seconds", "e2e_request_latency_seconds_created")
_RUNNING = ("num_requests_running", "num_running_reqs")
_REPLICA = ("instance", "engine", "dp_rank")
"""Labels of an engine with batches of its own: Prometheus', vLLM's and SGLang's."""
_DISAGGREGATED = (("engine_type", "prefill"), ("engine_type", "decode"))
_SPECULATION = re.compile(r"spec_decode_num_draft.*_total|spec_verify_calls_total|spec_accept_length")


@dataclass(frozen=True)
class ServerPage:
    """One scrape of one server."""

    scrape: Scrape
    engine: str
    """One of ENGINES' values."""
    model: str
    samples: Mapping[Key, float]
    """Of that model alone, by names without the engine's prefix."""

    @property
    def births(self) -> dict[Key, float]:
        """When the process and its counts began, seconds since 1970; empty if several processes share the page."""
        return {key: value for key, value in self.scrape.samples.items() if key[0].endswith(_BIRTHS)}

    @property
    def replicas(self) -> int:
        """Engines with batches of their own behind the page; one at least."""
        return max(1, len(self.gauge(*_RUNNING)))

    def gauge(self, *names: str) -> list[float]:
        """What a gauge of one of these names says of each replica; of a replica's ranks the one that says most."""
        found: dict[tuple[str | None, ...], float] = {}
        for (name, labels), value in self.samples.items():
            if name in names and math.isfinite(value):
                replica = tuple(dict(labels).get(label) for label in _REPLICA)
                found[replica] = max(value, found.get(replica, value))
        return list(found.values())

    @property
    def speculates(self) -> bool:
        """Whether it ever decoded several tokens at a time."""
        return any(value > 0 and _SPECULATION.fullmatch(name) for (name, _), value in self.samples.items())


def read_page(path: Path, model: str) -> ServerPage:
    """`model` may be empty if there is only one. Raises ValueError with one line if the page is of no use."""
    scrape = read_scrape(path)
    found = [(name, key[1], value) for key, value in scrape.samples.items() if (name := _NAME.fullmatch(key[0]))]
    engines = {name[1] for name, _, _ in found}
    if len(engines) != 1:
        remedy = "save http://HOST:PORT/metrics of one server (SGLang has it if started with --enable-metrics)"
        _refuse(path, f"has metrics of {' and '.join(ENGINES.values()) if engines else 'neither engine'}", remedy)
    models = sorted({value for _, labels, _ in found for name, value in labels if name == "model_name"})
    if model not in models and (model or len(models) != 1):
        _refuse(path, f"has models {models}, asked for {model or 'none'}", "name one of them")
    wanted = ("model_name", model or models[0])
    samples = {(name[2], labels): value for name, labels, value in found if wanted in labels}
    if any(kind in labels for _, labels in samples for kind in _DISAGGREGATED):
        _refuse(path, "is of a server that only prefills or only decodes", "scrape one that does both")
    return ServerPage(scrape, ENGINES[engines.pop()], wanted[1], samples)


def _refuse(path: Path, what: str, remedy: str) -> NoReturn:
    raise ValueError(f"{path}: {what}: {remedy}")
