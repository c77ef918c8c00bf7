"""Small cases, each for one rule in which SGLang's cache differs from this engine's.

A case is named as its rule; behind a comma may stand a note.
"""

from hbmgym.eval.sglang_cache.cases import Case
from hbmgym.eval.sglang_cache.sequence import PAGE_TOKENS, Request

ROOMY = 200
SMALL_CHUNK = 1024


def rule_cases() -> list[Case]:
    """In every case the last request, or the last two, reuse something else in SGLang than here."""
    a, b, c, d = (_text(n) for n in range(4))
    return [
        # The tail of `a` is evicted here, all of it there; what stays gets a state from the third request.
        _case("whole_nodes", [_ask(1000, a), _ask(1000, b), _ask(1000, a), _ask(1000, a[:10] + c)], pages=26),
        # The state of `a` is evicted; its pages stay here, so that the next visitor finds where to branch.
        _case(
            "leaves_go_whole",
            [_ask(1000, a), _ask(1000, b), _ask(1000, c), _ask(1000, a[:10] + d), _ask(1000, a[:10])],
            slots=4,
        ),
        # Three pages of output are kept here.
        _case("tail_is_freed", [_ask(1024, a, output=200), _ask(1400, a[:19] + b), _ask(1400, a[:19])]),
        # The second request branches off at page 8.
        _case("one_state_per_chunk", [_ask(1000, a), _ask(1000, a[:8] + b), _ask(1100, a[:8] + b)]),
        _case("chunk_by_chunk", [_ask(1600, a), _ask(1600, a[:20] + b)], prefill_budget=512),
        # The text passes 1024 tokens.
        _case("absolute_grid", [_ask(1000, a, output=100), _ask(1200, a)]),
        _case("last_token_saves", [_ask(1024, a, output=257), _ask(1400, a)]),
        # 900 tokens that nobody repeats, three decode states on the way.
        _case(
            "private_text_ages",
            [_ask(1000, a), Request(512, 900, b[:8]), _ask(1000, c), _ask(1000, a)],
            pages=46,
        ),
        # Both fit to the page.
        _case("spare_page", [_ask(1000, a), _ask(1000, b), _ask(1000, a)], pages=31),
        # While the first request decodes, four others save states.
        _case(
            "states_are_locked",
            [_ask(1030, a, output=240), *(_ask(1000, text) for text in (b, c, d, _text(4))), _ask(1300, a)],
            slots=7,
            arrival_s=(0.0, 2422.0, 4844.0, 7266.0, 9688.0, 1e6),
        ),
        # The state at page 16 is there already when the fourth request saves it.
        _case(
            "slot_before_look",
            [_ask(1000, b), _ask(1024, a), _ask(1024, a), _ask(1024, a), _ask(1000, b)],
            slots=5,
        ),
        # The third request parts from `a` at page 4, which makes the rest of `a` young.
        _case(
            "split_refreshes",
            [_ask(1000, a), _ask(1000, b), _ask(300, a[:4] + c), _ask(1000, d), _ask(1000, b)],
            pages=36,
        ),
        # `a` is still decoding when `b` ends: here it is the younger one then.
        _case(
            "tail_is_freed, overlapping",
            [_ask(1030, a[:16], output=60), _ask(1000, b), _ask(1000, c), _ask(1030, a[:16])],
            pages=45,
            arrival_s=(0.0, 1222.0, 1e6, 2e6),
        ),
    ]


def _text(number: int) -> tuple[int, ...]:
    """Page ids of a text."""
    return tuple(range(100 * number, 100 * number + 100))


def _ask(prompt: int, text: tuple[int, ...], output: int = 2) -> Request:
    return Request(prompt, output, text[: (prompt + output) // PAGE_TOKENS])


def _case(
    name: str,
    requests: list[Request],
    *,
    slots: int = ROOMY,
    pages: int = ROOMY,
    prefill_budget: int = SMALL_CHUNK,
    arrival_s: tuple[float, ...] = (),
) -> Case:
    return Case(name, slots, pages, prefill_budget, tuple(requests), arrival_s)
