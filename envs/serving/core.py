"""Core: one serving engine with its cache and pools, advanced window by window under a split that may be changed."""

import dataclasses
import hashlib
import json
import math
from typing import Any

import numpy as np

from hbmgym.controllers.base import TELEMETRY, Setup
from hbmgym.envs.serving.config import GIB, ServingConfig
from hbmgym.envs.serving.cost_model import COST, cold_prefill_s, make_cost, tpot_reference_s
from hbmgym.envs.serving.engine import LOG_FULL, ask_for_share, run
from hbmgym.envs.serving.gpus import find_gpu
from hbmgym.envs.serving.queueing import ADMISSION_RULES
from hbmgym.envs.serving.retention import INTERVAL, Retention
from hbmgym.envs.serving.shortage import ONE_BUFFER, PRICED, SHORTAGE_RULES
from hbmgym.envs.serving.state import (
    ACTION_NAMES,
    AS_LONG_AS_IT_LASTS,
    DECODING,
    EXAMPLE_STATE,
    FINISHED,
    FUTURE,
    HELD,
    LPM,
    OVERLAPPED,
    PINS,
    PREFILLING,
    REJECTED,
    RELEASES,
    SLO,
    TRANSFERS,
    WAITING,
    State,
    make_state,
    state_at,
)
from hbmgym.envs.serving.telemetry import close_window, make_window
from hbmgym.envs.traces.episode import Episode
from hbmgym.memory_backend.eviction import BY_USE, ORDERS
from hbmgym.memory_backend.geometry import HybridModel, find_model
from hbmgym.memory_backend.invariants import require
from hbmgym.memory_backend.jit import kernel, subkernel
from hbmgym.memory_backend.oplog import EVERYTHING, NOTHING
from hbmgym.memory_backend.padding import padded_pool
from hbmgym.memory_backend.prefix_cache import NEVER, Memory, check_chunks, check_memory, check_stamps, make_memory
from hbmgym.memory_backend.resize import RUN_CHUNKS
from hbmgym.memory_backend.split import CHUNK_BYTES, BudgetTooSmall, Layout
from hbmgym.memory_backend.table import Table
from hbmgym.memory_backend.vmm import Vmm, open_vmm

LEAST_SLOT_BYTES = 64 * 2**10
"""A model that keeps no record has slots all the same, which count its running requests and take next to nothing."""


