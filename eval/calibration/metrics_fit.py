"""From windows of a server's own metrics to the host's constants: no benchmark, and no replay.

A window tells means, so iterations are reckoned from means. Prompts come at a rate m as if by chance: a request finds
as many others decoding, D of ctx tokens each, as there are at any time. A prompt takes part in n iterations of p
seconds together: beside D decoding requests in a mixed engine, where these n give tokens as well, and alone in an
exclusive one, where n counts as 0. An output token takes t(1 + D), or waits for prompts that came since the last one;
and the second of a request's G + 1 tokens, for all that came while it waited itself and was prefilled, W seconds:

    x = m (p - n t)        ITL = (t + x W / G) / (1 - x)

Prompts that are computed together are reckoned as if one at a time, so windows of light load tell more. The time
before the queue is TTFT - queue - prefill. It has no HTTP, network or client in it, which a benchmark's has. What the
windows leave open stays as in the profile that the fit starts from: one window with prompts of one length cannot tell
the floor from the factor.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import cost_of
from hbmgym.envs.serving.cost_model import iteration_s
from hbmgym.envs.serving.engines import EngineProfile
from hbmgym.eval.calibration.host import fit_host, under
from hbmgym.eval.calibration.prometheus import MetricsWindow

LEAST_S = 1e-3
"""Times below it are not told apart from none: windows of counts of different requests can give less than 0."""
MOST_LOST = 0.95
"""Share of time that prefill may take from decoding; beyond it the means of a window do not fit together."""


@dataclass(frozen=True)
class WindowFit:
    """A profile, and what it makes of every window."""

    profile: EngineProfile
    modelled: tuple[dict[str, float], ...]
    """Seconds by window: request, prefill and itl, as far as the window tells them; keys as `measured`."""
    measured: tuple[dict[str, float], ...]


def measured_of(window: MetricsWindow) -> dict[str, float]:
    """Seconds that a window tells: of a request outside the scheduler, of a prefill, between two tokens. The last two
    say something only where tokens and decoding requests are known as well."""
    known = math.isfinite(window.computed_tokens)
    batch_known = known and math.isfinite(window.output_tokens) and math.isfinite(window.decoding)
    told = {
        "request": max(window.ttft_s - window.queue_s - window.prefill_s, LEAST_S),
        "prefill": window.prefill_s if batch_known else math.nan,
        "itl": window.itl_s if batch_known else math.nan,
    }
    return {name: seconds for name, seconds in told.items() if math.isfinite(seconds) and seconds > 0}


def modelled_of(window: MetricsWindow, config: ServingConfig) -> dict[str, float]:
    """The same seconds of the model: of those that `measured_of` finds in the window."""
    cost = cost_of(config)
    told = measured_of(window)
    found = {"request": float(cost.request_s)}
    if told.keys() & {"prefill", "itl"}:
        found |= _modelled_iterations(window, cost, config.engine.prefill == "mixed")
    return {name: found[name] for name in told}


def _modelled_iterations(window: MetricsWindow, cost: np.record, mixed: bool) -> dict[str, float]:
    context = window.prompt_tokens + 0.5 * window.output_tokens
    chunks = list(_chunks(cost, window))
    prefill_s = sum(_iteration_s(cost, window.decoding if mixed else 0.0, context, *chunk) for chunk in chunks)
    decode_s = _iteration_s(cost, 1.0 + window.decoding, context)
    lost_s = prefill_s - len(chunks) * decode_s if mixed else prefill_s
    lost = min(window.requests / window.seconds * lost_s, MOST_LOST)
    waited_s = prefill_s + (window.queue_s if math.isfinite(window.queue_s) else 0.0)
    itl_s = (decode_s + lost * waited_s / max(window.output_tokens - 1.0, 1.0)) / (1.0 - lost)
    return {"prefill": prefill_s, "itl": itl_s}


def _chunks(cost: np.record, window: MetricsWindow) -> Iterator[tuple[int, float]]:
    """Computed tokens and attended pairs of each iteration that a prompt takes part in. Where a cache is used, it keeps
    states; see `cost_model.cold_prefill_s`."""
    tokens = max(round(window.computed_tokens), 1)
    saves = cost.snapshots_end_chunks and window.cached_share > 0
    aligned = tokens // cost.page_tokens * cost.page_tokens if saves else tokens
    cached = window.prompt_tokens - window.computed_tokens
    done = 0
    while done < tokens:
        end = aligned if done < aligned else tokens
        chunk = int(min(end - done, cost.prefill_budget))
        yield chunk, chunk * (cached + done + 0.5 * chunk)
        done += chunk


def _iteration_s(cost: np.record, decoding: float, context: float, prefill: int = 0, pairs: float = 0.0) -> float:
    """`cost_model.iteration_s` of a mean number of requests, `context` tokens each: between the whole ones."""
    low = math.floor(decoding)
    few, many = (float(iteration_s(cost, count, count * context, prefill, pairs)) for count in (low, low + 1))
    return few + (decoding - low) * (many - few)


def fit_windows(windows: Sequence[MetricsWindow], config: ServingConfig) -> WindowFit:
    """The host's constants that the windows ask for, from those of `config.engine` on.

    Raises ValueError unless the windows are of one engine and model and tell something; there must be one at least.
    """
    served = sorted({(window.engine, window.model_id) for window in windows})
    if len(served) != 1:
        names = ", ".join(f"{engine} {model}" for engine, model in served) or "nothing"
        raise ValueError(f"windows of {names}: fit those of one deployment")
    measured = tuple(map(measured_of, windows))
    if not any(measured):
        raise ValueError("the windows tell no TTFT with queue and prefill time, and no inter-token latency")

    def modelled_by(engine: EngineProfile) -> tuple[dict[str, float], ...]:
        return tuple(modelled_of(window, under(config, engine)) for window in windows)

    def ratios(engine: EngineProfile) -> list[float]:
        pairs = zip(modelled_by(engine), measured, strict=True)
        return [modelled[name] / told[name] for modelled, told in pairs for name in told]

    profile = fit_host(ratios, config.engine)
    return WindowFit(profile, modelled_by(profile), measured)
