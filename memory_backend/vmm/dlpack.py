"""Bytes at an address as an object that array libraries take without a copy: the DLPack protocol, made by hand.

The capsule says itself on which device the bytes lie, so nobody has to ask the driver about the pointer: a range of
virtual memory may have nothing mapped at its start. Layout: dlpack.h, version 0, the unversioned capsule.
"""

import ctypes
from typing import Any

CPU, CUDA = 1, 2
_UNSIGNED, _BITS, _LANES = 1, 8, 1
_NAME = b"dltensor"
_Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Tensor(ctypes.Structure):
    """DLManagedTensor with its DLTensor spelled out."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("dimensions", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("type_bits", ctypes.c_uint8),
        ("type_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", _Callback),
    )


class ByteView:
    """uint8[length] at `address` of a device; `owner` lives as long as whatever was made from this view."""

    def __init__(self, address: int, length: int, device: tuple[int, int], owner: object):
        self._address, self._length, self._device, self._owner = address, length, device, owner

    def __len__(self) -> int:
        return self._length

    def __dlpack_device__(self) -> tuple[int, int]:
        """(device type, device id)."""
        return self._device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule. `stream` has nothing to wait for: whoever gives views out has ended its own work on the bytes.

        Consumers of any `max_version` take the unversioned capsule. Raises BufferError for another device or a copy.
        """
        if dl_device not in (None, self._device):
            raise BufferError(f"the bytes lie on device {self._device}, they cannot be exported to {dl_device}")
        if copy:
            raise BufferError("the bytes are exported as they lie, without a copy: copy them afterwards")
        return _make_capsule(self._address, self._length, self._device, self._owner)


_exported: dict[int, tuple[_Tensor, object]] = {}
"""What consumers hold, by address of the struct: the struct itself and the owner of the bytes."""


def _make_capsule(address: int, length: int, device: tuple[int, int], owner: object) -> Any:
    shape, strides = (ctypes.c_int64 * 1)(length), (ctypes.c_int64 * 1)(1)
    tensor = _Tensor(address, *device, 1, _UNSIGNED, _BITS, _LANES, shape, strides, 0, None, _DELETER)
    key = ctypes.addressof(tensor)
    _exported[key] = tensor, owner
    return _new_capsule(key, _NAME, _DESTRUCTOR)


def _forget(tensor: int) -> None:
    """The deleter: the consumer is done."""
    _exported.pop(tensor, None)


def _destroy_capsule(capsule: int) -> None:
    """A consumer renames the capsule it takes; one that has kept its name was never used."""
    if _is_valid(capsule, _NAME):
        _forget(_pointer(capsule, _NAME))


_DELETER, _DESTRUCTOR = _Callback(_forget), _Callback(_destroy_capsule)

# In a destructor the capsule is no object any more, only an address: as an object it would be destroyed again.
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
