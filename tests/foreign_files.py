"""Writes snapshots as the published systems write them: torch and pickle do the writing, classes are stand-ins.

Every object carries source text that would touch a file if anybody ran it. Imported by tests.
"""

import contextlib
import copy
import pickle
from pathlib import Path

import torch

from dnnlib.util import EasyDict
from torch_utils import persistence
from training.encoders import StabilityVAEEncoder, StandardRGBEncoder
from training.networks_edm import EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond
from training.networks_edm2 import Precond
from training.networks_toy import ToyModel

SOURCE = "import pathlib\npathlib.Path({flag!r}).touch()\n" + "class Anything:\n    pass\n" * 200
PLAIN = (bool, int, float, str, type(None))


def _reconstruct_persistent_obj(meta):
    raise AssertionError("a file was executed")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


@contextlib.contextmanager
def original_modules():
    """Under the module names of the originals pickle finds what it has to name."""
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    try:
        yield
    finally:
        del persistence._reconstruct_persistent_obj


class Persistent:
    """An object of NVIDIA's persistence: pickles as its meta dict."""

    def __init__(self, class_name, state, flag="executed", **meta):
        text = SOURCE.format(flag=str(flag))
        self.meta = dict(type="class", version=6, module_src=text, class_name=class_name, state=state) | meta

    def __reduce__(self):
        return (_reconstruct_persistent_obj, (self.meta,), None)


CONTAINERS = (torch.nn.ModuleDict, torch.nn.ModuleList, torch.nn.Sequential)
RENAMED = {("ToyModel", "MPConv"): "MPLinear"}


def module(net, args=(), kwargs=None, flag="executed", root=None, **more):
    """A module of ours as the Persistent that the original would be; containers stay torch's own."""
    root = root or type(net).__name__
    state = {name: value for name, value in vars(net).items() if name.startswith("_") or isinstance(value, PLAIN)}
    parts = {name: part if part is None else module(part, flag=flag, root=root) for name, part in net._modules.items()}
    state["_modules"] = parts
    state |= {"training": False, **more}
    state.pop("init_kwargs", None)
    if isinstance(net, CONTAINERS):
        made = type(net)()
        vars(made).update(state, _modules=parts)
        return made
    name = RENAMED.get((root, type(net).__name__), type(net).__name__)
    return Persistent(name, state | {"_init_args": tuple(args), "_init_kwargs": dict(kwargs or {})}, flag)


def randomised(net, seed=0):
    """Random weights everywhere: what starts at zero hides the rest."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim else 0.5) + (0 if p.ndim else 0.5))
    return net.eval().requires_grad_(False)


def dump(content, path, protocol=4):
    with original_modules():
        Path(path).write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def save(content, path, **options):
    with original_modules():
        torch.save(content, path, **options)
    return path


# --- the layouts ------------------------------------------------------------------------------------------------------

SMALL_EDM2 = dict(model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], channels_per_head=8)
SMALL_EDM = dict(model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], dropout=0.13)
INTERFACE = dict(img_resolution=8, img_channels=3, label_dim=5)


def edm2_net(seed=0, **more):
    """(network with the weights that the file will hold, its keyword arguments)."""
    kwargs = EasyDict(SMALL_EDM2, dropout=0.1, use_fp16=True, **{**INTERFACE, **more})
    return randomised(Precond(**kwargs), seed), kwargs


def edm2_content(net, kwargs, flag="executed", latents=False):
    """The dictionary of network-snapshot-*.pkl; everything in half precision, buffers too."""
    half = copy.deepcopy(net).to(torch.float16)
    encoder = StabilityVAEEncoder() if latents else StandardRGBEncoder()
    own = {name: value for name, value in vars(encoder).items() if name != "init_kwargs"}
    encoder = Persistent(type(encoder).__name__, own | {"_init_args": (), "_init_kwargs": EasyDict()}, flag)
    loss = dict(P_mean=-0.8, P_std=1.6, sigma_data=0.5, _init_args=(), _init_kwargs=dict(P_mean=-0.8, P_std=1.6))
    data = EasyDict(class_name="training.dataset.ImageFolderDataset", path="data.zip", use_labels=True)
    return EasyDict(
        encoder=encoder,
        dataset_kwargs=data,
        loss_fn=Persistent("EDM2Loss", loss, flag),
        ema=module(half, (), kwargs, flag),
    )


def edm_net(kind, model="SongUNet", seed=0, **more):
    """(network, positional arguments, keyword arguments) of an EDM-era preconditioner."""
    classes = dict(edm=EDMPrecond, vp=VPPrecond, ve=VEPrecond, iddpm=iDDPMPrecond)
    kwargs = EasyDict(SMALL_EDM, use_fp16=False, model_type=model, augment_dim=9, **more)
    if model == "SongUNet":
        kwargs |= dict(embedding_type="fourier", encoder_type="residual", decoder_type="standard")
        kwargs |= dict(channel_mult_noise=2, resample_filter=[1, 3, 3, 1])
    args = tuple(INTERFACE.values())
    return randomised(classes[kind](*args, **kwargs), seed), args, kwargs


def edm_content(net, args, kwargs, flag="executed", **more):
    """The dictionary of EDM's network-snapshot-*.pkl, with numbers of NumPy where EDM has them."""
    import numpy as np

    scale = dict(skip_scale=np.sqrt(0.5), num_heads=1)
    loss = dict(P_mean=-1.2, P_std=1.2, sigma_data=0.5, _init_args=(), _init_kwargs={})
    pipe = dict(p=0.12, xflip=1e8, _init_args=(), _init_kwargs=dict(p=0.12, xflip=1e8))
    ema = module(net, args, kwargs, flag, **scale, sigma_max=float("inf"), **more)
    return dict(
        ema=ema,
        loss_fn=Persistent("EDMLoss", loss, flag),
        augment_pipe=Persistent("AugmentPipe", pipe, flag),
        dataset_kwargs=dict(class_name="training.dataset.ImageFolderDataset", path="cifar10.zip", use_labels=True),
    )


def pfgmpp_content(net, ema, args, kwargs, D=128, pfgmpp=True, flag="executed"):
    """PFGM++'s training state: whole modules, raw and averaged."""
    about = dict(D=D, N=192, pfgmpp=pfgmpp)
    kwargs = dict(kwargs, **about)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.randn(3))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    modules = {name: module(m, args, kwargs, flag, **about) for name, m in (("net", net), ("ema", ema))}
    return dict(**modules, optimizer_state=optimizer.state_dict(), step=193177 * 1000)


def toy_content(flag="executed", **sizes):
    """(the model itself, the object at the top of iterNNNN.pkl)."""
    net = randomised(ToyModel(**sizes))
    return net, module(net, (), EasyDict(sizes), flag)
