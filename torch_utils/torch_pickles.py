"""Pickles of torch modules and tensors read as data: `torch.save` files, old and new, and snapshots of NVIDIA's persistence.

Such files name functions that rebuild objects, and NVIDIA's carry source text that is meant to be executed. Here every
object is an `Object`: the name of its class and its attributes, nothing more; tensors are views of the bytes in the file.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from dnnlib.util import reason
from torch_utils.pickles import Machine, StandIn

PERSISTENCE = 6  # version of NVIDIA's persistence that is read
MOST_MODULES, MOST_LEVELS = 100_000, 32
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # begin torch.save files that are no zip archives

_DTYPES = dict(
    Half=torch.float16, BFloat16=torch.bfloat16, Float=torch.float32, Double=torch.float64, Long=torch.int64,
    Int=torch.int32, Short=torch.int16, Char=torch.int8, Byte=torch.uint8, Bool=torch.bool,
)  # fmt: skip


class _Token(StandIn):
    """What a file may name but not call."""

    def __init__(self, *arguments):
        raise ValueError(f"refuses to call {type(self).__name__}")


_STORAGES = {name: type(f"{name}Storage", (_Token,), {"dtype": dtype}) for name, dtype in _DTYPES.items()}


class _Storage(StandIn):
    """The numbers of one or several tensors; the file says their count and, somewhere, their bytes."""

    def __init__(self, reference):
        kind, cls, self.key, _device, self.count, *view = reference
        if kind != "storage" or cls not in _STORAGES.values() or type(self.count) is not int or any(view):
            raise ValueError("damaged storage")
        if type(self.key) is not str or self.count < 0:
            raise ValueError("damaged storage")
        self.dtype = cls.dtype
        self.nbytes = self.count * self.dtype.itemsize
        self.read = None  # () -> bytes
        self.values = None

    def tensor(self):
        """[count], read at the first call."""
        if self.values is None:
            if self.read is None:
                raise ValueError("a storage without its numbers")
            data, self.read = bytearray(self.read()), None
            self.values = torch.frombuffer(data, dtype=self.dtype) if data else torch.empty([0], dtype=self.dtype)
        return self.values


class Tensor(StandIn):
    """torch._utils._rebuild_tensor_v2: a view of a storage."""

    def __init__(self, storage: _Storage, offset: int, size: tuple, stride: tuple, *flags: object):
        numbers = [offset, *size, *stride]
        if not isinstance(storage, _Storage) or len(size) != len(stride) or len(size) > 8:
            raise ValueError("damaged tensor")
        if not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("damaged tensor")
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if count > storage.count or (count and last >= storage.count):
            raise ValueError(f"a tensor of shape {tuple(size)} in a storage of {storage.count} numbers")
        self.storage, self.offset, self.size, self.stride = storage, offset, tuple(size), tuple(stride)

    def value(self) -> torch.Tensor:
        """The tensor, in the type it was stored in."""
        return self.storage.tensor().as_strided(self.size, self.stride, self.offset)


class _Parameter(StandIn):
    def __new__(cls, tensor, requires_grad=True, hooks=None):
        if not isinstance(tensor, Tensor):
            raise ValueError("damaged parameter")
        return tensor


class Object(StandIn):
    """An object by the name of its class and its attributes."""

    def __init__(self, name: str = "", state: dict | None = None):
        self.name, self.state = type(self).__name__ if name == "" else name, state

    def set_state(self, state: object) -> None:
        if not isinstance(state, dict) or self.state is not None:
            raise ValueError("unexpected state")
        self.state = state


class _Persistent(StandIn):
    """NVIDIA's _reconstruct_persistent_obj: keeps what the object is, leaves the source of its module alone."""

    def __new__(cls, meta):
        if meta["type"] != "class" or meta.get("version", PERSISTENCE) != PERSISTENCE:
            raise ValueError(f"persistence of version {meta.get('version')!r:.20}: only {PERSISTENCE} is read")
        if type(meta["class_name"]) is not str or not isinstance(meta["state"], (dict, type(None))):
            raise ValueError("damaged object")
        own = {f"_{name}": meta[name] for name in ("init_args", "init_kwargs") if name in meta}
        return Object(meta["class_name"], own | (meta["state"] or {}))


class _Set(StandIn):
    def __new__(cls, items=()):
        return list(items)


def _container(name):
    return type(name, (Object,), {"__init__": lambda self: Object.__init__(self)})


_TORCH = {f"torch.{name}Storage": cls for name, cls in _STORAGES.items()}
_TORCH |= {"torch._utils._rebuild_tensor_v2": Tensor, "torch._utils._rebuild_parameter": _Parameter}
_TORCH |= {f"torch.nn.modules.container.{n}": _container(n) for n in ("ModuleDict", "ModuleList", "Sequential")}
_TORCH |= {
    "builtins.set": _Set,
    "__builtin__.set": _Set,
    "torch.nn.parameter.Parameter": type("Parameter", (_Token,), {}),
}
_TORCH["torch_utils.persistence._reconstruct_persistent_obj"] = _Persistent
_TORCH["argparse.Namespace"] = _container("Namespace")  # settings beside a Lightning checkpoint


