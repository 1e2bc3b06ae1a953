"""The EDM2 network against published sizes and definitions written out in NumPy, float64."""

import itertools
import math

import numpy as np
import pytest
import scipy.signal
import torch

from training import networks_edm2
from training.networks_edm import layers
from training.networks_edm2 import Block, MPConv, MPFourier, Precond, UNet

# EDM2 table 6 and the released networks: channels, parameters with 1000 classes and without, RGB, elements of buffers.
SIZES = [
    (64, 31_309_029, 31_053_029, 31_307_877, 384),
    (128, 124_713_253, 124_201_253, 124_710_949, 512),
    (192, 280_212_837, 279_444_837, 280_209_381, 640),
    (256, 497_807_781, 496_783_781, 497_803_173, 768),
    (320, 777_498_085, 776_218_085, 777_492_325, 896),
    (384, 1_119_283_749, 1_117_747_749, 1_119_276_837, 1024),
    (448, 1_523_164_773, 1_521_372_773, 1_523_156_709, 1152),
]


def randn(*shape, seed=0):
    return np.random.RandomState(seed).randn(*shape)


def tensor(array, dtype=torch.float64):
    return torch.as_tensor(np.asarray(array), dtype=dtype)


def rms(x, axis):
    return np.sqrt(np.mean(np.square(x), axis=axis, keepdims=True))


def silu(x):
    return x / (1 + np.exp(-x))


# --- sizes and names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels, conditional, unconditional, rgb, buffers", SIZES)
def test_parameter_counts(channels, conditional, unconditional, rgb, buffers):
    def count(img_channels, label_dim):
        with torch.device("meta"):
            net = Precond(64, img_channels, label_dim, model_channels=channels)
        parameters = list(net.parameters())
        assert len(parameters) == (199 if label_dim else 198)
        assert sum(b.numel() for b in net.buffers()) == buffers
        return sum(p.numel() for p in parameters)

    assert (count(4, 1000), count(4, 0), count(3, 1000)) == (conditional, unconditional, rgb)


def test_state_dict_names_shapes_and_order():
    narrow, wide, emb = 16, 32, 32

    def block(name, cin, cout, flavor, heads=False):
        first = cout if flavor == "enc" else cin
        rows = [
            ("emb_gain", []),
            ("conv_res0.weight", [cout, first, 3, 3]),
            ("emb_linear.weight", [cout, emb]),
            ("conv_res1.weight", [cout, cout, 3, 3]),
        ]
        rows += [("conv_skip.weight", [cout, cin, 1, 1])] if cin != cout else []
        rows += [("attn_qkv.weight", [3 * cout, cout, 1, 1]), ("attn_proj.weight", [cout, cout, 1, 1])] if heads else []
        return [(f"unet.{name}.{row}", shape) for row, shape in rows]

    with torch.device("meta"):
        net = Precond(
            8, 1, 3, model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], channels_per_head=32
        )
    expected = [
        ("unet.out_gain", []),
        ("unet.emb_fourier.freqs", [narrow]),
        ("unet.emb_fourier.phases", [narrow]),
        ("unet.emb_noise.weight", [emb, narrow]),
        ("unet.emb_label.weight", [emb, 3]),
        ("unet.enc.8x8_conv.weight", [narrow, 2, 3, 3]),
        *block("enc.8x8_block0", narrow, narrow, "enc"),
        *block("enc.4x4_down", narrow, narrow, "enc"),
        *block("enc.4x4_block0", narrow, wide, "enc", heads=True),
        *block("dec.4x4_in0", wide, wide, "dec", heads=True),
        *block("dec.4x4_in1", wide, wide, "dec"),
        *block("dec.4x4_block0", wide + wide, wide, "dec", heads=True),
        *block("dec.4x4_block1", wide + narrow, wide, "dec", heads=True),
        *block("dec.8x8_up", wide, wide, "dec"),
        *block("dec.8x8_block0", wide + narrow, narrow, "dec"),
        *block("dec.8x8_block1", narrow + narrow, narrow, "dec"),
        ("unet.out_conv.weight", [1, narrow, 3, 3]),
        ("logvar_fourier.freqs", [128]),
        ("logvar_fourier.phases", [128]),
        ("logvar_linear.weight", [1, 128]),
    ]
    assert [(name, list(value.shape)) for name, value in net.state_dict().items()] == expected


def test_narrow_attention_is_left_out_with_a_warning():
    with torch.device("meta"), pytest.warns(UserWarning, match="attention is left out"):
        block = Block(32, 32, 8, attention=True)
    assert block.attn_qkv is None and not any("attn" in name for name in block.state_dict())


