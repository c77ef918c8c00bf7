"""Small configurations, workloads and trace files for the tests of evaluation and training."""

import json
from pathlib import Path

import numpy as np

from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.workload import ScenarioWorkload

MODEL, HBM_GIB = "qwen3.5-4b", 1.0
CONFIG = ServingConfig(model=MODEL, hbm_gib=HBM_GIB)
CHAT = ScenarioWorkload("steady-chat", {"chat": 0.4}, 1.0, CONFIG.page_tokens)
MIX = ScenarioWorkload("mix-shift", {"chat": 0.4, "document": 0.02}, 1.0, CONFIG.page_tokens)


def write_trace(path: Path, span_s: float = 1800.0, rate_per_s: float = 0.5, **changes: object) -> Path:
    """A Mooncake file of short and long prompts that come back now and then; `changes` are made to its last row."""
    rng = np.random.default_rng(0)
    rows = []
    for index, arrival_s in enumerate(np.sort(rng.uniform(0.0, span_s, int(span_s * rate_per_s)))):
        tokens = int(rng.choice([700, 1500, 9000]))
        document = index if rng.random() < 0.5 else int(rng.integers(20))
        ids = [1000 * document + block for block in range(-(-tokens // 512))]
        rows.append(
            {"timestamp": round(1000 * arrival_s), "input_length": tokens, "output_length": 60, "hash_ids": ids}
        )
    rows[-1].update(changes)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
