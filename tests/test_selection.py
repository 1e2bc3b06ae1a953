"""Selection in training: what is scored, what is trained on, when it switches, on one process and on two."""

import json
import math
import multiprocessing
import socket

import pytest
import torch

from simulations.tree.training import TreeFeed
from torch_utils import distributed as dist
from torch_utils.persistence import save_snapshot
from torch_utils.random import hash_seed
from training.encoders import IdentityEncoder, StandardRGBEncoder
from training.feed import Candidates
from training.losses import Draws, EDM2Loss, Loss, Objective
from training.schedules import ajest_learning_rate, ajest_schedule
from training.selection import FUNCTIONS, IdentitySelector, LossSelector, hard_loss, jointly_sample_batch


class PointFeed:
    """One block of all candidates: image i is filled with value[i], its label is one-hot of source[i]."""

    seed, block, rank, world_size, device = 0, 1 << 20, 0, 1, torch.device("cpu")

    def __init__(self, values, sources=None, num_sources=0, side=2):
        self.values, self.side = torch.as_tensor(values, dtype=torch.float32), side
        self.labels = torch.zeros(len(self.values), num_sources)
        if num_sources:
            self.labels[range(len(values)), list(sources)] = 1

    def blocks(self, position, count):
        index = torch.arange(position, position + count) % len(self.values)
        images = self.values[index].reshape(-1, 1, 1, 1).expand(-1, 1, self.side, self.side).contiguous()
        yield position, images, self.labels[index]


class ValueLoss(Loss):
    """The loss of an example is net(its image): known losses for learner and reference. sigma counts the examples."""

    def draw(self, images, labels=None, generator=None):
        sigma = torch.arange(1.0, len(images) + 1)
        return Draws(images=images, sigma=sigma, noise=torch.zeros_like(images), labels=labels)

    def evaluate(self, net, draws):
        return net(draws.images)


class Affine(torch.nn.Module):
    """slope * image + offset; counts the examples it sees."""

    def __init__(self, slope=1.0, offset=0.0):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(float(slope)))
        self.offset, self.seen = offset, 0

    def forward(self, x, *args, **kwargs):
        self.seen += len(x)
        return self.slope * x + self.offset


def candidates_of(feed, selector, batch, cur_nimg=0, position=0, loss=None, **options):
    count = selector.candidates(batch)
    return Candidates(feed, IdentityEncoder(), loss or ValueLoss(), position, count, batch, cur_nimg, **options)


def step(selector, objective, feed, batch=4, cur_nimg=0, position=0):
    """One step's trained values, and the position after it."""
    candidates = candidates_of(feed, selector, batch, cur_nimg, position)
    parts = list(selector.minibatches(objective, candidates))
    values = torch.cat([d.images[:, 0, 0, 0] for d in parts]) if parts else torch.zeros(0)
    return values.tolist(), position + candidates.count


def test_bad_choices_are_named():
    for bad in (dict(filter_ratio=1), dict(scope="node"), dict(when="often"), dict(cheap="free"), dict(when="early")):
        with pytest.raises(ValueError):
            LossSelector(hard_loss, **bad)
    with pytest.raises(ValueError, match="--reference"):
        LossSelector(jointly_sample_batch)
    with pytest.raises(ValueError, match="--chunks"):
        LossSelector(hard_loss, options={"num_chunks": 4})


@pytest.mark.parametrize(
    "function",
    [
        lambda learner_loss, *, size, generator: torch.zeros(size, dtype=torch.int64),
        lambda learner_loss, *, size, generator: torch.arange(size - 1),
        lambda learner_loss, *, size, generator: torch.arange(size) + len(learner_loss) - 1,
        lambda learner_loss, *, size, generator: learner_loss > 0,
    ],
    ids=["repeated", "too few", "out of range", "mask"],
)
def test_a_function_that_breaks_its_contract_is_refused(function):
    with pytest.raises(ValueError, match="2 distinct indices below 8"):
        step(LossSelector(function, filter_ratio=0.75), Objective(Affine(), ValueLoss()), PointFeed(range(8)), batch=2)


