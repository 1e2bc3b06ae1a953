"""Injected noise and rounded weights: against plain loops, and against the published counts of rounded tensors."""

import math

import numpy as np
import pytest
import torch
from small_runs import one_line, run

import generate_images
from torch_utils import persistence
from torch_utils.random import StackedRandomGenerator
from training import generation, networks_edm, processes, quantize, samplers

SONG = dict(model_type="SongUNet", model_channels=128, augment_dim=9)
DDPMPP = dict(SONG, embedding_type="positional", encoder_type="standard", channel_mult_noise=1, resample_filter=[1, 1])
NCSNPP = dict(
    SONG, embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=[1, 3, 3, 1]
)


# --- rounding ---------------------------------------------------------------------------------------------------------


def plain_quantize(values, bits):
    """Number by number in float32, as the published experiment describes it."""
    one = np.float32
    low, high, top = min(values), max(values), 2**bits - 1
    scale = one(one(high - low) / one(top))
    zero = math.trunc(float(min(max(one(-low / scale), 0), top)))
    rounded = []
    for x in values:
        position = min(max(one(one(zero) + one(x / scale)), 0), top)
        rounded.append(one(scale * one(round(float(position)) - zero)))  # Python rounds half to even
    return np.array(rounded, np.float32), float(scale), zero


@pytest.mark.parametrize("bits", [1, 3, 5, 8, 9])
@pytest.mark.parametrize("offset", [0.0, 0.4, 5.0, -5.0])
def test_quantizer_equals_a_plain_loop(bits, offset):
    """Also where the range holds no zero: there the published rule saturates."""
    x = torch.randn([6, 5], generator=torch.Generator().manual_seed(bits)) + offset
    ours = quantize.quantize_tensor(x, bits)
    expected, scale, zero = plain_quantize(list(x.flatten().numpy()), bits)
    np.testing.assert_allclose(ours.flatten(), expected, rtol=1e-6, atol=1e-7)
    codes = ours.flatten().numpy() / scale + zero
    assert codes.min() > -0.01 and codes.max() < 2**bits - 1 + 0.01
    np.testing.assert_allclose(codes, codes.round(), atol=1e-2)
    error = (ours - x).abs().max().item()
    if abs(offset) < 1:
        assert error <= scale * 1.0001  # the zero point is truncated, so up to a whole step
    elif bits > 1:
        assert error > scale


def test_zero_stays_zero():
    x = torch.tensor([-0.7, 0.0, 1.3, 0.0])
    for bits in range(2, 12):
        assert quantize.quantize_tensor(x, bits)[1] == 0


def test_degenerate_tensors():
    assert torch.equal(quantize.quantize_tensor(torch.zeros(3, 2), 5), torch.zeros(3, 2))
    assert torch.equal(quantize.quantize_tensor(torch.full([4], 0.3), 5), torch.zeros(4))  # as published
    half = quantize.quantize_tensor(torch.randn(4, generator=torch.Generator().manual_seed(0)).half(), 5)
    assert half.dtype == torch.float16
    for bits in (0, 25, 2.5):
        with pytest.raises(ValueError, match="--quantize-bits"):
            quantize.quantize_tensor(torch.ones(2), bits)


# --- which weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, resolution, tensors, parameters, rounded, share",
    [
        (dict(DDPMPP, channel_mult=[2, 2, 2]), 32, 417, 55_733_891, 71, 64.8),
        (dict(NCSNPP, channel_mult=[2, 2, 2]), 32, 421, 56_397_827, 73, 65.1),
        (dict(DDPMPP, channel_mult=[1, 2, 2, 2]), 64, None, 61_805_571, None, 66.5),
    ],
)
def test_original_policy_hits_the_published_tensors(options, resolution, tensors, parameters, rounded, share):
    with torch.device("meta"):
        net = networks_edm.EDMPrecond(resolution, 3, **options)
    sizes = {name: p.numel() for name, p in net.named_parameters()}
    names = quantize.quantized_names(net, "original")
    assert sum(sizes.values()) == parameters
    assert tensors is None or (len(sizes), len(names)) == (tensors, rounded)
    assert round(100 * sum(sizes[name] for name in names) / parameters, 1) == share
    if resolution == 32:  # what the substring meant: the image's own resolution
        assert names == quantize.quantized_names(net, "role")
    else:
        roles = quantize.quantized_names(net, "role")
        assert any("32x32" in name for name in roles) and not any("64x64" in name for name in roles)


def test_roles_in_the_edm2_network(tiny_net):
    net = tiny_net()
    names = quantize.quantized_names(net, "role")
    assert names and all("4x4" in name and "conv" in name or "attn" in name for name in names)
    before = {name: p.clone() for name, p in net.named_parameters()}
    rounded = quantize.quantize_weights(net, 4)
    for name, p in rounded.named_parameters():
        assert torch.equal(before[name], net.get_parameter(name))  # the network itself is left alone
        assert torch.equal(p, before[name]) != (name in names)
        assert name not in names or len(p.unique()) <= 16
    assert quantize.quantize_weights(net, None) is net
    with pytest.raises(ValueError, match="--quantize-policy"):
        quantize.quantize_weights(net, 4, "mine")
    with pytest.raises(ValueError, match="--quantize-policy=original"):
        quantize.quantize_weights(torch.nn.Linear(2, 2), 4)


def test_many_bits_reproduce_the_network(tiny_net):
    net, x = tiny_net(label_dim=0), torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(quantize.quantize_weights(net, 20)(x, 1.0), net(x, 1.0), atol=1e-3, rtol=1e-3)
    assert (quantize.quantize_weights(net, 2)(x, 1.0) - net(x, 1.0)).abs().max() > 1e-2


