"""What is served, on what, under which rules: settings, defaults and all."""

import dataclasses
from dataclasses import dataclass, fields

from hbmgym.envs.serving.cost_model import CHUNK_MOVE_S
from hbmgym.envs.serving.engines import DEFAULT_ENGINE, ENGINE_PROFILES, EngineProfile
from hbmgym.envs.serving.gpus import is_number
from hbmgym.envs.serving.queueing import ADMISSION_RULES
from hbmgym.envs.serving.retention import Retention
from hbmgym.envs.serving.shortage import ONE_BUFFER, SHORTAGE_RULES
from hbmgym.envs.serving.state import TRANSFERS
from hbmgym.memory_backend.eviction import ORDERS
from hbmgym.memory_backend.geometry import find_model
from hbmgym.memory_backend.migration import PAPERS_RULE, MigrateOnFailure
from hbmgym.memory_backend.padding import PaddedPool, padded_pool
from hbmgym.memory_backend.pricing import ADMITTER, PricedAdmission
from hbmgym.memory_backend.split import CHUNK_BYTES

GIB = 2**30
MAX_SLOTS_PER_REQUEST = 8
MAX_DRAFT_TOKENS = 32
SGLANG_SLOTS = {"off": 1, "no_buffer": 3, "extra_buffer_lazy": 4, "extra_buffer": 5}
"""State slots that SGLang 0.5.23 reckons per running request: without a radix cache, and by the strategy of its cache
of states (extra_buffer with its overlapped scheduler)."""
MAX_HBM_GIB = 4096.0
MAX_HOST_GIB = 2.0**20
POLICY_CHOICES = {
    "eviction": tuple(ORDERS),
    "admission": tuple(ADMISSION_RULES),
    "on_shortage": tuple(SHORTAGE_RULES),
    "layout": ("separate", "padded"),
    "pin": ("none", "ttl"),
    "preemption": ("recompute", "offload"),
}


def draft_slots(engine: str, draft_tokens: int) -> int:
    """Slots that a running request holds beside `slots_per_request` where so many tokens are drafted at a time.

    A rejected draft rolls the state back, so each token that is verified leaves one. vLLM reckons 2 + drafts slots for
    a request (`MambaSpec.max_memory_usage_bytes`, align mode). SGLang keeps beside the slots of its presets, which have
    the ping-pong buffers, a state for each draft and for the token before them (`intermediate_ssm_state_cache`; its
    `speculative_num_draft_tokens` counts that token too). Its convolutions there take less than a slot's, which is not
    modelled. `engine` is whose kernels run (`EngineProfile.kernels`). Engines that replay inputs instead of keeping
    states (ReplaySSM, SGLang #28511, vLLM #49232) hold none: leave drafts at 0.
    """
    return draft_tokens + 1 if engine == "sglang" and draft_tokens else draft_tokens


def parse_slots_per_request(text: str, draft_tokens: int = 0) -> int:
    """A number, or the name of one of SGLang's presets; ValueError in one line, also for no_buffer beside drafts."""
    if text == "no_buffer" and draft_tokens:
        raise ValueError(
            f"slots_per_request is no_buffer, with which SGLang drafts no tokens, but draft_tokens is {draft_tokens}: "
            "choose extra_buffer or extra_buffer_lazy"
        )
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
    """Order in which waiting requests are admitted: fcfs, lpm as SGLang, slo (least slack first), or past-future as
    LightLLM: in order of arrival, while the peak that is forecast fits."""
    retention: str = "latest"
    """Which snapshots of a path stay when a deeper one is saved (retention.py): all, latest, interval-N, path-cap-K or
    optimal-K."""
    on_shortage: str = "evict"
    """What a pool does when it has too few free blocks: evict, migrate as AVMP, float as SGLang's one buffer, float-lru
    as vLLM's, or go by price as HiMA's Admitter (priced)."""
    layout: str = "separate"
    """Pages and states of their own sizes (separate), or of whole blocks of one pool, as vLLM pads them (padded)."""
    pin: str = "none"
    """What keeps a finished turn's pages and snapshot for the session's next one: nothing, or a time to live (ttl)."""
    preemption: str = "recompute"
    """How a preempted request comes back: it recomputes, or what it had is copied to host memory and back (offload)."""

    def __post_init__(self) -> None:
        for field, choices in POLICY_CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise ValueError(f"policy {field} is {value!r}, expected one of: {', '.join(choices)}")
        Retention.parse(self.retention)
        if self.admission == "past-future" and self.on_shortage == "priced":
            raise ValueError(
                "policies: admission=past-future and on_shortage=priced both say whether the queue's head gets in: "
                "choose one of them"
            )
        if self.layout == "padded" and self.on_shortage not in ONE_BUFFER:
            raise ValueError(
                f"policies: layout=padded is one pool, which on_shortage={self.on_shortage} would divide: "
                f"on_shortage must be one of: {', '.join(ONE_BUFFER)}"
            )

    @property
    def text(self) -> str:
        """As `parse` reads it."""
        return ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))

    @classmethod
    def parse(cls, text: str) -> "Policies":
        """From 'eviction=lru,retention=all', the default for what is left out; ValueError names what is wrong."""
        given: dict[str, str] = {}
        known_fields = [field.name for field in fields(cls)]
        for part in filter(None, text.split(",")):
            field, separator, value = part.partition("=")
            if not separator or field not in known_fields:
                known = ", ".join(f"{name}=" for name in known_fields)
                raise ValueError(f"policies: {part!r} is not one of: {known}")
            if field in given:
                raise ValueError(f"policies: {field} is given twice: {given[field]} and {value}")
            given[field] = value
        return cls(**given)