def window_workspace_bytes(model: HybridModel, prefill_budget: int, tensor_parallel: int, kv_dtype: str) -> int:
    """Bytes for what prompts in flight leave in the layers of a sliding window, in whole chunks; 0 without windows.

    While a prompt is prefilled, those layers hold the chunk in flight beside its slot, the window's tail. All chunks of
    an iteration together are at most `prefill_budget` tokens, whatever the number of requests, so this is one
    workspace for the engine, and the same for every controller. vLLM and SGLang have no such reserve: they take the
    pages of a chunk from the pages of the window, and free those behind the window afterwards, so that a request holds
    window + chunk at most. Here that memory is set aside also while nothing is prefilled.
    """
    workspace = prefill_budget * model.window_token_bytes(tensor_parallel, kv_dtype)
    return -(-workspace // CHUNK_BYTES) * CHUNK_BYTES


def make_layout(config: ServingConfig) -> Layout:
    """Chunks, blocks and splits of a configuration; ValueError when weights and budget do not fit the GPU, or the
    budget does not hold a window's workspace and the least split."""
    model, gpu = find_model(config.model), find_gpu(config.gpu)
    parallel = config.tensor_parallel
    model.require_shares(parallel)
    weights = model.weight_bytes(config.weight_dtype) // parallel
    if weights + config.budget_bytes > gpu.memory_bytes:
        raise ValueError(
            f"{model.slug} has {weights / 1e9:.1f} GB of weights per GPU, which with hbm_gib {config.hbm_gib:g} "
            f"exceeds the {gpu.memory_bytes / 1e9:.0f} GB of {gpu.slug}: lower hbm_gib or choose another GPU, or "
            "raise tensor_parallel"
        )
    workspace = window_workspace_bytes(model, config.prefill_budget, parallel, config.kv_dtype)
    pages_per_prefill = -(-config.prefill_budget // config.page_tokens)
    page_bytes = model.page_bytes(config.kv_dtype, config.page_tokens, parallel)
    slot_bytes = max(model.slot_bytes(config.state_dtype, parallel, config.kv_dtype), LEAST_SLOT_BYTES)
    if config.policies.layout == "padded":
        pool = padded_pool(model, config.kv_dtype, config.state_dtype, parallel)
        page_bytes, slot_bytes = pool.page_bytes, pool.slot_bytes
    try:
        return Layout(
            budget_bytes=config.budget_bytes - workspace,
            chunk_bytes=CHUNK_BYTES,
            page_bytes=page_bytes,
            slot_bytes=slot_bytes,
            min_slots=config.running_slots,
            min_pages=pages_per_prefill + 1,
        )
    except BudgetTooSmall as error:
        needed_gib = math.ceil(100 * (error.needed_bytes + workspace) / GIB) / 100
        raise ValueError(
            f"hbm_gib is {config.hbm_gib:g}, but {model.slug} needs {needed_gib:.2f} GiB for one request of "
            f"{config.running_slots} slots and {config.prefill_budget} prompt tokens in flight: raise hbm_gib or lower "
            "prefill_budget"
        ) from None


def cost_of(config: ServingConfig) -> np.record:
    """The cost model's constants for a configuration."""
    return make_cost(
        find_model(config.model),
        find_gpu(config.gpu),
        engine=config.engine,
        tensor_parallel=config.tensor_parallel,
        expert_parallel=config.expert_parallel,
        weight_dtype=config.weight_dtype,
        kv_dtype=config.kv_dtype,
        state_dtype=config.state_dtype,
        prefill_budget=config.prefill_budget,
        page_tokens=config.page_tokens,
        chunk_move_s=config.chunk_move_s,
        block_copy_s_per_byte=config.block_copy_s_per_byte,
    )


def most_entries(config: ServingConfig, layout: Layout) -> int:
    """No iteration edge writes more entries of the op log."""
    on_shortage = config.policies.on_shortage
    pages, slots = (layout.budget_bytes // size for size in (layout.page_bytes, layout.slot_bytes))
    # A page is taken at most twice (to grow, by an admission) and evicted as often, released once because another one
    # is resident already, and relocated once by runs, which all go one way: 1 + 1 + 2 entries.
    # A slot is released by a preemption, evicted, taken and filled by an admission, and so again by a snapshot; it gets
    # a decode snapshot, is released at the end, and relocated: 1 + (1 + 3) + (1 + 4) + 3 + 1 + 2 entries.
    entries = 8 * pages + 16 * slots + layout.chunks
    # What retention saves beside takes a slot, which may be that of a snapshot saved just before, and drops others.
    prefill_pages = config.prefill_budget // config.page_tokens + slots
    entries += 6 * Retention.parse(config.policies.retention).most_saved(prefill_pages)
    if on_shortage in ("migrate", "priced"):
        # Once at an edge any block may be evicted and any relocated, and every chunk moved.
        entries += 3 * (pages + slots) + layout.chunks
    if on_shortage in ONE_BUFFER:
        # Every slot taken may fetch the chunks of a slot, and pages fetch them back with those that were there. All
        # blocks on a chunk that moves may have to be relocated.
        to_slots = 2 * slots * -(-layout.slot_bytes // layout.chunk_bytes)
        to_pages = to_slots + layout.chunks
        entries += to_slots * (1 + 2 * (layout.chunk_bytes // layout.page_bytes + 1))
        entries += to_pages * (1 + 2 * (layout.chunk_bytes // layout.slot_bytes + 1))
    return entries + 64


def _order_of(config: ServingConfig) -> int:
    """The order of eviction, by value where it has to be known when a block was used last."""
    policies = config.policies
    return BY_USE if policies.on_shortage == "float-lru" and policies.eviction == "lru" else ORDERS[policies.eviction]


def setup_hash(config: ServingConfig) -> str:
    """Of all that must be equal for every row of a table: settings, policies, geometry, cost constants.

    The split at start is the controller's and not part of it.
    """
    settings = dataclasses.asdict(config)
    del settings["initial_kv_share"]
    settings["engine"] = config.engine.prefill
    for name in ("gpu", "block_copy_s_per_byte"):  # what acts of them, and of the engine beside, is in the cost record
        del settings[name]
    for name in ("long_prefill_tokens", "max_long_prefills", "draft_tokens"):
        if not settings[name]:
            del settings[name]
    if config.policies.layout == "separate":
        del settings["policies"]["layout"]
    if config.policies.eviction != "tlru":
        del settings["tlru_threshold_tokens"], settings["tlru_next_tokens"]
    if config.policies.on_shortage != "migrate":
        del settings["migrate"]
    if config.policies.on_shortage != "priced":
        del settings["priced"]
    constants = list(COST.names or ())
    if config.policies.pin == "none":
        del settings["policies"]["pin"], settings["pin_price"]
    if config.policies.preemption == "recompute":
        del settings["policies"]["preemption"], settings["host_gib"]
        constants.remove("host_copy_s_per_byte")
    cost = cost_of(config)
    facts = [settings, dataclasses.asdict(make_layout(config)), [cost[name].tolist() for name in constants]]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@kernel
def _set_ttft_slos(table, floor_s, factor):
    state = state_at(table)
    for row in range(len(state.rows)):
        state.requests[row].ttft_slo_s = floor_s + factor * cold_prefill_s(state.cost, state.rows[row].input_tokens)


@subkernel
def serve_window(table, clock, window, telemetry, values):
    """`Core.run_window` for an engine without an op log; the arguments are `Core.kernel_arguments`."""
    clock[0] += clock[1]
    run(table, clock[0], 0)
    close_window(table, window, telemetry, values)


@kernel
def _serve_windows(table, clock, window, telemetry, values, records):
    for k in range(len(records)):
        serve_window(table, clock, window, telemetry, values)
        for i in range(len(values)):
            records[k, i] = values[i]


class Core:
    """One serving engine on a backend. `reset` first; then `request_split` and `run_window` in turns.

    `backend` chooses who executes the op log (`vmm.BACKENDS`), never a result. With `check`, every invariant
    is verified after every window, every block in use is read back, and accounting verifies the op log too.
    `log_capacity` is how many entries the op log holds before it is executed, at least those of one iteration edge
    (default: of two); no result depends on it.
    """

    def __init__(
        self, config: ServingConfig, *, backend: str = "accounting", check: bool = False, log_capacity: int = 0
    ) -> None:
        self.config = config
        self.layout = make_layout(config)
        self.cost = cost_of(config)
        model = find_model(config.model)
        self.setup = Setup(
            layout=self.layout,
            kv_token_bytes=model.kv_token_bytes(config.kv_dtype, config.tensor_parallel),
            slots_per_request=config.running_slots,
            window_s=config.window_s,
            kv_share_bounds=self.layout.share_bounds,
            chunk_move_s=config.chunk_move_s,
            tpot_slo_s=config.tpot_slo_floor_s + config.tpot_slo_factor * float(tpot_reference_s(self.cost)),
        )
        self._backend = backend
        self._check = check
        self._log_capacity = log_capacity
        self.vmm: Vmm | None = None

    def reset(
        self, episode: Episode, kv_share: float | None = None, share_bounds: tuple[float, float] | None = None
    ) -> np.record:
        """Start an episode at the split nearest to `kv_share` (default: the configuration's) with empty caches.

        `share_bounds` are the shares the controller can reach: a request too large for all of them is rejected at
        arrival. Where shortages move the split too, they are the layout's. Returns the Telemetry record at time 0.
        """
        if episode.page_tokens != self.config.page_tokens:
            raise ValueError(f"page_tokens of the episode is {episode.page_tokens}, expected {self.config.page_tokens}")
        self.close()
        self.episode = episode
        slots = self.layout.slots(self.config.initial_kv_share if kv_share is None else kv_share)
        kv_chunks = self.layout.kv_chunks(slots)
        fixed = self.config.policies.on_shortage == "evict"
        self._share_bounds = share_bounds if fixed and share_bounds else self.layout.share_bounds
        self.vmm = open_vmm(self._backend, self.layout, kv_chunks)
        self._state = self._make_state(slots)
        self._table = Table(self._state, EXAMPLE_STATE)
        _set_ttft_slos(self._table.address, self.config.ttft_slo_floor_s, self.config.ttft_slo_factor)
        self._window = make_window()
        self._clock = np.array([0.0, self.config.window_s])  # the end of the last window, and seconds of each
        telemetry = np.zeros(1, TELEMETRY)
        self.telemetry = telemetry.view(np.recarray)[0]
        self._telemetry_values = telemetry.view(np.float64)
        self._write_constants()
        close_window(self._table.address, self._window, self.telemetry, self._telemetry_values)
        return self.telemetry

    def _make_state(self, slots: int) -> State:
        config, layout, episode = self.config, self.layout, self.episode
        self._log_margin = most_entries(config, layout)
        keeps_log = self._check or (self.vmm is not None and self.vmm.name != "accounting")
        log_capacity = max(self._log_capacity or 2 * self._log_margin, self._log_margin)
        memory = make_memory(
            layout,
            slots,
            episode.id_count,
            log_capacity,
            EVERYTHING if keeps_log else NOTHING,
            run_limit=RUN_CHUNKS,
            pages_grow=True,
            order=_order_of(config),
        )
        self._write_values(memory)
        retention = Retention.parse(config.policies.retention)
        state = make_state(memory, episode, self.cost, retention)
        engine = state.engine
        engine.slots_per_request = config.running_slots
        engine.decode_snapshot_tokens = config.decode_snapshot_tokens
        engine.retention = retention.kind
        engine.retained = -(-retention.number // config.page_tokens) if retention.kind == INTERVAL else retention.number
        engine.share_min, engine.share_max = self._share_bounds
        engine.max_pages = layout.pages(layout.slots(self._share_bounds[1]))
        engine.max_preemptions = config.max_preemptions
        engine.pins_sessions, engine.pin_price = int(config.policies.pin == "ttl"), config.pin_price
        engine.host_limit = int(config.host_gib * GIB) if config.policies.preemption == "offload" else 0
        engine.on_shortage = SHORTAGE_RULES[config.policies.on_shortage]
        engine.migration_low, engine.migration_high = config.migrate.low, config.migrate.high
        engine.migration_chunks, engine.migration_interval = config.migrate.chunks, config.migrate.interval_ops
        engine.horizon_s, engine.max_deferrals = config.priced.horizon_s, config.priced.max_deferrals
        own = config.priced.deferral_weight
        engine.deferral_weight = AS_LONG_AS_IT_LASTS if own is None else own
        engine.admission = ADMISSION_RULES[config.policies.admission]
        engine.reorders = int(engine.admission in (LPM, SLO) or config.max_long_prefills > 0)
        engine.arrivals_matter = int(engine.reorders != 0 or engine.on_shortage == PRICED)
        engine.max_long_prefills = config.max_long_prefills
        engine.request_budget = config.long_prefill_tokens or config.prefill_budget
        engine.exclusive = int(config.engine.prefill == "exclusive")
        engine.receive_interval = config.receive_interval
        engine.transfers = TRANSFERS[config.transfers]
        engine.worker_chunk_s = config.chunk_move_s if engine.transfers == OVERLAPPED else 0.0
        engine.deadline_slos = config.deadline_slos
        engine.epoch_s = config.eviction_epoch_s
        engine.epoch_end_s = NEVER if config.policies.eviction == "lru" else config.eviction_epoch_s
        engine.tpot_slo_s = self.setup.tpot_slo_s
        return state

    def _write_values(self, memory: Memory) -> None:
        """What the orders of eviction go by. Recovering a prefix takes attention for the sake of its pages, and all
        else for that of its state."""
        cost, page_tokens = self.cost, self.config.page_tokens
        kv, ssm = memory.kv.meta, memory.ssm.meta
        kv.own_s_per_page2 = cost.attention_s_per_pair * page_tokens**2 / 2
        kv.state_s_per_page = page_tokens * cost.prefill_s_per_token
        ssm.own_s_per_page = kv.state_s_per_page
        kv.flop_weight = ssm.flop_weight = self.config.flop_weight
        kv.page_tokens = ssm.page_tokens = page_tokens
        kv.spare_tokens = ssm.spare_tokens = self.config.tlru_threshold_tokens - self.config.tlru_next_tokens

    def _write_constants(self) -> None:
        telemetry, setup = self.telemetry, self.setup
        telemetry.budget_bytes = self.layout.budget_bytes
        telemetry.slot_bytes = self.layout.slot_bytes
        telemetry.kv_token_bytes = setup.kv_token_bytes
        telemetry.slots_per_request = setup.slots_per_request
        telemetry.kv_share_min, telemetry.kv_share_max = self._share_bounds

    def request_split(self, kv_share: float) -> None:
        """Ask for the realisable split nearest to `kv_share`; replaces a request that is still under way.

        In one pool (on_shortage=float, float-lru) there is no split to ask for, and nothing happens.
        """
        if not math.isfinite(kv_share):
            raise ValueError(f"kv_share is {kv_share}, expected a number from 0 to 1")
        ask_for_share(self._table.address, float(kv_share))

    def set_prices(self, prices: np.record) -> None:
        """Let on_shortage=priced go by these PRICES from now on; no other rule looks at them, nor price_mode none.

        Where both pools' bytes are worth the same, moving some costs what the curvature says: the shadow price, which
        they share, cancels out. Raises ValueError for a price that is negative or not finite.
        """
        for name in ("curvature", "deferral_weight"):
            if not 0.0 <= prices[name] < math.inf:
                raise ValueError(f"price {name} is {prices[name]}, expected a finite number >= 0")
        if self.config.priced.price_mode == "shadow":
            self._state.engine.curvature = prices.curvature
            self._state.engine.deferral_weight = prices.deferral_weight

    def run_window(self) -> np.record:
        """Advance by one window and let the backend execute the op log; returns the Telemetry record."""
        self._clock[0] += self._clock[1]
        while run(self._table.address, self._clock[0], self._log_margin) == LOG_FULL:
            self._execute_log()
        close_window(self._table.address, self._window, self.telemetry, self._telemetry_values)
        self._execute_log()
        if self._check:
            self.check()
        return self.telemetry

    def run_windows(self, count: int) -> np.ndarray:
        """Advance by `count` windows under the split as it is; TELEMETRY records, shape (count,)."""
        records = np.zeros((count, len(self._telemetry_values)))
        if self.keeps_log:
            for record in records:
                self.run_window()
                record[:] = self._telemetry_values
        else:
            _serve_windows(*self.kernel_arguments, records)
        return records.view(TELEMETRY)[:, 0]

    @property
    def keeps_log(self) -> bool:
        """Whether there is an op log that the backend has to execute between two windows."""
        return int(self._state.memory.log.head.level) != NOTHING

    @property
    def kernel_arguments(self) -> tuple[Any, ...]:
        """What kernels take that serve this engine window by window (`serve_window`)."""
        return self._table.address, self._clock, self._window, self.telemetry, self._telemetry_values

    def _execute_log(self) -> None:
        log = self._state.memory.log
        if log.head.count:
            assert self.vmm is not None
            require(log.head.count <= len(log.ops), "an iteration edge wrote more than most_entries")
            self.vmm.execute(log.ops[: log.head.count])
            log.head.count = 0

    @property
    def now_s(self) -> float:
        """Simulated time of the last iteration edge."""
        return float(self._state.engine.now_s)

    @property
    def requests(self) -> np.ndarray:
        """REQUEST records, one per row of the episode."""
        return self._state.requests[: len(self.episode.rows)]

    @property
    def counters(self) -> np.record:
        """The ENGINE record: counters of the episode so far."""
        return self._state.engine

    @property
    def actions(self) -> dict[str, int]:
        """How often the queue's head got in, or not, in each way that on_shortage=priced has."""
        return dict(zip(ACTION_NAMES, self._state.actions.tolist(), strict=True))

    @property
    def price_ratios(self) -> np.ndarray:
        """Decisions by how many times dearer the second cheapest action was: 1 to 2, 2 to 4 and so on (int64); the last
        place has all beyond it."""
        return self._state.ratios

    @property
    def memory(self) -> Memory:
        """Pools, prefix index and split; to be read only."""
        return self._state.memory

    @property
    def moved_chunks(self) -> int:
        return int(self._state.memory.split.moved_chunks)

    @property
    def migrated_bytes(self) -> int:
        """Bytes of chunks that changed pools, and of blocks copied to clear their way."""
        split = self._state.memory.split
        return int(split.moved_chunks) * self.layout.chunk_bytes + int(split.relocated_bytes)

    @property
    def mapped_chunks(self) -> int:
        """Chunks of both pools."""
        return int(self._state.memory.kv.meta.chunks + self._state.memory.ssm.meta.chunks)

    @property
    def done(self) -> bool:
        """Every row has finished or was rejected."""
        return int(self.counters.finished + self.counters.rejected) == len(self.episode.rows)

    def check(self) -> None:
        """Raise AssertionError or VmmError unless every invariant of pools, prefix cache, requests and backend holds.

        Every block in use, live or cached, must read back its stamp, if the backend keeps an op log with stamps.
        """
        check_memory(self._state.memory)
        self._check_requests()
        if self.vmm is not None:
            self._check_backend(self.vmm)

    def _check_backend(self, vmm: Vmm) -> None:
        memory = self._state.memory
        self._execute_log()
        check_stamps(memory)  # fits: an empty log holds more than one entry per block
        self._execute_log()
        vmm.check()
        if memory.log.head.level != NOTHING:
            check_chunks(memory, vmm)

    def _check_requests(self) -> None:
        engine, requests = self.counters, self.requests
        count = np.bincount(requests["status"], minlength=REJECTED + 1)
        received = count[WAITING:].sum()
        require(engine.received == received, "received != waiting + running + finished + rejected")
        waiting = engine.waiting + engine.aside
        require((engine.held, waiting) == (count[HELD], count[WAITING]), "waiting requests are miscounted")
        released = (requests["status"] == FUTURE) & (requests["unmet"] == 0) & (self.episode.rows["needs"] > 0)
        expected = (0, released.sum()) if engine.closed else (engine.held, 0)
        require((engine.held, self._state.heap_sizes[RELEASES]) == expected, "rows with needs are miscounted")
        running = (engine.prefilling, engine.decoding)
        require(running == (count[PREFILLING], count[DECODING]), "running ones are miscounted")
        require((engine.finished, engine.rejected) == (count[FINISHED], count[REJECTED]), "ended ones are miscounted")
        slots = (count[PREFILLING] + count[DECODING]) * engine.slots_per_request + self._state.heap_sizes[PINS]
        require(self._state.memory.ssm.meta.live == slots, "live slots are not those of running requests and of pins")
        pages = -(-requests["offloaded"].astype(np.int64) // engine.page_tokens) * self.layout.page_bytes
        on_host = (pages + self.layout.slot_bytes)[requests["offloaded"] > 0].sum()
        require(engine.host_bytes == on_host <= engine.host_limit, "host memory is miscounted")

    def close(self) -> None:
        """Give the backend's memory back; idempotent."""
        if self.vmm is not None:
            self.vmm.close()
            self.vmm = None
