"""Snapshots of the published systems, look-alikes of every layout: outputs of the original, nothing executed."""

import sys

import foreign_files as theirs
import pytest
import torch

from torch_utils import persistence
from torch_utils.persistence import load_snapshot
from training import processes
from training.encoders import IdentityEncoder, StabilityVAEEncoder, StandardRGBEncoder

X, SIGMA, LABELS = (
    torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
    torch.tensor([0.3, 5.0]),
    torch.eye(5)[:2],
)


class Audit:
    """What the interpreter does while a file is read, watched from inside."""

    watching = None  # the one path that may be opened, or None
    seen = []
    EVENTS = (
        "compile",
        "exec",
        "import",
        "open",
        "os.",
        "subprocess",
        "socket",
        "ctypes",
        "shutil",
        "marshal",
        "pickle",
    )

    @classmethod
    def hook(cls, event, arguments):
        if cls.watching is None or not event.startswith(cls.EVENTS):
            return
        if event == "open" and str(arguments[0]) == cls.watching and arguments[1] in ("r", "rb", None):
            return
        cls.seen.append((event, str(arguments)[:100]))

    @classmethod
    def watched(cls, path, function):
        cls.watching, cls.seen[:] = str(path), []
        try:
            return function()
        finally:
            cls.watching = None
            assert cls.seen == [], cls.seen


sys.addaudithook(Audit.hook)


def load(path, warm=[]):  # noqa: B006 (once per process)
    """load_snapshot under the audit hook; what torch imports at its first use is imported before."""
    if not warm:
        warm.append(load_snapshot(path))
    return Audit.watched(path, lambda: load_snapshot(path))


def same(a, b, x=X, labels=LABELS):
    torch.testing.assert_close(a(x, SIGMA, labels), b(x, SIGMA, labels), rtol=1e-6, atol=1e-6)
    assert a(x, SIGMA, labels).std() > 0.05 and not a.training and not any(p.requires_grad for p in a.parameters())


def rounded(net):
    """The weights as half precision keeps them."""
    return net.to(torch.float16).to(torch.float32)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("latents", [False, True])
def test_edm2(tmp_path, protocol, latents):
    flag = tmp_path / "executed"
    more = dict(img_channels=4, label_dim=0) if latents else {}
    net, kwargs = theirs.edm2_net(**more)
    path = tmp_path / "network-snapshot-0002097-0.050.pkl"
    theirs.dump(theirs.edm2_content(net, kwargs, flag, latents), path, protocol)
    found = load(path)
    x = torch.randn(2, 4, 8, 8) if latents else X
    same(found.net, rounded(net), x, None if latents else LABELS)
    assert type(found.encoder) is (StabilityVAEEncoder if latents else StandardRGBEncoder) and found.process is None
    assert (
        found.header["nimg"] == 2097152
        and found.header["ema"] == "0.050"
        and found.header["dataset"]["path"] == "data.zip"
    )
    assert found.options["P_mean"] == -0.8 and found.options["loss_fn"]["class"] == "EDM2Loss"
    assert found.net.logvar_fourier.freqs.dtype == torch.float32 and persistence.read_header(path) == found.header
    assert not flag.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize(
    "kind, model, more",
    [
        ("edm", "SongUNet", {}),
        ("edm", "DhariwalUNet", dict(sigma_data=0.6)),
        ("vp", "SongUNet", dict(epsilon_t=1e-3)),
        ("ve", "SongUNet", dict(sigma_max=50)),
        ("iddpm", "DhariwalUNet", {}),
    ],
)
def test_edm(tmp_path, kind, model, more, protocol):
    net, args, kwargs = theirs.edm_net(kind, model, **more)
    path = theirs.dump(theirs.edm_content(net, args, kwargs), tmp_path / f"edm-cifar10-32x32-cond-{kind}.pkl", protocol)
    found = load(path)
    same(found.net, net)
    for name in ("sigma_min", "sigma_max", "sigma_data", "label_dim", "img_resolution", "img_channels"):
        assert getattr(found.net, name) == getattr(net, name), name
    assert type(found.encoder) is StandardRGBEncoder and found.process is None and found.header["nimg"] is None
    assert found.options["augment_pipe"]["p"] == 0.12


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("D, pfgmpp, expected", [(128, True, 128.0), (2048, True, 2048.0), (128, False, torch.inf)])
def test_pfgmpp(tmp_path, D, pfgmpp, expected, old):
    net, args, kwargs = theirs.edm_net("edm")
    ema, _, _ = theirs.edm_net("edm", seed=1)
    content = theirs.pfgmpp_content(net, ema, args, kwargs, D, pfgmpp)
    path = tmp_path / "training-state-193177.pt"
    theirs.save(content, path, _use_new_zipfile_serialization=not old)
    found = load(path)
    same(found.net, ema)
    assert processes.aug_dim(found.process) == expected and found.header["nimg"] == 193177000
    header, state = persistence.read_snapshot(path, part="net")
    assert header["source"]["part"] == "net" and all(
        torch.equal(state[f"net.{k}"], v) for k, v in net.state_dict().items()
    )
    theirs.dump(content, tmp_path / "training-state-195686.pkl", 3)
    again = load(tmp_path / "training-state-195686.pkl")
    same(again.net, ema)
    assert processes.aug_dim(again.process) == expected


def test_toy(tmp_path):
    net, content = theirs.toy_content(num_layers=2, hidden_dim=8)
    found = load(theirs.dump(content, tmp_path / "iter0512.pkl"))
    x = torch.randn(3, 2, 1, 1)
    assert torch.equal(found.net(x, 0.5), net(x, 0.5)) and type(found.encoder) is IdentityEncoder


def test_arguments_at_the_level_of_the_meta_dict(tmp_path):
    """As the persistence of StyleGAN2's time might keep them."""
    net, args, kwargs = theirs.edm_net("vp")
    ema = theirs.module(net)
    ema.meta["state"].pop("_init_args"), ema.meta["state"].pop("_init_kwargs")
    ema.meta |= dict(init_args=args, init_kwargs=kwargs)
    same(load(theirs.dump(dict(ema=ema), tmp_path / "old.pkl", 3)).net, net)
