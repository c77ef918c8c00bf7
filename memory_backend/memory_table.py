"""The arrays of a Memory behind one integer, so that a call from Python costs a fraction of a microsecond.

Handing a kernel the arrays themselves costs numba 3 us per call; here it finds them by their addresses in a table.
"""

from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array

from hbmgym.memory_backend.oplog import NOTHING
from hbmgym.memory_backend.prefix_cache import Memory, make_memory
from hbmgym.memory_backend.split import Layout

_WORD = ir.IntType(64)
_EXAMPLE = make_memory(Layout(2, 1, 1, 1, 1, 1), 1, 1, 1, NOTHING, 1, False)
_open: dict[int, Memory] = {}


class MemoryTable:
    """`address` names `memory` to kernels as long as this object lives and is not closed."""

    def __init__(self, memory: Memory):
        self._words = np.array(list(_words_of(memory)), dtype=np.int64)
        self.address = int(self._words.ctypes.data)
        self._memory = memory
        if numba.config.DISABLE_JIT:
            _open[self.address] = memory

    def close(self) -> None:
        """Forget the memory; kernels must not be given the address again."""
        _open.pop(self.address, None)


def _words_of(value: Any) -> Iterator[int]:
    """Addresses and lengths of the records and arrays of nested tuples, in the order in which `_build` reads them."""
    if isinstance(value, tuple):
        for item in value:
            yield from _words_of(item)
        return
    address, _ = value.__array_interface__["data"]
    yield address
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous
        yield from value.shape


def _build(context: Any, builder: Any, words: Iterator[Any], kind: Any) -> Any:
    """Code for a value of numba's type `kind` whose addresses and lengths are the next `words`."""
    if isinstance(kind, types.NamedTuple):
        return context.make_tuple(builder, kind, [_build(context, builder, words, item) for item in kind.types])
    address = next(words)
    if isinstance(kind, types.Record):
        return builder.inttoptr(address, context.get_value_type(kind))
    shape = [next(words) for _ in range(kind.ndim)]
    itemsize = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
    strides = [itemsize]
    for length in reversed(shape[1:]):
        strides.insert(0, builder.mul(strides[0], length))
    array = make_array(kind)(context, builder)
    data = builder.inttoptr(address, array.data.type)
    populate_array(array, data=data, shape=shape, strides=strides, itemsize=itemsize, meminfo=None)
    return array._getvalue()


def _load_words(builder: Any, table: Any) -> Iterator[Any]:
    index = 0
    while True:
        yield builder.load(builder.gep(table, [ir.Constant(_WORD, index)]))
        index += 1


def _memory_at(address: int) -> Memory:
    """The Memory whose table lies at `address`; as compiled code it only reads the table."""
    return _open[address]


@intrinsic
def _compiled_memory_at(typing_context, address):
    def generate(context, builder, signature, arguments):
        words = _load_words(builder, builder.inttoptr(arguments[0], _WORD.as_pointer()))
        return _build(context, builder, words, signature.return_type)

    return numba.typeof(_EXAMPLE)(types.intp), generate


memory_at = _memory_at if numba.config.DISABLE_JIT else _compiled_memory_at
