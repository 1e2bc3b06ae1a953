"""Data, networks, encoders and noise that do not belong together are refused by every command, in one line with both names."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import convert_digits
from small_runs import one_line, run, small_command, small_config

import calculate_metrics
import generate_images
import train_edm2
from simulations import run_robustness, run_solvers, run_stable_targets
from torch_utils import checkpoint
from torch_utils.persistence import load_snapshot, save_snapshot
from torch_utils.random import seeded_generator
from training import processes, setup
from training.config import make_config
from training.dataset import ArrayDataset, ImageFolderDataset, load_arrays
from training.dataset.format import png_bytes
from training.encoders import CenterEncoder, IdentityEncoder, LogitEncoder, StandardRGBEncoder
from training.generation import generate_images as generate
from training.networks_edm2 import Precond
from training.validation import NOISE_LEVELS, HeldOut

METRICS, CPU = calculate_metrics.cmdline, "--device=cpu"


def write_set(folder, shape, labels, num_classes=10):
    """A folder of random images [C, H, W]; labels None: none."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        (folder / f"{i}.png").write_bytes(png_bytes(rng.integers(0, 256, shape, dtype=np.uint8)))
    pairs = None if labels is None else [[f"{i}.png", i % labels] for i in range(6)]
    counted = {} if labels is None else {"num_classes": num_classes}
    (folder / "dataset.json").write_text(json.dumps({"labels": pairs, **counted}))
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """{what is wrong with it: (data set, words)} for a network of grey 8x8 images of ten sources."""
    root = tmp_path_factory.mktemp("sets")
    np.random.seed(0)
    (root / "arrays").mkdir()
    np.save(root / "arrays" / "0.npy", np.zeros([1, 8, 8], np.float32))
    (root / "arrays" / "dataset.json").write_text('{"labels": [["0.npy", 0]], "num_classes": 10}')
    return {
        "resolution": (write_set(root / "big", (1, 16, 16), 3), ["img_resolution=16", "img_resolution=8"]),
        "channels": (write_set(root / "rgb", (3, 8, 8), 3), ["img_channels=3", "img_channels=1"]),
        "labels": (write_set(root / "few", (1, 8, 8), 3, 3), ["label_dim=3", "label_dim=10"]),
        "unlabelled": (write_set(root / "plain", (1, 8, 8), None), ["label_dim=0", "label_dim=10"]),
        "rectangle": (write_set(root / "wide", (1, 8, 12), 3), ["12x8"]),
        "arrays": (root / "arrays", ["float32", "uint8"]),
    }


@pytest.fixture
def net(tmp_path, tiny_net):
    path = tmp_path / "net.safetensors"
    save_snapshot(path, tiny_net(), encoder=StandardRGBEncoder())
    return path


ALL = ["resolution", "channels", "labels", "unlabelled", "rectangle", "arrays"]


@pytest.mark.parametrize("wrong", ALL)
@pytest.mark.parametrize("command", ["loss", "likelihood", "stable", "bound", "val-data"])
def test_data_that_a_network_does_not_take(sets, net, digits, tmp_path, command, wrong):
    data, words = sets[wrong]
    if command == "val-data":
        if wrong == "unlabelled":  # --val-data is without labels where training is
            words = ["label_dim=0", "label_dim=10"]
        line = one_line(train_edm2.main, *small_command(digits, tmp_path / "run", f"--val-data={data}"))
        assert not (tmp_path / "run").exists()
    elif command == "stable":
        line = one_line(run_stable_targets.main, f"--net={net}", f"--data={data}", f"--dest={tmp_path / 'x.csv'}", CPU)
    elif command == "bound":
        line = one_line(run_solvers.main, "bound", f"--net={net}", f"--data={data}", f"--dest={tmp_path}")
    else:
        line = one_line(METRICS, command, f"--net={net}", f"--data={data}", CPU)
    sides = ["wide"] if wrong == "rectangle" else [str(data), str(digits if command == "val-data" else net)]
    assert all(word in line for word in [*words, *sides]), line


