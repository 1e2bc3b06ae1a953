"""Images from snapshots: a seed is an image, whatever the batch; files and labels beside them are a data set."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from small_runs import assert_identical, one_line, run

import generate_images
from torch_utils.persistence import save_snapshot
from torch_utils.random import StackedRandomGenerator
from training import processes
from training.dataset import ImageFolderDataset
from training.encoders import StandardRGBEncoder


def collect(net, seeds, **options):
    """{seed: (image, label, noise)} of all batches."""
    found = {}
    for batch in generate_images.generate_images(net, seeds, num_steps=3, **options):
        for i, seed in enumerate(batch.seeds):
            found[seed] = (batch.images[i], batch.labels[i], batch.noise[i])
    return found


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    from training.networks_edm2 import Precond

    torch.manual_seed(0)
    net = Precond(
        8, 1, 3, model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[], channels_per_head=8
    )
    with torch.no_grad():
        net.unet.out_gain.fill_(0.7)
    path = tmp_path_factory.mktemp("net") / "network-snapshot-0000001-0.100.safetensors"
    save_snapshot(path, net, encoder=StandardRGBEncoder())
    return path


GENERATE = (generate_images.main, "--device=cpu", "--steps=2")


@pytest.mark.parametrize("options", [{}, dict(S_churn=10), dict(class_idx=2), dict(class_idx="balanced")], ids=str)
def test_a_seed_is_an_image_whatever_the_batch(tiny_net, options):
    net = tiny_net(3)
    together = collect(net, range(7), max_batch_size=7, **options)
    apart = collect(net, [5, 0, 3], max_batch_size=1, **options)
    for seed, (image, label, noise) in apart.items():
        assert torch.equal(noise, together[seed][2]) and torch.equal(label, together[seed][1])
        assert int((image.int() - together[seed][0].int()).abs().max()) <= 1


def test_noise_first_then_the_class(tiny_net):
    """EDM2's order of draws from the generator of a seed: noise, then a uniform class."""
    found = collect(tiny_net(3), [11, 4])
    for seed in (11, 4):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(found[seed][2], torch.randn([1, 8, 8], generator=generator))
        assert int(found[seed][1].argmax()) == int(torch.randint(3, [], generator=generator))
    assert torch.equal(StackedRandomGenerator("cpu", [11]).randn([1, 1, 8, 8])[0], found[11][2])
    fixed = collect(tiny_net(3), [11], class_idx=1)  # the class costs no draw of the noise
    assert torch.equal(fixed[11][2], found[11][2]) and int(fixed[11][1].argmax()) == 1


def test_balanced_cycles_through_the_sources(tiny_net):
    labels = {seed: int(v[1].argmax()) for seed, v in collect(tiny_net(3), range(4, 10), class_idx="balanced").items()}
    assert labels == {seed: seed % 3 for seed in range(4, 10)}
    some = collect(tiny_net(3), range(4), class_idx="balanced", sources=[0, 2])
    assert [int(v[1].argmax()) for v in some.values()] == [0, 2, 0, 2]


def test_prior_of_the_training_noise(tmp_path, tiny_net):
    path = tmp_path / "pfgmpp.safetensors"
    kernel = processes.get("pfgmpp", D=16)
    save_snapshot(path, tiny_net(0), process=kernel)
    (batch,) = generate_images.generate_images(path, seeds=[3], num_steps=1)
    assert torch.equal(batch.noise, kernel.unit_noise([1, 1, 8, 8], StackedRandomGenerator("cpu", [3])))
    assert batch.labels is None and batch.class_ids is None


def test_files_are_a_data_set(snapshot, tmp_path):
    out = tmp_path / "out"
    run(*GENERATE, f"--net={snapshot}", f"--outdir={out}", "--seeds=0-6", "--class=balanced", "--grid", "--batch=4")
    assert {p.name for p in out.iterdir()} == {"dataset.json", *(f"{seed:06d}.png" for seed in range(7))}
    data = ImageFolderDataset(out)
    assert len(data) == 7 and data.num_classes == 3 and data.image_shape == [1, 8, 8]
    assert [int(data.get_label(i).argmax()) for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    (batch,) = generate_images.generate_images(snapshot, seeds=range(7), num_steps=2, class_idx="balanced")
    for i in range(7):
        assert np.abs(data[i][0].astype(int) - batch.images[i].numpy().astype(int)).max() <= 1
    grid = PIL.Image.open(tmp_path / "out-grid.png")  # beside the folder: a row per source
    assert grid.height > 3 * 8 and grid.width > 3 * 8


def test_later_calls_add_to_the_folder(snapshot, tmp_path):
    out = tmp_path / "out"
    for seeds, label in (("0-1", 0), ("1002", 2)):
        run(*GENERATE, f"--net={snapshot}", f"--outdir={out}", f"--seeds={seeds}", f"--class={label}", "--subdirs")
    labels = json.loads((out / "dataset.json").read_text())
    assert labels == {
        "labels": [["000000/000000.png", 0], ["000000/000001.png", 0], ["001000/001002.png", 2]],
        "num_classes": 3,
    }
    assert len(ImageFolderDataset(out)) == 3


def test_guidance_mixes_two_networks(tiny_net):
    net, weak = tiny_net(3, seed=0), tiny_net(3, seed=1)
    one, other, guided = (collect(net, [1], gnet=weak, guidance=g)[1][0].float() for g in (1, 0, 1.5))
    assert not torch.equal(one, other) and not torch.equal(one, guided)
    assert_identical(one, collect(net, [1])[1][0].float())
    assert_identical(other, collect(weak, [1])[1][0].float())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--class=3"], "class 3 is out of range: the network knows classes 0 to 2"),
        (["--class=balanced", "--sources=0,7"], "class 7 is out of range"),
        (["--gnet=nowhere.safetensors", "--guidance=2"], "nowhere.safetensors"),
    ],
)
def test_mistakes_leave_nothing_behind(snapshot, tmp_path, options, message):
    one_line(*GENERATE, f"--net={snapshot}", f"--outdir={tmp_path / 'out'}", "--seeds=0-3", *options, says=message)
    assert not (tmp_path / "out").exists()


def test_a_guide_of_another_shape_is_refused(tiny_net):
    from training.networks_edm2 import Precond

    other = Precond(16, 1, 3, model_channels=8, channel_mult=[1, 2], num_blocks=1, channels_per_head=8)
    with pytest.raises(ValueError, match="another shape"):
        collect(tiny_net(3), [0], gnet=other, guidance=2)
