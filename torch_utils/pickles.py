"""Foreign pickles read as data: numbers, text, bytes, dicts, lists, tuples and numeric NumPy arrays, nothing else.

A pickle is a program; here is the machine that runs it. It knows the instructions that plain data need and no others.
Nothing is imported and nothing of NumPy is called by the file: what a pickle may name stands for a class of this module
that checks what it is given and keeps it, and arrays are made from bytes of the right length only.
"""

from __future__ import annotations

import math
import pickletools
import re
from typing import Any, BinaryIO

import numpy as np

from dnnlib.util import reason

MOST_DEPTH = 32
MOST_INTEGER = 2**64
MOST_WAITING = 2**16  # values that are not yet part of another


class StandIn:
    """What a pickle may name: classes that take no state of their own, so that no file can change them."""

    def set_state(self, state: object) -> None:
        raise ValueError("unexpected state")


class _DType(StandIn):
    """numpy.dtype of plain numbers."""

    def __init__(self, name, align=False, copy=False):
        if not re.fullmatch(r"[<>|=]?[biufc]\d{1,2}", name):
            raise ValueError(f"refuses arrays of type {name!r:.40}")
        self.dtype = np.dtype(name)

    def set_state(self, state):  # (version, byte order, subdtype, names, fields, size, alignment, flags)
        if state[1] not in ("<", ">", "|", "=") or state[2:5] != (None, None, None):
            raise ValueError("refuses arrays of a structured type")
        self.dtype = self.dtype.newbyteorder(state[1])


def _array(data, dtype, shape, order="C"):
    """ndarray from its bytes; ValueError unless everything is what it should be."""
    data = data.encode("latin1") if isinstance(data, str) else data  # Python 2's bytes
    if not (isinstance(data, (bytes, bytearray)) and isinstance(dtype, _DType) and isinstance(shape, tuple)):
        raise ValueError("damaged array")
    if len(shape) > MOST_DEPTH or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("damaged shape of an array")
    if math.prod(shape) * dtype.dtype.itemsize != len(data):
        raise ValueError(f"{len(data)} bytes for an array of shape {shape}")
    return np.ndarray(shape, dtype.dtype, data, order=order).copy(order="K")


class _Array(StandIn):
    """numpy.ndarray and its `_reconstruct`; the array comes with the state."""

    value = None

    def __init__(self, *arguments):
        """Nothing is known yet."""

    def set_state(self, state):
        _version, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran else "C")


class _FromBuffer(StandIn):  # arrays of protocol 5
    def __new__(cls, data, dtype, shape, order, axes=None):
        array = _array(data, dtype, shape, "F" if order == "F" else "C")
        return array if axes is None else array.transpose(axes)


class _Scalar(StandIn):
    def __new__(cls, dtype, data):
        return _array(data, dtype, ())[()]


class _Bytes(StandIn):  # bytes of protocol 2
    def __new__(cls, text="", encoding="latin1"):
        if encoding != "latin1":
            raise ValueError("unexpected text encoding")
        return text.encode("latin1")


class _Dict(StandIn):
    def __new__(cls):
        return {}


_NAMES = {"__builtin__.bytes": _Bytes, "_codecs.encode": _Bytes, "numpy.dtype": _DType, "numpy.ndarray": _Array}
_NAMES |= {"collections.OrderedDict": _Dict, "dnnlib.util.EasyDict": _Dict}
for _core in ("numpy.core", "numpy._core"):
    _NAMES |= {f"{_core}.multiarray._reconstruct": _Array, f"{_core}.multiarray.scalar": _Scalar}
    _NAMES[f"{_core}.numeric._frombuffer"] = _FromBuffer
_PLAIN = (bool, int, float, complex, str, bytes, bytearray, np.ndarray, np.generic, type(None))

