"""torch_utils.random against published check values and against plain generators."""

import numpy
import pytest
import torch

from torch_utils import random
from torch_utils.random import StackedRandomGenerator, child_generator, hash_seed


def test_stacked_randn_check_values():
    draws = StackedRandomGenerator("cpu", [0, -1]).randn([2, 3, 4, 4])
    torch.testing.assert_close(draws[0].flatten()[:4], torch.tensor([-1.1258398, -1.1523602, -0.2505786, -0.4338788]))
    # Negative seeds wrap modulo 2^32.
    plain = torch.randn([3, 4, 4], generator=torch.Generator().manual_seed(2**32 - 1))
    assert torch.equal(draws[1], plain)


def test_stacked_randint_check_values():
    assert StackedRandomGenerator("cpu", range(8)).randint(10, size=[8]).tolist() == [4, 5, 8, 6, 0, 1, 0, 5]
    stacked = StackedRandomGenerator("cpu", range(8))
    stacked.randn([8, 3, 4, 4])
    assert stacked.randint(1000, size=[8]).tolist() == [782, 721, 920, 697, 818, 416, 683, 612]


def test_stacked_like_and_errors():
    like = torch.zeros(2, 5, dtype=torch.float64)
    draws = StackedRandomGenerator("cpu", [3, 4]).randn_like(like)
    expected = torch.randn(5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert draws.dtype == torch.float64 and torch.equal(draws[1], expected)
    with pytest.raises(ValueError, match="number of seeds, 2"):
        StackedRandomGenerator("cpu", [3, 4]).randn([3, 5])
    assert StackedRandomGenerator("cpu", []).randn([0, 5]).shape == (0, 5)
    assert StackedRandomGenerator("cpu", []).randint(7, size=[0]).dtype == torch.int64


def test_hash_seed_check_values():
    expected = {
        (0, 0): 397586535,
        (0, 1): 16979904,
        (1, 0): 1403689752,
        (0, 0, 0): 360982090,
        (0, 0, 2048): 386374691,
        (0, 3, 2048): 2014903531,
        (7,): 1272795442,
        (123456789, 2, 2**31): 1798188830,
    }
    assert {values: hash_seed(*values) for values in expected} == expected
    assert hash_seed(numpy.int64(0), torch.tensor(1)) == 16979904
    for value in ("0", 1.5):
        with pytest.raises(ValueError, match="integers"):
            hash_seed(value, 1)


def test_child_generator_leaves_the_parent_alone():
    parent, twin = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    child = child_generator(parent)
    first = torch.randn(1000, generator=child)
    assert torch.equal(torch.randn(8, generator=parent), torch.randn(8, generator=twin))
    # The same state gives the same child, a later state another one.
    again = child_generator(torch.Generator().manual_seed(5))
    assert torch.equal(first, torch.randn(1000, generator=again))
    assert not torch.equal(first, torch.randn(1000, generator=child_generator(parent)))
    # Independent of the parent's own stream: correlation of 1000 pairs below 5 standard errors.
    stream = torch.randn(1000, generator=torch.Generator().manual_seed(5))
    assert abs(torch.corrcoef(torch.stack([first, stream]))[0, 1]) < 5 / 1000**0.5


def test_child_of_the_global_generator():
    torch.manual_seed(3)
    first = torch.randn(4, generator=child_generator(None))
    after = torch.randn(4)
    torch.manual_seed(3)
    assert torch.equal(torch.randn(4), after)
    torch.manual_seed(3)
    assert torch.equal(torch.randn(4, generator=child_generator(None)), first)


@pytest.mark.parametrize("concentration", [0.25, 1.5, 64.0])
def test_standard_gamma_law(concentration):
    from scipy import stats

    draws = random.standard_gamma(concentration, 5000, torch.Generator().manual_seed(0))
    assert draws.dtype == torch.float64 and (draws > 0).all()
    assert stats.kstest(draws.numpy(), stats.gamma(concentration).cdf).pvalue > 1e-3
    stacked = random.standard_gamma(concentration, 2, StackedRandomGenerator("cpu", [1, 2]))
    single = random.standard_gamma(concentration, 1, torch.Generator().manual_seed(2))
    assert stacked[1] == single[0]
