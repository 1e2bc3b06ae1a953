"""Blocks drawn together, or one by one, are the same in every bit; what is not known to allow it is drawn one by one."""

import numpy as np
import pytest
import torch

from torch_utils.random import BlockGenerator, randn, seeded_generator, standard_gamma
from training import processes
from training.augment import AugmentPipe
from training.dataset import ArrayDataset
from training.encoders import IdentityEncoder, LogitEncoder, StabilityVAEEncoder, StandardRGBEncoder
from training.feed import Candidates, Feed
from training.losses import Draws, EDM2Loss, EDMLoss, StableTargets, VELoss, VPLoss
from training.losses.process import ProcessLoss

COUNT = 32 * 4 + 7  # the last block is shorter


def data_for(encoder):
    draw = np.random.RandomState(0)
    if encoder.stored == "uint8":
        images = draw.randint(0, 256, [200, 3, 8, 8]).astype(np.uint8)
    else:
        images = draw.rand(200, 8, 4, 4).astype(np.float32)
    return ArrayDataset(images, np.arange(200) % 5)


def candidates(loss, encoder=None, max_batch=None, block=32):
    encoder = encoder or StandardRGBEncoder()
    feed = Feed(data_for(encoder), seed=3, block=block)
    return Candidates(feed, encoder, loss, 64, COUNT, COUNT, 0, max_batch)


def one_by_one(found):
    """The draws block by block, each from a generator of its own: the contract."""
    return Draws.cat(found.draw([block]) for block in found.feed.blocks(found.position, found.count))


LOSSES = {
    "edm2": EDM2Loss,
    "dropout": lambda: EDM2Loss(label_dropout=0.3),
    "edm": EDMLoss,
    "vp": VPLoss,
    "ve": VELoss,
    "pfgmpp": lambda: EDM2Loss(kernel=processes.get("pfgmpp", D=128)),
    "cld": lambda: ProcessLoss(processes.get("cld")),
    "importance": lambda: ProcessLoss(processes.get("cld"), time_sampling="importance"),
    "learned": lambda: ProcessLoss(processes.get("learned")),
    "augmented": lambda: EDMLoss(augment=AugmentPipe.edm(0.5)),
    "stable": lambda: EDM2Loss(stable_targets=StableTargets(lambda n, g: (randn([n, 3, 8, 8], g), None), 4)),
}


@pytest.mark.parametrize("encoder", [StandardRGBEncoder(), LogitEncoder(), IdentityEncoder(), StabilityVAEEncoder()])
@pytest.mark.parametrize("max_batch", [None, 96, 50, 7])
def test_encoders_draw_the_same_together(encoder, max_batch):
    parts = list(candidates(EDM2Loss(), encoder, max_batch))
    assert [len(p) for p in parts[:-1]] == [max_batch] * (len(parts) - 1) and sum(map(len, parts)) == COUNT
    assert_same(Draws.cat(parts), one_by_one(candidates(EDM2Loss(), encoder)))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("block", [32, 20])
def test_losses_draw_the_same_together(name, block):
    torch.manual_seed(0)  # learned matrices
    loss = LOSSES[name]()
    assert_same(Draws.cat(list(candidates(loss, block=block))), one_by_one(candidates(loss, block=block)))


def assert_same(found, wanted):
    for name, value in wanted.items():
        assert (value is None and found[name] is None) or torch.equal(found[name], value), name
    assert len(found) == len(wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_which_are_drawn_together(name):
    sizes = [len(blocks) for blocks in candidates(LOSSES[name]())._groups()]
    assert sizes == ([1] * 5 if name in ("importance", "augmented", "stable") else [5])


def test_what_is_not_known_gets_a_plain_generator():
    class Own(EDM2Loss):
        def sample_sigma(self, n, generator, device):
            assert isinstance(generator, torch.Generator)
            return torch.rand([n], generator=generator) + torch.arange(n) / n

    found = candidates(Own())
    assert_same(Draws.cat(list(found)), one_by_one(found))
    kernel = type("Kernel", (), {"unit_noise": lambda self, shape, generator: torch.rand(shape, generator=generator)})
    assert [len(g) for g in candidates(EDM2Loss(kernel=kernel()))._groups()] == [1] * 5


def test_block_generators_draw_what_each_draws_alone():
    blocks = lambda: [seeded_generator("cpu", 1, k) for k in range(3)]
    both = BlockGenerator(blocks(), [4, 1, 3])
    alone = blocks()
    for _ in range(2):
        wanted = torch.cat([randn([n, 5], g) for n, g in zip([4, 1, 3], alone, strict=True)])
        assert torch.equal(randn([8, 5], both), wanted)
    wanted = torch.cat([standard_gamma(2.0, n, g) for n, g in zip([4, 1, 3], alone, strict=True)])
    assert torch.equal(standard_gamma(2.0, 8, both), wanted)
    with pytest.raises(ValueError, match="number of seeds, 8"):
        randn([7, 5], both)
