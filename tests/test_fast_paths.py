"""What makes the networks fast changes no number: against the published formulation of benchmarks/reference."""

import copy
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import assert_identical, final_state, small_config
from torch._dynamo.testing import CompileCounterWithBackend

from torch_utils.training_stats import Collector
from training import setup
from training.config import differences, make_config
from training.guidance import GuidedDenoiser, NullLabels, for_sampling, guided
from training.magnitude import normalize, packable
from training.networks_edm2 import Block, Precond, compile_network
from training.samplers import heun

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import reference  # noqa: E402

SIZES = [
    dict(model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], channels_per_head=16),
    dict(model_channels=8, channel_mult=[1, 2, 2], num_blocks=2, attn_resolutions=[8, 4], channels_per_head=4),
]


def pair(label_dim=3, sizes=SIZES[0], resolution=8):
    """(ours, the published formulation) with the same weights, of norms that need normalising."""
    torch.manual_seed(0)
    ours, theirs = Precond(resolution, 2, label_dim, **sizes), reference.Denoiser(resolution, 2, label_dim, **sizes)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.copy_(torch.full_like(p, 0.7 if name.endswith("out_gain") else 0.3) if p.ndim == 0 else p * 1.3)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def batch(n=6, label_dim=3, resolution=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, resolution, resolution, generator=generator)
    return x, torch.linspace(0.05, 3, n), torch.eye(label_dim)[torch.arange(n) % label_dim] if label_dim else None