def test_indices_may_come_as_a_list():
    selector = LossSelector(lambda learner_loss, *, size, generator: [5, 2], filter_ratio=0.75)
    assert step(selector, Objective(Affine(), ValueLoss()), PointFeed(range(8)), batch=2)[0] == [5.0, 2.0]


def test_the_largest_losses_are_trained_on_and_nothing_else():
    selector = LossSelector(hard_loss, filter_ratio=0.75)
    net = Affine()
    values, position = step(selector, Objective(net, ValueLoss()), PointFeed(range(16)))
    assert position == 16 and sorted(values) == [12, 13, 14, 15]
    assert net.seen == 16 and net.slope.grad is None  # scored once, without gradient
    ratio = LossSelector(hard_loss, filter_ratio=0.8)
    assert ratio.candidates(200) == 1000 and ratio.candidates(24) == 120  # exact rationals


def test_random_costs_no_network_evaluation():
    net = Affine()
    values, _ = step(
        LossSelector(FUNCTIONS["random"], filter_ratio=0.5), Objective(net, ValueLoss()), PointFeed(range(8))
    )
    assert len(set(values)) == 4 and net.seen == 0


def test_selection_prefers_what_the_reference_can_and_the_learner_cannot():
    torch.manual_seed(0)
    learnable = torch.arange(64) % 2  # odd examples: the learner's loss is 6, the reference's 0
    feed = PointFeed(learnable)
    selector = LossSelector(jointly_sample_batch, Affine(0.0), filter_ratio=0.75, options={"num_chunks": 4})
    objective, chosen = Objective(Affine(6.0), ValueLoss()), []
    for i in range(50):
        values, _ = step(selector, objective, feed, 16, 16 * i, 64 * i)
        chosen += values
    # First chunk (4 of 16) uniform; after it beta >= 1/2: odds of e^3 = 20 to 1. Expected share over .25 / 2 + .75 * .93.
    assert sum(chosen) / len(chosen) > 0.8


def test_two_passes_give_the_gradient_of_one(tiny_net):
    """Scoring without gradient, then training on the chosen, against choosing from losses that carry the graph."""
    torch.manual_seed(1)
    images, labels = torch.randn(24, 1, 8, 8), torch.eye(10)[torch.arange(24) % 10]
    loss = EDM2Loss(sigma_data=0.5)

    class Feed(PointFeed):
        def blocks(self, position, count):
            yield position, images[:count], labels[:count]

    gradients = []
    for two_pass in (True, False):
        objective, reference = Objective(tiny_net(), loss).train().requires_grad_(True), tiny_net(seed=1)
        for _ in range(3):  # training forwards normalize the weights in place: start where that has converged
            objective(Draws.cat(list(candidates_of(Feed([0.0]), IdentitySelector(), 12, loss=loss))))
        selector = LossSelector(jointly_sample_batch, reference, filter_ratio=0.5, options={"num_chunks": 3})
        candidates = candidates_of(Feed([0.0]), selector, 12, loss=loss, max_batch=5)
        if two_pass:
            parts = list(selector.minibatches(objective, candidates))
            assert [len(d) for d in parts] == [5, 5, 2]
            for draws in parts:
                objective(draws).sum().backward()
        else:
            draws = Draws.cat(list(candidates))
            objective.eval()  # the choice is made in eval mode
            scores = [loss.evaluate(net, draws).float().flatten(1).mean(1) for net in (objective.net, reference)]
            idx = jointly_sample_batch(*scores, size=12, num_chunks=3, generator=candidates.generator)
            objective.train()
            objective(draws).flatten(1).sum(1)[idx].sum().backward()  # as published: all candidates in the graph
        gradients.append(torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None]))
    difference = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert gradients[1].norm() > 1e-3 and difference < 1e-6


