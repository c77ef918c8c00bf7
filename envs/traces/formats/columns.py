"""The columns of a trace, those that a format does not record filled with what means unknown."""

import numpy as np

from hbmgym.envs.traces.coding import no_ids


def request_columns(
    arrival_s: np.ndarray, input_tokens: np.ndarray, output_tokens: np.ndarray, **known: np.ndarray
) -> dict[str, np.ndarray]:
    """Columns for `build_trace`, which is to link them where `known` has neither turn nor parent."""
    rows = len(arrival_s)
    unknown = np.full(rows, np.nan, np.float32)
    return {
        "arrival_s": np.asarray(arrival_s, np.float64),
        "input_tokens": np.asarray(input_tokens, np.int64),
        "output_tokens": np.asarray(output_tokens, np.int64),
        "session_id": np.full(rows, -1, np.int32),
        "gap_s": unknown,
        "service_s": unknown,
        "kind": np.zeros(rows, np.uint8),
        **no_ids(rows),
        **known,
    }
