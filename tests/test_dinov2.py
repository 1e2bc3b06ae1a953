"""DINOv2: the public file's names and shapes, the published code's numbers, transformers' with the same weights."""

import json

import numpy as np
import published
import pytest
import safetensors.torch
import torch
from PIL import Image
from small_runs import one_line, run

import calculate_metrics
from metrics.detectors import get_detector
from metrics.detectors.dinov2 import WEIGHTS, DinoV2
from metrics.detectors.resize import bicubic, normalise


def shapes_of(**sizes):
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in DinoV2(**sizes).state_dict().items()}


def small(heads=2, **sizes):
    """(network with golden weights, these)."""
    sizes = {"embed": 64, "depth": 2, **sizes}
    state = published.weights(shapes_of(heads=heads, **sizes))
    net = DinoV2(heads=heads, **sizes)
    net.load_state_dict(state)
    return net.eval().requires_grad_(False), state


def test_names_and_shapes_are_those_of_the_public_file():
    shapes = shapes_of()
    assert len(shapes) == 343 and sum(int(np.prod(shape)) for shape in shapes.values()) == 304_368_640
    block = {
        "norm1.weight": (1024,), "norm1.bias": (1024,), "attn.qkv.weight": (3072, 1024), "attn.qkv.bias": (3072,),
        "attn.proj.weight": (1024, 1024), "attn.proj.bias": (1024,), "ls1.gamma": (1024,), "norm2.weight": (1024,),
        "norm2.bias": (1024,), "mlp.fc1.weight": (4096, 1024), "mlp.fc1.bias": (4096,), "mlp.fc2.weight": (1024, 4096),
        "mlp.fc2.bias": (1024,), "ls2.gamma": (1024,),
    }  # fmt: skip
    expected = {f"blocks.{i}.{name}": shape for i in range(24) for name, shape in block.items()}
    expected |= {"cls_token": (1, 1, 1024), "pos_embed": (1, 1370, 1024), "mask_token": (1, 1024)}
    expected |= {"patch_embed.proj.weight": (1024, 3, 14, 14), "patch_embed.proj.bias": (1024,)}
    assert shapes == expected | {"norm.weight": (1024,), "norm.bias": (1024,)}


def test_golden_numbers():
    """Of the published class with the same weights and images, resized as EDM2 does."""
    net, _ = small()
    found = net(normalise(bicubic(published.images(64, 48).float(), 224)))
    first, last = [-0.996834, 0.998820, 1.020550, -1.070615], [1.255785, 1.148082]
    published.assert_golden(found, first, last, -0.001805, 1.013470)


def cubic(size, scale, grid=37):
    """[size, grid] float64: output i reads at (i + 0.5) scale - 0.5, A = -0.75, indices clamped, weights as they are."""
    weights, a = np.zeros((size, grid)), -0.75
    for i in range(size):
        at = (i + 0.5) * scale - 0.5
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            d = abs(at - j)
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
            weights[i, min(max(j, 0), grid - 1)] += near if d <= 1 else far
    return weights


@pytest.mark.parametrize("rows, columns", [(16, 16), (37, 37), (16, 20), (37, 36), (50, 3)])
def test_position_tables(rows, columns):
    """By the formula: steps of 37 / (n + 0.1). The step 37 / n, the commonest error, is far off."""
    net, state = small()
    table = state["pos_embed"].double().numpy()
    grid = table[0, 1:].reshape(37, 37, -1)
    expected = grid
    if (rows, columns) != (37, 37):
        y, x = (cubic(n, 37 / (n + 0.1)) for n in (rows, columns))
        expected = np.einsum("iy,jx,yxc->ijc", y, x, grid)
    found = net.positions(rows, columns)
    np.testing.assert_allclose(found[0, 1:].unflatten(0, (rows, columns)), expected, atol=2e-5)
    assert np.array_equal(found[0, 0], table[0, 0])
    if rows == columns == 16:
        assert abs(np.einsum("iy,jx,yxc->ijc", *[cubic(16, 37 / 16)] * 2, grid) - expected).max() > 0.1


