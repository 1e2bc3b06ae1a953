"""Encoders: published constants, exact round trips, log-determinants against automatic differentiation."""

import json
import math
import pickle

import numpy as np
import PIL.Image
import pytest
import torch
from small_runs import one_line, python, run, small_command

import calculate_metrics
import dataset_tool
import generate_images
import train_edm2
from torch_utils.persistence import CLASSES, build, describe, save_snapshot
from training import encoders
from training.networks_edm2 import Precond

ENCODERS = [name for name, module in CLASSES.items() if module == "training.encoders"]


def pixels(channels=3, side=4, count=5):
    return torch.randint(0, 256, [count, channels, side, side], generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )


class PerSample:
    """One generator per sample, randn_like only."""

    def __init__(self, seeds):
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]

    def randn_like(self, x):
        return torch.stack([torch.randn(x.shape[1:], generator=g, dtype=x.dtype) for g in self.generators])


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_standard_rgb(channels):
    encoder = encoders.StandardRGBEncoder()
    every_level = torch.arange(256, dtype=torch.uint8).repeat(channels, 1).reshape(1, channels, 16, 16)
    z = encoder.encode(every_level)
    assert z.dtype == torch.float32 and torch.equal(z, every_level.float() / 127.5 - 1)
    assert torch.equal(encoder.decode(z), every_level)
    # EDM2: x * 127.5 + 128, clipped, truncated
    decoded = encoder.decode(torch.tensor([-9.0, -1.0, 0.0, 0.4999, 1.0, 9.0]).reshape(1, 1, 2, 3))
    assert decoded.flatten().tolist() == [0, 0, 128, 191, 255, 255]


@pytest.mark.parametrize("bad", [torch.zeros(1, 5, 2, 2, dtype=torch.uint8), torch.zeros(1, 3, 2, 2), torch.zeros(3)])
def test_pixels_are_checked(bad):
    with pytest.raises(ValueError, match="uint8"):
        encoders.StandardRGBEncoder().encode_pixels(bad)


@pytest.mark.parametrize("name", ["UniformDequantizer", "CenterEncoder", "LogitEncoder"])
def test_dequantised_round_trip_is_exact(name):
    encoder = getattr(encoders, name)()
    x = torch.arange(256).repeat(4096).reshape(1024, 1, 32, 32).to(torch.uint8)  # a million draws
    assert torch.equal(encoder.decode(encoder.encode(x, torch.Generator().manual_seed(1))), x)


