"""Labels that are vectors are never taken for classes; many classes need no square of their number."""

import json
import warnings

import numpy as np
import pytest
import torch
from small_runs import one_line, run, small_config

import calculate_metrics
import dataset_tool
import generate_images
from torch_utils.persistence import load_snapshot
from training import setup
from training.dataset import ArrayDataset, ImageFolderDataset, load_raw
from training.feed import Feed
from training.generation import generate_images as generate
from training.hooks import grid_labels
from training.losses import Draws
from training.losses.targets import StableTargets
from training.magnitude import LOOKUP_WIDTH
from training.networks_edm2 import Precond
from training.validation import HeldOut

VECTORS = [[i / 8, 1 - i / 16, -1.0] for i in range(24)]
ONCE = dict(total_nimg=1024, batch_size=512, channel_mult=[1], num_blocks=1, attn_resolutions=[])
GENERATE = ("--device=cpu", "--steps=2", "--seeds=0-11")


def write_set(path, labels, **meta):
    """A data set of random 8x8 grey images with these labels, written by `convert` from a folder."""
    import PIL.Image

    folder = path.with_suffix("")
    folder.mkdir()
    pixels = np.random.RandomState(0).randint(0, 256, [len(labels), 8, 8], dtype=np.uint8)
    for i, image in enumerate(pixels):
        PIL.Image.fromarray(image).save(folder / f"{i}.png")
    pairs = [[f"{i}.png", label] for i, label in enumerate(labels)]
    (folder / "dataset.json").write_text(json.dumps({"labels": pairs, **meta}))
    run(dataset_tool.main, "convert", f"--source={folder}", f"--dest={path}", "--channels=1")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(data set of label vectors, run folder with grids)."""
    root = tmp_path_factory.mktemp("vectors")
    data = write_set(root / "data.zip", VECTORS)
    from training.hooks import standard_hooks

    made = setup.build(small_config(data, grid=True, **ONCE))
    made.start(root / "run", standard_hooks(made))
    return data, root / "run"


def vectors_in(labels, among):
    return {tuple(np.float32(v).tolist()) for v in labels} <= {tuple(np.float32(v).tolist()) for v in among}


def test_sampling_draws_from_the_training_vectors(trained, tmp_path):
    data, net = trained
    assert list(net.glob("samples-*.png"))
    with pytest.warns(UserWarning, match="drawn from 24 label vectors"):
        run(generate_images.main, f"--net={net}", f"--outdir={tmp_path}/g", *GENERATE)
    dataset = ImageFolderDataset(tmp_path / "g")
    assert dataset.num_classes == 0 and vectors_in(dataset.raw_labels, VECTORS)
    assert len({tuple(v) for v in dataset.raw_labels.tolist()}) > 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(generate_images.main, f"--net={net}", f"--outdir={tmp_path}/h", f"--labels={data}", *GENERATE)
    few = tmp_path / "few.json"
    few.write_text(json.dumps({"labels": [["x", [9, 8, 7]]]}))
    run(generate_images.main, f"--net={net}", f"--outdir={tmp_path}/i", f"--labels={few}", *GENERATE)
    assert ImageFolderDataset(tmp_path / "i").raw_labels.tolist() == [[9, 8, 7]] * 12


def test_a_seed_has_its_vector_whatever_the_batch(trained):
    _, net = trained
    labels = []
    for size in (1, 5):
        with pytest.warns(UserWarning, match="drawn from"):
            found = generate(net, range(5), num_steps=1, max_batch_size=size)
        labels.append(torch.cat([batch.labels for batch in found]))
    assert torch.equal(*labels)


def test_metrics_of_label_vectors_have_no_sources(trained, tmp_path):
    data, net = trained
    common = (f"--data={data}", "--metrics=pixel", "--device=cpu")
    with pytest.warns(UserWarning, match="drawn from"):
        result = run(calculate_metrics.cmdline, "gen", f"--net={net}", *common, "--num=12", "--steps=2")
    assert "sources" not in json.loads(result.stdout)["metrics"]["pixel"]
    scores = json.loads(run(calculate_metrics.cmdline, "calc", f"--images={data}", *common).stdout)
    assert "sources" not in scores["metrics"]["pixel"]
    found = HeldOut(ImageFolderDataset(data)).denoising_loss(load_snapshot(net).net, load_snapshot(net).encoder)
    assert "sources" not in found
    one_line(
        calculate_metrics.cmdline, "detector", f"--data={data}", f"--dest={tmp_path}/d.pt", says="that are classes"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--class=1"], ["--class=1", "label vectors"]),
        (["--class=balanced"], ["--class=balanced", "label vectors"]),
        (["--class=1", "--labels={data}"], ["--labels", "--class"]),
        (["--labels=nowhere.json"], "nowhere.json"),
        (["--labels={ids}"], "class indices"),
    ],
)
def test_sampling_vectors_refuses(trained, tmp_path, arguments, says):
    data, net = trained
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps({"labels": [["x", 1]]}))
    arguments = [a.format(data=data, ids=ids) for a in arguments]
    one_line(generate_images.main, f"--net={net}", f"--outdir={tmp_path}/g", *GENERATE, *arguments, says=says)
    assert not (tmp_path / "g").exists()


# --- Many classes -----------------------------------------------------------------------------------------------------

MANY = 100_000


def many(count=64):
    ids = np.random.RandomState(1).randint(0, MANY, count)
    images = np.random.RandomState(0).randint(0, 256, [count, 1, 8, 8], dtype=np.uint8)
    return ArrayDataset(images, ids, num_classes=MANY), ids


def peak_of(function):
    """(result, bytes of the largest tensor operation)."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = function()
    largest = max((event.cpu_memory_usage for event in profile.events()), default=0)
    return result, largest


