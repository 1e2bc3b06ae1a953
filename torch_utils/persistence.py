"""Descriptions of objects as plain data, and snapshots: safetensors files whose header says how to rebuild a network.

One protocol for networks, encoders, noise kernels, processes and detectors: `@persistent` records the constructor's
arguments, `describe` gives {"class": name, "kwargs": arguments}, `build` makes the object again. Nothing in a file is
executed: its classes are looked up by name in the caller's `classes`, among decorated classes, and in CLASSES.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from dnnlib import download
from dnnlib.reading import nested, parse_json
from dnnlib.util import atomic_write, reason
from torch_utils import foreign

FORMAT = "multi-source-diffusion snapshot"
VERSION = 2
MOST_HEADER = 2**24  # characters

# Where the project's classes live; a module is imported when a file asks for one of its classes.
_MODULES = {
    "training.networks_edm2": "Precond",
    "training.networks_edm": "EDMPrecond VPPrecond VEPrecond iDDPMPrecond",
    "training.networks_joint": "JointPrecond",
    "training.networks_toy": "ToyModel MLPDenoiser",
    "training.encoders": "IdentityEncoder StandardRGBEncoder UniformDequantizer CenterEncoder LogitEncoder "
    "StabilityVAEEncoder",
    "training.processes": "GaussianKernel PFGMpp EDM LinearProcess VP CLD ALDA MALDA Learned",
    "metrics.classifier": "ConvNet",
}
CLASSES = {name: module for module, names in _MODULES.items() for name in names.split()}
_REGISTRY = {}  # decorated classes


def persistent(cls: type) -> type:
    """Class decorator: remember the constructor's arguments as `init_kwargs` (plain data) and allow the class in files.

    The constructor must be callable by keywords alone. Arrays become lists, infinite numbers strings. Raises TypeError
    where an argument is something else than numbers, strings, lists and dicts. A subclass needs a decorator of its own.
    """
    original = cls.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if type(self) is cls:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            arguments = {}
            for name, value in list(bound.arguments.items())[1:]:
                kind = signature.parameters[name].kind
                if kind is inspect.Parameter.VAR_KEYWORD:
                    arguments.update(value)
                elif kind is not inspect.Parameter.VAR_POSITIONAL:
                    arguments[name] = value
            text = json.dumps(arguments, default=_array_as_list)
            object.__setattr__(self, "init_kwargs", json.loads(text, parse_constant=lambda name: str(float(name))))

    cls.__init__ = init
    _REGISTRY[cls.__name__] = cls
    return cls


def _array_as_list(value):
    if not hasattr(value, "tolist"):
        raise TypeError(f"a {type(value).__name__} is no plain data")
    return value.tolist()


def describe(obj: object) -> dict | None:
    """{"class": name, "kwargs": constructor arguments} of an object; None for None.

    Raises ValueError, with the remedy, where its class is not decorated by `@persistent`.
    """
    if obj is None:
        return None
    name = type(obj).__name__
    if not hasattr(obj, "init_kwargs"):
        raise ValueError(f"{name} cannot be stored: decorate the class with @torch_utils.persistence.persistent")
    return {"class": name, "kwargs": obj.init_kwargs}


def content_digest(net: object) -> str:
    """Short hash of what a network computes: its description and every parameter and buffer, wherever they came from."""
    found = hashlib.sha256(json.dumps([type(net).__name__, getattr(net, "init_kwargs", None)]).encode())
    for name, value in sorted(net.state_dict().items() if isinstance(net, torch.nn.Module) else ()):
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return "sha256:" + found.hexdigest()[:12]


def build(spec: dict | None, classes: dict[str, type] | None = None, state: dict | None = None) -> object:
    """The object that `describe` described, None for None. state: tensors of a module.

    Raises ValueError for a class that is neither in `classes` {name: class}, decorated nor in CLASSES, and for arguments
    or tensors that do not fit it: before more memory is taken than the tensors have.
    """
    if spec is None:
        return None
    cls = _find_class(spec["class"], classes or {})
    try:
        kwargs = {k: float(v) if v in ("inf", "-inf") else v for k, v in spec["kwargs"].items()}
        if nested(spec["kwargs"], 4) or not _sober(spec["kwargs"]):
            raise ValueError("arguments that are no sober numbers, words, lists of them")
        if state is None or not issubclass(cls, torch.nn.Module):
            return cls(**kwargs)
        if spec["class"] in CLASSES:
            _require_kinds(kwargs)
        with _Budget(state):
            made = cls(**kwargs)
        _require_fit(made.state_dict(), state)
        made.load_state_dict(state)
    except Exception as err:  # every constructor fails in its own way
        raise ValueError(f"does not fit class {spec['class']} ({reason(err):.300})") from err
    return made


def _sober(value):
    """Whether no number in plain data is NaN or beyond 1e30."""
    if isinstance(value, (list, dict)):
        return all(map(_sober, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, (int, float)) or abs(value) <= 1e30


# Arguments of modules that are no integers; constructors check the words.
_WORDS = {"model_type", "embedding_type", "encoder_type", "decoder_type", "reduced_dtype"}
_WORDS |= {"parameterization", "time_code"}
_LISTS = {"channel_mult", "attn_resolutions", "resample_filter", "image_shape", "beta"}
_MAY_LACK = {"channel_mult_noise", "channel_mult_emb", "clip_act"}
_REAL = {
    "sigma_min",
    "sigma_max",
    "sigma_data",
    "dropout",
    "label_dropout",
    "beta_d",
    "beta_min",
    "epsilon_t",
    "C_1",
    "C_2",
}
_REAL |= {"res_balance", "attn_balance", "label_balance", "concat_balance", "clip_act", "M", "init_aux_var", "cov_eps"}
MOST_ENTRIES = 64  # of such a list


def _require_kinds(kwargs):
    for name, value in kwargs.items():
        numbers = value if isinstance(value, list) and name in _LISTS else [value]
        known = (isinstance(value, str) and name in _WORDS) or (value is None and name in _MAY_LACK)
        kinds = (int, float) if name in _REAL | _LISTS else int
        if not known and (len(numbers) > MOST_ENTRIES or not all(isinstance(n, kinds) for n in numbers)):
            raise ValueError(f"{name}={value!r:.60} is of the wrong kind")


class _Budget(torch.overrides.TorchFunctionMode):
    """While a module is made: refuses to make tensors, before there is memory, of more than the file can fill."""

    MAKERS = {torch.randn, torch.rand, torch.empty, torch.zeros, torch.ones, torch.full, torch.eye, torch.arange}
    MAKERS |= {torch.logspace, torch.linspace}

    def __init__(self, state):
        super().__init__()
        self.left = 4 * sum(tensor.numel() for tensor in state.values()) + 2**20
        self.modules = 64 * (len(state) + 16)  # also those that hold nothing

    def __enter__(self):
        register = torch.nn.modules.module.register_module_module_registration_hook
        self.hook = register(lambda *_: self._take("modules", 1))
        return super().__enter__()

    def __exit__(self, *error):
        self.hook.remove()
        return super().__exit__(*error)

    def _take(self, what, count):
        setattr(self, what, getattr(self, what) - count)
        if min(self.left, self.modules) < 0:
            raise ValueError("it is larger than the tensors of the file")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.MAKERS:
            sizes = [*args, *(kwargs or {}).values()]
            sizes = [n for size in sizes for n in (size if isinstance(size, (list, tuple)) else [size])]
            self._take("left", math.prod(max(abs(n), 1) for n in sizes if type(n) is int))
        return function(*args, **(kwargs or {}))


def _require_fit(own, state):
    """Raises ValueError where names, shapes or kinds of the tensors of a module and of a file differ."""
    for name in sorted({*own, *state}):
        if name not in state or name not in own:
            raise ValueError(f"tensor {name:.60} is {'too much' if name in state else 'missing'}")
        forms = [
            (list(t.shape), "numbers" if t.is_floating_point() else str(t.dtype)) for t in (state[name], own[name])
        ]
        if forms[0] != forms[1]:
            raise ValueError(f"tensor {name:.60} has {forms[0]}, expected {forms[1]}")


# What the class of a part must have one of.
_PARTS = {"net": ("state_dict",), "encoder": ("decode",), "process": ("unit_noise", "project")}
# What solvers and losses read of a denoiser: the least and the largest value.
_OF_DENOISERS = {"img_resolution": (1, 2**13), "img_channels": (1, 2**13), "label_dim": (0, 10**6)}
_OF_DENOISERS |= {"sigma_min": (0.0, 1e30), "sigma_max": (0.0, math.inf), "sigma_data": (0.0, 1e30)}


def _require_denoiser(net):
    for name, (least, most) in _OF_DENOISERS.items():
        value = getattr(net, name, None)
        known = type(value) is int or (type(value) is float and type(least) is float)
        if not (known and least <= value <= most):
            raise ValueError(f"{type(net).__name__} has {name}={value}: must be a number from {least} to {most}")


def _require_finite(module):
    for name, tensor in module.state_dict().items() if isinstance(module, torch.nn.Module) else ():
        if not tensor.isfinite().all():
            raise ValueError(f"tensor {name} holds NaN or infinity: the training broke down; take an earlier snapshot")


def _find_class(name, classes):
    if name not in classes and name not in _REGISTRY and name in CLASSES:
        importlib.import_module(CLASSES[name])
    known = {**_REGISTRY, **classes}
    if name not in known:
        names = ", ".join(sorted({*CLASSES, *known}))
        raise ValueError(f"class {name!r} is not on the allow-list ({names}): pass classes={{{name!r}: ...}}")
    return known[name]


@dataclass
class Snapshot:
    """What a snapshot file holds, ready for use."""

    net: torch.nn.Module  # in eval mode, without gradients
    encoder: object = None  # training.encoders.Encoder, or None
    process: object = None  # kernel or process that the network was trained for, or None
    options: dict = field(default_factory=dict)  # training options, plain data
    header: dict = field(default_factory=dict)  # everything the file says about itself
    path: str = ""  # of the file

    @property
    def kernel(self) -> object:
        """The noise that the network was trained with, by its `unit_noise`; None: Gaussian."""
        return self.process if hasattr(self.process, "unit_noise") else None

    @property
    def sources(self) -> list[int] | None:
        """Source ids with images in the training data, ascending; None: not known. Raises ValueError for no such list."""
        found = self.header.get("sources")
        if found is None:
            return None
        if not (
            isinstance(found, list) and found and all(type(k) is int and 0 <= k < self.net.label_dim for k in found)
        ):
            raise ValueError(f"{self.path}: sources={found!r} in the header are no ids below {self.net.label_dim}")
        return sorted(set(found))


def save_snapshot(
    path: str | Path,
    net: torch.nn.Module,
    *,
    encoder: object = None,
    process: object = None,
    dtype: torch.dtype | None = None,
    kind: str = FORMAT,
    **header: object,
) -> None:
    """Write `net` with the descriptions of itself, its encoder and its noise to `path` (.safetensors), atomically.

    process: kernel or process; if it is a module, its tensors are stored as "process.<name>". dtype: storage type of the
    network's floating-point parameters (None: as they are). kind: what sort of file, for `read_header`. Other keywords go
    into the header: nimg, options, dataset, sources (ids in the training data), git_commit... Raises ValueError for a
    class that cannot be stored.
    """
    parts = {"net": describe(net), "encoder": describe(encoder), "process": describe(process)}
    header = {"format": kind, "version": VERSION, **parts, "torch": torch.__version__, **header}
    state = {f"net.{name}": value for name, value in net.state_dict().items()}
    if dtype is not None:
        state |= {f"net.{name}": p.to(dtype) for name, p in net.named_parameters() if p.is_floating_point()}
    if isinstance(process, torch.nn.Module):
        state.update({f"process.{name}": value for name, value in process.state_dict().items()})
    # safetensors refuses shared memory
    state = {name: value.detach().to("cpu").contiguous().clone() for name, value in state.items()}
    data = safetensors.torch.save(state, metadata={"header": json.dumps(header, allow_nan=False)})
    with atomic_write(path) as file:
        file.write(data)


_SUFFIXES = (".safetensors", *foreign.SUFFIXES)


def resolve(path: str | Path) -> Path:
    """The snapshot file that `path` means: itself, of a URL its cached download, of a run folder the newest one.

    Raises ValueError if that is unclear, or, before anything is downloaded, for a format that is not read.
    """
    if download.is_url(path):
        if not (str(path).endswith(".safetensors") or foreign.is_foreign(path)):
            raise ValueError(f"{path}: not a snapshot ({', '.join(_SUFFIXES)})")
        path = download.cached(str(path))
    path = Path(path)
    if not path.is_dir():
        return path
    found = {}
    for file in path.glob("network-snapshot-*"):
        if match := re.fullmatch(r"network-snapshot-(\d+)(-.+)?\.(safetensors|pkl)", file.name):
            found.setdefault(int(match[1]), []).append(file)
    if not found:
        raise ValueError(f"{path}: no network-snapshot-*.safetensors (or .pkl) in this folder")
    newest = sorted(found[max(found)])
    if len(newest) > 1:
        names = ", ".join(file.name for file in newest)
        raise ValueError(f"{path}: several averages at {max(found)} kimg ({names}): name the file")
    return newest[0]


_NAMES_1 = {name.lower(): name for name in _MODULES["training.processes"].split()} | {"linear": "LinearProcess"}


def _from_version_1(header):
    """The header in today's form: processes were {"name": ..., options}, detectors had no description."""
    if header["format"] == "classifier-detector-1":
        kwargs = {name: header[name] for name in ("image_shape", "num_classes", "width", "features")}
        net = {"class": "ConvNet", "kwargs": kwargs}
        return {**header, "format": "classifier-detector-2", "version": 1, "net": net}
    if "name" in (header.get("process") or {}):
        kwargs = dict(header["process"])
        name = kwargs.pop("name")
        return {**header, "process": {"class": _NAMES_1.get(name, name), "kwargs": kwargs}}
    return header