def close(found, expected, tolerance):
    found, expected = found.detach(), expected.detach()
    assert float((found - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("label_dim", [0, 3])
@torch.no_grad()
def test_folded_network_is_the_network(sizes, label_dim):
    ours, theirs = (net.eval() for net in pair(label_dim, sizes, 16))
    x, sigma, labels = batch(label_dim=label_dim, resolution=16)
    folded = ours.folded()
    close(ours(x, sigma, labels), theirs(x, sigma, labels), 1e-6)
    for level in (sigma, sigma[0], 0.3):
        close(folded(x, level, labels), ours(x, level, labels), 5e-7)
    for found, expected in zip(folded(x, sigma, return_logvar=True), ours(x, sigma, return_logvar=True), strict=True):
        close(found, expected, 5e-7)
    assert folded.state_dict().keys() == ours.state_dict().keys() and folded.folded() is folded
    assert all(a is b for a, b in zip(folded.parameters(), ours.parameters(), strict=True))
    assert folded.label_dim == label_dim and not any(
        layer.folded for layer in ours.modules() if isinstance(layer, Block)
    )


def test_folded_network_has_the_gradient_of_its_input():
    ours, x = pair()[0].eval().requires_grad_(False), batch()[0].requires_grad_()
    _, *rest = batch()
    gradients = [torch.autograd.grad(net(x, *rest).square().sum(), x)[0] for net in (ours.folded(), ours)]
    close(*gradients, 2e-6)


def test_packed_weights_serve_every_shape_copies_and_gradients():
    ours, (x, sigma, labels) = pair()[0].eval().requires_grad_(False), batch()
    expected, folded = ours(x, sigma, labels), ours.folded()
    layer = folded.unet.dec["8x8_up"].conv_res1
    for size in (6, 2, 6):  # packed anew for another shape
        with torch.no_grad():
            close(folded(x[:size], sigma[:size], labels[:size]), expected[:size], 5e-7)
        if packable(x.device, x.dtype):
            assert layer.ready.is_mkldnn and layer.shape == (size, 32, 8, 8)
    for net in (copy.deepcopy(folded), folded):
        close(net(x, sigma, labels), expected, 5e-7)  # what has a gradient takes the plain order
        with torch.no_grad():
            close(net(x, sigma, labels), expected, 5e-7)


def test_what_is_watched_or_trained_is_not_folded():
    ours = pair()[0]
    assert for_sampling(ours.eval()) is ours  # its parameters may get gradients
    with torch.no_grad():
        _only_the_plain_one_is_folded(ours)


def _only_the_plain_one_is_folded(ours):
    assert for_sampling(ours.train()) is ours
    handle = ours.eval().unet.enc["8x8_block0"].register_forward_hook(lambda *_: None)
    assert for_sampling(ours) is ours
    handle.remove()
    assert for_sampling(ours) is not ours
    ours.forward = ours.forward
    assert for_sampling(ours) is ours


def test_other_resampling_filters_fold():
    torch.manual_seed(0)
    net = Precond(8, 1, 0, **SIZES[0], resample_filter=[1, 3, 3, 1]).eval()
    assert not [name for name in net.state_dict() if "resample" in name]
    with torch.no_grad():
        net.unet.out_gain.fill_(1)
        x = torch.randn(2, 1, 8, 8)
        close(net.folded()(x, 0.5), net(x, 0.5), 5e-7)


def gradients(net, parts, once, compiled=False):
    """Gradients and weights after forward and backward passes over `parts`, weights normalised once or in every pass."""
    net = copy.deepcopy(net).train()
    if compiled:
        compile_network(net)
    if once:
        with net.step():
            for x, sigma, labels in parts:
                net(x, sigma, labels, return_logvar=True)[0].square().sum().backward()
    else:
        for x, sigma, labels in parts:
            net(x, sigma, labels, return_logvar=True)[0].square().sum().backward()
    return {name: (p.detach(), p.grad) for name, p in net.named_parameters()}


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("micro", [6, 2])
def test_training_step_is_the_published_one(once, micro):
    ours, theirs = pair()
    parts = list(zip(*(value.split(micro) for value in batch()), strict=True))
    found, expected = gradients(ours, parts, once), gradients(theirs, parts, False)
    for name, (weight, gradient) in expected.items():
        close(found[name][0], weight, 1e-6)
        if gradient is None or not gradient.any():
            assert found[name][1] is None or not found[name][1].any()
        else:
            # Of weights far from norm 1, as here, later passes differ by eps.
            close(found[name][1], gradient, 1e-5 if micro == 6 else 3e-4)


def test_steps_follow_each_other_and_leave_nothing():
    ours, theirs = pair()
    optimizers = [torch.optim.SGD(net.train().parameters(), lr=1e-3) for net in (ours, theirs)]
    for _ in range(3):
        with ours.step():
            ours(*batch(), return_logvar=True)[0].square().sum().backward()
        theirs(*batch(), return_logvar=True)[0].square().sum().backward()
        for optimizer in optimizers:
            optimizer.step(), optimizer.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(p, q, 1e-6)
    with pytest.raises(RuntimeError, match="out of memory"), ours.step():
        ours(*batch())
        raise RuntimeError("out of memory")
    assert ours.once is None and all(getattr(m, "ready", None) is None for m in ours.modules())


@pytest.mark.parametrize("dim", [1, 2, [1, 2, 3]])
def test_gradient_of_normalize(dim):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, weight = x.requires_grad_(), torch.randn_like(x)
    expected = x / (1e-4 + x.square().mean(dim, keepdim=True).sqrt())
    expected = torch.autograd.grad((expected * weight).sum(), x)[0]
    close(torch.autograd.grad((normalize(x, dim) * weight).sum(), x)[0], expected, 1e-6)
    zero = torch.zeros(1, 4, 1, 1, requires_grad=True)
    assert torch.autograd.grad(normalize(zero, 1).sum(), zero)[0].eq(1e4).all()


class Counted(torch.nn.Module):
    """A network that counts its evaluations."""

    def __init__(self, net):
        super().__init__()
        self.net, self.sizes, self.label_dim = net, [], net.label_dim
        for name in ("sigma_data", "sigma_min", "sigma_max", "img_channels", "img_resolution"):
            setattr(self, name, getattr(net, name))

    def forward(self, x, sigma, labels=None, **options):
        self.sizes.append(len(x))
        return self.net(x, sigma, labels, **options)


@pytest.mark.parametrize("null", ["zero", "last"])
@torch.no_grad()
def test_guidance_by_the_same_network_is_one_batch(null):
    net = Counted(pair()[0].eval())
    x, sigma, labels = batch()
    both = GuidedDenoiser(net, NullLabels(net, null), 1.7)
    other = GuidedDenoiser(net, NullLabels(copy.copy(net), null), 1.7)  # not known to be the same
    for levels, given in ((sigma, labels), (sigma[1], labels), (0.3, labels[:1]), (sigma, None)):
        net.sizes.clear()
        found, logvar = both(x, levels, given, return_logvar=True)
        assert net.sizes == [12]
        expected, head = other(x, levels, given, return_logvar=True)
        close(found, expected, 1e-6)
        assert torch.equal(logvar.expand_as(head), head) or torch.allclose(logvar, head)
    net.sizes.clear()
    half = GuidedDenoiser(net, NullLabels(net, null), 1.7, interval=(0.4, 9))
    assert torch.equal(half(x, sigma, labels)[0], net(x, sigma, labels)[0]) and net.sizes == [6, 6, 6]


@torch.no_grad()
def test_samplers_fold_by_themselves():
    ours, theirs = (net.eval() for net in pair())
    x, _, labels = batch()
    folds = []
    fold = Precond.folded
    ours.folded = lambda **options: folds.append(fold(ours, **options)) or folds[-1]
    close(heun(ours, x, labels, num_steps=4), reference.heun(theirs, x, labels, num_steps=4), 3e-6)
    assert len(folds) == 1
    guide = guided(ours, NullLabels(ours), 2.0)
    assert guide.unlabelled and guide.net is folds[1] and guide.gnet.net is guide.net
    expected = reference.heun(theirs, x, labels, reference.Unlabelled(theirs), 2.0, num_steps=4)
    close(heun(ours, x, labels, NullLabels(ours), num_steps=4, guidance=2.0), expected, 3e-6)


def test_statistics_are_means_of_all_finite_samples():
    collector, generator = Collector(), torch.Generator().manual_seed(0)
    reports = [torch.randn(4, 3, generator=generator), 0.1, [], [2, math.nan], torch.tensor(True), math.inf]
    reports += [torch.tensor([[-math.inf, 7.0]], requires_grad=True), torch.tensor(3, dtype=torch.int64)]
    for value in reports:
        collector.report("x", value)
    collector.report("none", [])
    every = np.concatenate([np.ravel(torch.as_tensor(v, dtype=torch.float64).detach()) for v in reports])
    found = collector.means()
    assert found["x"] == pytest.approx(every[np.isfinite(every)].mean(), rel=1e-7) and found["none"] is None
    assert collector.nonfinite_share == {"x": 3 / len(every), "none": 0} and len(every) == 20
    assert collector.means() == {"x": None, "none": None}  # starts anew


# --- torch.compile ----------------------------------------------------------------------------------------------------


def test_one_graph_without_breaks_for_every_shape_in_training_and_sampling(monkeypatch):
    ours, graphs = pair()[0], CompileCounterWithBackend("eager")  # no code is generated, which takes most of the time
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_module(self, backend=graphs, **options)
    )
    torch._dynamo.reset()
    parts = list(zip(*(value.split(2) for value in batch()), strict=True))
    found, expected = (gradients(ours, parts, True, compiled) for compiled in (True, False))  # a break is an error
    for name in ("unet.out_conv.weight", "unet.enc.8x8_block0.conv_res0.weight"):
        close(found[name][1], expected[name][1], 1e-6)
    assert graphs.frame_count == 1
    with torch.no_grad():
        folded, (x, sigma, labels) = ours.eval().folded(compiled=True), batch()
        for size, count in ((6, 2), (6, 2), (4, 3), (6, 3)):
            given = x[:size], sigma[:size], labels[:size]
            close(folded(*given), ours(*given), 1e-6)
            assert graphs.frame_count == count


@pytest.mark.slow
def test_compiled_gradients_are_the_gradients():
    ours = pair()[0]
    found, expected = (gradients(ours, [batch()], True, compiled) for compiled in (True, False))
    for name, (weight, gradient) in expected.items():
        close(found[name][0], weight, 1e-6)
        if gradient is not None and gradient.any():
            close(found[name][1], gradient, 1e-5)
    assert sum(bool(gradient is not None and gradient.any()) for _, gradient in found.values()) > 40


@pytest.mark.slow
@torch.no_grad()
def test_compiled_network_is_the_network_and_recompiles_only_for_a_new_shape():
    ours = pair()[0].eval()
    compiled, (x, sigma, labels) = ours.folded(compiled=True), batch()
    close(compiled(x, sigma, labels), ours(x, sigma, labels), 1e-6)
    with torch._dynamo.config.patch(error_on_recompile=True):
        close(compiled(x * 0.5, sigma * 2, labels), ours(x * 0.5, sigma * 2, labels), 1e-6)
    close(compiled(x[:4], sigma[:4], labels[:4]), ours(x[:4], sigma[:4], labels[:4]), 1e-6)


@pytest.mark.slow
@torch.no_grad()
def test_only_compiled_networks_for_sampling_are_frozen():
    ours, inputs = pair()[0].eval(), batch()
    before, frozen = ours(*inputs), ours.folded(compiled=True)
    compiled = copy.deepcopy(ours)
    compile_network(compiled)
    for net in (frozen, compiled):
        close(net(*inputs), before, 1e-6)
    compiled.unet.enc["8x8_block0"].emb_gain.fill_(2)  # as training and averages change them
    ours.unet.enc["8x8_block0"].emb_gain.fill_(2)
    after = ours(*inputs)
    close(compiled(*inputs), after, 1e-6)
    close(frozen(*inputs), before, 1e-6)
    assert float((after - before).norm() / before.norm()) > 1e-3


@pytest.mark.slow
def test_compiled_run_resumes_bit_for_bit(digits, tmp_path):
    options = dict(compile=True, dropout=0.1, total_nimg=1024, checkpoint_nimg=0)
    for name, lengths in (("whole", [0]), ("parts", [512, 0])):
        for slice_nimg in lengths:
            torch._dynamo.reset()  # as in a new process
            setup.train(small_config(digits, **options, slice_nimg=slice_nimg), tmp_path / name)
    assert_identical(final_state(tmp_path / "whole", 1), final_state(tmp_path / "parts", 1))
    with pytest.raises(ValueError, match="--compile: True -> False"):
        setup.train(small_config(digits, **options | {"compile": False}), tmp_path / "whole")


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match="--compile needs a C"):
        pair()[0].eval().requires_grad_(False).folded(compiled=True)


def test_another_mode_does_not_resume():
    modes = [make_config("digits8", data="x", compile=compiled).fixed() for compiled in (False, True)]
    assert differences(*modes) == ["--compile: False -> True"]
    old = {name: value for name, value in modes[0].items() if name != "compile"}  # of a run before there was a choice
    assert not differences(old, modes[0])