# --- primitives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [None, 1])
def test_normalize(axis):
    x = randn(3, 4, 5, 5) * 7
    axes = (1, 2, 3) if axis is None else axis
    expected = x / (1e-4 + rms(x, axes))  # eps outside the root
    result = networks_edm2.normalize(tensor(x, torch.float32), dim=axis)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-6)
    small = networks_edm2.normalize(tensor(x * 1e-6, torch.float32), dim=axis).numpy()
    np.testing.assert_allclose(small, x * 1e-6 / (1e-4 + 1e-6 * rms(x, axes)), rtol=1e-6)


@pytest.mark.parametrize("t", [0.5, 0.3, 0.9])
def test_sum_and_concatenation(t):
    a, b, c = randn(2, 6, 3, 3), randn(2, 6, 3, 3, seed=1), randn(2, 10, 3, 3, seed=2)
    scale = math.sqrt((1 - t) ** 2 + t**2)
    result = networks_edm2.mp_sum(tensor(a), tensor(b), t=t)
    np.testing.assert_allclose(result.numpy(), ((1 - t) * a + t * b) / scale, rtol=1e-12)
    factor = math.sqrt(16) / scale
    joined = np.concatenate([a * factor * (1 - t) / math.sqrt(6), c * factor * t / math.sqrt(10)], axis=1)
    np.testing.assert_allclose(networks_edm2.mp_cat(tensor(a), tensor(c), t=t).numpy(), joined, rtol=1e-12)


