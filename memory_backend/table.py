"""Tuples of arrays behind one address, which is all that kernels are handed.

Handing a kernel the arrays themselves copies a hundred words at every call, and costs 3 us per call from Python. A
Table holds the address of each record and the address and shape of each array; a Reference to it knows where each field
lies, and what a field is, is known when the kernel is compiled.
"""

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakValueDictionary
from zlib import crc32

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import typing
from numba.core.extending import lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import intrinsic, lower_builtin, models, register_model
from numba.np.arrayobj import make_array, populate_array

_WORD = ir.IntType(64)
_tables: "WeakValueDictionary[int, Table]" = WeakValueDictionary()


class Table:
    """`address` names `value` to kernels as long as this object lives.

    `value` is a NamedTuple of records, C-contiguous arrays, and such tuples, with the types of `example`, for which its
    reader was made.
    """

    def __init__(self, value: Any, example: Any):
        leaves, expected = list(_leaves_of(value)), list(_leaves_of(example))
        alike = len(leaves) == len(expected) and all(map(_are_alike, leaves, expected))
        assert alike, "kernels would take these arrays for others"
        self._words = np.array([word for leaf in leaves for word in _words_of(leaf)], dtype=np.int64)
        self.address = int(self._words.ctypes.data)
        self.value = value
        _tables[self.address] = self


def _leaves_of(value: Any) -> Iterator[Any]:
    """Its records and arrays, in order."""
    if isinstance(value, tuple):
        for item in value:
            yield from _leaves_of(item)
    else:
        yield value


def _are_alike(leaf: Any, example: Any) -> bool:
    """Whether numba would give both one type; asking it for both types takes a hundred times as long."""
    if leaf.dtype != example.dtype or isinstance(leaf, np.ndarray) != isinstance(example, np.ndarray):
        return False
    if not isinstance(leaf, np.ndarray):
        return True
    flags, expected = leaf.flags, example.flags
    return (
        leaf.ndim == example.ndim
        and flags.c_contiguous
        and flags.writeable == expected.writeable
        and flags.aligned == expected.aligned
    )


def _words_of(leaf: Any) -> Iterator[int]:
    # Not __array_interface__, which describes all fields of a record to say where it is.
    if isinstance(leaf, np.ndarray):
        yield leaf.ctypes.data
        yield from leaf.shape
    else:
        yield np.frombuffer(leaf, np.uint8).ctypes.data


def equal_records(dtype: np.dtype, count: int, /, **values: float) -> np.recarray:
    """`count` records with these values, and 0 in all other fields; at least one, so that there is an address."""
    record = np.zeros(1, _of_records(dtype))
    for name, value in values.items():
        record[name] = value
    return np.repeat(record, max(count, 1)).view(np.recarray)


@functools.cache
def _of_records(dtype: np.dtype) -> np.dtype:
    """The dtype of a recarray, one object each time: equal ones take long to compare."""
    return np.dtype((np.record, dtype))


def table_reader(example: Any) -> Callable[[int], Any]:
    """A function for kernels that finds the value behind a table's address; its types are those of `example`."""
    if numba.config.DISABLE_JIT:
        return lambda address: _tables[address].value
    reference = Reference(numba.typeof(example))

    @intrinsic
    def value_at(typing_context, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], _WORD.as_pointer())

        return reference(types.intp), generate

    return value_at


class Reference(types.Type):  # type: ignore[misc]
    """A NamedTuple that lies in a table; its fields are read when they are used."""

    def __init__(self, target: types.NamedTuple):
        self.target = target
        # A short name: it is a part of the name of every function that takes one.
        super().__init__(f"{target.instance_class.__name__}_{crc32(target.name.encode()):x}")


def _word_count(kind: Any) -> int:
    if isinstance(kind, types.NamedTuple):
        return sum(map(_word_count, kind.types))
    return 1 if isinstance(kind, types.Record) else 1 + kind.ndim


class Column(types.Array):  # type: ignore[misc]
    """An array of a table, whose indices are never negative: counting from the end costs a sixth of all time."""

    @classmethod
    def of(cls, array: types.Array) -> "Column":
        """The column that `array` becomes in a table."""
        return cls(array.dtype, array.ndim, array.layout, readonly=not array.mutable, aligned=array.aligned)


@register_model(Reference)
class _ReferenceModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _WORD.as_pointer())


@infer_getattr
class _ReferenceFields(AttributeTemplate):  # type: ignore[misc]
    key = Reference

    def generic_resolve(self, reference, field):
        kind = reference.target.types[reference.target.fields.index(field)]
        if isinstance(kind, types.NamedTuple):
            return Reference(kind)
        return Column.of(kind) if isinstance(kind, types.Array) else kind


@lower_getattr_generic(Reference)
def _read_field(context, builder, reference, table, field):
    target = reference.target
    index = target.fields.index(field)
    kind = target.types[index]
    begin = sum(map(_word_count, target.types[:index]))
    if isinstance(kind, types.NamedTuple):
        return _word_at(builder, table, begin)
    address = _load(builder, table, begin)
    if isinstance(kind, types.Record):
        return builder.inttoptr(address, context.get_value_type(kind))
    shape = [_load(builder, table, begin + 1 + axis) for axis in range(kind.ndim)]
    itemsize = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
    strides = [itemsize]
    for length in reversed(shape[1:]):
        strides.insert(0, builder.mul(strides[0], length))
    array = make_array(Column.of(kind))(context, builder)
    data = builder.inttoptr(address, array.data.type)
    populate_array(array, data=data, shape=shape, strides=strides, itemsize=itemsize, meminfo=None)
    return array._getvalue()


def _word_at(builder, table, index):
    return builder.gep(table, [ir.Constant(_WORD, index)])


def _load(builder, table, index):
    word = builder.load(_word_at(builder, table, index))
    # A table never changes, so what was read once need not be read again after a store.
    word.set_metadata("invariant.load", builder.module.add_metadata([]))
    return word


register_model(Column)(models.ArrayModel)


@lower_builtin(operator.getitem, Column, types.Integer)
def _get_item(context, builder, signature, arguments):
    return _index_unsigned(operator.getitem, context, builder, signature, arguments)


@lower_builtin(operator.setitem, Column, types.Integer, types.Any)
def _set_item(context, builder, signature, arguments):
    return _index_unsigned(operator.setitem, context, builder, signature, arguments)


def _index_unsigned(operation, context, builder, signature, arguments):
    """As with any array, except that numba does not see that the index could be negative."""
    column, index, *values = signature.args
    array = types.Array(column.dtype, column.ndim, column.layout, readonly=not column.mutable, aligned=column.aligned)
    unsigned = typing.signature(signature.return_type, array, types.uintp, *values)
    place = context.cast(builder, arguments[1], index, types.intp)
    return context.get_function(operation, unsigned)(builder, (arguments[0], place, *arguments[2:]))
