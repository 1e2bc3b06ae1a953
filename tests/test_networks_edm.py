"""EDM-era networks against published sizes, closed forms and independent library functions."""

import math

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F

from torch_utils.persistence import load_snapshot, save_snapshot
from training.networks_edm import DhariwalUNet, EDMPrecond, SongUNet, VEPrecond, VPPrecond, iDDPMPrecond
from training.networks_edm.layers import BlockStyle, Conv2d, Linear, UNetBlock, attention

DDPMPP = {"model_type": "SongUNet"}
NCSNPP = {
    "model_type": "SongUNet",
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
ADM = {"model_type": "DhariwalUNet"}
ARCHS = {
    "ddpmpp": DDPMPP,
    "ncsnpp": NCSNPP,
    "adm": ADM,
    "skip": {**DDPMPP, "encoder_type": "skip", "decoder_type": "skip"},
}
CIFAR = {"img_resolution": 32, "channel_mult": [2, 2, 2], "augment_dim": 9}
FACES = {"img_resolution": 64, "augment_dim": 9}


def tiny(precond=EDMPrecond, arch="ddpmpp", **kwargs):
    torch.manual_seed(0)
    options = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.0}
    if arch == "adm":
        options.update(model_channels=32)
    net = precond(8, 3, **{**ARCHS[arch], **options, **kwargs}).eval()
    with torch.no_grad():  # initial outputs are near zero: make them count
        for name, parameter in net.named_parameters():
            if "aux_conv" in name or "out_conv" in name or "conv1" in name or "proj" in name:
                parameter.normal_(std=0.1)
    return net


@pytest.mark.parametrize(
    "options, count",
    [
        ({**DDPMPP, **CIFAR}, 55_733_891),
        ({**DDPMPP, **CIFAR, "label_dim": 10}, 55_735_299),
        ({**NCSNPP, **CIFAR}, 56_397_827),
        ({**NCSNPP, **CIFAR, "label_dim": 10}, 56_400_643),
        ({**DDPMPP, **FACES}, 61_805_571),
        ({**NCSNPP, **FACES}, 62_761_091),
        ({**ADM, "img_resolution": 64, "label_dim": 1000}, 295_899_267),
    ],
)
def test_published_parameter_counts(options, count):
    with torch.device("meta"):
        net = EDMPrecond(img_channels=3, **options)
    assert sum(p.numel() for p in net.parameters()) == count


def test_state_dict_names_and_order():
    with torch.device("meta"):
        names = list(EDMPrecond(img_channels=3, label_dim=10, **NCSNPP, **CIFAR).state_dict())
    head = ["map_noise.freqs", "map_label.weight", "map_label.bias", "map_augment.weight", "map_layer0.weight"]
    assert names[:5] == ["model." + name for name in head]
    block = [name.removeprefix("model.enc.16x16_block0.") for name in names if "enc.16x16_block0." in name]
    layers = ["norm0", "conv0", "affine", "norm1", "conv1", "norm2", "qkv", "proj"]
    assert block == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert "model.enc.16x16_aux_residual.resample_filter" in names
    assert (
        "model.enc.16x16_down.skip.resample_filter" in names and "model.enc.16x16_down.conv0.resample_filter" in names
    )
    assert "model.enc.32x32_conv.resample_filter" not in names and "model.enc.32x32_block0.qkv.weight" not in names
    # Decoder attention: deepest in0, and only the last block of an attention resolution.
    attend = [name.split(".")[2] for name in names if name.startswith("model.dec.") and name.endswith("qkv.weight")]
    assert attend == ["8x8_in0", "16x16_block4"]
    assert names[-4:] == [f"model.dec.32x32_aux_{x}.{y}" for x in ("norm", "conv") for y in ("weight", "bias")]
    with torch.device("meta"):
        adm = [name for name in EDMPrecond(64, 3, 1000).state_dict() if name.endswith("qkv.weight")]
    assert sum("enc.32x32" in name for name in adm) == 3 and sum("dec.32x32" in name for name in adm) == 4
    assert "model.dec.8x8_in0.qkv.weight" in adm and not any("64x64" in name for name in adm)


