"""Families of sessions, from a handful of ranges."""

import random
from dataclasses import dataclass

from hbmgym.eval.sglang_cache.sequence import PAGE_TOKENS, Request

Range = tuple[int, int]
"""Least and most, drawn evenly."""


@dataclass(frozen=True)
class Family:
    """Sessions whose turns follow each other in random order: the next turn is of any session that goes on."""

    sessions: int
    turns: Range
    first_tokens: Range
    """Of the first prompt, behind the system prompt."""
    added_tokens: Range
    """Of a later turn, behind what was said before."""
    output_tokens: Range
    system_prompts: int = 0
    """Sessions share so many system prompts."""
    system_pages: int = 0
    on_grid: bool = False
    """Prompts are padded to end within the first page behind a multiple of 256 tokens."""


SHORT = Family(sessions=200, turns=(4, 8), first_tokens=(256, 1024), added_tokens=(64, 256), output_tokens=(64, 256))
"""Chats."""
LONG = Family(
    sessions=24, turns=(10, 20), first_tokens=(16384, 24576), added_tokens=(512, 1536), output_tokens=(128, 512)
)
"""Agents: the first prompt brings instructions and tools, every later one the result of a tool."""
GRID_TOKENS = 256


def draw(family: Family, seed: int) -> list[Request]:
    """The requests of every turn. A turn repeats all that was said before; nobody repeats a last turn's output."""
    rng = random.Random(seed)
    ids = _Ids()
    systems = [ids.take(family.system_pages) for _ in range(family.system_prompts)]
    sessions = [
        _Session(systems[i % len(systems)] if systems else (), rng.randint(*family.turns))
        for i in range(family.sessions)
    ]
    requests = []
    while sessions:
        session = rng.choice(sessions)
        requests.append(_next_turn(session, family, rng, ids))
        if session.turns_left == 0:
            sessions.remove(session)
    return requests


class _Ids:
    def __init__(self) -> None:
        self._next = 0

    def take(self, pages: int) -> tuple[int, ...]:
        """So many new page ids."""
        self._next += pages
        return tuple(range(self._next - pages, self._next))


class _Session:
    """What has been said so far: full pages, and tokens altogether."""

    def __init__(self, pages: tuple[int, ...], turns: int) -> None:
        self.pages, self.tokens, self.turns_left = pages, 0, turns


def _next_turn(session: _Session, family: Family, rng: random.Random, ids: _Ids) -> Request:
    if session.tokens == 0:
        prompt = len(session.pages) * PAGE_TOKENS + rng.randint(*family.first_tokens)
    else:
        prompt = session.tokens + rng.randint(*family.added_tokens)
    if family.on_grid:
        prompt = -(-prompt // GRID_TOKENS) * GRID_TOKENS + rng.randrange(PAGE_TOKENS)
    session.turns_left -= 1
    session.tokens = prompt + rng.randint(*family.output_tokens)
    known = prompt if session.turns_left == 0 else session.tokens
    session.pages += ids.take(known // PAGE_TOKENS - len(session.pages))
    return Request(prompt, session.tokens - prompt, session.pages)