class _Machine(Machine):
    most_integer = 2**80  # of the magic number

    def __init__(self, data, size, storages):
        super().__init__(data, size)
        self.storages = storages  # {key: _Storage}

    def BINPERSID(self, _):
        (reference,) = self.take(1)
        if not isinstance(reference, tuple) or len(reference) not in (4, 5, 6):
            raise ValueError("an unknown persistent id")
        if (
            reference[0] == "module" and reference[1] in self.names.values()
        ):  # a class with its source text, of old torch
            self.stack.append(reference[1])
            return
        storage = _Storage(reference)
        same = self.storages.setdefault(storage.key, storage)
        if (same.count, same.dtype) != (storage.count, storage.dtype):
            raise ValueError("one storage of two kinds")
        self.stack.append(same)

    def counted(self, made):
        self.room -= made.nbytes if isinstance(made, _Storage) else 0
        return super().counted(made)

    def BUILD(self, _):
        if isinstance(self.stack[-2], dict):  # attributes of a dict, such as the versions of a state_dict's modules
            self.take(1)
        else:
            super().BUILD(_)

    def EMPTY_SET(self, _):
        self.EMPTY_LIST(_)

    def ADDITEMS(self, _):
        self.APPENDS(_)


class _LoadFromBytes(StandIn):
    def __new__(cls, data):
        if not isinstance(data, bytes):
            raise ValueError("damaged storage")
        storage = _unpickle(io.BytesIO(data), len(data), nested=True)
        if not isinstance(storage, _Storage):
            raise ValueError("no storage")
        return storage


_Machine.names = Machine.names | _TORCH
_Inner = type("_Inner", (_Machine,), {})  # storages hold no storages
_Machine.names = _Machine.names | {"torch.storage._load_from_bytes": _LoadFromBytes}


def _unpickle(file, size, nested=False):
    """One object from a plain pickle, or from a torch.save file of before the zip archives."""
    machine, storages = _Inner if nested else _Machine, {}
    found = machine(file, size, storages).run()
    if found != _MAGIC:
        return found
    protocol, system, found, keys = (machine(file, size, storages).run() for _ in range(4))
    if protocol != _PROTOCOL or system.get("little_endian") is not True or keys != [*dict.fromkeys(keys)]:
        raise ValueError("not a torch.save file of a little-endian machine")
    for key in keys:
        storage = storages[key]
        if int.from_bytes(file.read(8), "little") != storage.count:
            raise ValueError("another number of elements than announced")
        data = file.read(storage.nbytes)
        if len(data) != storage.nbytes:
            raise ValueError(f"{len(data)} bytes for a storage of {storage.count} numbers")
        storage.read = lambda data=data: data
    return found


def _from_zip(path, size):
    """One object from a torch.save archive. Numbers are read when a tensor is asked for."""
    archive = zipfile.ZipFile(path)
    members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    packed = any(info.compress_type != zipfile.ZIP_STORED for info in members.values())
    if packed or sum(info.file_size for info in archive.infolist()) > size:
        raise ValueError("a compressed archive, or members that share their bytes")
    if archive.read(members["byteorder"]).strip() != b"little" if "byteorder" in members else False:
        raise ValueError("numbers of a big-endian machine")
    storages = {}
    pickled = archive.read(members["data.pkl"])
    found = _Machine(io.BytesIO(pickled), len(pickled), storages).run()
    for key, storage in storages.items():
        info = members[f"data/{key}"]
        if info.file_size != storage.nbytes:
            raise ValueError(f"{info.file_size} bytes for a storage of {storage.count} numbers")
        storage.read = lambda info=info: archive.read(info)
    return found


def load(path: str | Path) -> object:
    """What a .pkl or .pt file holds: dicts, lists, plain values, `Object`s and `Tensor`s.

    Raises ValueError, in one line, for anything else.
    """
    try:
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        if zipped:  # its numbers, which may be many, stay on the disk until they are asked for
            return _from_zip(path, os.path.getsize(path))
        data = Path(path).read_bytes()
        return _unpickle(io.BytesIO(data), len(data))
    except Exception as err:  # a broken file fails in any way at all
        raise ValueError(reason(err)) from err


def modules(root: Object) -> Iterator[tuple[str, Object]]:
    """(dotted name, module) of a module and all modules in it, as torch names them. Raises ValueError for a damaged one."""
    waiting, count = [("", root, 0)], 0
    while waiting:
        name, module, level = waiting.pop()
        count += 1
        if not isinstance(module, Object) or not isinstance(module.state, dict):
            raise ValueError(f"{name!r:.100} is no module")
        if count + len(waiting) > MOST_MODULES or level > MOST_LEVELS:
            raise ValueError("modules nested too deeply, or too many")
        yield name, module
        parts = module.state.get("_modules") or {}
        if not isinstance(parts, dict) or not all(type(key) is str for key in parts):
            raise ValueError(f"{name!r:.100} is damaged")
        inner = [(f"{name}.{key}" if name else key, part, level + 1) for key, part in parts.items() if part is not None]
        waiting += reversed(inner)


def state_dict(root: Object) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a module and all modules in it, by torch's names. Raises ValueError."""
    state = {}
    for name, module in modules(root):
        entries = {**(module.state.get("_parameters") or {}), **(module.state.get("_buffers") or {})}
        for key, tensor in entries.items():
            if tensor is not None:
                if not isinstance(tensor, Tensor):
                    raise ValueError(f"{name}.{key} is no tensor")
                state[f"{name}.{key}" if name else key] = tensor.value()
        if len(state) > MOST_MODULES:
            raise ValueError("too many tensors")
    return state


def attributes(made: Object) -> dict:
    """The attributes of an object that are numbers or text."""
    return {name: value for name, value in (made.state or {}).items() if isinstance(value, (bool, int, float, str))}
