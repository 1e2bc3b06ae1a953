"""Only sources with training images are drawn and scored, unless asked for, and then with a word."""

import json

import numpy as np
import pytest
import torch
from conftest import convert_digits
from small_runs import one_line, run, small_config

import calculate_metrics
import dataset_tool
import generate_images
from metrics.distances import frechet_distance
from torch_utils.persistence import load_snapshot, read_header, save_snapshot
from training import setup
from training.dataset import ImageFolderDataset, load_arrays
from training.dataset.format import png_bytes
from training.generation import generate_images as generate

MAIN = (generate_images.main, "--device=cpu", "--steps=2")
GEN = (calculate_metrics.cmdline, "gen", "--steps=1", "--splits=0", "--distances=fd", "--device=cpu")


@pytest.fixture
def snapshot(tmp_path, tiny_net):
    """A function: sources -> path of the same network of ten classes, whose header lists them (None: no list)."""

    def make(sources):
        path = tmp_path / f"net-{sources}.safetensors"
        save_snapshot(path, tiny_net(10), **({} if sources is None else {"sources": sources}))
        return str(path)

    return make


def test_training_lists_its_sources(tmp_path):
    data = convert_digits(tmp_path / "data.zip", sources="0,3,5", per_source=8)
    short = dict(total_nimg=1024, checkpoint_nimg=0, channel_mult=[1], attn_resolutions=[1])
    for name, more, expected in (("a", {}, [0, 3, 5]), ("b", dict(cond=False), None), ("c", dict(max_images=1), 1)):
        setup.train(small_config(data, **short, **more), tmp_path / name)
        header = read_header(tmp_path / name)
        assert header["sources"] == expected or len(header["sources"]) == expected
    assert load_snapshot(tmp_path / "a").sources == [0, 3, 5] and load_snapshot(tmp_path / "b").sources is None


@pytest.mark.parametrize("class_idx", [None, "balanced", 3])
def test_nothing_changes_for_a_network_trained_on_all(snapshot, class_idx):
    """Noise, classes and images of a seed, to the bit; also the draws of EDM2: noise, then a uniform class."""
    found = []
    for sources in (None, [*range(10)]):
        (batch,) = generate(snapshot(sources), range(12), class_idx=class_idx, num_steps=2, S_churn=5)
        found.append(batch)
    for name in ("noise", "class_ids", "images"):
        assert torch.equal(found[0][name], found[1][name])
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        torch.randn([1, 8, 8], generator=generator)
        drawn = int(torch.randint(10, [], generator=generator))
        assert int(found[0].class_ids[seed]) == {None: drawn, "balanced": seed % 10, 3: 3}[class_idx]


def test_classes_are_drawn_from_the_trained_ones(snapshot, recwarn):
    known, every = snapshot([0, 3, 5]), snapshot(None)
    (drawn,) = generate(known, range(60), num_steps=1, max_batch_size=60)
    assert set(drawn.class_ids.tolist()) == {0, 3, 5} and min(np.bincount(drawn.class_ids)[[0, 3, 5]]) > 9
    (balanced,) = generate(known, range(6), class_idx="balanced", num_steps=1)
    assert balanced.class_ids.tolist() == [0, 3, 5, 0, 3, 5]
    (some,) = generate(known, range(4), class_idx="balanced", sources=[5, 0], num_steps=1)
    assert some.class_ids.tolist() == [5, 0, 5, 0] and not recwarn.list
    (all_of_them,) = generate(every, range(60), num_steps=1, max_batch_size=60)
    assert torch.equal(drawn.noise, all_of_them.noise)
    one = dict(num_steps=2, S_churn=5, max_batch_size=60)  # the class costs one draw, however many there are
    same = [seed for seed in range(60) if drawn.class_ids[seed] == all_of_them.class_ids[seed]]
    a, b = (next(iter(generate(net, same, **one))).images for net in (known, every))
    assert len(same) > 2 and torch.equal(a, b)


@pytest.mark.parametrize("options", [["--class=7"], ["--class=balanced", "--sources=0,7"]], ids=str)
def test_another_class_gets_a_word(snapshot, tmp_path, options):
    with pytest.warns(UserWarning, match="class 7 had no training images, the network was trained on 0,3,5"):
        run(*MAIN, f"--net={snapshot([0, 3, 5])}", f"--outdir={tmp_path / 'out'}", "--seeds=0-3", *options)
    assert 7 in dict(json.loads((tmp_path / "out" / "dataset.json").read_text())["labels"]).values()


@pytest.mark.parametrize("sources", [[3, 10], [-1], "all", [], [1.5], {"0": 1}], ids=str)
def test_a_list_that_is_none_is_refused(snapshot, tmp_path, sources):
    one_line(*MAIN, f"--net={snapshot(sources)}", f"--outdir={tmp_path / 'out'}", says=["sources", "header"])
    assert not (tmp_path / "out").exists()