def test_transforms_equal_the_formulas():
    """MDM: y = (x + U) / 256; center 2 y - 1; logit of alpha + (1 - 2 alpha) y, alpha = 0.05."""
    x = pixels()
    y = encoders.UniformDequantizer().encode(x, torch.Generator().manual_seed(3)).double()
    u = y * 256 - x.double()
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 4 / math.sqrt(12 * u.numel())
    z = encoders.CenterEncoder().encode(x, torch.Generator().manual_seed(3))
    torch.testing.assert_close(z.double(), 2 * y - 1, atol=1e-6, rtol=0)
    z = encoders.LogitEncoder().encode(x, torch.Generator().manual_seed(3))
    s = 0.05 + 0.9 * y
    torch.testing.assert_close(z.double(), s.log() - (1 - s).log(), atol=2e-6, rtol=0)
    edge = encoders.LogitEncoder()._forward(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(edge, torch.tensor([-2.944439, 2.944439]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("encoder", "map_from_unit"),
    [
        (encoders.UniformDequantizer(), lambda y: y),
        (encoders.CenterEncoder(), lambda y: 2 * y - 1),
        (encoders.LogitEncoder(), lambda y: torch.logit(0.05 + 0.9 * y)),
        (encoders.LogitEncoder(alpha=0.01), lambda y: torch.logit(0.01 + 0.98 * y)),
        (encoders.StandardRGBEncoder(), lambda y: y * 256 / 127.5 - 1),
    ],
)
def test_log_abs_det_is_that_of_the_jacobian(encoder, map_from_unit):
    y = torch.rand([3, 2, 2, 2], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = [
        torch.autograd.functional.jacobian(lambda v: map_from_unit(v).flatten(), row.flatten()).slogdet()[1]
        for row in y
    ]
    torch.testing.assert_close(encoder.log_abs_det(map_from_unit(y)), torch.stack(expected), atol=1e-10, rtol=1e-10)


def test_log_abs_det_refusals():
    with pytest.raises(ValueError, match="bits/dim"):
        encoders.StabilityVAEEncoder().log_abs_det(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match="final latents"):
        encoders.LogitEncoder().log_abs_det(pixels())
    with pytest.raises(ValueError, match="uint8"):
        encoders.CenterEncoder().encode_latents(torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="alpha"):
        encoders.LogitEncoder(alpha=0.5)


@pytest.mark.parametrize("encoder", [encoders.CenterEncoder(), encoders.StabilityVAEEncoder()])
def test_draws_come_from_the_generator(encoder):
    x = torch.rand(4, 8, 4, 4) if isinstance(encoder, encoders.StabilityVAEEncoder) else pixels(count=4)
    draw = lambda generator, rows=slice(None): encoder.encode_latents(x[rows], generator)
    assert torch.equal(draw(torch.Generator().manual_seed(5)), draw(torch.Generator().manual_seed(5)))
    assert not torch.equal(draw(torch.Generator().manual_seed(5)), draw(torch.Generator().manual_seed(6)))
    state = torch.get_rng_state()
    whole = draw(PerSample(range(4)))
    assert torch.equal(whole[2:3], draw(PerSample([2]), slice(2, 3)))  # Independent of the batch.
    assert torch.equal(state, torch.get_rng_state())


def test_per_sample_normals_dequantise_uniformly():
    scipy_stats = pytest.importorskip("scipy.stats")
    x = torch.zeros([4, 1, 50, 50], dtype=torch.uint8)
    u = encoders.UniformDequantizer().encode_latents(x, PerSample(range(4))) * 256
    assert scipy_stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3


# --- VAE --------------------------------------------------------------------------------------------------------------


def test_vae_constants():
    """EDM2's published scale and bias (float32)."""
    encoder = encoders.StabilityVAEEncoder()
    scale = torch.tensor([0.11990407, 0.10822511, 0.13477089, 0.15243903])
    bias = torch.tensor([-0.69664264, -0.3517316, -0.01617251, 0.32774392])
    torch.testing.assert_close(encoder.scale, scale, atol=1e-8, rtol=0)
    torch.testing.assert_close(encoder.bias, bias, atol=3e-8, rtol=0)


def test_vae_latents_formula():
    encoder = encoders.StabilityVAEEncoder(raw_mean=[1, 2], raw_std=[4, 8], final_mean=[0.5, 0], final_std=2)
    x = torch.cat([torch.full([1, 2, 3, 3], 5.0), torch.full([1, 2, 3, 3], 0.25)], dim=1)
    n = torch.randn([1, 2, 3, 3], generator=torch.Generator().manual_seed(0))
    z = encoder.encode_latents(x, torch.Generator().manual_seed(0))
    expected = torch.stack([(5 + 0.25 * n[:, 0] - 1) / 4 * 2 + 0.5, (5 + 0.25 * n[:, 1] - 2) / 8 * 2], dim=1)
    torch.testing.assert_close(z, expected)
    with pytest.raises(ValueError, match="4 channels"):
        encoder.encode_latents(torch.zeros(1, 3, 2, 2))


def test_vae_encode_and_decode_follow_edm2(tiny_vae):
    path, vae = tiny_vae
    encoder = encoders.StabilityVAEEncoder(vae_name=path, batch_size=2)
    x = pixels(side=8)
    with torch.no_grad():
        posterior = vae.encode(x.float() / 255)["latent_dist"]  # [0, 1], not [-1, 1]
    raw = encoder.encode_pixels(x)
    torch.testing.assert_close(raw, torch.cat([posterior.mean, posterior.std], dim=1), atol=1e-5, rtol=1e-5)
    z = torch.randn(3, 4, 4, 4)
    with torch.no_grad():
        images = vae.decode((z - encoder.bias.view(1, 4, 1, 1)) / encoder.scale.view(1, 4, 1, 1))["sample"]
    difference = encoder.decode(z).int() - (images.clamp(0, 1) * 255).to(torch.uint8).int()
    assert difference.abs().max() <= 1  # Batches of the VAE round differently.
    assert encoder.encode(x, torch.Generator().manual_seed(0)).shape == (5, 4, 4, 4)
    assert pickle.loads(pickle.dumps(encoder))._vae is None
    with pytest.raises(ValueError, match="divisible by 2"):
        encoder.encode_pixels(pixels(side=5))


def test_missing_vae_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="cannot load the VAE") as err:
        encoders.StabilityVAEEncoder(vae_name=str(tmp_path)).decode(torch.zeros(1, 4, 2, 2))
    assert "\n" not in str(err.value) and "--vae" in str(err.value)


# --- Specs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
def test_description_is_plain_data(name):
    encoder = getattr(encoders, name)()
    spec = json.loads(json.dumps(describe(encoder)))
    assert type(build(spec)) is type(encoder) and describe(build(spec)) == spec and repr(build(spec)) == repr(encoder)


def test_description_keeps_arguments():
    encoder = encoders.StabilityVAEEncoder(vae_name="x", raw_std=(1, 2, 3, 4), final_std=1)
    again = build(describe(encoder))
    assert again.vae_name == "x" and torch.equal(again.scale, encoder.scale)
    assert repr(build({"class": "LogitEncoder", "kwargs": {"alpha": 0.1}})) == "LogitEncoder(alpha=0.1)"


@pytest.mark.parametrize(
    ("channels", "cls"), [(1, "StandardRGBEncoder"), (3, "StandardRGBEncoder"), (8, "StabilityVAEEncoder")]
)
def test_for_channels(channels, cls):
    assert type(encoders.for_channels(channels)).__name__ == cls
    with pytest.raises(ValueError, match="5 channels"):
        encoders.for_channels(5)


def test_importing_encoders_leaves_diffusers_alone():
    python("-c", "import sys, training.encoders; sys.exit('diffusers' in sys.modules)")


@pytest.fixture
def asked(monkeypatch):
    """[(name, whether the network may be asked)] of every attempt to load a VAE; all fail."""
    diffusers, calls = pytest.importorskip("diffusers"), []

    def from_pretrained(name, local_files_only, **_):
        calls.append((name, not local_files_only))
        raise OSError("not there")

    monkeypatch.setattr(encoders, "_hub_is_away", lambda: None)
    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", from_pretrained)
    return calls


def test_a_file_sends_nobody_to_the_network(asked, tmp_path, tiny_net):
    """The header names a VAE; only what the user names is looked for on the hub."""
    net, path = tiny_net(0), tmp_path / "net.safetensors"
    save_snapshot(path, net, encoder=encoders.StabilityVAEEncoder(vae_name="somebody/else"))
    command = [f"--net={path}", f"--outdir={tmp_path / 'out'}", "--seeds=0", "--steps=1", "--device=cpu"]
    one_line(generate_images.main, *command, says=["somebody/else", "--vae=FOLDER"])
    gen = ["gen", f"--net={path}", f"--ref={path}", "--num=2", "--device=cpu"]
    one_line(calculate_metrics.cmdline, *gen, says=["somebody/else", "--vae=FOLDER"])
    assert asked == [("somebody/else", False)] * 2
    one_line(generate_images.main, *command, "--vae=my/own", says=["my/own", "--vae=FOLDER"])
    one_line(calculate_metrics.cmdline, *gen, "--vae=my/own", says="my/own")
    assert asked[2:] == [("my/own", False), ("my/own", True)] * 2


def test_training_on_latents_goes_on_without_the_vae(asked, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(8):
        np.save(data / f"img-mean-std-{i}.npy", np.random.RandomState(i).rand(8, 8, 8).astype(np.float32))
    command = [word for word in small_command(data, tmp_path / "run", "--cond=False") if word != "--grid=False"]
    with pytest.warns(UserWarning, match="without sample grids") as warned:
        run(train_edm2.main, *command)
    assert len(warned) == 2 and "is for pixels" in str(warned[0].message) + str(warned[1].message)
    assert asked == [("stabilityai/sd-vae-ft-mse", False)]
    assert list((tmp_path / "run").glob("network-snapshot-*")) and not list((tmp_path / "run").glob("samples-*"))
    one_line(
        dataset_tool.main, "decode", f"--source={data}", f"--dest={tmp_path}/x.zip", "--vae=my/own", says="--vae=FOLDER"
    )
    assert asked[1:] == [("my/own", False), ("my/own", True)]


def test_sampling_with_the_vae_of_a_folder(tmp_path, tiny_vae, tiny_net):
    folder, vae = tiny_vae
    path = tmp_path / "net.safetensors"
    torch.manual_seed(0)
    net = Precond(8, 4, 0, model_channels=8, channel_mult=[1], num_blocks=1, channels_per_head=8)
    save_snapshot(path, net, encoder=encoders.StabilityVAEEncoder())
    command = [f"--net={path}", "--seeds=0", "--steps=1", "--device=cpu"]
    run(generate_images.main, *command, f"--outdir={tmp_path / 'out'}", f"--vae={folder}")
    assert PIL.Image.open(tmp_path / "out" / "000000.png").size == (16, 16)
    save_snapshot(path, tiny_net(0), encoder=encoders.StandardRGBEncoder())
    with pytest.warns(UserWarning, match="--vae=.*no effect"):
        run(generate_images.main, *command, f"--outdir={tmp_path / 'rgb'}", f"--vae={folder}")
