"""A case in this engine."""

from collections.abc import Sequence
from dataclasses import dataclass

from hbmgym.envs.serving.config import GIB, Policies, ServingConfig
from hbmgym.envs.serving.core import Core, make_layout
from hbmgym.envs.serving.engines import EngineProfile
from hbmgym.eval.sglang_cache.cases import Case
from hbmgym.eval.sglang_cache.sequence import PAGE_TOKENS, Request, make_episode
from hbmgym.memory_backend.geometry import find_model
from hbmgym.memory_backend.split import CHUNK_BYTES

MODEL = "qwen3.5-4b"
"""A page of 64 of its tokens is one chunk, so that any number of slots and pages can be had."""
A_MINUTE_EACH = EngineProfile(
    name="a-minute-each",
    kernels="vllm",
    prefill_factor=1.0,
    layer_s=60.0 / find_model(MODEL).layers,
    prefill_floor_s=0.0,
    request_s=0.0,
    prefill="mixed",
    graph_tokens=0,
    snapshots_end_chunks=True,
    source="an iteration takes a minute, next to which its kernels are nothing: they do not decide who overlaps",
)
SGLANG_POLICIES = Policies(retention="all")
"""SGLang's defaults."""
ALONE_S = 1e6
"""Between two arrivals: whoever came before has ended."""
ENDLESS_S = 1e12


@dataclass(frozen=True)
class Served:
    """What happened to the requests of a case."""

    reused_tokens: list[int]
    order: list[int]
    """Every request twice: where it starts, and where it ends."""


def serve(case: Case) -> Served:
    """Serve all requests; nobody may be preempted or rejected."""
    config, kv_share = config_for(case)
    core = replay(config, kv_share, case.requests, case.arrival_s)
    capacities = (core.memory.ssm.meta.capacity, core.memory.kv.meta.capacity)
    assert capacities == (case.slots, case.pages), (capacities, case.name)
    assert core.counters.finished == len(case.requests) and core.counters.preemptions == 0, case.name
    starts = [(request.admitted_s, row) for row, request in enumerate(core.requests)]
    ends = [(request.ended_s, row) for row, request in enumerate(core.requests)]
    return Served(core.requests["reused_tokens"].tolist(), [row for _, row in sorted(starts + ends)])


def config_for(case: Case) -> tuple[ServingConfig, float]:
    """A configuration with exactly the case's slots and pages, and the kv_share that divides it so."""
    chunks = case.pages + -(-case.slots * find_model(MODEL).slot_bytes("fp32") // CHUNK_BYTES)
    config = ServingConfig(
        model=MODEL,
        hbm_gib=chunks * CHUNK_BYTES / GIB,
        engine=A_MINUTE_EACH,
        policies=SGLANG_POLICIES,
        page_tokens=PAGE_TOKENS,
        prefill_budget=case.prefill_budget,
        window_s=ENDLESS_S,
    )
    return config, make_layout(config).share(case.slots)


def replay(
    config: ServingConfig, kv_share: float, requests: Sequence[Request], arrival_s: Sequence[float] = ()
) -> Core:
    """A core that has served all requests, one after the other where no arrivals are given."""
    core = Core(config)
    core.reset(make_episode(requests, arrival_s or [ALONE_S * i for i in range(len(requests))]), kv_share)
    core.run_window()
    assert core.done, "a window without end has ended early"
    return core