def moments(images):
    x = images.reshape(len(images), -1).astype(np.float64) / 127.5 - 1
    return x.mean(0), np.cov(x, rowvar=False)


@pytest.mark.parametrize(
    "trained, reference, options, counted",
    [
        ([0, 1, 2], "0,1,2", [], [0, 1, 2]),
        ([0, 1, 2], "0,1", [], [0, 1]),  # the reference lacks one
        ([0, 1, 2], "0,1,2,3,4", [], [0, 1, 2]),  # training lacks two
        ([0, 1, 2], "0,1,2,7", ["--class=balanced", "--sources=0,7"], [0, 1, 2]),  # asked for, and yet not counted
        ([0], "0,1,2", [], [0]),
        (None, "0,1,2", [], None),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:--class")
def test_overall_holds_what_training_and_reference_share(snapshot, tmp_path, trained, reference, options, counted):
    net, data = snapshot(trained), convert_digits(tmp_path / "ref.zip", sources=reference)
    result = run(*GEN, f"--net={net}", f"--data={data}", "--num=40", *options)
    scores = json.loads(result.stdout)["metrics"]["pixel"]
    chosen = dict(class_idx="balanced", sources=[0, 7]) if options else {}
    batches = generate(net, range(40), num_steps=1, max_batch_size=40, **chosen)
    images, ids = next((batch.images.numpy(), batch.class_ids.numpy()) for batch in batches)
    real, labels = (part.numpy() for part in load_arrays(ImageFolderDataset(str(data))))
    labels, counted = labels.argmax(1), range(10) if counted is None else counted
    ours, theirs = np.isin(ids, counted), np.isin(labels, counted)
    assert (scores["overall"]["count"], scores["overall"]["reference_count"]) == (ours.sum(), theirs.sum())
    expected = frechet_distance(*moments(images[ours]), *moments(real[theirs]))
    assert scores["overall"]["fd"] == pytest.approx(expected, rel=1e-6)
    left = {str(k): int((ids == k).sum()) for k in np.unique(ids[~ours])}
    assert scores.get("left_out", {}) == left and ("left out of the overall" in result.stderr) == bool(left)
    assert scores["num_images"] == 40 and (trained is None or scores["mean"]["fd"] > 0)


def test_a_folder_is_scored_on_the_sources_of_the_reference(snapshot, tmp_path):
    out, data = tmp_path / "out", convert_digits(tmp_path / "ref.zip", sources="0,1")
    run(*MAIN, f"--net={snapshot([0, 1, 2])}", f"--outdir={out}", "--seeds=0-29", "--class=balanced")
    result = run(calculate_metrics.cmdline, "calc", f"--images={out}", f"--data={data}", "--splits=0", "--device=cpu")
    scores = json.loads(result.stdout)["metrics"]["pixel"]
    assert scores["overall"]["count"] == 20 and scores["left_out"] == {"2": 10}
    assert "Warning: pixel: 10 images of sources 2" in result.stderr


@pytest.mark.parametrize(
    "command", [["loss"], ["likelihood", "--num=2", "--samples=1"]], ids=lambda command: command[0]
)
def test_measures_on_data_say_what_the_network_never_saw(snapshot, tmp_path, command):
    net, data = snapshot([0, 1, 2]), convert_digits(tmp_path / "data.zip", sources="2,3,5")
    own = convert_digits(tmp_path / "own.zip", sources="1,2")
    words = [*command, f"--net={net}", "--device=cpu"]
    said = run(calculate_metrics.cmdline, *words, f"--data={data}").stderr
    assert f"Warning: --data={data} holds images of sources 3,5" in said and "trained on 0,1,2" in said
    assert "sources" not in run(calculate_metrics.cmdline, *words, f"--data={own}").stderr
    if command == ["loss"]:
        asked = (calculate_metrics.cmdline, *words, f"--data={data}", "--sources=7")
        one_line(*asked, says=["--sources=7", str(data)])
        assert "Warning" not in run(calculate_metrics.cmdline, *words, f"--data={data}", "--sources=2").stderr


@pytest.mark.parametrize(
    "labels, more, hinted",
    [
        ([1, 2, 1, 2], {}, True),
        ([1, 2, 3, 3], {"num_classes": 4}, True),  # as convert writes a list that starts at 1
        ([2, 5, 2, 5], {}, True),
        ([3, 5, 3, 5], {"num_classes": 10}, False),  # chosen sources
        ([0, 1, 2, 0], {}, False),
        (None, {}, False),
    ],
    ids=str,
)
def test_inspect_hints_at_labels_from_one(tmp_path, labels, more, hinted):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png_bytes(np.full([1, 8, 8], i, np.uint8)))
    pairs = labels and [[f"{i}.png", label] for i, label in enumerate(labels)]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": pairs, **more}))
    text = run(dataset_tool.main, "inspect", tmp_path).output
    assert ("source 0 has no images: labels count from 0" in text) == hinted
