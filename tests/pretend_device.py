"""A pretend accelerator: tensors that claim another device and hold CPU values, for tests where there is no accelerator.

`with Accelerator() as seen:` a tensor on `DEVICE` mixes with CPU tensors only where a GPU allows it, else RuntimeError;
`seen.syncs` counts by line where the host waits for the device (a value or a copy is asked for), `seen.uploads` where a copy
to the device is made from ordinary memory, for which PyTorch also waits unless it is non_blocking. The device is 'meta' by
name, since that needs no backend. Generators on it draw what CPU generators of the same seed draw.
"""

import collections
import contextlib
import functools
import os
import sys
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "item", "nonzero", "masked_select", "bincount"}
WAITS |= {"_unique2", "unique_dim", "unique_consecutive", "_linalg_check_errors"}
DRAWS = ("randn", "rand", "randint", "randperm", "_standard_gamma", "multinomial", "bernoulli", "normal")


class Pretended(torch.Tensor):
    """`inner`, a CPU tensor, under the name of another device."""

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        layout = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype)
        return cls._make_wrapper_subclass(cls, inner.size(), device=DEVICE, requires_grad=requires_grad, **layout)

    def __init__(self, inner, requires_grad=False):
        self.inner = inner

    def __repr__(self):
        return f"Pretended({self.inner})"

    def __deepcopy__(self, memo):
        copied = memo[id(self)] = type(self)(self.inner.clone(), self.requires_grad)
        copied._is_param = getattr(self, "_is_param", False)
        return copied

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *_, **__):
        raise RuntimeError(f"numpy() of a tensor on the device, {where()}")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


def on_device(device):
    return device is not None and torch.device(device).type == DEVICE.type


def inner(x):
    return x.inner if isinstance(x, Pretended) else x.real if isinstance(x, Generator) else x


def outer(x):
    return Pretended(x) if isinstance(x, torch.Tensor) and not isinstance(x, Pretended) else x