@pytest.mark.parametrize("wrong", ["resolution", "channels", "labels"])
@pytest.mark.parametrize("command", ["gen", "gen --ref", "calc", "calc --train", "robustness"])
def test_references_of_other_images(sets, net, digits, tmp_path, command, wrong):
    data, words = sets[wrong]
    ref = tmp_path / "ref.npz"
    against = [f"--data={data}"]
    if "--ref" in command:
        run(METRICS, "ref", f"--data={data}", f"--dest={ref}", CPU)
        against = [f"--ref={ref}"]
    if command == "calc --train":
        against = [f"--data={digits}", f"--train={data}"]
    if command == "robustness":
        line = one_line(run_robustness.main, f"--net={net}", *against, f"--dest={tmp_path / 'out'}", "--num=4", CPU)
    elif command.startswith("gen"):
        line = one_line(METRICS, "gen", f"--net={net}", *against, "--num=8", "--steps=1", CPU)
    else:
        line = one_line(METRICS, "calc", f"--images={digits}", *against, CPU)
    assert all(word in line for word in [*words, against[-1], str(digits if "calc" in command else net)]), line


def other(tiny_net, path, wrong):
    """A snapshot that differs in one thing from `net`."""
    nets = {
        "img_resolution": lambda: Precond(
            16, 1, 10, model_channels=8, channel_mult=[1], num_blocks=1, channels_per_head=8
        ),
        "label_dim": lambda: tiny_net(3),
        "sigma_data": lambda: tiny_net(sigma_data=0.7),
    }
    encoder = LogitEncoder(0.1) if wrong == "encoder" else StandardRGBEncoder()
    process = processes.PFGMpp(64) if wrong == "noise" else None
    save_snapshot(path, nets.get(wrong, tiny_net)(), encoder=encoder, process=process)
    return path


@pytest.mark.parametrize("wrong", ["img_resolution", "label_dim", "sigma_data", "encoder", "noise"])
@pytest.mark.parametrize("option", ["--gnet", "--init", "--reference"])
def test_networks_that_do_not_fit_each_other(tiny_net, net, digits, tmp_path, option, wrong):
    path = other(tiny_net, tmp_path / "other.safetensors", wrong)
    if option == "--gnet":
        command = [
            generate_images.main,
            f"--net={net}",
            f"--gnet={path}",
            "--guidance=2",
            f"--outdir={tmp_path / 'run'}",
        ]
        mine = f"--net={net}"
    else:
        more = ["--sigma-data=0.5", *(["--select=jest"] if option == "--reference" else [])]
        command = [train_edm2.main, *small_command(digits, tmp_path / "run", f"{option}={path}", *more)]
        mine = f"--data={digits}"
    one_line(*command, CPU, says=[f"{option}={path}", mine, wrong])
    assert not (tmp_path / "run").exists()


def test_what_is_equal_in_law_fits(tiny_net, net, digits, tmp_path):
    """D = inf and linear processes are Gaussian; an unconditional guide serves every network."""
    for i, process in enumerate(
        (processes.PFGMpp("inf"), processes.EDM(), processes.get("cld"), processes.GaussianKernel())
    ):
        path = tmp_path / f"{i}.safetensors"
        save_snapshot(path, tiny_net(0 if i == 0 else 10), process=process)
        (batch,) = generate(net, seeds=[0], gnet=path, guidance=2, num_steps=1)
        assert batch.images is not None


def test_a_process_refuses_every_noise_that_is_not_gaussian(tiny_net, tmp_path):
    save_snapshot(tmp_path / "net.safetensors", tiny_net(), process=processes.PFGMpp(64))
    line = f"--net={tmp_path / 'net.safetensors'}"
    one_line(
        generate_images.main,
        line,
        "--process=cld",
        f"--outdir={tmp_path / 'x'}",
        CPU,
        says=["PFGMpp(D=64", "--process"],
    )


