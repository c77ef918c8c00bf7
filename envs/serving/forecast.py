"""Past-Future admission: the queue's head gets in only while the peak of what will be live fits.

Source: Gong et al., Past-Future Scheduler (arXiv 2507.10150, section 4), and LightLLM's own queue, whose window it has.
How long an answer will be is expected from those of the last HISTORY requests that have finished: the mean of the ones
longer than what has been generated. LightLLM draws several samples and takes the worst peak; their mean needs no
chance, and what many requests hold together comes close to it. Nobody is told how long an answer that is not finished
will be. Until ENOUGH have finished there is nothing to expect from, and a request counts with its limit (max_tokens),
for which a trace has the output's length alone. One that has outlived all is expected to be half through.

As requests leave nothing grows faster, so the peak lies where one of them ends. Prefill is taken to be done at once.
Pages that several hold are counted once, and as held to the end.
"""

import numpy as np

from hbmgym.envs.serving.shortage import lacking_pool
from hbmgym.envs.serving.state import DECODE_EVENTS, DECODING, HISTORY, PREFILL, RECENT, SORTED
from hbmgym.memory_backend.jit import subkernel
from hbmgym.memory_backend.pools import NONE

ENOUGH = 10
STEPS, TOKENS, PAGES, OWN_PAGES = range(4)


@subkernel
def note_length(state, tokens):
    """Remember how long an answer was that has just finished; of more than HISTORY the oldest is forgotten."""
    lengths = state.lengths
    known = min(state.engine.lengths_seen, HISTORY)
    place = state.engine.lengths_seen % HISTORY
    if known == HISTORY:
        known -= 1
        _forget_length(lengths, lengths[RECENT, place])
    lengths[RECENT, place] = tokens
    while known > 0 and lengths[SORTED, known - 1] > tokens:
        lengths[SORTED, known] = lengths[SORTED, known - 1]
        known -= 1
    lengths[SORTED, known] = tokens
    state.engine.lengths_seen += 1


@subkernel
def _forget_length(lengths, tokens):
    place = 0
    while lengths[SORTED, place] != tokens:
        place += 1
    for i in range(place, HISTORY - 1):
        lengths[SORTED, i] = lengths[SORTED, i + 1]


@subkernel
def expected_length(state, row, generated):
    """Tokens that an answer will have in all, of which so many are there."""
    known = min(state.engine.lengths_seen, HISTORY)
    if known < ENOUGH:
        return np.int64(state.rows[row].output_tokens)
    total, longer = np.int64(0), np.int64(0)
    while longer < known and state.lengths[SORTED, known - 1 - longer] > generated:
        total += state.lengths[SORTED, known - 1 - longer]
        longer += 1
    return -(-total // longer) if longer > 0 else 2 * np.int64(generated)


@subkernel
def peak_fits(state, row, reuse, needed):
    """Will there be room at every end of a request, if the queue's head `row` gets in now: it reuses `reuse` pages and
    needs `needed` more to be live? Beside an engine that runs nobody there is nothing to wait for."""
    if state.engine.prefilling + state.engine.decoding == 0:
        return True
    count = _foresee_running(state, row, reuse)
    _foresee(state, count, row, needed)
    count += 1
    for i in range(count):
        slots, pages = _change_until(state, count, state.forecast[i, STEPS], needed)
        if lacking_pool(state, slots, pages, pages) != NONE:
            return False
    return True


@subkernel
def _foresee_running(state, head, reuse):
    count = 0
    row = state.ends[PREFILL, 0]
    while row != NONE:
        _foresee(state, count, row, _own_pages(state, row, head, reuse))
        count += 1
        row = state.requests[row].next
    for i in range(state.heap_sizes[DECODE_EVENTS]):
        row = state.heaps[DECODE_EVENTS, i]
        _foresee(state, count, row, _own_pages(state, row, head, reuse))
        count += 1
    return count


@subkernel
def _foresee(state, place, row, own_pages):
    """Note the decode steps that a request is expected to have left, what it holds, and what goes when it ends."""
    request = state.requests[row]
    decodes = request.status == DECODING
    decoded = state.engine.iterations - request.joined_at if decodes else np.int64(0)
    generated = request.generated + decoded
    left = expected_length(state, row, generated) - generated
    # Prefill has the first token of the rest.
    state.forecast[place, STEPS] = left if decodes else left - 1
    state.forecast[place, TOKENS] = request.goal + decoded
    state.forecast[place, PAGES] = request.pages if decodes else -(-request.goal // state.engine.page_tokens)
    state.forecast[place, OWN_PAGES] = own_pages


@subkernel
def _own_pages(state, row, head, reuse):
    """Pages of a running request that nobody else holds and the head does not reuse: a leading part is held by others,
    since whoever holds a page holds all before it."""
    request = state.requests[row]
    first, heads = state.rows[row].ref_off, state.rows[head].ref_off
    low, high = 0, request.published
    while low < high:
        middle = (low + high) // 2
        page_id = state.refs[first + middle]
        is_heads = middle < reuse and state.refs[heads + middle] == page_id
        if is_heads or state.memory.kv.entries[state.memory.ids[page_id].page].pins > 1:
            low = middle + 1
        else:
            high = middle
    return request.pages - low


@subkernel
def _change_until(state, count, step, needed):
    """(Slots, pages) that will be live beyond today's after so many decode steps, those that end there included."""
    slots, pages = state.engine.slots_per_request, needed
    for i in range(count):
        if state.forecast[i, STEPS] < step:
            slots -= state.engine.slots_per_request
            pages -= state.forecast[i, OWN_PAGES]
        else:
            grown = -(-(state.forecast[i, TOKENS] + step) // state.engine.page_tokens)
            pages += max(grown - state.forecast[i, PAGES], 0)
    return slots, pages