def where():
    """'file:line' of the innermost call from the project's own code."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(ROOT + os.sep) and path != __file__ and "site-packages" not in path:
            return f"{os.path.relpath(path, ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


seen = None  # the Accelerator in use


def dispatch(function, args, kwargs):
    """One operation: on the device if any of its tensors is there, or if it is made there."""
    name = function._schema.name.removeprefix("aten::")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, Pretended)]
    here = [x for x in tensors if not isinstance(x, Pretended)]
    call = lambda **more: function(*tree_map(inner, args), **{**tree_map(inner, kwargs), **more})
    if name in ("_to_copy", "copy_"):
        return moved(name, args, kwargs, call)
    if "device" in kwargs and kwargs["device"] is not None:
        made = call(device=torch.device("cpu"))
        return tree_map(outer, made) if on_device(kwargs["device"]) else made
    if not there:
        return call()
    if name in WAITS or (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])):
        seen.syncs[where()] += 1
    wrong = [x for x in here if x.ndim]
    if name in ("index", "index_put_", "_index_put_impl_", "index_put") and wrong and isinstance(args[0], Pretended):
        seen.uploads[where()] += 1  # indices may lie on the CPU, at the price of a copy
        wrong = []
    if wrong:
        raise RuntimeError(f"{name}: a tensor on the device meets one on the CPU, {where()}")
    result = call()
    if function._schema.is_mutable and name.endswith("_") and isinstance(args[0], torch.Tensor):
        return args[0]
    return tree_map(outer, result)


def moved(name, args, kwargs, call):
    """Copies between the devices, and on one."""
    if name == "copy_":
        target, source = args[:2]
        count(isinstance(source, Pretended), isinstance(target, Pretended), source.ndim, args[2:] == (True,))
        call()
        return target
    start = isinstance(args[0], Pretended)
    end = start if kwargs.get("device") is None else on_device(kwargs["device"])
    count(start, end, True, kwargs.get("non_blocking", False))
    made = call(device=torch.device("cpu"))
    made = made.clone() if made is inner(args[0]) else made
    return outer(made) if end else made


def count(start, end, sized, non_blocking):
    if start and not end:
        seen.syncs[where()] += 1
    elif end and not start and sized and not non_blocking:
        seen.uploads[where()] += 1


class Generator:
    """torch.Generator on any device."""

    def __init__(self, device="cpu"):
        self.real, self.device = REAL_GENERATOR(), torch.device(device)

    def manual_seed(self, seed):
        self.real.manual_seed(seed)
        return self

    def __getattr__(self, name):
        return getattr(self.real, name)


REAL_GENERATOR = torch.Generator


def drawing(real):
    """A function of torch that draws: its generator must be on the device of what is drawn."""

    @functools.wraps(real)
    def draw(*args, **kwargs):
        generator = next((x for x in [*args, *kwargs.values()] if isinstance(x, Generator)), None)
        if generator is None:
            return real(*args, **kwargs)
        first = next((x for x in args if isinstance(x, torch.Tensor)), None)
        device = torch.device(kwargs.pop("device", None) or "cpu") if first is None else first.device
        if device.type != generator.device.type:
            raise RuntimeError(f"{real.__name__}: a generator on {generator.device} draws on {device}, {where()}")
        drawn = real(*tree_map(inner, args), **tree_map(inner, kwargs))
        if real.__name__.endswith("_"):
            return first
        return outer(drawn) if on_device(device) else drawn

    return draw


def made_of_numbers(real):
    """torch.tensor and as_tensor, which bypass the dispatcher for what is no tensor."""

    @functools.wraps(real)
    def make(data, *args, device=None, **kwargs):
        if isinstance(data, torch.Tensor) or not on_device(device):
            return real(data, *args, device=device, **kwargs)
        seen.uploads[where()] += 1
        return outer(real(data, *args, **kwargs))

    return make


def module_to(self, device=None, *args, real=torch.nn.Module.to, **kwargs):
    """Module.to for the device, which would not exchange parameters."""
    if not on_device(device):
        return real(self, *([] if device is None else [device]), *args, **kwargs)
    for module in self.modules():
        for name, p in module._parameters.items():
            if p is not None and not isinstance(p, Pretended):
                module._parameters[name] = torch.nn.Parameter(Pretended(p.detach().clone()), p.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = outer(buffer)
    return self


def matmul(self, other, real=torch.Tensor.__matmul__):
    """vector @ matrix of constants, which PyTorch takes apart before it is dispatched."""
    vectors = isinstance(self, Pretended) and isinstance(other, Pretended) and 1 in (self.ndim, other.ndim)
    return outer(real(inner(self), inner(other))) if vectors else real(self, other)


def autocast(kind, *args, real=torch.autocast, **kwargs):
    """torch.autocast, as the CPU does it."""
    return real("cpu" if on_device(kind) else kind, *args, **kwargs)


class Accelerator(TorchDispatchMode):
    """While it is entered, `DEVICE` is an accelerator. syncs, uploads: Counter by line."""

    def __init__(self):
        super().__init__()
        self.syncs, self.uploads = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})

    def forget(self):
        """Count from here."""
        self.syncs.clear(), self.uploads.clear()

    def __enter__(self):
        global seen
        seen, self.patches = self, contextlib.ExitStack()
        replaced = {"Generator": Generator, "autocast": autocast} | {
            name: drawing(getattr(torch, name)) for name in DRAWS
        }
        replaced |= {name: made_of_numbers(getattr(torch, name)) for name in ("tensor", "as_tensor")}
        for name, function in replaced.items():
            self.patches.enter_context(mock.patch.object(torch, name, function))
        drawn = drawing(torch.Tensor.exponential_)
        self.patches.enter_context(mock.patch.object(torch.Tensor, "exponential_", drawn))
        self.patches.enter_context(mock.patch.object(torch.Tensor, "__matmul__", matmul))
        self.patches.enter_context(mock.patch.object(torch.nn.Module, "to", module_to))
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.close()
        return super().__exit__(*error)