def test_sources_in_another_order_are_other_labels(tiny_net, tmp_path):
    names = [f"source {k}" for k in range(10)]
    net = tmp_path / "net.safetensors"
    save_snapshot(net, tiny_net(), dataset={"class_names": names})
    images = write_set(tmp_path / "images", (1, 8, 8), 3)
    meta = json.loads((images / "dataset.json").read_text())
    loss = ("loss", f"--net={net}", f"--data={images}", CPU)
    for given in (names, [names[1], names[0], *names[2:]]):
        (images / "dataset.json").write_text(json.dumps(meta | {"class_names": given}))
        if given == names:
            run(METRICS, *loss)
        else:
            one_line(METRICS, *loss, says=["class_names=['source 1', 'source 0'", str(net), "labels of another order"])


def test_fine_tuning_on_other_sources(tiny_net, tmp_path):
    """Everything but the label embedding is taken over; of this the columns of the same names, or none."""
    donor = tiny_net(sigma_data=make_config("digits8").sigma_data)
    save_snapshot(tmp_path / "net.safetensors", donor, dataset={"class_names": [f"s{k}" for k in range(10)]})
    images = write_set(tmp_path / "images", (1, 8, 8), 3, 4)
    meta = json.loads((images / "dataset.json").read_text())
    (images / "dataset.json").write_text(json.dumps(meta | {"class_names": ["s7", "other", "s2", "s0"]}))
    shape = dict(init=str(tmp_path / "net.safetensors"), channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])

    def start(**options):
        return setup.build(small_config(images, **{**shape, **options})).objective.net.state_dict()

    with pytest.raises(ValueError, match="label_dim=10.*label_dim=4.*--init-classes=new"):
        start()
    first = start(init=None)
    for how, same in (("new", {}), ("names", {0: 7, 2: 2, 3: 0})):
        found, label = start(init_classes=how), "unet.emb_label.weight"
        for name, value in donor.state_dict().items():
            assert name == label or torch.equal(found[name], value), name
        for k in range(4):
            wanted = donor.state_dict()[label][:, same[k]] if k in same else first[label][:, k]
            assert torch.equal(found[label][:, k], wanted), (how, k)
    with pytest.raises(ValueError, match="--init-classes=names belongs to --init"):
        small_config(images, init_classes="names")
    (images / "dataset.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="share no class_names; give new"):
        start(init_classes="names")


def test_label_dropout_allows_images_without_labels(tiny_net, sets, tmp_path):
    path = tmp_path / "net.safetensors"
    save_snapshot(path, tiny_net(), options={"label_dropout": 0.1})
    run(METRICS, "loss", f"--net={path}", f"--data={sets['unlabelled'][0]}", CPU)


def test_floats_of_an_identity_encoder_are_no_pixels(tiny_net, digits, tmp_path):
    path = tmp_path / "net.safetensors"
    save_snapshot(path, tiny_net(), encoder=IdentityEncoder())
    one_line(
        METRICS, "loss", f"--net={path}", f"--data={digits}", CPU, says=["uint8", "float32", str(digits), str(path)]
    )


class Same(torch.nn.Module):
    """The denoiser that leaves the noise in: its error is the noise."""

    def __init__(self):
        super().__init__()
        self.label_dim, self.sigma_data, self.p = 0, 0.5, torch.nn.Parameter(torch.zeros([]))

    def forward(self, x, sigma, class_labels=None):
        return x


@pytest.mark.parametrize(
    "kernel", [None, processes.GaussianKernel(), processes.PFGMpp(6.0)], ids=["none", "gaussian", "pfgmpp"]
)
def test_validation_noise_is_the_noise_of_training(kernel):
    data = ArrayDataset(np.zeros([3, 1, 8, 8], np.uint8))
    found = HeldOut(data).denoising_loss(Same(), CenterEncoder(), kernel)
    means = []
    for i in range(3):
        generator = seeded_generator("cpu", 0, 7, i)
        for sigma in NOISE_LEVELS:
            if kernel is None or processes.aug_dim(kernel) == float("inf"):
                noise = torch.randn([1, 8, 8], generator=generator)
            else:
                noise = kernel.unit_noise([1, 1, 8, 8], generator)
            means.append(float((sigma**2 + 0.25) / 0.25 * noise.double().square().mean()))
    assert found["loss"] == pytest.approx(np.mean(means), rel=1e-6)


def test_commands_validate_with_the_noise_of_the_snapshot(tiny_net, digits, tmp_path):
    losses = {}
    for name, kernel in (("none", None), ("pfgmpp", processes.PFGMpp(5.0))):
        path = tmp_path / f"{name}.safetensors"
        save_snapshot(path, tiny_net(), process=kernel)
        snapshot = load_snapshot(path)
        result = run(METRICS, "loss", f"--net={path}", f"--data={digits}", CPU)
        losses[name] = json.loads(result.stdout)["metrics"]["denoising"]["loss"]
        held = HeldOut(ImageFolderDataset(str(digits)))
        assert losses[name] == held.denoising_loss(snapshot.net, StandardRGBEncoder(), kernel)["loss"]
    assert losses["none"] != losses["pfgmpp"]
    config = small_config(digits, process="pfgmpp", aug_dim=5.0, val_data=str(digits), total_nimg=1024)
    from training.hooks import Validation

    loop = setup.train(config, tmp_path / "run")
    with loop.average() as average:
        expected = HeldOut(ImageFolderDataset(str(digits))).denoising_loss(
            average.net, loop.encoder, processes.PFGMpp(5.0)
        )
    look = Validation(ImageFolderDataset(str(digits)), interval=10**9)
    assert look.on_status(loop)["Loss/validation"] == expected["loss"]


@pytest.mark.parametrize("shape", [(3, 8, 12), (1, 12, 8), (1, 9, 8)], ids=str)
def test_rectangles_are_refused_before_training(tmp_path, shape):
    data = write_set(tmp_path / "data", shape, 3)
    one_line(train_edm2.main, *small_command(data, tmp_path / "run"), says=["data", f"{shape[2]}x{shape[1]}", "square"])
    assert not (tmp_path / "run").exists()


def test_resume_says_what_it_takes(digits, tmp_path, net):
    (tmp_path / "old").mkdir()
    for path in (tmp_path / "old", net):
        command = small_command(digits, tmp_path / "run", f"--resume={path}")
        one_line(train_edm2.main, *command, says=[str(path), "training-state", "--init"])


def test_a_checkpoint_without_its_checksum_is_checked_by_its_own(tmp_path, capsys):
    path, copy = tmp_path / "training-state-0000001.pt", tmp_path / "copy"
    checkpoint.save(path, {"x": torch.arange(1000)})
    copy.mkdir()
    there = copy / path.name
    shutil.copy(path, there)
    assert checkpoint.newest_sound(copy) == there
    data = bytearray(there.read_bytes())
    data[len(data) // 2] ^= 1
    there.write_bytes(data)
    with pytest.raises(ValueError, match="all checkpoints are damaged"):
        checkpoint.newest_sound(copy)


def test_a_moved_or_copied_data_set_is_the_same(digits, tmp_path, monkeypatch):
    shutil.copy(digits, tmp_path / "digits.zip")
    command = small_command(tmp_path / "digits.zip", tmp_path / "run", "--duration=1Ki", "--channel-mult=1")
    run(train_edm2.main, *command)
    (tmp_path / "digits.zip").rename(tmp_path / "moved.zip")
    monkeypatch.chdir(tmp_path)
    for there in (tmp_path / "moved.zip", "moved.zip", f"../{tmp_path.name}/moved.zip", digits):
        run(train_edm2.main, *small_command(there, tmp_path / "run", "--duration=1Ki", "--channel-mult=1"))
    convert_digits(tmp_path / "new.zip", sources="3,4,5")
    command = small_command(tmp_path / "new.zip", tmp_path / "run", "--duration=1Ki", "--channel-mult=1")
    one_line(train_edm2.main, *command, says=["other images", "--outdir"])
    images, _ = load_arrays(ImageFolderDataset(str(digits)))
    assert len(images) == 48