@pytest.mark.parametrize("size", [(64, 64), (300, 180), (224, 224)])
def test_pixels_are_resized_as_pillow_does(size):
    """Pillow's bicubic of float images shares the kernel, and rounds nothing in between."""
    images = published.images(*size, count=1)
    found = bicubic(images.float(), 224)
    for channel, expected in zip(found[0], images[0], strict=True):
        theirs = Image.fromarray(expected.numpy().astype(np.float32)).resize((224, 224), Image.BICUBIC)
        np.testing.assert_allclose(channel, np.asarray(theirs), atol=5e-3)
    assert found.min() < 0 or size == (224, 224)  # no clamp
    unit = normalise(torch.tensor([0.485, 0.456, 0.406])[None, :, None, None] * 255 + torch.tensor(255 * 0.229))
    np.testing.assert_allclose(unit.flatten(), [1, 0.229 / 0.224, 0.229 / 0.225], rtol=1e-5)


def of_transformers(state):
    """The published state under transformers' names, which keep query, key and value apart."""
    outside = {"cls_token": "embeddings.cls_token", "mask_token": "embeddings.mask_token"}
    outside |= {"pos_embed": "embeddings.position_embeddings", "norm.weight": "layernorm.weight"}
    outside |= {
        f"patch_embed.proj.{kind}": f"embeddings.patch_embeddings.projection.{kind}" for kind in ("weight", "bias")
    }
    outside |= {"norm.bias": "layernorm.bias"}
    inside = {"attn.proj": "attention.o_proj", "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
    result = {}
    for name, value in state.items():
        if name in outside:
            result[outside[name]] = value
            continue
        _, block, own = name.split(".", 2)
        place = f"encoder.layer.{block}"
        if own.startswith("attn.qkv"):
            for part, third in zip("qkv", value.chunk(3), strict=True):
                result[f"{place}.attention.{part}_proj.{own.rpartition('.')[2]}"] = third
        else:
            for ours, theirs in inside.items():
                own = own.replace(ours, theirs)
            result[f"{place}.{own}"] = value
    return result


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(our network, transformers' at 518 px with the same weights, a folder where it saved itself)."""
    transformers = pytest.importorskip("transformers")
    net, state = small(heads=1, depth=3)
    sizes = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=1, patch_size=14)
    model = transformers.Dinov2Model(transformers.Dinov2Config(image_size=518, **sizes)).eval()
    model.load_state_dict(of_transformers(state))
    folder = tmp_path_factory.mktemp("dinov2")
    model.save_pretrained(folder)
    return net, model, folder


@pytest.mark.parametrize("size", [(518, 518), (224, 224)])
def test_features_are_those_of_transformers(theirs, size):
    """At 518 px as it is; at 224 px with our position table in it, since it resizes by size and not by the factor."""
    net, model, _ = theirs
    x = normalise(bicubic(published.images(40, 40).float(), size[0]))
    if size[0] == 224:
        config = type(model.config)(**model.config.to_dict() | {"image_size": 224})
        resized = type(model)(config).eval()
        table = {"embeddings.position_embeddings": net.positions(16, 16)}
        resized.load_state_dict(model.state_dict() | table)
        model = resized
    with torch.no_grad():
        expected = model(x).pooler_output
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.5


def test_files_of_transformers_are_read_too(theirs, tmp_path):
    """As it saves itself, whose names are of its older versions, and under its newer ones."""
    net, model, folder = theirs
    images = published.images(32, 32)
    expected = net(normalise(bicubic(images.float(), 224)))
    assert any(
        "attention.attention.query" in name for name in safetensors.torch.load_file(folder / "model.safetensors")
    )
    safetensors.torch.save_file(
        {f"dinov2.{name}": v for name, v in model.state_dict().items()}, tmp_path / "x.safetensors"
    )
    torch.save(small(heads=1, depth=3)[1], tmp_path / "x.pth")
    for file in (folder / "model.safetensors", tmp_path / "x.safetensors", tmp_path / "x.pth"):
        detector = get_detector(f"fd_dinov2:{file}@any")
        torch.testing.assert_close(detector.features(images), expected, atol=1e-5, rtol=1e-5)
        assert detector.width == 64 and detector.identity == f"fd_dinov2:{detector.sha256[:16]}"


def test_reference_and_scores_from_the_command_line(digits, tmp_path):
    """Grey images, per source; batches of any size give the same to 1e-4."""
    torch.save(small(heads=1)[1], file := tmp_path / WEIGHTS.names[0])
    given = ["--metrics=fd_dinov2", f"--weights=fd_dinov2={tmp_path}@any"]
    run(calculate_metrics.cmdline, "ref", f"--data={digits}", f"--dest={tmp_path}/r.npz", *given)
    detector = get_detector(f"fd_dinov2:{file}@any")
    found = []
    for batch in (1, 7, 256):
        score = ["calc", f"--images={digits}", f"--ref={tmp_path}/r.npz", *given, f"--batch={batch}", "--num=20"]
        found.append(json.loads(run(calculate_metrics.cmdline, *score).stdout)["metrics"][detector.identity]["overall"])
        assert found[-1]["fd"] == pytest.approx(found[0]["fd"], rel=1e-4) and found[0]["fd"] > 1e-3
        assert found[-1]["kid"] == pytest.approx(found[0]["kid"], abs=1e-4)


def test_half_precision_says_what_it_does(digits, tmp_path):
    """bf16 has 8 bits: features are off by about 2^-8, the distance hardly; fp16 has three more. No mixing, nothing else."""
    torch.save(small(heads=1)[1], file := tmp_path / WEIGHTS.names[0])
    given = ["--metrics=fd_dinov2", f"--weights=fd_dinov2={file}@any"]
    ref = lambda name: f"{tmp_path}/{name}.npz"
    found = {}
    for name in ("fp32", "bf16", "fp16"):
        how = [*given, f"--detector-precision={name}"]
        run(calculate_metrics.cmdline, "ref", f"--data={digits}", f"--dest={ref(name)}", *how)
        done = run(
            calculate_metrics.cmdline,
            "calc",
            f"--images={digits}",
            f"--ref={ref(name)}",
            *how,
            "--num=20",
            "--splits=0",
        )
        (found[name],) = json.loads(done.stdout)["metrics"].values()
        assert (f"features in {name} are off by" in done.stderr) == (name != "fp32")
        assert found[name]["reference"]["detector"]["precision"] == name
    assert "precision_error" not in found["fp32"]
    bf16, fp16 = (found[name]["precision_error"] for name in ("bf16", "fp16"))
    assert 2**-10 < bf16 < 2**-5 and 2**-14 < fp16 < bf16 / 3
    assert 0 < abs(found["bf16"]["overall"]["fd"] / found["fp32"]["overall"]["fd"] - 1) < 0.05
    calc = ["calc", f"--images={digits}", f"--ref={ref('fp32')}", "--num=20"]
    one_line(calculate_metrics.cmdline, *calc, *given, "--detector-precision=bf16", says=["precision=fp32", "bf16"])
    says = "--detector-precision=bf16: pixel computes in fp32 alone"
    one_line(calculate_metrics.cmdline, *calc, "--metrics=pixel", "--detector-precision=bf16", says=says)


def test_files_of_another_network(tmp_path):
    path = tmp_path / "x.pth"

    def refused(says, **changes):
        state = {**small(heads=1)[1], **changes}
        torch.save({name: value for name, value in state.items() if value is not None}, path)
        with pytest.raises(ValueError, match=f"x.pth: {says}"):
            get_detector(f"fd_dinov2:{path}@any")

    refused("the variant with registers; .*dinov2_vitl14_pretrain.pth", register_tokens=torch.zeros(1, 4, 64))
    refused("lacks 'pos_embed'", pos_embed=None)
    refused("tensor 'pos_embed' has shape", pos_embed=torch.zeros(1, 1371, 64))
    refused("lacks tensor 'mask_token'", mask_token=None)
    refused("holds an unexpected tensor 'blocks.0.mlp.w12.weight'", **{"blocks.0.mlp.w12.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=f"sha256 is .*, expected {WEIGHTS.sha256}"):
        get_detector(f"fd_dinov2:{path}")