def test_seeded_initialisation_follows_the_published_draw_order():
    torch.manual_seed(3)
    net = SongUNet(8, 3, 3, label_dim=4, **{k: v for k, v in NCSNPP.items() if k != "model_type"}, model_channels=8)
    torch.manual_seed(3)
    freqs = torch.randn(8) * 16
    label = math.sqrt(6 / (4 + 16)) * (torch.rand(16, 4) * 2 - 1)
    torch.rand(16)  # the bias is drawn, then multiplied by zero
    layer0 = math.sqrt(6 / (16 + 32)) * (torch.rand(32, 16) * 2 - 1)
    assert torch.equal(net.map_noise.freqs, freqs)
    torch.testing.assert_close(net.map_label.weight.data, label)
    assert not net.map_label.bias.any()
    torch.testing.assert_close(net.map_layer0.weight.data, layer0)

    torch.manual_seed(4)
    net = DhariwalUNet(8, 3, 3, label_dim=5, model_channels=32, channel_mult=[1])
    torch.manual_seed(4)
    weight = math.sqrt(1 / 3) * math.sqrt(3 / 32) * (torch.rand(128, 32) * 2 - 1)
    bias = math.sqrt(1 / 3) * math.sqrt(3 / 32) * (torch.rand(128) * 2 - 1)
    torch.testing.assert_close(net.map_layer0.weight.data, weight)
    torch.testing.assert_close(net.map_layer0.bias.data, bias)
    torch.rand(128, 128), torch.rand(128)  # map_layer1
    torch.testing.assert_close(net.map_label.weight.data, math.sqrt(5) * math.sqrt(1 / 5) * torch.randn(128, 5))


@pytest.mark.parametrize(
    "mode, low, std",
    [
        ("xavier_uniform", 6, None),
        ("xavier_normal", None, 2),
        ("kaiming_uniform", 3, None),
        ("kaiming_normal", None, 1),
    ],
)
def test_initial_weights_have_the_named_law(mode, low, std):
    torch.manual_seed(0)
    weight = Linear(200, 300, init_mode=mode).weight.data
    fan = 500 if "xavier" in mode else 200
    if low:
        assert weight.abs().max() <= math.sqrt(low / fan)
    assert weight.square().mean() == pytest.approx((low / 3 if low else std) / fan, rel=0.02)
    with pytest.raises(ValueError, match="init_mode='he'"):
        Linear(2, 2, init_mode="he")


def test_resampling_convolutions():
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(Conv2d(4, 4, kernel=0, up=True)(x), F.interpolate(x, scale_factor=2))
    torch.testing.assert_close(Conv2d(4, 4, kernel=0, down=True)(x), F.avg_pool2d(x, 2))

    image = np.random.RandomState(0).randn(8, 8)
    taps = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64
    for fused in (False, True):
        conv = Conv2d(1, 1, kernel=3, down=True, resample_filter=[1, 3, 3, 1], fused_resample=fused)
        kernel = conv.weight.data[0, 0].numpy()
        if fused:  # convolve, filter, decimate; zero padding only once at the outside
            full = scipy.signal.correlate2d(scipy.signal.correlate2d(np.pad(image, 2), kernel, "valid"), taps, "valid")
            expected = full[::2, ::2]
        else:
            small = scipy.signal.correlate2d(np.pad(image, 1), taps, "valid")[::2, ::2]
            expected = scipy.signal.correlate2d(small, kernel, "same")
        actual = conv(torch.tensor(image, dtype=torch.float32)[None, None]).detach()[0, 0]
        np.testing.assert_allclose(actual, expected, atol=1e-5)

        conv = Conv2d(1, 1, kernel=3, up=True, resample_filter=[1, 3, 3, 1], fused_resample=fused)
        spread = np.zeros((16, 16))
        spread[::2, ::2] = image
        smooth = scipy.signal.convolve2d(np.pad(spread, ((2, 1), (2, 1))), taps * 4, "valid")
        expected = scipy.signal.correlate2d(smooth, conv.weight.data[0, 0].numpy(), "same")
        actual = conv(torch.tensor(image, dtype=torch.float32)[None, None]).detach()[0, 0]
        np.testing.assert_allclose(actual[2:-2, 2:-2], expected[2:-2, 2:-2], atol=1e-5)
    with pytest.raises(ValueError, match="exclude each other"):
        Conv2d(1, 1, 3, up=True, down=True)


def test_attention_equals_the_library():
    q, k, v = torch.randn(3, 6, 5, 9).unbind(0)
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(attention(q, k, v), expected)