def test_silu_and_fourier():
    x = randn(50)
    np.testing.assert_allclose(networks_edm2.mp_silu(tensor(x)).numpy(), silu(x) / 0.596, rtol=1e-12)
    torch.manual_seed(3)
    layer = MPFourier(6)
    torch.manual_seed(3)
    freqs, phases = 2 * np.pi * torch.randn(6).numpy(), 2 * np.pi * torch.rand(6).numpy()  # in that order
    expected = math.sqrt(2) * np.cos(np.outer(x[:5], freqs) + phases)
    np.testing.assert_allclose(layer(tensor(x[:5], torch.float32)).numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("taps, mode", itertools.product([[1, 1], [1, 3, 3, 1]], ["down", "up", "keep"]))
def test_resample(taps, mode):
    x = randn(2, 3, 8, 8)
    if mode == "keep":
        expected = x
    else:
        f = np.outer(taps, taps) / np.sum(taps) ** 2
        pad = (len(taps) - 1) // 2
        expected = []
        for image in x.reshape(-1, 8, 8):
            if mode == "down":
                full = scipy.signal.correlate2d(np.pad(image, pad), f, mode="valid")
                expected.append(full[::2, ::2])
            else:
                wide = np.zeros([15, 15])
                wide[::2, ::2] = image
                full = scipy.signal.convolve2d(wide, f * 4, mode="full")
                expected.append(full[pad : len(full) - pad, pad : len(full) - pad])
        expected = np.stack(expected).reshape(2, 3, *expected[0].shape)
    np.testing.assert_allclose(networks_edm2.resample(tensor(x), taps, mode).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("taps", [[1, 2, 1], [[1, 1]]])
def test_resample_refuses_odd_filters(taps):
    with pytest.raises(ValueError, match="even number of taps"):
        networks_edm2.resample(torch.zeros(1, 1, 4, 4), taps, "down")


@pytest.mark.parametrize("kernel", [[], [1, 1], [3, 3]])
def test_conv_weights_in_eval_and_training(kernel):
    layer = MPConv(4, 6, kernel).eval()
    weight = layer.weight.detach().double().numpy().copy()
    axes = tuple(range(1, weight.ndim))
    x = randn(2, 4, *([5, 5] if kernel else []))

    def apply(w):
        w = w / (1e-4 + rms(w, axes)) * 1.7 / math.sqrt(w[0].size)
        if not kernel:
            return x @ w.T
        pad = kernel[0] // 2
        padded = np.pad(x, [(0, 0), (0, 0), (pad, pad), (pad, pad)])
        return np.stack(
            [
                [
                    sum(scipy.signal.correlate2d(p, k, mode="valid") for p, k in zip(image, filters, strict=True))
                    for filters in w
                ]
                for image in padded
            ]
        )

    result = layer(tensor(x, torch.float32), gain=1.7).detach().numpy()
    np.testing.assert_allclose(result, apply(weight), rtol=1e-4, atol=1e-5)
    assert np.array_equal(layer.weight.detach().double().numpy(), weight)  # eval mode leaves the weights alone

    normalized = weight / (1e-4 + rms(weight, axes))
    result = layer.train()(tensor(x, torch.float32), gain=1.7).detach().numpy()
    np.testing.assert_allclose(layer.weight.detach().numpy(), normalized, rtol=1e-5)  # overwritten in place
    np.testing.assert_allclose(result, apply(normalized), rtol=1e-4, atol=1e-5)  # normalised twice


def test_gradient_is_orthogonal_to_the_weight():
    layer = MPConv(4, 6, [3, 3]).train()
    layer(torch.randn(2, 4, 5, 5)).square().sum().backward()
    along = (layer.weight.grad * layer.weight).flatten(1).sum(dim=1)
    assert float(along.abs().max().detach()) < 1e-3 * float(layer.weight.grad.norm())


def test_attention_layout():
    """Channels of qkv are [heads, feature, qkv] with qkv fastest; q, k and v are normalised over the features."""
    block = Block(12, 12, 8, flavor="dec", attention=True, channels_per_head=4, attn_balance=0.3).eval()
    x = randn(2, 12, 3, 3)
    w_qkv, w_proj = (
        w.weight.detach().double().numpy()[:, :, 0, 0]
        / (1e-4 + rms(w.weight.detach().double().numpy(), (1, 2, 3)))[..., 0, 0]
        for w in (block.attn_qkv, block.attn_proj)
    )
    mixed = np.einsum("oc,ncp->nop", w_qkv / math.sqrt(12), x.reshape(2, 12, 9))
    out = np.zeros([2, 12, 9])
    for n, head in itertools.product(range(2), range(3)):
        rows = [[mixed[n, (head * 4 + feature) * 3 + which] for feature in range(4)] for which in range(3)]
        q, k, v = (np.array(r) / (1e-4 + rms(np.array(r), 0)) for r in rows)  # [feature, pixel]
        logits = np.einsum("cq,ck->qk", q, k) / math.sqrt(4)
        weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        out[n, head * 4 : head * 4 + 4] = np.einsum("qk,ck->cq", weights, v)
    expected = np.einsum("oc,ncp->nop", w_proj / math.sqrt(12), out).reshape(x.shape)
    result = block._attend(tensor(x, torch.float32)).detach().numpy()
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_block_follows_its_definition():
    """An encoder block with a skip convolution, down-sampling and clipping, from the primitives."""
    torch.manual_seed(0)
    block = Block(4, 6, 8, flavor="enc", resample_mode="down", clip_act=1.0).eval()
    with torch.no_grad():
        block.emb_gain.fill_(0.8)
    x, emb = torch.randn(2, 4, 8, 8) * 2, torch.randn(2, 8)
    y = block.conv_skip(torch.nn.functional.avg_pool2d(x, 2))
    y = y / (1e-4 + y.square().mean(dim=1, keepdim=True).sqrt())
    r = block.conv_res0(torch.nn.functional.silu(y) / 0.596)
    r = torch.nn.functional.silu(r * (block.emb_linear(emb, gain=0.8) + 1)[:, :, None, None]) / 0.596
    r = block.conv_res1(r)
    expected = ((0.7 * y + 0.3 * r) / math.sqrt(0.7**2 + 0.3**2)).clip(-1, 1)
    torch.testing.assert_close(block(x, emb), expected, rtol=1e-4, atol=1e-5)


# --- the whole network ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label_dim", [0, 3])
def test_preconditioning(tiny_net, label_dim):
    net = tiny_net(label_dim, sigma_data=0.7)
    x, sigma = torch.randn(4, 1, 8, 8), torch.tensor([0.01, 0.5, 3.0, 80.0])
    labels = torch.eye(3)[[0, 1, 2, 0]] if label_dim else None
    denoised, logvar = net(x, sigma, labels, return_logvar=True)
    s = sigma.double().numpy().reshape(-1, 1, 1, 1)
    c_in = 1 / np.sqrt(s**2 + 0.49)
    f = net.unet(tensor(c_in * x.numpy(), torch.float32), torch.log(sigma) / 4, labels).detach().double().numpy()
    expected = 0.49 / (s**2 + 0.49) * x.numpy() + s * 0.7 / np.sqrt(s**2 + 0.49) * f
    np.testing.assert_allclose(denoised.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    assert denoised.dtype == torch.float32 and logvar.shape == (4, 1, 1, 1)
    w = net.logvar_linear.weight.detach().double().numpy()[0]
    phase = np.outer(np.log(s.ravel()) / 4, net.logvar_fourier.freqs.numpy()) + net.logvar_fourier.phases.numpy()
    head = math.sqrt(2) * np.cos(phase) @ (w / (1e-4 + rms(w, 0))) / math.sqrt(128)
    np.testing.assert_allclose(logvar.detach().numpy().ravel(), head, atol=1e-3)


def test_labels_matter_and_broadcast(tiny_net):
    net = tiny_net(3)
    x, sigma = torch.randn(4, 1, 8, 8), torch.tensor(0.5)
    one = net(x, sigma, torch.eye(3)[[1]])
    torch.testing.assert_close(one, net(x, sigma.expand(4), torch.eye(3)[[1] * 4]))
    assert not torch.allclose(one, net(x, sigma, torch.eye(3)[[2]]))
    torch.testing.assert_close(net(x, sigma), net(x, sigma, torch.zeros(4, 3)))  # None: zeros
    unconditional = tiny_net(0)
    assert unconditional.unet.emb_label is None
    torch.testing.assert_close(unconditional(x, sigma), unconditional(x, sigma, torch.eye(3)[[1] * 4]))


def test_label_embedding_scale(tiny_net):
    """One-hot labels are scaled by the root of their length, so that the embedding has unit magnitude."""
    net = tiny_net(3).unet
    c = torch.tensor([0.2])
    noise = net.emb_noise(net.emb_fourier(c))
    weight = net.emb_label.weight.detach()
    weight = weight / (1e-4 + weight.square().mean(dim=1, keepdim=True).sqrt())
    label = weight[:, 1]  # one-hot * sqrt(3) / sqrt(fan_in = 3)
    expected = torch.nn.functional.silu((0.5 * noise + 0.5 * label) / math.sqrt(0.5)) / 0.596
    seen = []
    handle = net.enc["8x8_block0"].emb_linear.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0])
    )
    net(torch.randn(1, 1, 8, 8), c, torch.eye(3)[[1]])
    handle.remove()
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.006)])
def test_reduced_precision_stays_close(tiny_net, dtype, tolerance):
    net = tiny_net(3).unet
    x, c, labels = torch.randn(4, 1, 8, 8), torch.tensor([-1.0, -0.2, 0.1, 0.9]), torch.eye(3)[[0, 1, 2, 0]]
    full = net(x, c, labels)
    reduced = net(x.to(dtype), c, labels)
    assert reduced.dtype == dtype
    assert float((reduced.float() - full).norm() / full.norm()) < tolerance


