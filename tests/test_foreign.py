"""Snapshots of the published systems, look-alikes of every layout: outputs of the original, nothing executed."""

import hashlib
import json
import sys

import foreign_files as theirs
import matplotlib.figure
import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from small_runs import one_line, run

import convert_snapshot
import generate_images
from dnnlib import download
from simulations import run_tree
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


# --- commands ---------------------------------------------------------------------------------------------------------


def test_conversion_keeps_every_bit(tmp_path):
    net, kwargs = theirs.edm2_net()
    path = theirs.dump(theirs.edm2_content(net, kwargs), tmp_path / "network-snapshot-0002097-0.050.pkl")
    dest = tmp_path / "ours.safetensors"
    found = json.loads(run(convert_snapshot.main, f"--net={path}", f"--dest={dest}").stdout)
    assert found["net"]["class"] == "Precond" and found["nimg"] == 2097152 and found["types"] == ["float16"]
    assert found["parameters"] == sum(p.numel() for p in net.parameters()) and found["source"]["file"] == path.name
    old, new = load_snapshot(path), load_snapshot(dest)
    assert all(
        torch.equal(a, b) for a, b in zip(old.net.state_dict().values(), new.net.state_dict().values(), strict=True)
    )
    assert new.options == old.options and new.header["source"] == old.header["source"] and new.header["ema"] == "0.050"
    assert dest.stat().st_size < path.stat().st_size
    plain = tmp_path / "plain.safetensors"
    run(convert_snapshot.main, f"--net={dest}", f"--dest={plain}", "--state-dict")
    tensors = safetensors.torch.load_file(plain)
    assert sorted(tensors) == sorted(net.state_dict())
    assert torch.equal(tensors["unet.out_gain"], net.unet.out_gain.half())


def test_conversion_of_pfgmpp(tmp_path):
    (net, args, kwargs), (ema, _, _) = theirs.edm_net("edm"), theirs.edm_net("edm", seed=1)
    path = theirs.save(theirs.pfgmpp_content(net, ema, args, kwargs, 128), tmp_path / "training-state-000001.pt")
    for part, expected in (("ema", ema), ("net", net)):
        run(convert_snapshot.main, f"--net={path}", f"--dest={tmp_path / part}.safetensors", f"--part={part}")
        found = load_snapshot(tmp_path / f"{part}.safetensors")
        same(found.net, expected)
        assert found.process.D == 128
    before = sorted(p.name for p in tmp_path.iterdir())
    one_line(convert_snapshot.main, f"--net={path}", f"--dest={path}", says=["--dest", "--net"])
    one_line(convert_snapshot.main, f"--net={path}", f"--dest={tmp_path}/x.pkl", says="--dest")
    both = ["--state-dict", "--folder"]
    one_line(convert_snapshot.main, f"--net={path}", f"--dest={tmp_path}/both", *both, says=both)
    one_line(convert_snapshot.main, f"--net={path}", *both, says=both)
    assert not (tmp_path / "both").exists()
    ours = tmp_path / "ema.safetensors"
    one_line(convert_snapshot.main, f"--net={ours}", f"--dest={ours}", says=["--dest", "--net"])
    one_line(convert_snapshot.main, f"--net={ours}", "--part=net", says="part")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_sampling_needs_the_file_alone(tmp_path):
    """PFGM++'s prior has the D of the snapshot; guides, processes and solvers take any of the networks."""
    net, args, kwargs = theirs.edm_net("edm")
    path = theirs.save(theirs.pfgmpp_content(net, net, args, kwargs, 64), tmp_path / "training-state-000001.pt")
    run(generate_images.main, f"--net={path}", f"--outdir={tmp_path / 'a'}", "--seeds=0-1", "--steps=2")
    expected = generate_images.generate_images(net, seeds=[0, 1], kernel=processes.PFGMpp(64), num_steps=2)
    pixels = next(iter(expected)).images
    for seed in range(2):
        image = torch.from_numpy(np.array(PIL.Image.open(tmp_path / "a" / f"00000{seed}.png"))).permute(2, 0, 1)
        assert torch.equal(image, pixels[seed])
    one_line(generate_images.main, f"--net={path}", f"--outdir={tmp_path / 'b'}", "--aug-dim=32", says="D=64")
    one_line(generate_images.main, f"--net={path}", f"--outdir={tmp_path / 'b'}", "--process=cld", says="D=64")
    other = theirs.dump(theirs.edm_content(*theirs.edm_net("vp")), tmp_path / "vp.pkl")
    run(
        generate_images.main,
        f"--net={other}",
        f"--outdir={tmp_path / 'c'}",
        "--process=cld",
        "--solver=sscs",
        "--steps=2",
    )