@pytest.mark.parametrize("when", ["early", "late"])
def test_the_switch_is_for_good_and_takes_effect_with_the_next_step(when):
    learner, reference = Affine(1.0), Affine(1.0, offset=-0.5)
    objective, feed = Objective(learner, ValueLoss()), PointFeed(range(16))
    selector = LossSelector(hard_loss, reference, filter_ratio=0.75, when=when)
    before, after = (16, 4) if when == "early" else (4, 16)
    position = 0
    for i, offset in enumerate([-0.5, -0.6, -0.4, 3.0, -9.0]):  # of the reference, against 0: beaten in the fourth step
        reference.offset = offset
        assert selector.candidates(4) == (before if i < 4 else after)
        _, position = step(selector, objective, feed, 4, 4 * i, position)
    assert selector.beaten_at == 12 and selector.candidates(4) == after  # the reference is ahead again: no way back
    assert selector.progress() == dict(selecting=when == "late", when=when, ratio=4.0, beaten_at=12)
    other = LossSelector(hard_loss, reference, filter_ratio=0.75, when=when)
    other.load_state_dict(json.loads(json.dumps(selector.state_dict())))
    assert other.candidates(4) == after and other.state_dict() == selector.state_dict()


def test_selection_window_in_images():
    selector = LossSelector(hard_loss, filter_ratio=0.5, select_from=8, select_until=16)
    objective, position, sizes = Objective(Affine(), ValueLoss()), 0, []
    for i in range(5):
        sizes.append(selector.candidates(4))
        _, position = step(selector, objective, PointFeed(range(8)), 4, 4 * i, position)
    assert sizes == [4, 4, 8, 8, 4]


def test_statistics_say_what_is_selected_per_source():
    feed = PointFeed([0, 0, 5, 1, 9, 0, 8, 0], sources=[0, 0, 2, 0, 1, 1, 1, 2], num_sources=3)
    selector = LossSelector(hard_loss, filter_ratio=0.5)
    step(selector, Objective(Affine(), ValueLoss()), feed)  # keeps 9, 8, 5, 1: sources 1, 1, 2, 0
    stats = selector.statistics()
    assert [stats[f"Selection/share_source{k}"] for k in range(3)] == pytest.approx([0.25, 0.5, 0.25])
    assert [stats[f"Selection/candidate_share_source{k}"] for k in range(3)] == pytest.approx([3 / 8, 3 / 8, 2 / 8])
    assert stats["Selection/learner_loss"] == pytest.approx(23 / 8)
    assert stats["Selection/learner_loss_selected"] == pytest.approx(23 / 4)
    logs = [math.log(i) for i in (3, 4, 5, 7)]  # the places of 5, 1, 9 and 8
    assert stats["Selection/log_sigma_selected"] == pytest.approx(sum(logs) / 4)
    assert stats["Selection/candidates_kimg"] == pytest.approx(0.008) and 0 < stats["Selection/time_share"] <= 1
    assert "Selection/learner_loss" not in selector.statistics()  # since the last call


