"""Foreign pickles read as data: numbers, text, bytes, dicts, lists, tuples and numeric NumPy arrays, nothing else.

Nothing is imported and nothing of NumPy is called by the file: what a pickle may name stands for a class of this module
that checks what it is given and keeps it, and arrays are made from bytes of the right length only.
"""

from __future__ import annotations

import io
import math
import pickle
import re

import numpy as np

from dnnlib.util import reason


class _StandIn:
    """What a pickle may name: classes that take no state of their own, so that no file can change them."""

    def __setstate__(self, state):
        raise pickle.UnpicklingError("unexpected state")


class _DType(_StandIn):
    """numpy.dtype of plain numbers."""

    def __init__(self, name, align=False, copy=False):
        if not re.fullmatch(r"[<>|=]?[biufc]\d{1,2}", name):
            raise pickle.UnpicklingError(f"refuses arrays of type {name!r}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state):  # (version, byte order, subdtype, names, fields, size, alignment, flags)
        if state[1] not in ("<", ">", "|", "=") or state[2:5] != (None, None, None):
            raise pickle.UnpicklingError("refuses arrays of a structured type")
        self.dtype = self.dtype.newbyteorder(state[1])


def _array(data, dtype, shape, order="C"):
    """ndarray from its bytes; UnpicklingError unless everything is what it should be."""
    data = data.encode("latin1") if isinstance(data, str) else data  # Python 2's bytes
    if not (isinstance(data, (bytes, bytearray)) and isinstance(dtype, _DType) and isinstance(shape, tuple)):
        raise pickle.UnpicklingError("damaged array")
    if not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) * dtype.dtype.itemsize != len(data):
        raise pickle.UnpicklingError(f"{len(data)} bytes for an array of shape {shape}")
    return np.ndarray(shape, dtype.dtype, data, order=order).copy(order="K")


class _Array(_StandIn):
    """numpy.ndarray and its `_reconstruct`; the array comes with the state."""

    value = None

    def __init__(self, *arguments):
        """Nothing is known yet."""

    def __setstate__(self, state):
        _version, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran else "C")


class _FromBuffer(_StandIn):  # arrays of protocol 5
    def __new__(cls, data, dtype, shape, order, axes=None):
        array = _array(data, dtype, shape, "F" if order == "F" else "C")
        return array if axes is None else array.transpose(axes)


class _Scalar(_StandIn):
    def __new__(cls, dtype, data):
        return _array(data, dtype, ())[()]


class _Bytes(_StandIn):  # bytes of protocol 2
    def __new__(cls, text="", encoding="latin1"):
        if encoding != "latin1":
            raise pickle.UnpicklingError("unexpected text encoding")
        return text.encode("latin1")


_NAMES = {"__builtin__.bytes": _Bytes, "_codecs.encode": _Bytes, "numpy.dtype": _DType, "numpy.ndarray": _Array}
_NAMES |= {"collections.OrderedDict": dict, "dnnlib.util.EasyDict": dict}
for _core in ("numpy.core", "numpy._core"):
    _NAMES |= {f"{_core}.multiarray._reconstruct": _Array, f"{_core}.multiarray.scalar": _Scalar}
    _NAMES[f"{_core}.numeric._frombuffer"] = _FromBuffer
_PLAIN = (int, float, complex, str, bytes, bytearray, np.ndarray, np.generic, type(None))


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if f"{module}.{name}" not in _NAMES:
            raise pickle.UnpicklingError(f"refuses to load '{module}.{name}'")
        return _NAMES[f"{module}.{name}"]


def _plain(value):
    """The value with arrays in place of their stand-ins."""
    if isinstance(value, dict):
        return {_plain(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    if isinstance(value, _Array) and value.value is not None:
        return value.value
    if not isinstance(value, _PLAIN):
        raise pickle.UnpicklingError(f"holds a {type(value).__name__.strip('_')}")
    return value


def load(data: bytes) -> object:
    """The content of a pickle; text of Python 2 is read as latin-1. Raises ValueError, in one line, for anything else."""
    try:
        return _plain(_Unpickler(io.BytesIO(data), encoding="latin1").load())
    except Exception as err:  # a broken pickle fails in any way at all
        raise ValueError(reason(err)) from err