# What else a header may say, and as what; all may be missing.
_FIELDS = dict.fromkeys(("options", "dataset", "source_accuracy"), (dict,)) | {"git_commit": (str,), "torch": (str,)}
_FIELDS |= {"ema": (str, int, float), "accuracy": (int, float)}
_FIELDS |= dict.fromkeys(("nimg", "epochs", "seed", "num_train", "num_holdout"), (int,))


def read_header(path: str | Path, kind: str = FORMAT) -> dict:
    """The header of a file of `save_snapshot`, or that of another system's snapshot in the same form.

    Raises ValueError, in one line, for anything else.
    """
    path = resolve(path)
    if kind == FORMAT and foreign.is_foreign(path):
        return read_snapshot(path)[0]
    if not path.is_file():
        raise ValueError(f"{path}: no such snapshot")
    if kind == FORMAT and path.suffix != ".safetensors":
        raise ValueError(f"{path}: not a snapshot ({', '.join(_SUFFIXES)})")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {})["header"]
        if len(text) > MOST_HEADER:
            raise ValueError(f"a header of {len(text)} characters")
        header = _from_version_1(parse_json(text))
        if header["format"] != kind:
            raise KeyError("format")
        if type(header["version"]) is not int or nested(header):
            raise KeyError("version")
        for name, types in _FIELDS.items():
            if not isinstance(header.get(name), (*types, type(None))):
                raise KeyError(name)
        for part in ("net", "encoder", "process"):
            spec = header.get(part)
            optional = part != "net" and spec is None
            if not optional and not (isinstance(spec["class"], str) and isinstance(spec["kwargs"], dict)):
                raise KeyError(part)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, OSError) as err:
        raise ValueError(f"{path}: not a snapshot of this project, or damaged ({reason(err):.300})") from err
    if header["version"] > VERSION:
        raise ValueError(f"{path}: snapshot version {header['version']} is newer than this program ({VERSION}): update")
    return header


