"""Which requests arrived in a window, for rules that count requests rather than average over time."""

import math

import numpy as np

from hbmgym.controllers.telemetry import FAST_S


class ArrivalCounter:
    """Requests and prompt tokens of each window; `reset` first, then every record once."""

    def reset(self) -> None:
        self._rate = 0.0

    def count(self, telemetry: np.record) -> tuple[float, float]:
        """(requests, mean prompt tokens) that arrived in the window; (0, 0) where none did.

        Telemetry has no tokens per window, but its 10 s average follows from them:
        average += (1 - exp(-window_s / 10 s)) (tokens per second - average).
        """
        before, self._rate = self._rate, float(telemetry["prompt_tokens_per_s_10s"])
        window_s = float(telemetry["window_s"])
        requests = float(telemetry["arrivals_per_s"]) * window_s
        if requests < 0.5:
            return 0.0, 0.0
        tokens = (before - (self._rate - before) / math.expm1(-window_s / FAST_S)) * window_s
        return requests, max(tokens, 0.0) / requests