@pytest.mark.parametrize("adaptive", [True, False])
def test_block_equals_its_formula(adaptive):
    torch.manual_seed(0)
    init = {"init_mode": "kaiming_normal", "init_bias": 0.5}
    options = {"adaptive_scale": adaptive, "skip_scale": 0.7, "eps": 1e-3, "init": init, "init_zero": init}
    block = UNetBlock(16, 32, BlockStyle(12, num_heads=2, **options), attention=True)
    x, emb = torch.randn(2, 16, 4, 4), torch.randn(2, 12)
    p = dict(block.named_parameters())
    norm = lambda x, name, groups: F.group_norm(x, groups, p[f"{name}.weight"], p[f"{name}.bias"], 1e-3)
    y = F.conv2d(F.silu(norm(x, "norm0", 4)), p["conv0.weight"], p["conv0.bias"], padding=1)
    affine = (emb @ p["affine.weight"].T + p["affine.bias"])[:, :, None, None]
    if adaptive:
        y = F.silu(norm(y, "norm1", 8) * (1 + affine[:, :32]) + affine[:, 32:])
    else:
        y = F.silu(norm(y + affine, "norm1", 8))
    y = F.conv2d(y, p["conv1.weight"], p["conv1.bias"], padding=1)
    y = (y + F.conv2d(x, p["skip.weight"], p["skip.bias"])) * 0.7
    qkv = F.conv2d(norm(y, "norm2", 8), p["qkv.weight"], p["qkv.bias"]).reshape(2, 2, 16, 3, 16)  # q, k, v fastest
    q, k, v = (qkv[:, :, :, i].transpose(2, 3) for i in range(3))
    a = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(2, 32, 4, 4)
    y = (y + F.conv2d(a, p["proj.weight"], p["proj.bias"])) * 0.7
    torch.testing.assert_close(block(x, emb), y, rtol=1e-4, atol=1e-4)


def test_embedding_is_sines_then_cosines_for_song_only():
    seen = []
    catch = lambda module, args: seen.append(args[0])
    for arch, endpoint in (("ddpmpp", 1), ("adm", 0)):
        net = tiny(arch=arch)
        net.model.map_layer0.register_forward_pre_hook(catch)
        half = net.model.map_layer0.in_features // 2
        net(torch.zeros(1, 3, 8, 8), torch.tensor(7.0))
        angle = math.log(7.0) / 4 * 10000.0 ** (-np.arange(half) / (half - endpoint))
        parts = [np.sin(angle), np.cos(angle)] if arch == "ddpmpp" else [np.cos(angle), np.sin(angle)]
        np.testing.assert_allclose(seen.pop()[0].detach(), np.concatenate(parts), atol=1e-6)


@pytest.mark.parametrize("precond", [EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond])
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("label_dim", [0, 4])
def test_every_combination_is_a_denoiser(precond, arch, label_dim):
    net = tiny(precond, arch, label_dim=label_dim, augment_dim=2)
    x, sigma = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([0.3, 2.0], dtype=torch.float64)
    labels = torch.eye(4)[:2] if label_dim else None
    denoised, logvar = net(x, sigma, labels, return_logvar=True)
    assert denoised.shape == x.shape and denoised.dtype == torch.float32
    assert logvar.shape == (2, 1, 1, 1) and not logvar.any()
    single = net(x[1:], torch.tensor(2.0), None if labels is None else labels[1:])
    torch.testing.assert_close(single[0], denoised[1], rtol=1e-4, atol=1e-5)
    augmented = net(x, sigma, labels, augment_labels=torch.ones(2, 2))
    assert (augmented - denoised).abs().max() > (1e-7 if arch != "adm" else -1)  # ADM starts without augment weights
    if label_dim:
        assert not torch.equal(net(x, sigma, labels.flip(0)), denoised)
        torch.testing.assert_close(net(x, sigma), net(x, sigma, torch.zeros(2, 4)))
    net.train()
    net(x, sigma, labels, augment_labels=torch.ones(2, 2)).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.label_dim == label_dim and net.img_resolution == 8 and net.img_channels == 3
    assert 0 <= net.sigma_min < net.sigma_max and net.sigma_data == 0.5


