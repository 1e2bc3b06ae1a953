"""Golden weights and images of published networks: random, of a recipe that other implementations were run with."""

import numpy as np
import torch

SKIPPED = ("num_batches_tracked", "attn_mask", "relative_position_index")


def weights(shapes):
    """{name: float32 tensor} of {name: shape}: one stream of normal numbers, in the order of the names."""
    rng, state = np.random.RandomState(0), {}
    for name in sorted(name for name in shapes if not name.endswith(SKIPPED)):
        shape = tuple(shapes[name])
        n, fan_in = rng.standard_normal(shape), int(np.prod(shape[1:]))
        if name.endswith("running_var"):
            value = 1 + 0.1 * abs(n)
        elif len(shape) == 1:
            value = 0.1 * n + name.endswith(("weight", "gamma"))
        elif len(shape) == 4 and name.endswith("conv.weight"):
            value = n * np.sqrt(2 / fan_in)
        elif name.endswith(("embed", "token", "table")):
            value = 0.5 * n
        else:
            value = n / np.sqrt(fan_in)
        state[name] = torch.from_numpy(value.astype(np.float32))
    return state


def images(height, width, count=2):
    """uint8 [count, 3, height, width]; the first two are the golden ones."""
    pixels = np.random.RandomState(1).randint(0, 256, (count, 3, height, width))
    return torch.from_numpy(pixels.astype(np.uint8))


def assert_golden(found, first, last, mean, std):
    """The digits of a table: entries [0, :4] and [1, -2:], mean and standard deviation (n - 1)."""
    np.testing.assert_allclose(found[0, :4], first, atol=1e-4)
    np.testing.assert_allclose(found[1, -2:], last, atol=1e-4)
    np.testing.assert_allclose([found.mean(), found.std()], [mean, std], atol=1e-4)