def test_a_lookup_gives_the_numbers_of_the_product():
    torch.manual_seed(0)
    wide = LOOKUP_WIDTH + 4
    net = Precond(
        8, 1, wide, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=8
    )
    with torch.no_grad():
        net.unet.out_gain.fill_(1)
        for block in net.unet.enc.values():
            if hasattr(block, "emb_gain"):
                block.emb_gain.fill_(1)
    x, sigma = torch.randn(4, 1, 8, 8), torch.ones(4)
    labels = torch.zeros(4, wide)
    labels[range(3), [0, 17, wide - 1]] = 1  # and a dropped one
    weight = net.unet.emb_label.weight

    def outputs(labels):
        out = net(x, sigma, labels)
        return out, *torch.autograd.grad(out.square().sum(), weight)

    looked_up = outputs(labels)
    spread = labels.clone()
    spread[3, :2] = torch.tensor([1e-30, 1e-30])  # two entries: the product of matrices
    for a, b in zip(looked_up, outputs(spread), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert looked_up[1].abs().sum() > 0


def test_many_classes_in_feed_grid_and_targets():
    dataset, ids = many()
    _, raw = load_raw(dataset)
    assert raw.tolist() == ids.tolist()
    feed = Feed(dataset, block=8, cache=True)
    ((_, _, labels),) = [*feed.blocks(0, 8)]
    assert labels.shape == (8, MANY) and labels.argmax(1).tolist() == ids[feed.order(0, 8)].tolist()
    assert (labels.sum(1) == 1).all()
    rows, titles = grid_labels(dataset)
    wanted = sorted(set(ids.tolist()))[:16]
    assert titles == [*map(str, wanted)] and rows.argmax(-1)[:, 0].tolist() == wanted
    references = torch.randn(5, 1, 2, 2), torch.eye(3)[[0, 1, 2, 0, 1]]
    targets = StableTargets(lambda n, generator: references, 5)
    draws = Draws(images=torch.zeros(2, 1, 2, 2), noise=torch.ones(2, 1, 2, 2), sigma=torch.full([2], 50.0))
    draws.labels = torch.tensor([[1.0, 0, 0], [0, 0, 0]])
    found = targets(draws, None)
    near = lambda rows: torch.cat([torch.zeros(1, 1, 2, 2), references[0][rows]]).mean(0)
    torch.testing.assert_close(found[0], near([0, 3]), atol=2e-2, rtol=0)  # almost equal weights at this noise level


def test_a_hundred_thousand_classes_are_sampled_and_validated():
    torch.manual_seed(0)
    net = Precond(
        8, 1, MANY, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=8
    )
    dataset, ids = many(16)
    (batch,), largest = peak_of(lambda: [*generate(net, range(3), num_steps=1)])
    assert batch.labels.shape == (3, MANY) and batch.labels.argmax(1).tolist() == batch.class_ids.tolist()
    assert largest < 2**28  # K x K would be 40 GB
    from training.encoders import StandardRGBEncoder

    found = HeldOut(dataset).denoising_loss(net, StandardRGBEncoder())
    assert {*found["sources"]} == {*ids.tolist()}


def test_training_on_the_classes_of_imagenet_21k(tmp_path):
    ids = [0, 21842, 7, 100]
    data = write_set(tmp_path / "d.zip", ids * 4, num_classes=21843)
    from training.hooks import standard_hooks

    made = setup.build(small_config(data, grid=True, val_data=str(data), **ONCE))
    loop = made.start(tmp_path / "run", standard_hooks(made))
    assert loop.objective.net.label_dim == 21843 and list((tmp_path / "run").glob("samples-*.png"))
    run(generate_images.main, f"--net={tmp_path}/run", f"--outdir={tmp_path}/g", "--class=21842", *GENERATE)
    assert ImageFolderDataset(tmp_path / "g").raw_labels.tolist() == [21842] * 12