def read_snapshot(path: str | Path, kind: str = FORMAT, part: str = "ema") -> tuple[dict, dict[str, torch.Tensor]]:
    """(header, tensors by name: "net.<name>" and "process.<name>") of a snapshot file, in the types they are stored in.

    part: of another system's file that keeps both: "ema" or "net". Raises ValueError as `load_snapshot`.
    """
    path = resolve(path)
    if kind == FORMAT and foreign.is_foreign(path):
        header, state = foreign.read(path, part)
        header = {"format": FORMAT, "version": VERSION, **header}
        return header, {f"net.{name}": value for name, value in state.items()}
    if part != "ema":
        raise ValueError(f"{path}: holds one network, not also its part {part!r}")
    header = read_header(path, kind)
    try:
        return header, safetensors.torch.load_file(path, device="cpu")
    except (safetensors.SafetensorError, OSError) as err:
        raise ValueError(f"{path}: damaged snapshot ({err})") from err


def load_snapshot(
    path: str | Path, device: str | torch.device = "cpu", classes: dict[str, type] | None = None, kind: str = FORMAT
) -> Snapshot:
    """Read a snapshot -> Snapshot with the network in eval mode on `device`, float32, gradients off.

    path: a file or URL, or a run folder (its newest snapshot). Reads ours, and those of EDM2, EDM and PFGM++ (.pkl, .pt:
    their averaged network), and networks of points of CLD and MDM (.pth, .ckpt) as data. classes: {name: class} extends the
    allow-list by the caller's own networks, encoders, kernels and processes. Raises ValueError for a missing or damaged file,
    a class that is not on the list, or tensors that do not fit.
    """
    path = resolve(path)
    return assemble(path, *read_snapshot(path, kind), device, classes)