# Instructions by what they do; pickletools has read the value that comes with one.
_VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_VALUES |= {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_VALUES |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Tuple(tuple):
    """Knows how deep it is: a million instructions can put a tuple around a tuple."""

    def __init__(self, parts):
        self.depth = 1 + max((part.depth for part in parts if isinstance(part, _Tuple)), default=0)
        if self.depth > MOST_DEPTH:
            raise ValueError("nested too deeply")


class Machine:
    """Runs one pickle, up to its end. Subclasses add what it may name, and instructions as methods of their names."""

    names = _NAMES  # {"module.name": class}
    most_integer = MOST_INTEGER

    def __init__(self, data: bytes | BinaryIO, size: int | None = None):
        self.data, self.stack, self.marks, self.memo = data, [], [], {}
        self.room = 4 * (len(data) if size is None else size) + 2**16  # bytes of arrays and strings that may be made

    def run(self) -> object:
        """What the pickle holds, with stand-ins in place of objects; `plain` makes data of it."""
        push = self.stack.append
        for count, (instruction, value, _) in enumerate(pickletools.genops(self.data)):
            name = instruction.name
            if name in _VALUES:
                if type(value) is int and abs(value) >= self.most_integer:
                    raise ValueError("an integer of more than 64 bits")
                push(value)
            elif name in _CONSTANTS:
                push(_CONSTANTS[name])
            elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
                self.memo[len(self.memo) if value is None else value] = self.stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                push(self.memo[value])
            elif name == "MARK":
                self.marks.append(len(self.stack))
            elif name in _TUPLES:
                push(_Tuple(self.take(_TUPLES[name])))
            elif name == "STOP":
                self.count = count
                return self.stack[-1]
            elif hasattr(self, name):
                getattr(self, name)(value)
            elif name not in ("PROTO", "FRAME"):
                raise ValueError(f"refuses the instruction {name}")
            if len(self.stack) > MOST_WAITING:
                raise ValueError("nested too deeply")

    def take(self, count: int | None = None) -> list:
        """The last entries of the stack, or those since the last mark."""
        start = self.marks.pop() if count is None else len(self.stack) - count
        if start < 0:
            raise ValueError("nothing there")
        part = self.stack[start:]
        del self.stack[start:]
        return part

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"not a {kind.__name__.strip('_')}")
        return self.stack[-1]

    def TUPLE(self, _: object) -> None:
        self.stack.append(_Tuple(self.take()))

    def LIST(self, _: object) -> None:
        self.stack.append(self.take())

    def EMPTY_LIST(self, _: object) -> None:
        self.stack.append([])

    def EMPTY_DICT(self, _: object) -> None:
        self.stack.append({})

    def DICT(self, _: object) -> None:
        entries = self.take()
        self.stack.append({})
        self.set_items(entries)

    def APPEND(self, _: object) -> None:
        (entry,) = self.take(1)
        self.top(list).append(entry)

    def APPENDS(self, _: object) -> None:
        entries = self.take()
        self.top(list).extend(entries)

    def SETITEM(self, _: object) -> None:
        self.set_items(self.take(2))

    def SETITEMS(self, _: object) -> None:
        self.set_items(self.take())

    def set_items(self, entries: list) -> None:
        if not all(type(key) in (str, bytes, int) for key in entries[::2]):  # others may be deep, and hashed in C
            raise ValueError("a key that is neither text nor an integer")
        self.top(dict).update(zip(entries[::2], entries[1::2], strict=True))

    def GLOBAL(self, value: str) -> None:
        self.find(value.replace(" ", "."))

    def STACK_GLOBAL(self, _: object) -> None:
        self.find(".".join(self.take(2)))

    def find(self, name: str) -> None:
        if name not in self.names:
            raise ValueError(f"refuses to load {name!r:.100}")
        self.stack.append(self.names[name])

    def REDUCE(self, _: object) -> None:
        kind, arguments = self.take(2)
        if kind not in self.names.values() or not isinstance(arguments, tuple):
            raise ValueError("refuses to call what it does not know")
        self.stack.append(self.counted(kind(*arguments)))

    NEWOBJ = REDUCE

    def BUILD(self, _: object) -> None:
        (state,) = self.take(1)
        made = self.top(StandIn)
        made.set_state(state)
        self.counted(getattr(made, "value", None))

    def counted(self, made: object) -> object:
        """What was made, if all that is made takes no more room than the pickle's length allows."""
        self.room -= made.nbytes if isinstance(made, np.ndarray) else len(made) if isinstance(made, bytes) else 0
        if self.room < 0:
            raise ValueError("stands for more than it holds")
        return made


class _Plain:
    """Turns a value into plain data: arrays in place of their stand-ins.

    room: values that there may be, each counted as often as it stands somewhere; an honest pickle says each one.
    """

    def __init__(self, room):
        self.room = room

    def __call__(self, value, depth=0):
        self.room -= 1
        if depth > MOST_DEPTH or self.room < 0:
            raise ValueError("nested too deeply, or too much of it")
        if isinstance(value, dict):
            return {key: self(part, depth + 1) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return (list if isinstance(value, list) else tuple)(self(part, depth + 1) for part in value)
        if isinstance(value, _Array) and value.value is not None:
            return value.value
        if not isinstance(value, _PLAIN):
            raise ValueError(f"holds a {type(value).__name__.strip('_')}")
        return value


def plain(value: object, most: int = 100_000) -> object:
    """What a machine made, as plain data of at most so many values. Raises ValueError for anything else."""
    return _Plain(most)(value)


def load(data: bytes) -> object:
    """The content of a pickle; text of Python 2 is read as latin-1. Raises ValueError, in one line, for anything else."""
    try:
        machine = Machine(data)
        return plain(machine.run(), 4 * machine.count + 1000)
    except Exception as err:  # a broken pickle fails in any way at all
        raise ValueError(reason(err)) from err
