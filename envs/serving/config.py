"""What is served, on what, under which rules: settings, defaults and all."""

from dataclasses import dataclass

from hbmgym.envs.serving.cost_model import CHUNK_MOVE_S
from hbmgym.envs.serving.engines import DEFAULT_ENGINE, ENGINE_PROFILES, EngineProfile
from hbmgym.envs.serving.gpus import is_number
from hbmgym.envs.serving.shortage import SHORTAGE_RULES
from hbmgym.memory_backend.eviction import ORDERS
from hbmgym.memory_backend.migration import PAPERS_RULE, MigrateOnFailure
from hbmgym.memory_backend.pricing import ADMITTER, PricedAdmission
from hbmgym.memory_backend.split import CHUNK_BYTES

GIB = 2**30
MAX_SLOTS_PER_REQUEST = 8
SGLANG_SLOTS = {"off": 1, "no_buffer": 3, "extra_buffer_lazy": 4, "extra_buffer": 5}
"""State slots that SGLang 0.5.23 reckons per running request: without a radix cache, and by the strategy of its cache
of states (extra_buffer with its overlapped scheduler)."""
MAX_HBM_GIB = 4096.0
POLICY_CHOICES = {"eviction": tuple(ORDERS), "admission": ("fcfs",), "on_shortage": tuple(SHORTAGE_RULES)}


def parse_slots_per_request(text: str) -> int:
    """A number, or the name of one of SGLang's presets; ValueError in one line."""
    if text in SGLANG_SLOTS:
        return SGLANG_SLOTS[text]
    try:
        return int(text)
    except ValueError:
        names = ", ".join(SGLANG_SLOTS)
        raise ValueError(
            f"slots_per_request is {text!r}, expected 1 to {MAX_SLOTS_PER_REQUEST} or one of SGLang's presets: {names}"
        ) from None


@dataclass(frozen=True)
class Policies:
    """The harness's rules, equal for every controller of a table."""

    eviction: str = "lru"
    """Order in which cached blocks go."""
    admission: str = "fcfs"
    """Order in which waiting requests are admitted."""
    on_shortage: str = "evict"
    """What a pool does when it has too few free blocks: evict, migrate as AVMP, float as SGLang's one buffer, or go
    by price as HiMA's Admitter (priced)."""

    def __post_init__(self) -> None:
        for field, choices in POLICY_CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise ValueError(f"policy {field} is {value!r}, expected one of: {', '.join(choices)}")

    @classmethod
    def parse(cls, text: str) -> "Policies":
        """From 'eviction=lru,admission=fcfs'; ValueError names what is wrong."""
        given: dict[str, str] = {}
        for part in filter(None, text.split(",")):
            field, separator, value = part.partition("=")
            if not separator or field not in POLICY_CHOICES:
                known = ", ".join(f"{name}=" for name in POLICY_CHOICES)
                raise ValueError(f"policies: {part!r} is not one of: {known}")
            if field in given:
                raise ValueError(f"policies: {field} is given twice: {given[field]} and {value}")
            given[field] = value
        return cls(**given)