def test_cheap_scores():
    feed = PointFeed(range(1, 17), side=4)
    for cheap in ("half", "lowres", "levels"):
        net = Affine()
        selector = LossSelector(hard_loss, filter_ratio=0.75, cheap=cheap)
        values, _ = step(selector, Objective(net, ValueLoss()), feed)
        if cheap == "levels":  # sigma = the value: the middle eight are 5 .. 12, the others get their mean, 8.5
            assert net.seen == 8 and sorted(values) == [9, 10, 11, 12]
        else:
            assert net.seen == 16 and sorted(values) == [13, 14, 15, 16]

    class Probe(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.inputs = torch.nn.Parameter(torch.ones([])), []

        def forward(self, x, sigma, labels=None, return_logvar=False):
            self.inputs.append((x.clone(), sigma.clone(), torch.is_autocast_enabled("cpu")))
            out = x * self.weight
            return (out, torch.zeros(len(x), 1, 1, 1)) if return_logvar else out

    for cheap in ("half", "lowres"):
        net, loss = Probe(), EDM2Loss()
        selector = LossSelector(hard_loss, filter_ratio=0.5, cheap=cheap)
        candidates = candidates_of(feed, selector, 4, loss=loss)
        drawn = Draws.cat(list(candidates))
        chosen = Draws.cat(list(selector.minibatches(Objective(net, loss), candidates)))
        x, sigma, autocast = net.inputs[0]
        assert autocast == (cheap == "half") and chosen.images.shape[-1] == 4  # training is never cheapened
        if cheap == "lowres":
            noisy = drawn.images + drawn.noise
            expected = (
                noisy[..., ::2, ::2] + noisy[..., 1::2, ::2] + noisy[..., ::2, 1::2] + noisy[..., 1::2, 1::2]
            ) / 4
            torch.testing.assert_close(x, expected)
            torch.testing.assert_close(sigma, drawn.sigma / 2)
            # D(y) = y: the loss is lambda(sigma / 2) times the mean square of the averaged noise.
            n = torch.nn.functional.avg_pool2d(drawn.noise, 2).square().mean(dim=(1, 2, 3))
            s = drawn.sigma / 2
            losses = (s**2 + 0.25) / (0.5 * s) ** 2 * n
            assert sorted(chosen.sigma.tolist()) == sorted(drawn.sigma[losses.topk(4).indices].tolist())
    with pytest.raises(ValueError, match="even side"):
        step(LossSelector(hard_loss, cheap="lowres"), Objective(Affine(), ValueLoss()), PointFeed(range(8), side=1))


# --- two processes ------------------------------------------------------------------------------------------------------


class TwoFeed(TreeFeed):
    """Points whose values are uniform in their position: 0 .. 1."""

    def __init__(self, rank, world_size, block=8):
        self.seed, self.block, self.device, self.rank, self.world_size = 5, block, torch.device("cpu"), rank, world_size

    def blocks(self, position, count):
        from training.feed import block_slices, share

        for first, size in share(block_slices(position, count, self.block), self.rank, self.world_size):
            values = torch.rand(size, generator=torch.Generator().manual_seed(hash_seed(self.seed, first)))
            yield first, values.reshape(-1, 1, 1, 1), torch.eye(3)[torch.arange(first, first + size) % 3]


def two_process_work(rank, world_size):
    """Sorted values selected over all ranks, whether the trigger fired, the statistics."""
    out = {}
    for name in ("jest", "diverse", "hard"):
        reference = Affine(-0.3, 0.4)
        options = {} if name == "hard" else {"num_chunks": 4}
        selector = LossSelector(FUNCTIONS[name], reference, filter_ratio=0.75, options=options)
        values, _ = step(selector, Objective(Affine(5.0), ValueLoss()), TwoFeed(rank, world_size), batch=20)
        out[name] = torch.tensor(values)
        out[f"{name} statistics"] = {k: v for k, v in selector.statistics().items() if "time" not in k}
    # Scope "rank": the ranks' own verdicts differ, the switch must not. The reference's loss is 1 on the first half of the
    # candidates and 3 on the second, the learner's 1.5 everywhere.
    for scope in ("rank", "global"):
        feed = TwoFeed(rank, world_size)
        feed.blocks = lambda position, count, feed=feed: (
            (p, torch.full_like(v, 1.0 if p < count // 2 else 3.0), lab)
            for p, v, lab in TwoFeed.blocks(feed, position, count)
        )
        selector = LossSelector(hard_loss, Affine(1.0), filter_ratio=0.5, scope=scope, when="early")
        values, _ = step(selector, Objective(Affine(0.0, 1.5), ValueLoss()), feed, batch=16)
        out[f"beaten {scope}"] = selector.beaten_at, selector.candidates(16), len(values)
    return out


def two_process_main(rank, port, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    queue.put((rank, {k: v.tolist() if torch.is_tensor(v) else v for k, v in two_process_work(rank, 2).items()}))
    torch.distributed.barrier()
    dist.shutdown()


def test_two_processes_select_the_same_set_as_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=two_process_main, args=(rank, port, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    results = dict(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(60)
    alone = two_process_work(0, 1)
    for name in ("jest", "diverse", "hard"):
        assert len(alone[name]) == 20
        assert sorted(results[0][name] + results[1][name]) == sorted(alone[name].tolist())
        assert results[0][name] and results[1][name]
        assert results[0][f"{name} statistics"] == pytest.approx(alone[f"{name} statistics"])
    for scope in ("rank", "global"):
        verdicts = {results[rank][f"beaten {scope}"][:2] for rank in range(2)}
        assert verdicts == {alone["beaten global"][:2]} == {(0, 16)}  # 1.5 < (1 + 3) / 2, on both ranks at once
        assert sum(results[rank][f"beaten {scope}"][2] for rank in range(2)) == 16


# --- in the trainer ----------------------------------------------------------------------------------------------------


def test_resume_includes_selection(digits, tiny_net, tmp_path):
    from training.config import make_config
    from training.setup import train

    reference = tmp_path / "reference.safetensors"
    # A trained network that is worse than most: the fresh learner beats it once its learning rate has done some work.
    net = tiny_net()
    net.unet.out_gain.data.fill_(0.0)
    net.logvar_linear.weight.data.mul_(0.0)
    save_snapshot(reference, net, encoder=StandardRGBEncoder())
    options = dict(
        data=str(digits), channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], channels_per_head=8,
        batch_size=16, total_nimg=128, snapshot_nimg=0, checkpoint_nimg=0, status_nimg=128, lr=0.02, rampup=1e-6,
        decay=100, lr_schedule="ajest", fp16=False, select="jest", reference=str(reference), select_when="early",
        select_options={"num_chunks": 4}, grid=False,
    )  # fmt: skip
    whole = train(make_config(**options), tmp_path / "whole")
    assert 0 < whole.selector.beaten_at < 112  # the switch lies between two resumes
    for _ in range(4):
        parts = train(make_config(**options, slice_nimg=32), tmp_path / "parts")
    for (name, p), q in zip(whole.objective.named_parameters(), parts.objective.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert parts.selector.state_dict() == whole.selector.state_dict() and parts.state.position == whole.state.position
    stats = json.loads((tmp_path / "whole" / "stats.jsonl").read_text().splitlines()[-1])
    shares = [stats[f"Selection/share_source{k}"] for k in range(10)]
    assert sum(shares[:3]) == pytest.approx(1) and stats["Selection/candidates_kimg"] > stats["Progress/kimg"]


def test_published_learning_rate():
    """The turning points that follow from super-batch 2048, 384 selected, decay 5463, ramp .780288 Mimg, lr .012."""
    common = dict(super_batch=2048, mini_batch=384, ref_lr=0.012, ref_batches=5463, rampup_Mimg=0.780288)

    def rate(step, selecting, **more):
        nimg = (step + 1) * (384 if selecting else 2048)
        return ajest_learning_rate(nimg, step, selecting=selecting, **common, **more)

    assert rate(379, False) < 0.012 == pytest.approx(rate(380, False))  # 381 steps of 2048 images are the ramp
    assert rate(70, True) < 0.012 == pytest.approx(rate(71, True), rel=1e-2)  # F^2 = 28 times faster in images
    assert rate(5463, False) == pytest.approx(0.012) and rate(5500, False) < 0.01197
    assert rate(1024, True) == pytest.approx(0.012) and rate(1030, True) < 0.01197  # 5463 / F
    assert rate(4 * 5463, False) == pytest.approx(0.006)
    # Continuous at a switch: what ran before it keeps its count.
    e, n = 3000, 3000 * 384
    before = ajest_learning_rate(n, e, selecting=True, when="early", **common)
    after = ajest_learning_rate(n, e, selecting=False, when="early", change_nimg=n, change_step=e, **common)
    assert after == pytest.approx(before) == pytest.approx(0.012 / math.sqrt(e * 2048 / 384 / 5463))
    before = ajest_learning_rate(e * 2048, e, selecting=False, when="late", **common)
    late = dict(selecting=True, when="late", change_nimg=e * 2048, change_step=e)
    assert ajest_learning_rate(e * 2048, e, **late, **common) == pytest.approx(before)
    with pytest.raises(ValueError, match="too small"):
        ajest_learning_rate(0, 0, 256, 256, selecting=True)
    # As the trainer calls it: images before the step.
    progress = dict(IdentitySelector().progress(), selecting=True, ratio=2048 / 384)
    assert ajest_schedule(384 * 70, 384, 0.012, 5463, 0.780288, selection=progress) == pytest.approx(rate(70, True))