def test_training_mode_renormalises_every_weight_once(tiny_net):
    net = tiny_net(3).train()
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim > 1:
                p.mul_(5)
    before = net.eval()(torch.ones(1, 1, 8, 8), torch.tensor(0.5))
    after = net.train()(torch.ones(1, 1, 8, 8), torch.tensor(0.5), return_logvar=True)[0]
    for name, p in net.named_parameters():
        if p.ndim > 1:
            magnitude = p.detach().flatten(1).square().mean(dim=1).sqrt()
            assert torch.allclose(magnitude, torch.ones_like(magnitude), atol=3e-4), name
    torch.testing.assert_close(before, after, rtol=5e-3, atol=5e-3)  # the scale of a weight means nothing


def test_untrained_network_returns_the_preconditioned_input():
    torch.manual_seed(0)
    net = Precond(
        8, 1, 0, model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[], channels_per_head=8
    )
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(net(x, torch.tensor(0.5)), x / 2)


@pytest.mark.parametrize("resolution, mult", [(8, [1, 2, 3, 4, 5]), (9, [1, 2]), (28, [1, 2, 2, 2]), (0, [1])])
def test_wrong_resolution_is_named(resolution, mult):
    if resolution == 28:
        assert 28 % 8
    with pytest.raises(ValueError, match=f"img_resolution={resolution}"):
        UNet(resolution, 1, 0, model_channels=8, channel_mult=mult, channels_per_head=8)


@pytest.mark.parametrize("per_head", [10, 0, -16])  # 3 heads of 32 channels; none; of a damaged file
@pytest.mark.parametrize("network", ["edm2", "ddpmpp"])
def test_heads_of_equal_width(network, per_head):
    with pytest.raises(ValueError, match="num_heads=3 does not make heads of equal width of 32 channels"):
        layers.UNetBlock(32, 32, layers.BlockStyle(emb_channels=8, num_heads=3), attention=True)
    with pytest.raises(ValueError, match=f"channels_per_head={per_head} .* of 32 channels: give a divisor"):
        if network == "edm2":
            UNet(8, 1, 0, model_channels=32, channel_mult=[1], channels_per_head=per_head)
        else:
            layers.UNetBlock(32, 32, layers.BlockStyle(emb_channels=8, channels_per_head=per_head), attention=True)


@pytest.mark.parametrize("resolution, mult, channels", [(8, [1, 2], 1), (28, [1, 2, 2], 3), (12, [1, 2, 2], 4)])
def test_other_resolutions_and_channels(resolution, mult, channels):
    net = Precond(resolution, channels, 2, model_channels=8, channel_mult=mult, num_blocks=1, channels_per_head=8)
    x = torch.randn(2, channels, resolution, resolution)
    assert net(x, torch.tensor([0.1, 1.0]), torch.eye(2)).shape == x.shape


def test_dropout_only_while_training(tiny_net):
    net = tiny_net(0, dropout=0.5)
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor(0.5)
    assert torch.equal(net(x, sigma), net(x, sigma))
    net.train()
    assert not torch.equal(net(x, sigma), net(x, sigma))