@dataclass(frozen=True)
class ServingConfig:
    """One serving engine on one GPU (or one tensor-parallel group of them)."""

    model: str = "qwen3-next-80b-a3b"
    """Slug of memory_backend/models.json."""
    gpu: str = "h200"
    hbm_gib: float = 40.0
    """GiB of both pools together, on each GPU."""
    engine: EngineProfile = ENGINE_PROFILES[DEFAULT_ENGINE]
    """The engine that serves: what its host takes, and how it fits prompts into iterations."""
    tensor_parallel: int = 1
    expert_parallel: int = 1
    """GPUs of the group that share the experts out whole; each such set of GPUs divides every expert."""
    weight_dtype: str = "fp8"
    kv_dtype: str = "bf16"
    state_dtype: str = "fp32"
    page_tokens: int = 64
    prefill_budget: int = 8192
    """Most prompt tokens of one iteration."""
    long_prefill_tokens: int = 0
    """Most of them for one request, so that a long prompt lets others through; 0: no such bound. vLLM's
    long_prefill_token_threshold, which is off by default too."""
    receive_interval: int = 1
    """While nothing but decoding goes on, new requests are seen every so many iterations: SGLang's
    scheduler_recv_interval."""
    slots_per_request: int = 2
    """Recurrent slots a running request holds: its state and its latest snapshot; SGLANG_SLOTS has SGLang's numbers."""
    decode_snapshot_tokens: int = 256
    """A decoding request refreshes its snapshot after so many tokens."""
    max_preemptions: int = 16
    """After so many a request is not preempted again."""
    deadline_slos: float = 10.0
    """A waiting request is given up after so many of its TTFT SLOs."""
    ttft_slo_floor_s: float = 1.0
    ttft_slo_factor: float = 3.0
    """TTFT SLO = floor + factor x unloaded cold prefill time."""
    tpot_slo_factor: float = 2.0
    """TPOT SLO = factor x modelled TPOT at batch 16 and 8k context."""
    eviction_epoch_s: float = 30.0
    """lpb counts hits in two epochs of so many seconds; flop_aware scales anew at their edges."""
    flop_weight: float = 1.0
    """flop_aware: what saved seconds count beside recency; 0 is lru."""
    chunk_move_s: float = CHUNK_MOVE_S
    """Modelled seconds to move one chunk between the pools."""
    block_copy_s_per_byte: float | None = None
    """Copying a block inside the HBM of one GPU, as measured by eval/gpu_check.py; None: by bandwidth."""
    transfers: str = "overlapped"
    """Moving chunks runs beside the iterations (overlapped) or stops them (stall)."""
    window_s: float = 5.0
    """Simulated seconds between two decisions."""
    initial_kv_share: float = 0.526
    """Split at start; SGLang's default."""
    policies: Policies = Policies()
    migrate: MigrateOnFailure = PAPERS_RULE
    """Thresholds, batch and throttle (in pages and slots taken) of on_shortage=migrate."""
    priced: PricedAdmission = ADMITTER
    """What on_shortage=priced weighs."""

    def __post_init__(self) -> None:
        if not 0 < self.hbm_gib <= MAX_HBM_GIB:
            raise ValueError(f"hbm_gib is {self.hbm_gib}, expected a number above 0 and at most {MAX_HBM_GIB:g}")
        for field in (
            "window_s",
            "deadline_slos",
            "eviction_epoch_s",
            "chunk_move_s",
            "ttft_slo_floor_s",
            "tpot_slo_factor",
        ):
            if not 0 < getattr(self, field) < float("inf"):
                raise ValueError(f"{field} is {getattr(self, field)}, expected a finite number > 0")
        if not 0 <= self.flop_weight < float("inf"):
            raise ValueError(f"flop_weight is {self.flop_weight}, expected a finite number >= 0")
        for field in (
            "tensor_parallel",
            "expert_parallel",
            "page_tokens",
            "prefill_budget",
            "receive_interval",
            "slots_per_request",
            "decode_snapshot_tokens",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, expected an integer >= 1")
        if self.long_prefill_tokens < 0:
            raise ValueError(
                f"long_prefill_tokens is {self.long_prefill_tokens}, expected an integer >= 0 (0: no bound)"
            )
        if self.slots_per_request > MAX_SLOTS_PER_REQUEST:
            raise ValueError(f"slots_per_request is {self.slots_per_request}, expected 1 to {MAX_SLOTS_PER_REQUEST}")
        if self.decode_snapshot_tokens < self.page_tokens:
            raise ValueError(
                f"decode_snapshot_tokens is {self.decode_snapshot_tokens}, expected at least page_tokens "
                f"{self.page_tokens}"
            )
        if (copy_s := self.block_copy_s_per_byte) is not None and not (is_number(copy_s) and 0 < copy_s <= 1):
            raise ValueError(f"block_copy_s_per_byte is {copy_s!r}, expected seconds up to 1")
        if self.transfers not in ("overlapped", "stall"):
            raise ValueError(f"transfers is {self.transfers!r}, expected overlapped or stall")
        if not 0.0 <= self.initial_kv_share <= 1.0:
            raise ValueError(f"initial_kv_share is {self.initial_kv_share}, expected a number from 0 to 1")

    @property
    def budget_bytes(self) -> int:
        """Both pools, rounded down to whole chunks."""
        return int(self.hbm_gib * GIB) // CHUNK_BYTES * CHUNK_BYTES
