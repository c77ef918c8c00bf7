"""What users ask to be checked is checked under `python -O` as well, which drops every assert."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOCATOR = """
from hbmgym.memory_backend.avmp import Avmp
memory = Avmp(64 << 20, "qwen3.5-4b", check=True)
memory.allocate("kv", 3)
meta, pool = memory._memory.kv.meta, memory._memory.kv
"""
CORE = """
import dataclasses
from tests.envs.test_check_mutations import CONFIG, EPISODE, SHARES
from hbmgym.envs.serving.core import Core
config = dataclasses.replace(CONFIG, policies=dataclasses.replace(CONFIG.policies, eviction="lpb"))
core = Core(config, check=True)
core.reset(EPISODE, SHARES[0])
for _ in range(5):
    core.run_window()
"""
ALLOCATOR_DAMAGES = (
    "meta.live += 3",
    "meta.limit += 1000",
    "pool.entry_at[0] += 1",
    "pool.free_bits[0] ^= 1",
    "memory._memory.chunk_at[0, 0] += 1",
)
CORE_DAMAGES = (
    "core.counters.received += 1",
    "core.counters.held += 1",
    "core.counters.decoding += 1",
    "core.counters.finished += 1",
    "core.memory.ssm.meta.live += 1",
    "core.memory.kv.ranks['continued'][0] += 1",
    "core.memory.kv.ranks['place'][core.memory.kv.heap[0]] += 1",
    "core.memory.ids['snapshot'][0] += 1",
)


def ended(script: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-O", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(("start", "check", "damages"), [
    (ALLOCATOR, "memory.check()", ALLOCATOR_DAMAGES),
    (CORE, "core.run_window()", CORE_DAMAGES),
])  # fmt: skip
def test_damage_is_found_without_asserts(start, check, damages):
    script = f"""
from hbmgym.memory_backend.invariants import InvariantError
assert False, "asserts are on"
for damage in {damages!r}:
    own = {{}}
    exec({start!r}, own)
    exec({check!r}, own)
    exec(damage, own)
    try:
        exec({check!r}, own)
    except InvariantError as error:
        print("found:", damage)
"""
    found = ended(script)
    assert found.stdout.splitlines() == [f"found: {damage}" for damage in damages], found.stderr
