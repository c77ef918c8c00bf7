"""Preemption by copying out (preemption=offload): a preempted request's KV and state wait in host memory.

Source: SGLang's retraction (PR 22493): the KV of all tokens of the request and its recurrent state are copied to the
host while the engine waits, and back when the request returns. So both copies stall the next iteration (`debt_s`), by
bytes over the GPU's PCIe rate. FastSwitch (arXiv 2411.18424) is about hiding them; that is not modelled.

On the return pages that are still resident are not copied. Only the token that was sampled last is prefilled then.
Where host memory is full, the request recomputes.
"""

from hbmgym.memory_backend.jit import subkernel


@subkernel
def copy_out(state, row, tokens):
    """Before a request that holds `tokens` tokens is preempted: copy them to the host, if that has room."""
    engine = state.engine
    size = _host_bytes(state, tokens)
    if tokens == 0 or engine.host_bytes + size > engine.host_limit:
        return
    state.requests[row].offloaded = tokens
    engine.host_bytes += size
    engine.offloads += 1
    engine.offloaded_bytes += size
    engine.debt_s += size * state.cost.host_copy_s_per_byte


@subkernel
def copy_back(state, row, resident):
    """Bring back the state, and the pages behind the `resident` first ones; their tokens are computed."""
    engine = state.engine
    request = state.requests[row]
    request.computed = request.offloaded
    size = _host_bytes(state, request.offloaded) - resident * state.memory.kv.meta.block_bytes
    engine.restored_bytes += size
    engine.debt_s += size * state.cost.host_copy_s_per_byte
    drop_copy(state, row)


@subkernel
def drop_copy(state, row):
    """Free what host memory holds of a request."""
    request = state.requests[row]
    if request.offloaded > 0:
        state.engine.host_bytes -= _host_bytes(state, request.offloaded)
        request.offloaded = 0


@subkernel
def _host_bytes(state, tokens):
    """Of the pages that `tokens` tokens fill or begin, and one state."""
    pages = -(-tokens // state.engine.page_tokens)
    return pages * state.memory.kv.meta.block_bytes + state.memory.ssm.meta.block_bytes