# --- noise ------------------------------------------------------------------------------------------------------------


class Linear:
    """D(x; sigma) = x / (1 + sigma^2): the denoiser of standard normal data. Counts its calls."""

    label_dim, sigma_data, sigma_min, sigma_max, img_channels, img_resolution = 0, 1.0, 0.0, math.inf, 1, 4

    def __init__(self):
        self.calls = 0

    def __call__(self, x, sigma, labels=None):
        self.calls += 1
        return x / (1 + sigma**2)


def test_injected_noise_equals_a_plain_loop():
    """x += alpha sigma_i eps_i at the start of every step, none before the corrector (published experiment)."""
    alpha, n, latents = 0.3, 6, torch.randn(3, 1, 4, 4, dtype=torch.float64)
    noise = torch.randn(n, 3, 1, 4, 4, dtype=torch.float64)
    queue = iter(noise)
    kept, net = latents.clone(), Linear()
    options = dict(num_steps=n, dtype=torch.float64, randn_like=lambda x: next(queue))
    ours = samplers.noisy_heun(alpha)(net, latents, **options)
    assert net.calls == 2 * n - 1 and next(queue, None) is None and torch.equal(latents, kept)
    t = [(80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(n)] + [0.0]
    x = latents * t[0]
    for i in range(n):
        x = x + alpha * t[i] * noise[i]
        d = (x - x / (1 + t[i] ** 2)) / t[i]
        euler = x + (t[i + 1] - t[i]) * d
        if i < n - 1:
            d = (d + (euler - euler / (1 + t[i + 1] ** 2)) / t[i + 1]) / 2
        x = x + (t[i + 1] - t[i]) * d
    torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-12)


def test_no_noise_is_the_sampler_itself():
    assert samplers.noisy_heun(0) is samplers.heun and samplers.noisy_heun(None) is samplers.heun
    with pytest.raises(ValueError, match="--inject-noise"):
        samplers.noisy_heun(-0.1)


def test_noise_belongs_to_the_seed():
    """The same pixels for any batch size; another seed, other noise."""
    made = {}
    for batch in (1, 3):
        batches = generation.generate_images(
            Linear(), range(5, 9), max_batch_size=batch, sampler=samplers.noisy_heun(0.5), num_steps=3
        )
        made[batch] = torch.cat([b.images for b in batches])
    assert torch.equal(made[1], made[3])
    assert len({image.numpy().tobytes() for image in made[1]}) == 4


def test_random_state_is_untouched_by_alpha_zero():
    generators = [StackedRandomGenerator("cpu", [1, 2]) for _ in range(2)]
    latents = torch.ones(2, 1, 4, 4)
    a = samplers.noisy_heun(0)(Linear(), latents, num_steps=3, randn_like=generators[0].randn_like)
    b = samplers.heun(Linear(), latents, num_steps=3, randn_like=generators[1].randn_like)
    assert torch.equal(a, b) and torch.equal(*(g.randn([2, 3]) for g in generators))


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def snapshot(tiny_net, tmp_path):
    path = tmp_path / "net.safetensors"
    persistence.save_snapshot(path, tiny_net(label_dim=3), process=processes.PFGMpp(64))
    return path


def generate(snapshot, outdir):
    """The command line; for small_runs."""
    return generate_images.main, f"--net={snapshot}", f"--outdir={outdir}", "--seeds=0-3", "--steps=3"


def images(snapshot, outdir, *options):
    run(*generate(snapshot, outdir), *options)
    return {path.name: path.read_bytes() for path in sorted(outdir.glob("*.png"))}


def test_options_of_generate_images(snapshot, tmp_path):
    base = images(snapshot, tmp_path / "a")
    assert len(base) == 4
    assert images(snapshot, tmp_path / "b", "--aug-dim=64", "--inject-noise=0", "--quantize-policy=original") == base
    noisy = images(snapshot, tmp_path / "c", "--inject-noise=0.4")
    assert noisy != base
    assert images(snapshot, tmp_path / "d", "--inject-noise=0.4", "--batch=1") == noisy
    assert images(snapshot, tmp_path / "e", "--quantize-bits=2") != base
    one_line(*generate(snapshot, tmp_path / "f"), "--aug-dim=128", says=["--aug-dim=128", "D=64"])
    one_line(*generate(snapshot, tmp_path / "f"), "--aug-dim=inf")
    assert not (tmp_path / "f").exists()


def test_D_comes_from_the_snapshot(snapshot):
    batch = next(generation.generate_images(str(snapshot), [7], num_steps=1))
    expected = processes.PFGMpp(64).unit_noise([1, 1, 8, 8], StackedRandomGenerator("cpu", [7]))
    assert torch.equal(batch.noise, expected)


def test_noise_levels_stay_within_the_network():
    """As in EDM's sampler: a network made for sigma in [0.02, 100] is not asked beyond."""
    seen = []
    ask = type(
        "Ask", (Linear,), {"__call__": lambda self, x, s, labels=None: seen.append(float(s)) or x / (1 + s**2)}
    )()
    ask.sigma_min, ask.sigma_max = 0.02, 50.0
    list(generation.generate_images(ask, [0], num_steps=5))
    assert min(seen) == pytest.approx(0.02, rel=1e-4) and max(seen) == pytest.approx(50, rel=1e-4)
    seen.clear()
    list(generation.generate_images(ask, [0], num_steps=5, sigma_max=10.0))
    assert max(seen) == pytest.approx(10, rel=1e-4)
