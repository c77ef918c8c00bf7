"""Dense page ids and shared stretches, against an oracle that expands every row on its own."""

import numpy as np
import pytest

from hbmgym.envs.traces.coding import encode, no_ids
from hbmgym.envs.traces.pages import Selection, assemble, output_id_fraction
from hbmgym.envs.traces.trace import Trace, TraceError
from hbmgym.envs.traces.validate import build_trace


def make_trace(ids, tokens, block_size, parent=None, arrival_s=None, output=None) -> Trace:
    rows = len(tokens)
    columns = {
        "arrival_s": np.arange(rows, dtype=float) if arrival_s is None else arrival_s,
        "input_tokens": np.array(tokens),
        "output_tokens": np.full(rows, 3) if output is None else np.array(output),
        "session_id": np.zeros(rows, int),
        "turn": np.zeros(rows, int),
        "parent": np.full(rows, -1) if parent is None else np.array(parent),
        "gap_s": np.full(rows, np.nan),
        "service_s": np.full(rows, np.nan),
        "kind": np.zeros(rows, np.uint8),
        **(encode(ids) if block_size else no_ids(rows)),
    }
    return build_trace(
        columns, name="made", kind="open-loop", block_size=block_size, path="made", where=lambda row: f"made:{row}"
    )


def select(trace: Trace, rows, copy=None) -> Selection:
    rows = np.array(rows, np.int64)
    copy = np.zeros_like(rows) if copy is None else np.array(copy)
    return Selection(rows, copy, np.arange(len(rows), dtype=float))


def episode_of(trace, selection, page_tokens, max_refs=10**6):
    settings = {"warmup_s": 0.0, "horizon_s": 1e6, "max_refs": max_refs, "loop": "open"}
    return assemble(trace, selection, seed=0, page_tokens=page_tokens, **settings)


def random_trace(rng: np.random.Generator, block_size: int) -> Trace:
    ids, tokens, parents, outputs, fresh = [], [], [], [], 0
    with_parents = rng.random() < 0.7
    for row in range(int(rng.integers(2, 40))):
        parent = int(rng.integers(row)) if row and rng.random() < 0.8 else -1
        stem = list(ids[parent]) if parent >= 0 else []
        keep = len(stem) if rng.random() < 0.7 else int(rng.integers(len(stem) + 1))
        grown = int(rng.integers(0, 6))
        fresh += grown
        blocks = stem[:keep] + list(range(fresh - grown, fresh))
        if not blocks:
            length = int(rng.integers(1, block_size)) if block_size > 1 else 1
            blocks = [] if block_size > 1 else [fresh + 10**6]
        elif rng.random() < 0.5:
            length = len(blocks) * block_size + int(rng.integers(0, block_size))
        else:
            length = len(blocks) * block_size - int(rng.integers(0, block_size))
        ids.append(blocks)
        tokens.append(length)
        parents.append(parent if with_parents else -1)
        outputs.append(int(rng.integers(1, 4 * block_size)))
    return make_trace(ids, tokens, block_size, parents, output=outputs)


def naive_blocks(trace, row):
    if row < 0:
        return []
    own = []
    for run in range(trace.r_off[row], trace.r_off[row + 1]):
        own += range(trace.r_start[run], trace.r_start[run] + trace.r_len[run])
    return naive_blocks(trace, int(trace.h_ref[row]))[: trace.h_lcp[row]] + own


def pages(blocks, block_size, page_tokens):
    """A page is known by the last token that it shares with a block."""
    tokens = [(block, token) for block in blocks for token in range(block_size)]
    return tokens[page_tokens - 1 :: page_tokens]


