"""`lowest_bit(word)`: the place of the lowest bit that is set, in one instruction; a table would take five in a row."""

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def _count_trailing_zeros(typing_context, word):
    def generate(context, builder, signature, arguments):
        zero_is_undefined = ir.Constant(ir.IntType(1), 1)
        return builder.cttz(arguments[0], zero_is_undefined)

    return types.int64(types.int64), generate


def _lowest_bit(word: int) -> int:
    return (int(word) & -int(word)).bit_length() - 1


lowest_bit = _lowest_bit if numba.config.DISABLE_JIT else _count_trailing_zeros
