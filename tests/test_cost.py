"""What a run will cost: against published numbers, closed forms, the allocator, and the files of a real run."""

import json
import re

import pytest
import torch
from small_runs import one_line, run, small_config
from torch.nn.functional import conv2d, silu

import count_flops
from training import cost, presets, setup
from training.config import make_config
from training.networks_edm2 import Precond

# papers/edm2.md 2.3: parameters, and 1e9 multiply-adds or elementwise operations per evaluation.
PUBLISHED = {
    "edm2-img512-xxs": (31_309_029, 11.53),
    "edm2-img512-s": (280_212_837, 101.92),
    "edm2-img512-xxl": (1_523_164_773, 552.07),
    "edm2-img64-s": (280_209_381, 101.90),
}


def of_preset(name):
    return cost.of_net(cost._network(make_config(name, data="x"), presets.interface(name)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    parameters, gflops = PUBLISHED[name]
    found = of_preset(name)
    assert found.parameters == parameters
    assert 0.978 < found.flops / 2e9 / gflops < 1  # the elementwise rest of the published count: 2 % (XXS) to 1 %
    assert found.training_flops / found.flops == pytest.approx(3, rel=1e-2)
    if name == "edm2-img512-s":  # papers/edm2.md 13
        assert found.operators["convolution"] / 2e9 == pytest.approx(100.236, rel=2e-4)
        assert (found.operators["matmul"] + found.operators["attention"]) / 2e9 == pytest.approx(0.593, abs=5e-4)


@pytest.mark.parametrize("name", ["edm2-img256-xs-10c-1000", "digits28"])
def test_closed_form_of_a_unet(name):
    """Multiply-adds from the shapes of the weights and the resolutions in their names."""
    net = cost._network(make_config(name, data="x"), presets.interface(name))
    linear = convolution = attention = 0
    for where, p in net.named_parameters():
        side = re.search(r"(\d+)x\d+_", where)
        pixels = int(side[1]) ** 2 if side else presets.interface(name)["img_resolution"] ** 2
        linear += p.numel() if p.ndim == 2 else 0
        convolution += p.numel() * pixels if p.ndim == 4 else 0
        attention += 2 * len(p) * pixels**2 if where.endswith("attn_proj.weight") else 0  # q k and the weighted v
    found = cost.of_net(net)
    assert found.operators["matmul"] == 2 * linear
    assert found.operators["attention"] == 2 * attention
    assert found.operators["convolution"] == pytest.approx(2 * convolution, rel=2e-3)  # the rest: resampling


class Plain(torch.nn.Module):
    """Two convolutions; what the backward pass keeps can be counted by hand."""

    img_resolution, img_channels, label_dim = 8, 2, 0

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Parameter(torch.randn(6, 2, 3, 3))
        self.second = torch.nn.Parameter(torch.randn(2, 6, 3, 3))

    def forward(self, x, sigma, labels=None, return_logvar=False):
        hidden = conv2d(x, self.first, padding=1)  # kept for silu, 6 maps
        return conv2d(silu(hidden), self.second * 2, padding=1), sigma  # 6 maps, and the doubled weight


def test_closed_form_of_two_convolutions():
    found, pixels = cost.of_net(Plain()), 64
    one = 2 * pixels * 6 * 2 * 9
    assert found.parameters == 216 and found.operators == {"convolution": 2 * one}
    assert found.training_flops == 2 * 3 * one - one  # the image needs no gradient
    assert found.activation_bytes == 4 * 2 * 6 * pixels and found.fixed_bytes == 4 * 108
    assert found.weight_bytes == 4 * 216


@pytest.mark.parametrize("batch", [2, 16])
def test_memory_is_what_the_allocator_hands_out(batch):
    torch.manual_seed(0)
    net = Precond(16, 3, 4, model_channels=16, channel_mult=[1, 2], attn_resolutions=[8], channels_per_head=16)
    net.use_fp16 = False
    inputs, found = cost._inputs(net.train(), batch, "cpu"), cost.of_net(net)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        _kept = net(*inputs, return_logvar=True)
    allocated = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    # Without a device attention keeps its weights; the fused kernels that every device has do not.
    assert 0.97 * allocated < found.fixed_bytes + batch * found.activation_bytes < 1.2 * allocated


def test_bytes_are_those_of_a_real_run(digits, tmp_path):
    config = small_config(digits, ema_std=[0.05, 0.1])
    found = cost.of_run(config, cost.shape_of(config))
    loop = setup.train(config, tmp_path)
    snapshots, checkpoints = [sorted(tmp_path.glob(end)) for end in ("*.safetensors", "training-state-*.pt")]
    assert (found.snapshots, found.checkpoints) == (len(snapshots), len(checkpoints)) == (6, 2)
    for path in snapshots:
        assert 0 < path.stat().st_size - found.snapshot_bytes < 0.1 * found.snapshot_bytes  # names, header
    for path in checkpoints:
        assert 0 < path.stat().st_size - found.checkpoint_bytes < 0.15 * found.checkpoint_bytes
    assert found.steps == 16 and found.images == 2048
    assert found.state_bytes - found.checkpoint_bytes == sum(4 * p.numel() for p in loop.parameters)  # gradients


def test_half_precision_halves_what_is_kept_and_stored():
    def of(**options):
        config = make_config("digits28", data="x", **options)
        return cost.of_run(config, presets.interface("digits28"))

    full, half = of(), of(fp16=True, snapshot_fp16=True)
    assert 0.45 < half.activation_bytes / full.activation_bytes < 0.65
    assert 0.5 <= half.snapshot_bytes / full.snapshot_bytes < 0.51 and half.state_bytes == full.state_bytes


def test_selection_is_counted():
    def scoring(**options):
        config = make_config("digits8", data="x", **options)
        found = cost.of_run(config, presets.interface("digits8"))
        return found.scoring_flops / found.flops

    assert scoring() == scoring(select="random") == 0
    assert scoring(select="hard", filter_ratio=0.75) == pytest.approx(4)
    assert scoring(select="jest", reference="ema") == pytest.approx(10)


def test_a_machine_is_measured_on_what_fits(monkeypatch):
    config, interface = make_config("digits8", data="x"), presets.interface("digits8")
    rate, name = cost.measured_rate(config, interface, seconds=0.2)
    assert 1e7 < rate < 1e13 and name == "the preset itself"
    wide = make_config("digits8", data="x", channels=64)
    enough = cost.of_net(cost._network(config, interface)).training_flops
    monkeypatch.setattr(cost, "_convolution_rate", lambda device: 40 * enough)
    assert cost.measured_rate(wide, interface, seconds=0.1)[1] == "the same network with --channels=16"
    assert cost._narrower(make_config("edm2-img512-xxl", data="x")).channels == 192
    assert cost._narrower(make_config("edm2-img512-xxs", data="x")) is None


def test_command(tmp_path):
    what = json.loads(run(count_flops.main, "--seconds=0.1", "--json", "--batch-gpu=16", "--duration=64Ki").stdout)[0]
    assert what["parameters"] == 181_115 and what["images"] == 65536 and what["steps"] == 1024
    h100, here = what["devices"]["H100"], what["devices"]["here"]
    assert h100["hours"] == pytest.approx(65536 / h100["images_per_second"] / 3600)
    assert here["images_per_second"] > 0 and here["basis"].startswith("measured")
    table = run(count_flops.main, "--seconds=0", "--preset=digits8,small32").stdout.splitlines()
    assert len(table) == 4 and "0.8316 M" in table[3] and table[0].count("|") == table[3].count("|")
    one_line(count_flops.main, "--preset=nothing", says="nothing")
    one_line(count_flops.main, f"--net={tmp_path}/none.safetensors", says="none.safetensors")


def test_command_on_a_snapshot(tmp_path, tiny_net):
    from torch_utils.persistence import save_snapshot

    net = tiny_net()
    save_snapshot(tmp_path / "net.safetensors", net)
    found = json.loads(run(count_flops.main, f"--net={tmp_path}/net.safetensors").stdout)
    assert found["parameters"] == sum(p.numel() for p in net.parameters()) and found["flops"] == cost.of_net(net).flops


def test_shapes_of_the_presets():
    shape = presets.interface
    assert shape("edm2-img512-xs") == dict(img_resolution=64, img_channels=4, label_dim=1000)
    assert shape("edm2-img64-s")["img_channels"] == 3 and shape("edm2-tiny-xs")["label_dim"] == 200
    assert shape("edm2-img256-xs-10c-1000", classes=10) == dict(img_resolution=32, img_channels=4, label_dim=10)
    assert shape("pfgmpp-cifar10-ncsnpp") == dict(img_resolution=32, img_channels=3, label_dim=0)