@dataclass(frozen=True)
class ServingConfig:
    """One serving engine on one GPU (or one tensor-parallel group of them)."""

    model: str = "qwen3-next-80b-a3b"
    """Slug of memory_backend/models.json, or the path of a config.json."""
    gpu: str = "h200"
    hbm_gib: float = 40.0
    """GiB of both pools together, on each GPU; with a sliding window, its workspace included (`core.make_layout`)."""
    engine: EngineProfile = ENGINE_PROFILES[DEFAULT_ENGINE]
    """The engine that serves: what its host takes, and how it fits prompts into iterations."""
    tensor_parallel: int = 1
    expert_parallel: int = 1
    """GPUs of the group that share the experts out whole; each such set of GPUs divides every expert."""
    weight_dtype: str = "fp8"
    kv_dtype: str = "bf16"
    state_dtype: str = "fp32"
    """Of the state of running requests and of snapshots alike: both lie in slots of one size. fp8 and int8 have
    scales."""
    page_tokens: int = 64
    prefill_budget: int = 8192
    """Most prompt tokens of one iteration."""
    long_prefill_tokens: int = 0
    """Most of them for one request, so that a long prompt lets others through; 0: no such bound. vLLM's
    long_prefill_token_threshold, which is off by default too."""
    max_long_prefills: int = 0
    """Most prompts with more than long_prefill_tokens left that prefill at once; shorter ones pass those that wait for
    it; 0: no bound. Of vLLM's V0, max_long_partial_prefills."""
    receive_interval: int = 1
    """While nothing but decoding goes on, new requests are seen every so many iterations: SGLang's
    scheduler_recv_interval."""
    slots_per_request: int = 2
    """Slots a running request holds: its record and its latest snapshot; SGLANG_SLOTS has SGLang's numbers."""
    draft_tokens: int = 0
    """Tokens that speculative decoding drafts at a time, as far as they take memory (`draft_slots`). How many of them
    are accepted is not modelled: tokens take the time that they take without drafts."""
    decode_snapshot_tokens: int = 256
    """A decoding request refreshes its snapshot after so many tokens."""
    max_preemptions: int = 16
    """After so many a request is not preempted again."""
    deadline_slos: float = 10.0
    """A waiting request is given up after so many of its TTFT SLOs."""
    ttft_slo_floor_s: float = 1.0
    ttft_slo_factor: float = 3.0
    """TTFT SLO = floor + factor x unloaded cold prefill time."""
    tpot_slo_floor_s: float = 0.05
    tpot_slo_factor: float = 2.0
    """TPOT SLO = floor + factor x modelled decode iteration at batch 16 and 8k context; the floor is what prompts that
    prefill beside may take."""
    eviction_epoch_s: float = 30.0
    """lpb counts hits in two epochs of so many seconds; flop_aware scales anew at their edges."""
    flop_weight: float = 1.0
    """flop_aware: what saved seconds count beside recency; 0 is lru."""
    tlru_threshold_tokens: int = 4096
    """tlru: tokens that a next turn may have to compute and still be in time: SGLang's tlru-threshold. The number, and
    that of the next field, are the example that vLLM's page on it gives (#37825)."""
    tlru_next_tokens: int = 200
    """tlru: tokens that a next turn adds by itself. SGLang's tlru-next-prompt-estimate."""
    chunk_move_s: float = CHUNK_MOVE_S
    """Modelled seconds to move one chunk between the pools."""
    block_copy_s_per_byte: float | None = None
    """Copying a block inside the HBM of one GPU, as measured by eval/gpu_check.py; None: by bandwidth."""
    transfers: str = "overlapped"
    """Moving chunks runs beside the iterations (overlapped), stops them (stall), or stops them and waits for nobody, as
    in TensorRT-LLM: whoever does not fit the new split is preempted (suspend)."""
    window_s: float = 5.0
    """Simulated seconds between two decisions."""
    initial_kv_share: float = 0.526
    """Split at start; SGLang's default."""
    policies: Policies = Policies()
    migrate: MigrateOnFailure = PAPERS_RULE
    """Thresholds, batch and throttle (in pages and slots taken) of on_shortage=migrate."""
    priced: PricedAdmission = ADMITTER
    """What on_shortage=priced weighs."""
    pin_price: float = 1.0
    """pin=ttl: seconds that holding all of the budget for a second costs, and once more for each request that waits."""
    host_gib: float = 232.0
    """preemption=offload: GiB of host memory for preempted requests, per GPU; a DGX H100 has 2 TB for 8 GPUs."""

    def __post_init__(self) -> None:
        if not 0 < self.hbm_gib <= MAX_HBM_GIB:
            raise ValueError(f"hbm_gib is {self.hbm_gib}, expected a number above 0 and at most {MAX_HBM_GIB:g}")
        for field in (
            "window_s",
            "deadline_slos",
            "eviction_epoch_s",
            "chunk_move_s",
            "ttft_slo_floor_s",
            "tpot_slo_floor_s",
            "tpot_slo_factor",
        ):
            if not 0 < getattr(self, field) < float("inf"):
                raise ValueError(f"{field} is {getattr(self, field)}, expected a finite number > 0")
        for field in ("flop_weight", "pin_price"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise ValueError(f"{field} is {getattr(self, field)}, expected a finite number >= 0")
        if not 0 < self.host_gib <= MAX_HOST_GIB:
            raise ValueError(f"host_gib is {self.host_gib}, expected a number above 0 and at most {MAX_HOST_GIB:g}")
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
        if self.max_long_prefills < 0:
            raise ValueError(f"max_long_prefills is {self.max_long_prefills}, expected an integer >= 0 (0: no bound)")
        if self.max_long_prefills and not self.long_prefill_tokens:
            raise ValueError(
                f"max_long_prefills is {self.max_long_prefills}, but no prompt counts as long: set long_prefill_tokens"
            )
        for field in ("tlru_threshold_tokens", "tlru_next_tokens"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}, expected an integer >= 0")
        if not 0 <= self.draft_tokens <= MAX_DRAFT_TOKENS:
            raise ValueError(f"draft_tokens is {self.draft_tokens}, expected 0 to {MAX_DRAFT_TOKENS}")
        if self.slots_per_request > MAX_SLOTS_PER_REQUEST:
            raise ValueError(f"slots_per_request is {self.slots_per_request}, expected 1 to {MAX_SLOTS_PER_REQUEST}")
        if self.decode_snapshot_tokens < self.page_tokens:
            raise ValueError(
                f"decode_snapshot_tokens is {self.decode_snapshot_tokens}, expected at least page_tokens "
                f"{self.page_tokens}"
            )
        if (copy_s := self.block_copy_s_per_byte) is not None and not (is_number(copy_s) and 0 < copy_s <= 1):
            raise ValueError(f"block_copy_s_per_byte is {copy_s!r}, expected seconds up to 1")
        if self.transfers not in TRANSFERS:
            raise ValueError(f"transfers is {self.transfers!r}, expected one of: {', '.join(TRANSFERS)}")
        if self.transfers != "overlapped" and self.policies.on_shortage in ONE_BUFFER:
            raise ValueError(
                f"transfers is {self.transfers!r}, but on_shortage={self.policies.on_shortage} is one pool without a "
                "split to move: leave transfers at overlapped"
            )
        if self.policies.layout == "padded" and self.page_tokens != (derived := self.padded_pool.page_tokens):
            raise ValueError(f"page_tokens is {self.page_tokens}, but layout=padded has pages of {derived} tokens here")
        if not 0.0 <= self.initial_kv_share <= 1.0:
            raise ValueError(f"initial_kv_share is {self.initial_kv_share}, expected a number from 0 to 1")

    @property
    def padded_pool(self) -> PaddedPool:
        """The blocks that layout=padded has."""
        return padded_pool(find_model(self.model), self.kv_dtype, self.state_dtype, self.tensor_parallel)

    @property
    def running_slots(self) -> int:
        """Slots that a running request holds, those for drafts included.

        A model without recurrent layers needs none for drafts: those rejected are tokens less in its window.
        """
        drafts = self.draft_tokens if self.draft_tokens and find_model(self.model).recurrent_layers else 0
        return self.slots_per_request + draft_slots(self.engine.kernels, drafts)

    @property
    def budget_bytes(self) -> int:
        """Both pools and the workspace of sliding windows, rounded down to whole chunks."""
        return int(self.hbm_gib * GIB) // CHUNK_BYTES * CHUNK_BYTES


def with_policies(config: ServingConfig, policies: Policies) -> ServingConfig:
    """`config` under other policies; layout=padded sets the page size, with a decode snapshot at every page."""
    page_tokens, decode_tokens = config.page_tokens, config.decode_snapshot_tokens
    if policies.layout == "padded":
        page_tokens = decode_tokens = config.padded_pool.page_tokens
    elif config.policies.layout == "padded":
        page_tokens, decode_tokens = ServingConfig.page_tokens, ServingConfig.decode_snapshot_tokens
    return dataclasses.replace(config, policies=policies, page_tokens=page_tokens, decode_snapshot_tokens=decode_tokens)
