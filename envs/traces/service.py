"""How long a turn takes on an idle engine, roughly: where the next turn of a session starts in an open loop."""

import numpy as np

BASE_S = 0.2
PER_OUTPUT_TOKEN_S = 0.025


def unloaded_service_s(output_tokens: np.ndarray) -> np.ndarray:
    """float64 seconds, same shape; a placement rule for arrivals, not the cost model."""
    return BASE_S + PER_OUTPUT_TOKEN_S * output_tokens.astype(np.float64)


def ends_s(arrival_s: np.ndarray, service_s: np.ndarray, output_tokens: np.ndarray) -> np.ndarray:
    """float64 seconds, same shape: when rows ended in a recording, with an unloaded service time where it has NaN."""
    return np.asarray(arrival_s + np.where(np.isnan(service_s), unloaded_service_s(output_tokens), service_s))