def oracle(trace, selection, page_tokens):
    """(Pages of the prompt that the trace has ids for, all full pages) of every row as tuples, straight from the
    rules."""
    rows = list(zip(selection.source.tolist(), selection.copy.tolist(), strict=True))
    covered = [pages(naive_blocks(trace, row), trace.block_size, page_tokens) for row, _ in rows]
    prompt = [
        [(copy, *page) for page in covered[e][: int(trace.input_tokens[row]) // page_tokens]]
        for e, (row, copy) in enumerate(rows)
    ]
    result = []
    for e, (row, copy) in enumerate(rows):
        total = int(trace.input_tokens[row] + trace.output_tokens[row])
        known = prompt[e] + [("own", e, page) for page in range(len(prompt[e]), total // page_tokens)]
        for c in range(e + 1, len(rows)):
            child, child_copy = rows[c]
            with_parents = (trace.parent >= 0).any()
            if child_copy != copy or trace.h_ref[child] != row or (with_parents and trace.parent[child] != row):
                continue
            shared = 0
            while shared < min(len(prompt[e]), len(prompt[c])) and prompt[e][shared] == prompt[c][shared]:
                shared += 1
            long_enough = trace.input_tokens[child] >= total and len(prompt[c]) >= total // page_tokens
            if shared >= int(trace.input_tokens[row]) // page_tokens and long_enough:
                known = prompt[c][: total // page_tokens]
            break
        result.append((prompt[e], known))
    return result


def check(trace, selection, page_tokens):
    episode = episode_of(trace, selection, page_tokens)
    names: dict[tuple, int] = {}
    for row, (prompt, known) in zip(episode.rows, oracle(trace, selection, page_tokens), strict=True):
        ids = [names.setdefault(page, len(names)) for page in known]
        assert (row["prompt_ids"], row["known_ids"]) == (len(prompt), len(known))
        assert episode.refs[row["ref_off"] : row["ref_off"] + row["known_ids"]].tolist() == ids
    assert episode.id_count == len(names)


@pytest.mark.parametrize(("block_size", "page_tokens"), [(4, 4), (8, 2), (2, 6), (1, 1), (4, 6), (6, 4), (8, 3)])
def test_random_traces_agree_with_the_oracle(block_size, page_tokens):
    rng = np.random.default_rng([block_size, page_tokens])
    for _ in range(60):
        trace = random_trace(rng, block_size)
        check(trace, select(trace, range(len(trace))), page_tokens)
        some = np.flatnonzero(rng.random(len(trace)) < 0.6)
        if len(some):
            check(trace, select(trace, some), page_tokens)
            copy = rng.permutation(np.repeat([0, 1], len(some)))
            again = np.zeros(2 * len(some), np.int64)
            again[copy == 0] = again[copy == 1] = some
            check(trace, select(trace, again, copy), page_tokens)


def test_chain_of_turns_shares_one_stretch():
    ids = [list(range(n)) for n in range(2, 30)]
    trace = make_trace(ids, [4 * len(row) for row in ids], 4, parent=[*range(-1, 27)])
    episode = episode_of(trace, select(trace, range(28)), 4)
    assert len(episode.refs) == len(ids[-1])
    assert (episode.rows["ref_off"] == 0).all()


def test_output_takes_the_first_childs_ids_only_when_the_child_repeats_it():
    ids = [[0], [0, 1, 2], [0, 3, 4]]
    trace = make_trace(ids, [4, 12, 12], 4, parent=[-1, 0, 0], output=[5, 1, 1])
    episode = episode_of(trace, select(trace, range(3)), 4)
    assert episode.rows["known_ids"].tolist() == [2, 3, 3]
    assert episode.refs[episode.rows["ref_off"][0] + 1] == episode.refs[episode.rows["ref_off"][1] + 1]
    assert output_id_fraction(episode) == 1.0
    unrelated = episode_of(trace, select(trace, [0, 2]), 4)
    assert unrelated.rows["known_ids"].tolist() == [2, 3]
    assert unrelated.id_count == 4 and output_id_fraction(unrelated) == 0.0


def test_rows_of_a_trace_without_ids_have_pages_that_no_other_has():
    trace = make_trace([[], []], [100, 200], 0, output=[30, 1])
    episode = episode_of(trace, select(trace, [0, 1]), 64)
    assert (episode.refs.tolist(), episode.id_count) == ([0, 1, 2, 3, 4], 5)
    assert (episode.rows["prompt_ids"].tolist(), episode.rows["known_ids"].tolist()) == ([0, 0], [2, 3])


def test_a_page_that_ends_within_a_block_is_shared_only_with_the_whole_block():
    """vLLM's pages of 1056 tokens over blocks of 64: the first one ends in the middle of the 17th."""
    ids = [list(range(33)), [*range(16), *range(40, 57)], [*range(17), *range(60, 76)]]
    trace = make_trace(ids, [33 * 64] * 3, 64)
    rows = episode_of(trace, select(trace, range(3)), 1056)
    first = [int(rows.refs[row["ref_off"]]) for row in rows.rows]
    assert first[0] == first[2] != first[1]
    assert rows.rows["known_ids"].tolist() == [2, 2, 2] and rows.id_count == 5


def test_a_page_without_tokens_is_refused():
    trace = make_trace([[0]], [6], 6)
    with pytest.raises(TraceError, match="page_tokens is 0, expected an integer >= 1"):
        episode_of(trace, select(trace, [0]), 0)


def test_episode_above_the_limit_is_refused_with_the_remedy():
    trace = make_trace([[0, 1, 2]], [6], 2, output=[1])
    with pytest.raises(TraceError, match=r"holds 3 page ids, expected at most 2 \(shorter part"):
        episode_of(trace, select(trace, [0]), 2, max_refs=2)


def test_empty_selection_is_refused():
    trace = make_trace([[0]], [2], 2)
    with pytest.raises(TraceError, match="0 rows"):
        episode_of(trace, select(trace, []), 2)


def test_episode_is_read_only():
    trace = make_trace([[0]], [2], 2)
    episode = episode_of(trace, select(trace, [0]), 2)
    with pytest.raises(ValueError, match="read-only"):
        episode.rows["measured"][0] = 0
    with pytest.raises(ValueError, match="read-only"):
        episode.refs[0] = 0
