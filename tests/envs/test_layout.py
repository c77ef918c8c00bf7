"""What a configuration's memory is divided into: the windows' workspace, and the slots of a running request."""

import re
from dataclasses import replace

import pytest

from hbmgym.envs.serving.config import ServingConfig, draft_slots, parse_slots_per_request
from hbmgym.envs.serving.core import Core, cost_of, make_layout, setup_hash, window_workspace_bytes
from hbmgym.envs.serving.engines import ENGINE_PROFILES
from hbmgym.memory_backend.geometry import find_model
from hbmgym.memory_backend.split import CHUNK_BYTES
from tests.envs.episodes import Ask, make_episode

GPT_OSS = ServingConfig(model="gpt-oss-120b", hbm_gib=8.0)
SGLANG = ENGINE_PROFILES["sglang-graph"]
WINDOW_TOKEN = 18 * 2 * 8 * 64 * 2
"""Bytes of one token in the 18 layers of gpt-oss-120b that have a window."""


@pytest.mark.parametrize("budget", [1, 100, 8192])
def test_prompts_in_flight_have_a_workspace_of_whole_chunks_beside_both_pools(budget):
    config = replace(GPT_OSS, prefill_budget=budget)
    chunks = -(-budget * WINDOW_TOKEN // CHUNK_BYTES)
    assert make_layout(config).budget_bytes == config.budget_bytes - chunks * CHUNK_BYTES


def test_the_workspace_has_the_dtype_of_the_cache_and_is_shared_out_with_the_kv_heads():
    model = find_model("gpt-oss-120b")
    assert window_workspace_bytes(model, 8192, 1, "bf16") == 8192 * WINDOW_TOKEN
    assert window_workspace_bytes(model, 8192, 4, "bf16") == 8192 * WINDOW_TOKEN // 4
    assert window_workspace_bytes(model, 8192, 1, "fp8") == 8192 * WINDOW_TOKEN // 2


@pytest.mark.parametrize("slug", ["qwen3-next-80b-a3b", "kimi-linear-48b-a3b", "lfm2-8b-a1b"])
def test_without_windows_the_pools_have_the_whole_budget(slug):
    config = ServingConfig(model=slug, hbm_gib=8.0)
    assert make_layout(config).budget_bytes == config.budget_bytes


@pytest.mark.parametrize("hbm_gib", [0.01, 0.25, 0.29])
@pytest.mark.parametrize("config", [GPT_OSS, ServingConfig()])
def test_a_budget_that_is_too_small_is_one_line_that_says_how_much_is_needed(config, hbm_gib):
    message = rf"hbm_gib is {hbm_gib:g}, but {config.model} needs (.*) GiB for one request of 2 slots and 8192 prompt "
    with pytest.raises(ValueError, match=message) as error:
        make_layout(replace(config, hbm_gib=hbm_gib))
    assert "\n" not in str(error.value)
    needed = float(re.search(message, str(error.value))[1])
    make_layout(replace(config, hbm_gib=needed))
    with pytest.raises(ValueError, match=message.replace(f"{hbm_gib:g}", f"{needed - 0.01:g}", 1)):
        make_layout(replace(config, hbm_gib=needed - 0.01))


def test_a_window_tail_is_reused_without_a_copy_and_a_state_is_not():
    asks = [Ask(0.0, 1280, 1, ["a"] * 20), Ask(20.0, 1281, 1, ["a"] * 20)]
    for config, copied in ((GPT_OSS, 0.0), (ServingConfig(hbm_gib=8.0), 77_266_944)):
        cost = cost_of(config)
        assert cost.slot_copy_s == pytest.approx(cost.block_copy_s_per_byte * copied, rel=1e-12)
        core = Core(config, check=True)
        core.reset(make_episode(asks), 0.5)
        while not core.done:
            core.run_window()
        assert core.requests[1]["reused_tokens"] == 1280


def test_only_the_state_is_copied_of_a_slot_that_has_both():
    qwen = find_model("qwen3-next-80b-a3b")
    both = replace(qwen, window_layers=4, window_tokens=512)
    assert both.slot_bytes("fp32") == qwen.slot_bytes("fp32") + both.window_bytes()
    assert both.recurrent_bytes("fp32") == qwen.slot_bytes("fp32")


@pytest.mark.parametrize(("engine", "slots"), [("vllm", [0, 1, 3, 7]), ("sglang", [0, 2, 4, 8])])
def test_each_verified_token_leaves_a_state(engine, slots):
    """vLLM: 2 + drafts; SGLang: its preset and a state for every draft and the token before them."""
    assert [draft_slots(engine, drafts) for drafts in (0, 1, 3, 7)] == slots


@pytest.mark.parametrize(
    ("config", "slots"),
    [
        (ServingConfig(draft_tokens=3), 5),
        (ServingConfig(draft_tokens=3, engine=SGLANG, slots_per_request=5), 9),
        (ServingConfig(draft_tokens=0, engine=SGLANG, slots_per_request=5), 5),
        (ServingConfig(draft_tokens=3, model="gpt-oss-20b"), 2),  # rejected drafts are only fewer tokens
        (ServingConfig(draft_tokens=32, slots_per_request=8), 40),
    ],
)
def test_a_running_request_holds_the_slots_of_its_drafts_too(config, slots):
    assert config.running_slots == slots
    core = Core(config)
    assert core.layout.min_slots == core.setup.slots_per_request == slots
    core.reset(make_episode([Ask(0.0, 640, 20_000)]), 0.5)
    telemetry = core.run_window()
    assert telemetry.slots_per_request == slots
    assert core.memory.ssm.meta.live == slots
    assert telemetry.concurrency_cap == core.memory.ssm.meta.limit // slots


def test_drafts_take_memory_and_no_time():
    one, many = ServingConfig(), ServingConfig(draft_tokens=4)
    assert cost_of(one).tobytes() == cost_of(many).tobytes()
    assert setup_hash(one) != setup_hash(many)


def test_sglang_drafts_nothing_without_extra_buffers():
    assert [parse_slots_per_request(name, 3) for name in ("off", "extra_buffer", "extra_buffer_lazy")] == [1, 5, 4]
    assert parse_slots_per_request("no_buffer") == 3
    with pytest.raises(ValueError, match="slots_per_request is no_buffer, with which SGLang drafts no tokens"):
        parse_slots_per_request("no_buffer", 3)


@pytest.mark.parametrize("drafts", [-1, 33])
def test_a_strange_number_of_drafts_is_one_line(drafts):
    with pytest.raises(ValueError, match=f"draft_tokens is {drafts}, expected 0 to 32"):
        ServingConfig(draft_tokens=drafts)


@pytest.mark.parametrize(("dtype", "slot"), [("bf16", 78_446_592), ("fp16", 78_446_592), ("int8", 41_877_504)])
def test_slots_shrink_with_the_dtype_of_the_state(dtype, slot):
    """Qwen3.8-27B: SGLang's cookbook has 78.4 MB at bf16; int8 has a scale of 4 bytes for each row of 128 numbers."""
    config = ServingConfig(model="qwen3.8-27b", state_dtype=dtype)
    assert make_layout(config).slot_bytes == slot
