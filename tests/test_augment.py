"""The augmentation pipe against array operations, hand-made colour maps and the drawn law of its labels."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch

from training.augment import LABEL_COLUMNS, SYM6, AugmentPipe, resample_affine

ALL = dict.fromkeys(LABEL_COLUMNS, 1)
ALWAYS = 1e8  # multiplier that keeps every draw


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth_images(n=4, size=24, channels=3):
    noise = np.random.RandomState(0).randn(n, channels, size, size)
    image = scipy.ndimage.gaussian_filter(noise, [0, 0, 3, 3])
    return torch.tensor(image / image.std(), dtype=torch.float32)


def pipe_and_draw(draw, images, **options):
    """Run a pipe; return its images, labels and the parameter replayed from the same generator."""
    out, labels = AugmentPipe(**options)(images, generator(7))
    return out, labels, draw(generator(7))


def test_probability_zero_is_the_identity():
    images = torch.randn(3, 3, 8, 8)
    out, labels = AugmentPipe(p=0, **ALL)(images)
    assert torch.equal(out, images) and labels.shape == (3, sum(LABEL_COLUMNS.values())) and not labels.any()
    out, labels = AugmentPipe()(images)
    assert torch.equal(out, images) and labels.shape == (3, 0)


@pytest.mark.parametrize("name", LABEL_COLUMNS)
def test_label_zero_means_untouched(name):
    images = smooth_images(n=64)
    pipe = AugmentPipe(p=0.5, **{name: 1})
    out, labels = pipe(images, generator())
    assert labels.shape == (64, LABEL_COLUMNS[name]) == (64, pipe.label_dim)
    untouched = ~labels.any(dim=1)
    changed = (out - images).abs().amax(dim=[1, 2, 3]) > 1e-4
    assert 8 < int(untouched.sum()) < 60
    assert torch.equal(changed, ~untouched)


def test_edm_pipe():
    pipe = AugmentPipe.edm(0.12)
    assert pipe.label_dim == 9
    _, labels = pipe(torch.randn(4000, 1, 4, 4), generator())
    assert labels[:, 0].mean() == pytest.approx(0.5, abs=0.03)  # flips are a fair coin at any p
    assert labels[:, 1].mean() == pytest.approx(0.06, abs=0.015)
    assert (labels[:, 2] != 0).float().mean() == pytest.approx(0.12, abs=0.02)
    assert labels[:, 2][labels[:, 2] != 0].std() == pytest.approx(1, abs=0.1)  # log2 scale, before scale_std
    angle = torch.atan2(labels[:, 4], labels[:, 3] + 1)
    assert (angle != 0).float().mean() == pytest.approx(0.12, abs=0.02)
    assert (labels[:, 3] + 1).square().add(labels[:, 4].square()).sub(1).abs().max() < 1e-5


def test_generator_decides_everything():
    images = smooth_images()
    first, again = (AugmentPipe(**ALL)(images, generator(3)) for _ in range(2))
    other = AugmentPipe(**ALL)(images, generator(4))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


def test_flips_and_quarter_turns():
    images = torch.randn(40, 3, 6, 6)
    for name, axis in (("xflip", 3), ("yflip", 2)):
        out, labels = AugmentPipe(**{name: ALWAYS})(images, generator())
        for image, result, flip in zip(images, out, labels[:, 0], strict=True):
            assert torch.equal(result, image.flip(axis - 1) if flip else image)
    out, labels = AugmentPipe(rotate_int=ALWAYS)(images, generator())
    # Flip x, flip y, transpose in this order: (1, 0) a turn one way, (1, 1) upside down, (0, 1) the other way.
    turns = {(0, 0): 0, (1, 0): 1, (1, 1): 2, (0, 1): 3}
    for image, result, label in zip(images, out, labels.tolist(), strict=True):
        assert torch.equal(result, torch.rot90(image, turns[tuple(map(int, label))], (1, 2)))
    assert len({tuple(label) for label in labels.tolist()}) == 4


def test_whole_pixel_shift_mirrors_at_the_border():
    images = torch.randn(6, 2, 16, 8)
    out, labels = AugmentPipe(translate_int=ALWAYS, translate_int_max=0.5)(images, generator())
    tx, ty = (labels * torch.tensor([8 * 0.5, 16 * 0.5])).round().int().T.tolist()
    assert any(tx) and any(ty)
    for image, result, dx, dy in zip(images, out, tx, ty, strict=True):
        padded = np.pad(image.numpy(), ((0, 0), (9, 9), (5, 5)), mode="reflect")
        assert np.array_equal(result, padded[:, 9 + dy : 25 + dy, 5 - dx : 13 - dx])


def interior_error(actual, expected, margin=4):
    inside = (..., slice(margin, -margin), slice(margin, -margin))
    return float((torch.as_tensor(actual)[inside] - torch.as_tensor(expected)[inside]).abs().max())


def warp(images, inverse):
    """scipy's cubic spline resampling under output-to-input pixel maps [N, 2, 3] in (x, y) from the centre.

    The sym6 filter is not quite symmetric: the up-sampled image lies `phase` pixels off, and the last filter undoes
    it. So the pipe's map is conjugated by that shift, which only rotations and scalings can see.
    """
    phase = (np.arange(1, 13) @ np.asarray(SYM6[::-1]) / sum(SYM6) - 7) / -2  # centroid of the taps, in pixels
    out = np.empty(images.shape)
    h, w = images.shape[2:]
    y, x = np.meshgrid(np.arange(h) - (h - 1) / 2, np.arange(w) - (w - 1) / 2, indexing="ij")
    for i, m in enumerate(np.asarray(inverse)):
        source = m @ np.stack([x + phase, y + phase, np.ones_like(x)]).reshape(3, -1) - phase
        at = [source[1] + (h - 1) / 2, source[0] + (w - 1) / 2]
        for c in range(images.shape[1]):
            value = scipy.ndimage.map_coordinates(images[i, c].numpy(), at, order=3, mode="mirror")
            out[i, c] = value.reshape(h, w)
    return out


def test_identity_and_right_angle_through_the_filters():
    images = smooth_images()
    eye = torch.eye(3).expand(4, 3, 3)
    torch.testing.assert_close(resample_affine(images, eye), images, rtol=0, atol=2e-5)
    turn = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]).expand(4, 3, 3)
    assert interior_error(resample_affine(images, turn), warp(images, turn[:, :2])) < 0.02
    assert interior_error(resample_affine(images, turn), torch.rot90(images, 1, (2, 3))) < 0.15  # the filter's phase
    shift = torch.tensor([[1.0, 0, -2], [0, 1, 3], [0, 0, 1]]).expand(4, 3, 3)  # two right, three up
    assert interior_error(resample_affine(images, shift), images.roll((2, -3), (3, 2))) < 0.01


def test_geometry_equals_spline_resampling():
    images = smooth_images()
    n, (h, w) = len(images), images.shape[2:]
    keep = lambda g: torch.rand([n], generator=g)

    out, labels, k = pipe_and_draw(lambda g: torch.randn([n], generator=g), images, scale=ALWAYS)
    torch.testing.assert_close(labels[:, 0], k)
    expected = warp(images, [np.diag([2 ** (-0.2 * v)] * 2 + [1])[:2] for v in k.numpy()])
    assert interior_error(out, expected) < 0.03

    angle_of = lambda g: (torch.rand([n], generator=g) * 2 - 1) * math.pi
    out, labels, a = pipe_and_draw(angle_of, images, rotate_frac=ALWAYS)
    torch.testing.assert_close(labels, torch.stack([a.cos() - 1, a.sin()], 1))
    rotation = lambda a: np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0]])
    assert interior_error(out, warp(images, [rotation(v) for v in a.numpy()])) < 0.03

    def stretch(g):
        k, a = torch.randn([n], generator=g), (torch.rand([n], generator=g) * 2 - 1) * math.pi
        keep(g)
        return k, torch.where(keep(g) < 0.5, a, 0)

    out, labels, (k, a) = pipe_and_draw(stretch, images, aniso=ALWAYS)
    torch.testing.assert_close(labels, torch.stack([k * a.cos(), k * a.sin()], 1))
    maps = []
    for kv, av in zip(k.numpy(), a.numpy(), strict=True):
        r, s = rotation(av)[:, :2], 2 ** (0.2 * kv)
        maps.append(np.hstack([r.T @ np.diag([1 / s, s]) @ r, np.zeros((2, 1))]))
    assert interior_error(out, warp(images, maps)) < 0.03

    out, labels, k = pipe_and_draw(lambda g: torch.randn([2, n], generator=g), images, translate_frac=ALWAYS)
    torch.testing.assert_close(labels, k.T)
    maps = [np.array([[1, 0, -x * w * 0.125], [0, 1, -y * h * 0.125]]) for x, y in k.T.numpy()]
    assert interior_error(out, warp(images, maps)) < 0.03


def test_colours_by_hand():
    torch.manual_seed(0)
    images = torch.randn(8, 3, 5, 5)
    normal = lambda g: torch.randn([8], generator=g)
    grey = images.mean(dim=1, keepdim=True).expand_as(images)

    out, labels, k = pipe_and_draw(normal, images, brightness=ALWAYS)
    torch.testing.assert_close(out, images + 0.2 * k.reshape(-1, 1, 1, 1))
    torch.testing.assert_close(labels[:, 0], k)
    out, _, k = pipe_and_draw(normal, images, contrast=ALWAYS)
    torch.testing.assert_close(out, images * 2 ** (0.5 * k.reshape(-1, 1, 1, 1)))
    out, labels, k = pipe_and_draw(lambda g: torch.randint(2, [8], generator=g), images, lumaflip=ALWAYS)
    torch.testing.assert_close(out, images - 2 * grey * k.reshape(-1, 1, 1, 1))
    assert 0 < labels.sum() < 8
    out, _, k = pipe_and_draw(normal, images, saturation=ALWAYS)
    torch.testing.assert_close(out, grey + (images - grey) * 2 ** k.reshape(-1, 1, 1, 1))

    angle_of = lambda g: (torch.rand([8], generator=g) * 2 - 1) * math.pi
    out, labels, a = pipe_and_draw(angle_of, images, hue=ALWAYS)
    axis = np.ones(3) / math.sqrt(3)
    for i in range(8):
        pixels = torch.tensor(images[i].reshape(3, -1).T.numpy(), dtype=torch.float64).numpy()
        angle = float(a[i])
        turned = (  # Rodrigues' rotation formula
            pixels * math.cos(angle)
            + np.cross(axis, pixels) * math.sin(angle)
            + np.outer(pixels @ axis, axis) * (1 - math.cos(angle))
        )
        np.testing.assert_allclose(out[i].reshape(3, -1).T, turned, atol=1e-5)
    torch.testing.assert_close(labels, torch.stack([a.cos() - 1, a.sin()], 1))


def test_colour_steps_compose_in_order_and_grey_images_follow():
    images = torch.randn(8, 3, 5, 5)
    options = {"brightness": ALWAYS, "contrast": ALWAYS}
    out, labels = AugmentPipe(**options)(images, generator())
    b, c = (labels[:, i].reshape(-1, 1, 1, 1) for i in range(2))
    torch.testing.assert_close(out, (images + 0.2 * b) * 2 ** (0.5 * c))
    grey, grey_labels = AugmentPipe(**options, hue=ALWAYS, saturation=ALWAYS)(images[:, :1], generator())
    repeated, _ = AugmentPipe(**options, hue=ALWAYS, saturation=ALWAYS)(images[:, :1].expand(8, 3, 5, 5), generator())
    assert grey.shape == (8, 1, 5, 5) and grey_labels.shape == (8, 5)
    torch.testing.assert_close(grey.expand(8, 3, 5, 5), repeated, rtol=1e-4, atol=1e-5)


def test_user_errors():
    with pytest.raises(ValueError, match="1 or 3 channels, not 4"):
        AugmentPipe(hue=1)(torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match="square images, not 4x6"):
        AugmentPipe(rotate_int=1)(torch.zeros(1, 3, 4, 6))
    with pytest.raises(ValueError, match="p=-1"):
        AugmentPipe(p=-1)
    with pytest.raises(ValueError, match="N, C, H, W"):
        AugmentPipe()(torch.zeros(3, 4, 4))
