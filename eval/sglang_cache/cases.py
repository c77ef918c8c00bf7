"""The cases that are recorded: sequences of requests at so many slots and pages, and how they are kept in a file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hbmgym.eval.sglang_cache.families import LONG, SHORT, Family, draw
from hbmgym.eval.sglang_cache.sequence import Request


@dataclass(frozen=True)
class Case:
    """Requests for a cache of so many slots and pages."""

    name: str
    slots: int
    pages: int
    prefill_budget: int
    """Most prompt tokens of a chunk."""
    requests: tuple[Request, ...]
    arrival_s: tuple[float, ...] = ()
    """Empty: one after the other."""


@dataclass(frozen=True)
class Recorded:
    """A case and what SGLang's cache did with it."""

    case: Case
    order: list[int]
    """Every request twice: where it starts, and where it ends."""
    reused_tokens: list[int]


CHATS = replace(SHORT, sessions=16)
AGENTS = replace(LONG, sessions=3, turns=(8, 12), first_tokens=(2048, 4096), added_tokens=(256, 768))
BRANCHES = replace(SHORT, sessions=24, turns=(1, 2), system_prompts=4, system_pages=10)
ANY = Family(
    sessions=20, turns=(1, 5), first_tokens=(10, 2000), added_tokens=(1, 400), output_tokens=(2, 700), system_prompts=3,
    system_pages=3,
)  # fmt: skip


def family_cases() -> list[Case]:
    """Many short sessions, few long ones, branches and anything, from roomy to tight."""
    return [
        _drawn("chats, all fits", replace(CHATS, on_grid=True), slots=200, pages=2000),
        _drawn("agents, all fits", replace(AGENTS, on_grid=True), slots=200, pages=2000),
        _drawn("short answers, few pages", replace(CHATS, on_grid=True, output_tokens=(2, 60)), slots=20, pages=150),
        _drawn("terse agents, few pages", replace(AGENTS, on_grid=True, output_tokens=(2, 60)), slots=20, pages=300),
        _drawn("chats, few pages", replace(CHATS, on_grid=True), slots=200, pages=300),
        _drawn("chats off the grid", CHATS, slots=200, pages=2000),
        _drawn("chats, few slots", CHATS, slots=12, pages=2000),
        _drawn("chats, few of both", CHATS, slots=16, pages=260),
        _drawn("agents, few pages", AGENTS, slots=40, pages=260),
        _drawn("agents in chunks", AGENTS, slots=12, pages=400, prefill_budget=1024),
        _drawn("branches, all fits", BRANCHES, slots=200, pages=2000),
        _drawn("branches, few slots", BRANCHES, slots=14, pages=600),
        _drawn("anything", ANY, slots=12, pages=200, prefill_budget=1024),
        _drawn("anything, tight", ANY, slots=6, pages=90, prefill_budget=512),
        _overlapping("visitors overlap, all fits", slots=200, every_s=2422.0),
        _overlapping("visitors overlap, few slots", slots=30, every_s=2422.0),
    ]


def _overlapping(name: str, *, slots: int, every_s: float) -> Case:
    """Some requests run at the same time; pages abound, because when a running one takes its pages is not compared."""
    alone = _drawn(name, replace(BRANCHES, sessions=60, turns=(1, 1)), slots=slots, pages=3000)
    return replace(alone, arrival_s=tuple(every_s * i for i in range(len(alone.requests))))


def _drawn(name: str, family: Family, *, slots: int, pages: int, prefill_budget: int = 8192) -> Case:
    return Case(name, slots, pages, prefill_budget, tuple(draw(family, seed=0)))


def read_cases(path: Path) -> list[Recorded]:
    """What `write_cases` has written."""
    return [
        Recorded(
            Case(
                entry["name"],
                entry["slots"],
                entry["pages"],
                entry["prefill_budget"],
                tuple(Request(prompt, output, _ids(runs)) for prompt, output, *runs in entry["requests"]),
                tuple(entry["arrival_s"]),
            ),
            entry["order"] or [row for row in range(len(entry["requests"])) for _ in range(2)],
            entry["reused_tokens"],
        )
        for entry in json.loads(path.read_text())["cases"]
    ]


def as_json(recorded: Recorded) -> dict[str, Any]:
    """Of one case; page ids become runs of consecutive ones, first id and length."""
    case = recorded.case
    return {
        "name": case.name,
        "slots": case.slots,
        "pages": case.pages,
        "prefill_budget": case.prefill_budget,
        "arrival_s": case.arrival_s,
        "order": recorded.order if case.arrival_s else [],
        "requests": [
            [request.prompt_tokens, request.output_tokens, *_runs(request.pages)] for request in case.requests
        ],
        "reused_tokens": recorded.reused_tokens,
    }


def _runs(pages: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for page in pages:
        if runs and sum(runs[-1]) == page:
            runs[-1][1] += 1
        else:
            runs.append([page, 1])
    return runs


def _ids(runs: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(page for first, length in runs for page in range(first, first + length))