def assemble(
    path: str | Path,
    header: dict,
    state: dict[str, torch.Tensor],
    device: str | torch.device = "cpu",
    classes: dict[str, type] | None = None,
) -> Snapshot:
    """The Snapshot of what `read_snapshot` read; path: for messages."""
    own = {name[8:]: value for name, value in state.items() if name.startswith("process.")}
    state = {name.removeprefix("net."): value for name, value in state.items() if not name.startswith("process.")}
    try:
        for part, methods in _PARTS.items():
            cls = _find_class(header[part]["class"], classes or {}) if header.get(part) else None
            if cls is not None and not any(hasattr(cls, name) for name in methods):
                raise ValueError(f"{cls.__name__} stands in the place of the {part}")
        net = build(header["net"], classes, state)
        encoder = build(header.get("encoder"), classes)
        process = build(header.get("process"), classes, own)
        if hasattr(net, "bind"):  # a joint network sees the state of its process
            net.bind(process)
        if header["format"] == FORMAT and header["net"]["class"] in CLASSES:
            _require_denoiser(net)
        _require_finite(net), _require_finite(process)
    except ValueError as err:
        raise ValueError(f"{path}: {err}") from err
    if isinstance(process, torch.nn.Module):
        process.requires_grad_(False)
    net = net.to(device).eval().requires_grad_(False)
    what = dict(options=header.get("options", {}), header=header, path=str(path))
    return Snapshot(net=net, encoder=encoder, process=process, **what)
