"""Snapshots: safetensors files whose header says how to rebuild the network. Loading executes nothing from the file.

A class is named in the header and looked up in an allow-list: classes decorated with `@persistent` in the rooms listed in
ROOMS, and the caller's own through `classes=`.
"""

import functools
import importlib
import inspect
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from dnnlib import download
from dnnlib.util import atomic_write

FORMAT = "multi-source-diffusion snapshot"
VERSION = 1

# Where the classes of snapshots live; imported only when a snapshot asks for one of them.
ROOMS = ("training.networks_edm2", "training.networks_edm", "training.networks_toy")
_REGISTRY = {}


def persistent(cls):
    """Class decorator: remember the constructor arguments as `init_kwargs` (plain data) and allow the class in snapshots.

    The constructor must be callable by keywords alone.
    """
    original = cls.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self, *args, **kwargs):
        if type(self) is cls:
            bound = signature.bind(self, *args, **kwargs)
            arguments = dict(list(bound.arguments.items())[1:])
            for name, parameter in signature.parameters.items():
                if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                    arguments.update(arguments.pop(name, {}))
            object.__setattr__(self, "init_kwargs", json.loads(json.dumps(arguments)))
        original(self, *args, **kwargs)

    cls.__init__ = init
    _REGISTRY[cls.__name__] = cls
    return cls


def to_spec(obj):
    """{"class": name, "kwargs": constructor arguments} of an object: its own `to_spec()`, or what @persistent recorded."""
    if obj is None:
        return None
    if hasattr(obj, "to_spec"):
        return obj.to_spec()
    if not hasattr(obj, "init_kwargs"):
        name = type(obj).__name__
        raise ValueError(f"{name} cannot be stored: decorate the class with @torch_utils.persistence.persistent")
    return {"class": type(obj).__name__, "kwargs": obj.init_kwargs}


def _find_class(name, classes):
    if classes and name in classes:
        return classes[name]
    for room in ROOMS:
        if name in _REGISTRY:
            break
        try:
            importlib.import_module(room)
        except ModuleNotFoundError as err:
            if err.name != room:
                raise
    if name not in _REGISTRY:
        known = ", ".join(sorted({*_REGISTRY, *(classes or {})}))
        raise ValueError(f"class {name!r} is not on the allow-list ({known}): pass classes={{{name!r}: ...}}")
    return _REGISTRY[name]


@dataclass
class Snapshot:
    """What a snapshot file holds, ready for use."""

    net: torch.nn.Module  # in eval mode, without gradients
    encoder: object = None  # training.encoders.Encoder, or None
    process: object = None  # what `header["process"]` describes, or None for EDM's own noise
    options: dict = field(default_factory=dict)  # training options, plain data
    header: dict = field(default_factory=dict)  # everything the file says about itself


def save_snapshot(path, net, *, encoder=None, process=None, tensors=None, dtype=None, **header):
    """Write `net` (a @persistent module) with its description to `path` (.safetensors), atomically.

    process: the plain description of the noise (`process.spec()`); `tensors` {"process.<name>": tensor} are its learned
    parameters. dtype: storage type of the network's floating-point parameters (None: as they are). Other keywords go
    into the header: nimg, options, dataset, git_commit... Raises ValueError for a class that cannot be stored.
    """
    header = {
        "format": FORMAT,
        "version": VERSION,
        "net": to_spec(net),
        "encoder": to_spec(encoder),
        "process": process,
        "torch": torch.__version__,
        **header,
    }
    parameters = {name for name, _ in net.named_parameters()}
    state = {}
    for name, value in net.state_dict().items():
        value = value.detach().to("cpu")
        if dtype is not None and name in parameters and value.is_floating_point():
            value = value.to(dtype)
        state[f"net.{name}"] = value.contiguous().clone()  # safetensors refuses shared memory
    for name, value in (tensors or {}).items():
        state[name] = value.detach().to("cpu").contiguous().clone()
    data = safetensors.torch.save(state, metadata={"header": json.dumps(header)})
    with atomic_write(path) as file:
        file.write(data)


def resolve(path):
    """The snapshot file that `path` means: itself, of a URL its cached download, of a run folder the newest one.

    Raises ValueError if that is unclear, or, before anything is downloaded, for a format that is not read.
    """
    if download.is_url(path):
        if not str(path).endswith(".safetensors"):
            raise ValueError(f"{path}: not a .safetensors snapshot; other formats are not read: give --net by file")
        path = download.cached(str(path))
    path = Path(path)
    if not path.is_dir():
        return path
    found = {}
    for file in path.glob("network-snapshot-*.safetensors"):
        if match := re.fullmatch(r"network-snapshot-(\d+)-(.+)\.safetensors", file.name):
            found.setdefault(int(match[1]), []).append(file)
    if not found:
        raise ValueError(f"{path}: no network-snapshot-*.safetensors in this folder")
    newest = sorted(found[max(found)])
    if len(newest) > 1:
        names = ", ".join(file.name for file in newest)
        raise ValueError(f"{path}: several averages at {max(found)} kimg ({names}): name the file")
    return newest[0]


def read_header(path):
    """The header of a snapshot as a dict. Raises ValueError, in one line, for anything that is not one of ours."""
    path = resolve(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such snapshot")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: not a .safetensors snapshot; other formats are not read")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["header"])
            if header["format"] != FORMAT:
                raise KeyError("format")
            if not isinstance(header["version"], int):
                raise KeyError("version")
            if not isinstance(header["net"]["class"], str) or not isinstance(header["net"]["kwargs"], dict):
                raise KeyError("net")
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, OSError) as err:
        raise ValueError(f"{path}: not a snapshot of this project, or damaged ({err})") from err
    if header["version"] > VERSION:
        raise ValueError(f"{path}: snapshot version {header['version']} is newer than this program ({VERSION}): update")
    return header


def load_snapshot(path, device="cpu", classes=None):
    """Read a snapshot -> Snapshot with the network in eval mode on `device`, float32, gradients off.

    path: a file, or a run folder (its newest snapshot).
    classes: {name: class} extends the allow-list by the caller's own classes. Raises ValueError for a missing, damaged
    or foreign file, a class that is not on the list, or tensors that do not fit.
    """
    path = resolve(path)
    header = read_header(path)
    try:
        state = safetensors.torch.load_file(path, device="cpu")
    except (safetensors.SafetensorError, OSError) as err:
        raise ValueError(f"{path}: damaged snapshot ({err})") from err
    spec = header["net"]
    build = _find_class(spec["class"], classes)
    try:
        net = build(**spec["kwargs"])
        net.load_state_dict({k[4:]: v for k, v in state.items() if k.startswith("net.")})
    except Exception as err:  # every constructor fails in its own way
        why = (str(err) or type(err).__name__).splitlines()[0]
        raise ValueError(f"{path}: does not fit class {spec['class']} ({why})") from err
    net = net.to(device).eval().requires_grad_(False)
    encoder = header.get("encoder")
    if encoder is not None:
        encoder = importlib.import_module("training.encoders").from_spec(encoder, classes)
    process = header.get("process")
    if process is not None:
        process = importlib.import_module("training.processes").from_spec(process)
        own = {k[8:]: v for k, v in state.items() if k.startswith("process.")}
        if own:
            process.load_state_dict(own)
            process.requires_grad_(False)
    return Snapshot(net=net, encoder=encoder, process=process, options=header.get("options", {}), header=header)
