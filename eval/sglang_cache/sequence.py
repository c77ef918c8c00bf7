"""Requests that share prefixes, for SGLang's cache and for this engine alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count

import numpy as np

from hbmgym.envs.traces.episode import ROW, Episode

PAGE_TOKENS = 64
"""Of both caches, and the grid on which SGLang saves states."""


@dataclass(frozen=True)
class Request:
    """One request. Page ids are prefix-chained: equal ids are equal text after an equal beginning."""

    prompt_tokens: int
    output_tokens: int
    pages: tuple[int, ...]
    """Ids of leading full pages of prompt and output; nobody repeats what lies behind them."""

    def __post_init__(self) -> None:
        assert len(self.pages) * PAGE_TOKENS <= self.prompt_tokens + self.output_tokens, self


def token_ids(requests: Sequence[Request]) -> list[tuple[list[int], list[int]]]:
    """Token ids of each prompt and output: a page is its id repeated, every other token is unique."""
    unique = count(1 + max(chain.from_iterable(request.pages for request in requests), default=0))
    texts = []
    for request in requests:
        text = [page for page in request.pages for _ in range(PAGE_TOKENS)]
        rest = request.prompt_tokens + request.output_tokens - len(text)
        text += [next(unique) for _ in range(rest)]
        texts.append((text[: request.prompt_tokens], text[request.prompt_tokens :]))
    return texts


def make_episode(requests: Sequence[Request], arrival_s: Sequence[float]) -> Episode:
    """The requests, sorted by arrival, as an episode of this engine."""
    pages = np.array([page for request in requests for page in request.pages], np.int64)
    names, dense = np.unique(pages, return_inverse=True)
    rows = np.zeros(len(requests), ROW)
    first = 0
    for i, request in enumerate(requests):
        known = len(request.pages)
        rows["input_tokens"][i], rows["output_tokens"][i] = request.prompt_tokens, request.output_tokens
        rows["prompt_ids"][i] = min(request.prompt_tokens // PAGE_TOKENS, known)
        rows["known_ids"][i], rows["ref_off"][i] = known, first
        first += known
    rows["arrival_s"], rows["measured"] = arrival_s, 1
    refs = dense.astype(np.int32)
    # Kernels are compiled for read-only rows and ids, as the loaders make them.
    rows.flags.writeable = refs.flags.writeable = False
    horizon_s = arrival_s[-1] + 1.0
    return Episode("sequence", 0, rows.view(np.recarray), refs, len(names), PAGE_TOKENS, 0.0, horizon_s)
