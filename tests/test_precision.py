"""--precision means the same in training and sampling; errors of reduced types are those of the types."""

import pytest
import torch
from small_runs import one_line, run, small_command, small_config

import generate_images
import train_edm2
from metrics.classifier import Classifier, ConvNet
from metrics.detectors import Detector
from torch_utils import persistence, precision
from training import presets, setup
from training.config import TrainingConfig, make_config
from training.dataset import ImageFolderDataset, load_arrays
from training.sampling import Sampling


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return torch.randn([4, 1, 8, 8]), torch.tensor([0.02, 0.2, 2.0, 20.0]), torch.eye(10)[:4]


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_bf16_computes_the_body_and_nothing_else(tiny_net, inputs):
    net = tiny_net()
    low, types = precision.precise(net, "bf16"), {}
    for name, module in low.unet.named_children():
        module.register_forward_hook(lambda m, i, out, name=name: types.__setitem__(name, out.dtype))
    with torch.no_grad():
        exact = net(*inputs, return_logvar=True)
        denoised, logvar = low(*inputs, return_logvar=True)
    assert types["out_conv"] == torch.bfloat16 and types["emb_noise"] == torch.float32
    assert denoised.dtype == logvar.dtype == torch.float32 and torch.equal(logvar, exact[1])
    assert 1e-5 < relative(denoised, exact[0]) < 2**-7  # bfloat16 has 8 bits: 4e-3 a rounding, c_skip takes the rest
    assert not net.use_fp16 or net.reduced_dtype == "float16"  # the given network stays as it is


def test_names_of_a_precision(tiny_net):
    net = tiny_net()
    assert precision.precise(net, None) is net
    full = precision.precise(net, "fp32")
    assert full.use_fp16 is False and precision.precise(full, "tf32") is full
    assert next(full.parameters()) is next(net.parameters())
    half = precision.precise(full, "fp16")
    assert half.use_fp16 and half.reduced_dtype == "float16"
    with pytest.raises(ValueError, match=r"--precision=bf16: Linear computes in float32 alone"):
        precision.precise(torch.nn.Linear(1, 1), "bf16")
    choices = [TrainingConfig.__dataclass_fields__, Sampling.__dataclass_fields__]
    assert all(fields["precision"].metadata["opt"].choices == precision.PRECISIONS for fields in choices)


@pytest.mark.parametrize("arch", ["edm2", "ddpmpp", "ncsnpp", "adm"])
def test_every_network_takes_bf16(arch, inputs, tmp_path):
    """And keeps it in its snapshot; half precision of old stays that of GPUs alone."""
    sizes = dict(channels=32, channel_mult=[1], num_blocks=1, attn_resolutions=[8])

    def build(**options):
        return setup.build_network(
            make_config(data="x", arch=arch, **sizes, **options), presets.interface("digits8"), "cpu"
        )

    nets = [build(**options).eval() for options in (dict(precision="fp32"), dict(precision="bf16"), dict(fp16=True))]
    with torch.no_grad():
        for net in nets:
            torch.manual_seed(0)
            for p in net.parameters():
                p.copy_(torch.randn_like(p) * (1 if arch == "edm2" else 0.1))
        exact, low, old = [net(*inputs) for net in nets]
    assert torch.equal(exact, old) and 1e-6 < relative(low, exact) < 0.02
    persistence.save_snapshot(tmp_path / "net.safetensors", nets[1])
    again = persistence.load_snapshot(tmp_path / "net.safetensors").net
    with torch.no_grad():
        assert torch.equal(again(*inputs), low)


def test_a_run_in_bf16(digits, tmp_path):
    """Stored, resumed, close to float32; master weights, averages and optimizer stay float32."""
    loops = {
        name: setup.train(small_config(digits, precision=name, total_nimg=1024), tmp_path / name)
        for name in ("fp32", "bf16")
    }
    (path,) = (tmp_path / "bf16").glob("network-snapshot-0000001-*.safetensors")
    snapshot = persistence.load_snapshot(path)
    assert snapshot.options["precision"] == "bf16" and snapshot.net.reduced_dtype == "bfloat16"
    state = loops["bf16"].state_dict()
    tensors = [*state["objective"].values(), *(t for s in state["optimizer"]["state"].values() for t in s.values())]
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float32}
    weights = [torch.cat([p.detach().flatten() for p in loop.parameters]) for loop in loops.values()]
    assert 0 < relative(weights[1], weights[0]) < 0.02
    more = ["--duration=2Ki", "--precision=fp32"]
    one_line(train_edm2.main, *small_command(digits, tmp_path / "bf16", *more), says="--precision: bf16 -> fp32")


def test_sampling_in_a_precision(tiny_net, tmp_path):
    persistence.save_snapshot(tmp_path / "net.safetensors", tiny_net())
    command = [
        f"--net={tmp_path}/net.safetensors",
        "--seeds=0-3",
        "--steps=3",
        "--device=cpu",
        "--gnet=null",
        "--guidance=1.5",
    ]
    pixels = {}
    for name in ("fp32", "bf16"):
        run(generate_images.main, *command, f"--outdir={tmp_path}/{name}", f"--precision={name}")
        pixels[name] = load_arrays(ImageFolderDataset(str(tmp_path / name)))[0].float()
    apart = (pixels["fp32"] - pixels["bf16"]).abs()
    assert 0 < apart.mean() < 3 and apart.max() < 40  # levels of 256
    one_line(generate_images.main, *command, f"--outdir={tmp_path}/bf16", "--precision=fp32", says="made otherwise")


@pytest.mark.parametrize("main", ["train", "generate"])
def test_half_precision_on_a_cpu_is_refused(digits, tiny_net, tmp_path, main):
    persistence.save_snapshot(tmp_path / "net.safetensors", tiny_net())
    if main == "train":
        one_line(
            train_edm2.main,
            *small_command(digits, tmp_path / "r", "--precision=fp16"),
            says="--precision=fp16 needs a GPU",
        )
    else:
        command = [f"--net={tmp_path}/net.safetensors", f"--outdir={tmp_path}/o", "--device=cpu", "--precision=fp16"]
        one_line(generate_images.main, *command, says="--precision=fp16 needs a GPU")
    assert not (tmp_path / "r").exists() and not (tmp_path / "o").exists()


def test_tf32_is_a_flag_of_gpus(monkeypatch):
    flags = [(torch.backends.cudnn, "allow_tf32"), (torch.backends.cuda.matmul, "allow_tf32")]
    try:
        precision.use("tf32", "cuda")
        assert all(getattr(*flag) for flag in flags)
        with pytest.warns(UserWarning, match="--precision=tf32 is for GPUs"):
            precision.use("tf32", "cpu")
    finally:
        precision.use(None, "cpu")
    assert not any(getattr(*flag) for flag in flags)


def test_what_measures_computes_in_full():
    """--precision=tf32 of sampling is none of a detector's: set while it looks, and as before afterwards."""
    flags = [(torch.backends.cudnn, "allow_tf32"), (torch.backends.cuda.matmul, "allow_tf32")]
    state, seen = lambda: [getattr(place, name) for place, name in flags], []
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    net = torch.nn.Module()
    net.forward = lambda x: seen.append(state()) or x.flatten(1)
    judge = Detector()
    judge.net, judge.prepare = net, lambda x: x.float()
    small = Classifier(ConvNet([3, 8, 8], 2), {})
    small.net.features = net.forward
    try:
        precision.use("tf32", "cuda")
        for detector in (judge, small):
            detector.features(images)
        assert seen == [[False, False]] * 2 and state() == [True, True]
    finally:
        precision.use(None, "cpu")
