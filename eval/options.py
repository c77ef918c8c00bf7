"""The flags that training and comparison share: what is served, on what, under which traffic."""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hbmgym.cli import option
from hbmgym.envs.serving.config import (
    SGLANG_SLOTS,
    Policies,
    ServingConfig,
    parse_slots_per_request,
    with_policies,
)
from hbmgym.envs.serving.costs import read_costs
from hbmgym.envs.serving.engines import ENGINE_PROFILES, find_engine
from hbmgym.envs.serving.gpus import GPUS, find_gpu
from hbmgym.envs.serving.state import TRANSFERS
from hbmgym.envs.traces.avmp_traffic import PAPER_SCENARIOS
from hbmgym.envs.traces.episode import LOOPS
from hbmgym.envs.traces.jitter import SPREAD
from hbmgym.envs.traces.pages import output_id_fraction
from hbmgym.envs.traces.scenarios import SCENARIOS
from hbmgym.envs.traces.seeds import Part
from hbmgym.envs.traces.trace import Trace
from hbmgym.envs.workload import DEFAULT_SCENARIO, PaperTrafficWorkload, TraceWorkload, Workload, open_workloads
from hbmgym.memory_backend.geometry import STATE_BYTES
from hbmgym.memory_backend.pricing import PRICE_MODES, PricedAdmission

_DEFAULTS = ServingConfig()


def say_notices(traces: Iterable[Trace]) -> None:
    """Print what was repaired, left out or estimated of traces, and whose arrivals are spread."""
    for trace in traces:
        for notice in trace.all_notices:
            print(notice, file=sys.stderr)