def test_presets_from_a_folder_and_by_url(tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    models = tmp_path / "models"
    models.mkdir()
    for name, seed in (("edm2-img512-s-2147483-0.070", 0), ("edm2-img512-xs-0134217-0.125", 1)):
        theirs.dump(theirs.edm2_content(*theirs.edm2_net(seed)), models / f"{name}.pkl")

    def made(place, *more):
        options = [f"--outdir={tmp_path / place}", "--preset=edm2-img512-s-autog-fid", "--seeds=0", "--steps=2", *more]
        run(generate_images.main, *options)
        return (tmp_path / place / "000000.png").read_bytes()

    local, url = made("a", f"--models={models}"), made("b", f"--models={models.as_uri()}")
    assert local == url and len(list((tmp_path / "cache" / "downloads").glob("*.pkl"))) == 2
    guide = theirs.dump(theirs.edm2_content(*theirs.edm2_net(7)), tmp_path / "guide.pkl")
    assert made("c", f"--models={models}", f"--gnet={guide}") != local
    run(convert_snapshot.main, f"--net={models / 'edm2-img512-s-2147483-0.070.pkl'}",
        f"--dest={models / 'edm2-img512-s-2147483-0.070.safetensors'}")  # fmt: skip
    (models / "edm2-img512-s-2147483-0.070.pkl").unlink()
    assert made("d", f"--models={models}") == local
    command = [generate_images.main, f"--outdir={tmp_path / 'e'}", "--preset=edm2-img512-s-autog-fid"]
    one_line(*command, f"--models={tmp_path}", says=f"{tmp_path}/edm2-img512-s-2147483-0.070.pkl")
    one_line(*command[:2], f"--net={guide}", f"--models={models}", says="--models")


def test_a_file_that_changes_at_its_url_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    source = tmp_path / "net.pkl"
    source.write_bytes(b"one")
    path = download.cached(source.as_uri())
    assert (path.parent / f"{path.name}.sha256").read_text().strip() == hashlib.sha256(b"one").hexdigest()
    source.write_bytes(b"two")
    with pytest.raises(ValueError, match="is not the file of its first use"):
        download.cached(source.as_uri())
    assert path.read_bytes() == b"one"
    path.unlink()
    with pytest.raises(ValueError, match="net.pkl: is not the file of its first use"):
        download.cached(source.as_uri())
    assert not path.exists()
    path.write_bytes(b"three")  # in the cache itself
    with pytest.raises(ValueError, match="first use"):
        download.cached(source.as_uri())


def test_the_tree_is_drawn_from_published_models(tmp_path):
    for name, dim in (("clsA-layers04-dim64/iter4096", 8), ("clsA-layers04-dim32/iter0512", 4)):
        path = tmp_path / f"{name}.pkl"
        path.parent.mkdir()
        theirs.dump(theirs.toy_content(num_layers=1, hidden_dim=dim)[1], path)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        from simulations.tree import plots

        patch.setattr(plots, "autoguidance_figure", lambda *a: found.append(a) or matplotlib.figure.Figure())
        run(run_tree.main, "plot", f"--models={tmp_path}", f"--save={tmp_path / 'figure'}")
    assert [net.layers[0].weight.shape[0] for net in found[0][:2]] == [8, 4]
    one_line(run_tree.main, "plot", f"--net={tmp_path}/x.pkl", says="--models")