class Stub(torch.nn.Module):
    """A network that answers by a given function and remembers what it was asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        self.x, self.noise_labels = x, noise_labels
        return self.answer


def test_preconditioning_formulas():
    """A network that predicts exactly what each formulation defines must give back the clean image."""
    torch.manual_seed(0)
    clean, noise = torch.randn(3, 2, 8, 8) * 0.5, torch.randn(3, 2, 8, 8)
    sigma = torch.tensor([0.05, 0.7, 20.0])
    s = sigma.reshape(-1, 1, 1, 1)
    x = clean + s * noise
    c_skip, c_out = 0.25 / (s**2 + 0.25), s * 0.5 / (s**2 + 0.25).sqrt()
    time = (math.sqrt(0.1**2 + 2 * 19.9 * math.log(1 + 0.7**2)) - 0.1) / 19.9
    cases = [
        (EDMPrecond, (clean - c_skip * x) / c_out, x / (s**2 + 0.25).sqrt(), math.log(0.7) / 4),
        (VPPrecond, noise, x / (s**2 + 1).sqrt(), 999 * time),
        (VEPrecond, -noise, x, math.log(0.35)),
        (iDDPMPrecond, torch.cat([noise, noise + 9], dim=1), x / (s**2 + 1).sqrt(), None),
    ]
    for precond, answer, seen, c_noise in cases:
        with torch.device("meta"):
            net = precond(8, 2, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1)
        if precond is iDDPMPrecond:
            net.u = iDDPMPrecond(8, 2, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1).u
        net.model = Stub(answer)
        torch.testing.assert_close(net(x, sigma), clean, rtol=1e-4, atol=3e-5)
        torch.testing.assert_close(net.model.x, seen)
        if c_noise is not None:
            assert float(net.model.noise_labels[1]) == pytest.approx(c_noise, rel=1e-5)


def test_published_noise_ranges():
    small = {"model_channels": 32, "channel_mult": [1], "num_blocks": 1}
    vp = VPPrecond(8, 3, **small)
    assert vp.sigma_min == 0.0009765625 and vp.sigma_max == pytest.approx(152.17, abs=0.01)
    assert float(vp.sigma_inv(vp.sigma(torch.tensor(0.4)))) == pytest.approx(0.4, rel=1e-5)
    assert (VEPrecond(8, 3, **small).sigma_min, VEPrecond(8, 3, **small).sigma_max) == (0.02, 100)
    net = iDDPMPrecond(8, 3, **small)
    assert net.sigma_min == pytest.approx(0.006422, abs=1e-6) and net.sigma_max == pytest.approx(20291.2, abs=0.1)
    assert net.u.shape == (1001,) and net.u[-1] == 0
    sigma = torch.tensor([[0.5, 3.0], [1e9, 1e-9]])
    nearest = net.u[(sigma.flatten()[:, None] - net.u).abs().argmin(1)].reshape(2, 2)
    assert torch.equal(net.round_sigma(sigma), nearest)
    assert torch.equal(net.round_sigma(net.u[5:9], return_index=True), torch.arange(5, 9))
    assert EDMPrecond(8, 3, **small).round_sigma(0.3) == torch.tensor(0.3)


def test_logvar_head_is_optional_and_last():
    plain, with_head = tiny(), tiny(logvar_channels=16)
    extra = set(with_head.state_dict()) - set(plain.state_dict())
    assert extra == {"logvar.fourier.freqs", "logvar.linear.weight", "logvar.linear.bias"}
    conv = "model.enc.8x8_conv.weight"
    assert torch.equal(plain.state_dict()[conv], with_head.state_dict()[conv])
    x, sigma = torch.randn(3, 3, 8, 8), torch.tensor(1.5)
    assert not with_head(x, sigma, return_logvar=True)[1].any()
    torch.nn.init.normal_(with_head.logvar.linear.weight)
    logvar = with_head(x, sigma, return_logvar=True)[1]
    assert logvar.shape == (3, 1, 1, 1) and logvar.any()


def test_label_dropout_only_while_training():
    net = tiny(label_dim=4, label_dropout=1.0)
    x, labels = torch.randn(4, 3, 8, 8), torch.eye(4)
    with_labels, without = net(x, torch.ones(4), labels), net(x, torch.ones(4))
    assert not torch.allclose(with_labels, without, atol=1e-4)
    net.train()
    torch.testing.assert_close(net(x, torch.ones(4), labels), without)


def test_initial_adm_denoiser_is_the_skip_connection():
    net = EDMPrecond(8, 3, model_channels=64, channel_mult=[1, 1], num_blocks=1, attn_resolutions=[8])
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(net(x, torch.tensor(2.0)), x * 0.25 / 4.25)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model_type": "UNet"}, "model_type='UNet'.*SongUNet"),
        ({"encoder_type": "dense"}, "encoder_type='dense'"),
        ({"embedding_type": "rope"}, "embedding_type='rope'"),
        ({"decoder_type": "residual"}, "decoder_type='residual'"),
        ({"channel_mult": [1, 1, 1, 1, 1]}, "img_resolution=8 is not a multiple of 16"),
        ({"model_channels": 6}, "groups"),
    ],
)
def test_user_errors(options, message):
    with pytest.raises(ValueError, match=message):
        EDMPrecond(8, 3, **{"model_type": "SongUNet", "model_channels": 8, **options})


def test_snapshots_keep_network_and_arguments(tmp_path):
    net = tiny(VPPrecond, "ncsnpp", label_dim=3, logvar_channels=8)
    save_snapshot(tmp_path / "net.safetensors", net)
    loaded = load_snapshot(tmp_path / "net.safetensors").net
    x, sigma, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 2.0]), torch.eye(3)[:2]
    assert type(loaded) is VPPrecond and loaded.sigma_min == net.sigma_min
    assert torch.equal(loaded(x, sigma, labels), net(x, sigma, labels))