@dataclass(frozen=True)
class ServingOptions:
    """Model, GPU, memory, traffic and policies."""

    trace: tuple[str, ...] = option(
        (),
        "trace, repeatable: compact npz; jsonl of Mooncake, AIPerf or Qwen-Bailian; csv of Azure or BurstGPT; session "
        "files of kv-cache-tester or Claude Code, or a folder of them; ShareGPT json; all also compressed; other csv: "
        "`python -m hbmgym.envs.traces convert --help`",
        metavar="PATH",
    )
    scenario: tuple[str, ...] = option(
        (),
        f"generated scenario, repeatable (default {DEFAULT_SCENARIO}): "
        f"{', '.join((*SCENARIOS, *PAPER_SCENARIOS))}:FILE",
    )
    model: str = option(_DEFAULTS.model, "model served: lower-case slug, or its config.json")
    gpu: str = option(_DEFAULTS.gpu, f"GPU: {', '.join(GPUS)}, or a file with an entry as in envs/serving/gpus.json")
    engine: str = option(
        _DEFAULTS.engine.name,
        f"engine whose host is modelled: {', '.join(ENGINE_PROFILES)}, or a profile that eval/calibrate.py wrote",
        metavar="NAME|FILE",
    )
    tensor_parallel: int = option(_DEFAULTS.tensor_parallel, "GPUs that share the weights, pages and slots")
    expert_parallel: int = option(_DEFAULTS.expert_parallel, "GPUs of these that share the experts out whole")
    hbm_gib: float = option(_DEFAULTS.hbm_gib, "GiB of HBM for both pools together, on each GPU")
    window_s: float = option(_DEFAULTS.window_s, "seconds between two decisions of a controller")
    load: float = option(1.0, "multiplies the arrival rate; 1 is as recorded, or as calibrated")
    loop: str = option("open", "open: fixed arrivals; closed: a turn follows the end of the turn before", choices=LOOPS)
    spread: bool = option(True, SPREAD)
    tick_s: float = option(0.0, "seconds per tick of the avmp- scenarios at load 1; 0 calibrates it")
    weight_dtype: str = option(_DEFAULTS.weight_dtype, "dtype of the weights: bf16, fp8, or nvfp4 or mxfp4 of experts")
    kv_dtype: str = option(_DEFAULTS.kv_dtype, "dtype of the KV cache: bf16, fp16 or fp8")
    state_dtype: str = option(_DEFAULTS.state_dtype, f"dtype of the recurrent state: {', '.join(STATE_BYTES)}")
    slots_per_request: str = option(
        str(_DEFAULTS.slots_per_request),
        "state slots a running request holds: 1 to 8, or SGLang's preset: "
        + ", ".join(f"{name} {slots}" for name, slots in SGLANG_SLOTS.items()),
    )
    draft_tokens: int = option(
        _DEFAULTS.draft_tokens,
        "tokens that speculative decoding drafts at a time: only the slots that they take are modelled, by the rule of "
        "the engine, not how many are accepted",
    )
    costs: str = option("", "costs.json of eval/gpu_check.py: measured costs of moves and copies", metavar="FILE")
    prefill_chunk: int = option(_DEFAULTS.prefill_budget, "most prompt tokens of one iteration")
    receive_interval: int = option(
        _DEFAULTS.receive_interval,
        "decode iterations from one look for new requests to the next, SGLang's scheduler_recv_interval",
    )
    long_prefill_tokens: int = option(
        _DEFAULTS.long_prefill_tokens,
        "most prompt tokens of one request in an iteration, vLLM's long_prefill_token_threshold; 0: no bound",
    )
    max_long_prefills: int = option(
        _DEFAULTS.max_long_prefills,
        "most prompts with more tokens than that left that prefill at once, while shorter ones pass, "
        "max_long_partial_prefills of vLLM's V0; 0: no bound",
    )
    policies: str = option(
        _DEFAULTS.policies.text,
        "rules of the engine, equal for every controller; the default for those left out. admission: fcfs, lpm "
        "(SGLang), slo (least slack first) or past-future (LightLLM); retention of snapshots: latest (vLLM's default), "
        "all (SGLang's), interval-N, path-cap-K or optimal-K; on_shortage: evict, migrate (AVMP), float (SGLang's one "
        "buffer), float-lru (vLLM's, with layout=padded) or priced (HiMA's Admitter); pin: none or ttl (Continuum); "
        "preemption: recompute or offload",
    )
    host_gib: float = option(
        _DEFAULTS.host_gib, "GiB of host memory per GPU for preempted requests, where preemption=offload"
    )
    transfers: str = option(
        _DEFAULTS.transfers,
        "moving chunks: beside the iterations, stopping them, or as TensorRT-LLM, which also preempts who does not fit",
        choices=tuple(TRANSFERS),
    )
    price_mode: str = option(
        _DEFAULTS.priced.price_mode,
        "prices of a controller that on_shortage=priced goes by: all (shadow) or none",
        choices=PRICE_MODES,
    )

    def serving_config(self) -> ServingConfig:
        """Raises ValueError with one line."""
        config = ServingConfig(
            model=self.model,
            gpu=self.gpu,
            hbm_gib=self.hbm_gib,
            engine=find_engine(self.engine),
            tensor_parallel=self.tensor_parallel,
            expert_parallel=self.expert_parallel,
            weight_dtype=self.weight_dtype,
            kv_dtype=self.kv_dtype,
            state_dtype=self.state_dtype,
            slots_per_request=parse_slots_per_request(self.slots_per_request, self.draft_tokens),
            draft_tokens=self.draft_tokens,
            prefill_budget=self.prefill_chunk,
            window_s=self.window_s,
            receive_interval=self.receive_interval,
            long_prefill_tokens=self.long_prefill_tokens,
            max_long_prefills=self.max_long_prefills,
            transfers=self.transfers,
            priced=PricedAdmission(self.price_mode),
            host_gib=self.host_gib,
        )
        config = with_policies(config, Policies.parse(self.policies))
        return read_costs(Path(self.costs)).applied_to(config) if self.costs else config

    def workloads(self, config: ServingConfig) -> list[Workload]:
        """One per scenario and trace; raises ValueError with one line."""
        return open_workloads(
            config,
            scenarios=self.scenario,
            traces=self.trace,
            load=self.load,
            tick_s=self.tick_s or None,
            loop=self.loop,  # type: ignore[arg-type]
            spread=self.spread,
        )

    def announce(self, workloads: Sequence[Workload], part: Part, seed: int) -> None:
        """Try an episode of each, so that what cannot be composed is refused early; say what traces and times lack."""
        for workload in workloads:
            episode = workload.episode(part, seed)
            if isinstance(workload, PaperTrafficWorkload):
                print(f"{workload.name}: a tick lasts {workload.tick_s:.4g} s", file=sys.stderr)
            if isinstance(workload, TraceWorkload):
                say_notices([workload.trace])
                known = output_id_fraction(episode)
                if not math.isnan(known):
                    print(f"{workload.name}: {known:.0%} of the generated pages are in a later prompt", file=sys.stderr)
        for notice in self._notices_of_times():
            print(notice, file=sys.stderr)

    def _notices_of_times(self) -> Iterator[str]:
        """One line each for what the modelled times do not rest on, or rest on instead."""
        gpu = find_gpu(self.gpu)
        if gpu.is_estimate:
            yield f"{gpu.name}: {gpu.sources['assumed']}"
        if self.costs:
            yield read_costs(Path(self.costs)).line
