"""Selection functions against the pairwise definition of JEST, exact enumeration and hand-made cases."""

import functools
import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from training.selection import functions as sf
from training.selection.functions import conditional_logits, jointly_sample_batch, requirements_of

VARIANTS = list(itertools.product([True, False], [False, True]))  # learnability, inverted


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pairwise_logits(learner, reference, selected, learnability, inverted):
    """The definition: a B x B score matrix, rows and columns of the selected set summed (NumPy, float64)."""
    b = len(learner)
    scores = np.subtract.outer(learner if learnability else np.zeros(b), reference)
    scores = -scores if inverted else scores
    mask = np.zeros(b)
    mask[list(selected)] = 1
    total = scores.diagonal() + mask @ scores + scores @ mask
    return np.where(mask == 1, -np.inf, total / (2 * len(selected) + 1))


@pytest.mark.parametrize("learnability, inverted", VARIANTS)
@pytest.mark.parametrize("b, n", [(6, 0), (7, 2), (50, 20)])
def test_closed_form_equals_the_pairwise_form(b, n, learnability, inverted):
    rng = np.random.RandomState(b + n)
    learner, reference, selected = rng.randn(b) * 3, rng.rand(b), rng.permutation(b)[:n]
    expected = pairwise_logits(learner, reference, selected, learnability, inverted)
    args = (torch.tensor(learner), torch.tensor(reference), torch.tensor(selected), learnability, inverted)
    logits = conditional_logits(*args)
    assert logits.dtype == torch.float64
    np.testing.assert_allclose(logits, expected, atol=1e-13)
    mask = torch.zeros(b, dtype=torch.bool).index_fill(0, args[2], True)
    for same in (set(selected.tolist()), mask, selected):  # any container says the same
        torch.testing.assert_close(conditional_logits(*args[:2], same, learnability, inverted), logits)
    single = conditional_logits(args[0].float(), args[1].float(), list(selected), learnability, inverted)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, expected, atol=1e-5 / 2)


def chunk_law(learner, reference, k, num_chunks, learnability, inverted):
    """Probability of every ordered outcome by enumeration: uniform first chunk, then successive softmax draws."""
    law = {(): 1.0}
    for chunk in range(num_chunks):
        grown = {}
        for prefix, p_prefix in law.items():
            logits = pairwise_logits(learner, reference, prefix, learnability, inverted)
            weights = np.exp(logits) if chunk else np.isfinite(logits).astype(float)
            free = [i for i in range(len(learner)) if i not in prefix]
            for picks in itertools.permutations(free, k):
                p, left = p_prefix, weights.copy()
                for i in picks:
                    p *= left[i] / left.sum()
                    left[i] = 0
                grown[prefix + picks] = p
        law = grown
    return law


@pytest.mark.parametrize("b, k, num_chunks, learnability, inverted", [(5, 1, 3, True, False), (5, 2, 2, False, True)])
def test_draws_follow_the_exact_law(b, k, num_chunks, learnability, inverted):
    rng = np.random.RandomState(1)
    learner, reference = rng.randn(b) * 2, rng.randn(b) * 2
    law = chunk_law(learner, reference, k, num_chunks, learnability, inverted)
    assert sum(law.values()) == pytest.approx(1)
    g, draws = generator(), 4000
    args = (torch.tensor(learner), torch.tensor(reference))
    options = {"size": k * num_chunks, "num_chunks": num_chunks, "learnability": learnability, "inverted": inverted}
    counts = dict.fromkeys(law, 0)
    for _ in range(draws):
        counts[tuple(jointly_sample_batch(*args, **options, generator=g).tolist())] += 1
    # Pool outcomes too rare for a chi-square test.
    common = [o for o, p in law.items() if p * draws >= 5]
    observed = [counts[o] for o in common] + [draws - sum(counts[o] for o in common)]
    expected = [law[o] * draws for o in common] + [draws * (1 - sum(law[o] for o in common))]
    keep = np.array(expected) > 1e-9
    assert scipy.stats.chisquare(np.array(observed)[keep], np.array(expected)[keep]).pvalue > 1e-3
    inclusion = [sum(p for o, p in law.items() if i in o) for i in range(b)]
    frequency = np.array([sum(c for o, c in counts.items() if i in o) for i in range(b)]) / draws
    assert np.abs(frequency - inclusion).max() < 4.5 * 0.5 / math.sqrt(draws)
    assert max(inclusion) - min(inclusion) > 0.15  # a uniform sampler would fail


@pytest.mark.parametrize(
    "b, num_chunks, joint, uniform",
    [
        (64, 8, 8, 12),
        (128, 8, 24, 25),
        (256, 8, 48, 51),
        (512, 8, 96, 102),
        (4096, 16, 816, 819),
        (1024, 16, 192, 204),
        (40, 8, 8, 8),
        (80, 16, 16, 16),
        (1000, 8, 200, 200),
    ],
)
def test_published_sizes_in_exact_arithmetic(b, num_chunks, joint, uniform):
    losses = torch.rand(b)
    assert len(jointly_sample_batch(losses, losses, filter_ratio=0.8, num_chunks=num_chunks)) == joint
    assert sf.selection_size(b, 0.8) == uniform
    assert sf.selection_size(b, 0.8, num_chunks) == joint


def call(function, size, b=40, seed=0):
    inputs = {
        "learner_loss": torch.linspace(0, 3, b),
        "reference_loss": torch.linspace(1, 0, b),
        "features": torch.randn(b, 3, 2, 2, generator=generator(9)),
    }
    inputs = {name: inputs[name] for name in requirements_of(function)}
    return function(**inputs, size=size, generator=generator(seed))


@pytest.mark.parametrize("name", sf.FUNCTIONS)
def test_every_function_keeps_the_contract(name):
    function = sf.FUNCTIONS[name]
    for size in (1, 7, 23, 40):
        indices = call(function, size)
        assert indices.dtype == torch.int64 and indices.shape == (size,)
        assert len(set(indices.tolist())) == size and indices.min() >= 0 and indices.max() < 40
    assert torch.equal(call(function, 23), call(function, 23))
    if name != "hard":
        assert not torch.equal(call(function, 23), call(function, 23, seed=1))
    for size in (0, 41):
        with pytest.raises(ValueError, match=f"size={size}"):
            call(function, size)


@pytest.mark.parametrize("name", ["jest", "hard", "proportional", "diverse"])
def test_the_learnable_half_is_preferred(name):
    share = np.mean([(call(sf.FUNCTIONS[name], 16, seed=s) >= 20).double().mean() for s in range(20)])
    assert share > 0.6


def test_chunks_share_a_given_size_evenly():
    """The first chunk ignores the scores: with decisive scores the uniform part of the selection shows its size."""
    learner = torch.cat([torch.full((50,), 1e6), torch.zeros(950)])
    zeros = torch.zeros(1000)
    for size, num_chunks, first in [(10, 4, 3), (12, 4, 3), (5, 16, 1), (7, 1, 7)]:
        hits = [
            int(
                (
                    jointly_sample_batch(learner, zeros, size=size, num_chunks=num_chunks, generator=generator(s)) < 50
                ).sum()
            )
            for s in range(40)
        ]
        assert max(hits) <= size and size - first <= min(hits)
        assert min(hits) == size - first  # some seed draws its uniform chunk entirely outside


def test_invariances():
    torch.manual_seed(0)
    learner, reference = torch.randn(60).double(), torch.randn(60).double()
    draw = lambda l, r, **kw: jointly_sample_batch(l, r, size=20, num_chunks=5, generator=generator(3), **kw)
    base = draw(learner, reference)
    assert torch.equal(draw(learner + 5, reference - 7), base)
    assert torch.equal(draw(reference, learner, inverted=True), base)
    assert torch.equal(
        draw(learner * 0, reference, inverted=False, learnability=True), draw(learner, reference, learnability=False)
    )
    assert torch.equal(
        sf.easy_reference(learner, reference, size=20, num_chunks=5, generator=generator(3)),
        draw(learner, reference, learnability=False),
    )
    assert not torch.equal(draw(learner, reference, inverted=True), base)
    for loss in (learner.float(), learner.clone().requires_grad_()):
        assert not draw(loss, reference).requires_grad
    logits = conditional_logits(learner, reference, [4, 7])
    shuffle = torch.randperm(60)
    where = shuffle.argsort()[torch.tensor([4, 7])]
    torch.testing.assert_close(conditional_logits(learner[shuffle], reference[shuffle], where), logits[shuffle])
    both = conditional_logits(2 * learner, 2 * reference, [4, 7])
    torch.testing.assert_close(both, 2 * logits)


def test_extreme_losses_and_large_batches():
    learner = torch.zeros(64).index_fill(0, torch.tensor([5, 9]), 1e30)
    learner[11] = math.inf
    picked = jointly_sample_batch(learner, torch.zeros(64), size=32, num_chunks=4)
    assert {5, 9, 11} <= set(picked.tolist()) and len(set(picked.tolist())) == 32
    low = jointly_sample_batch(-learner, torch.zeros(64), size=60, num_chunks=60)
    assert len(set(low.tolist())) == 60
    big = jointly_sample_batch(torch.rand(65536), torch.rand(65536))
    assert len(big) == len(big.unique()) == 16 * (65536 * 2 // 10 // 16)
    features = torch.randn(65536, 8)
    diverse = sf.diverse_learnability(torch.rand(65536), torch.rand(65536), features, size=13104, num_chunks=4)
    assert len(diverse.unique()) == 13104


def test_requirements_come_from_the_signature():
    assert requirements_of(jointly_sample_batch) == {"learner_loss", "reference_loss"}
    assert requirements_of(sf.random_baseline) == {"learner_loss"}
    assert requirements_of(sf.diverse_learnability) == {"learner_loss", "reference_loss", "features"}
    assert requirements_of(functools.partial(jointly_sample_batch, inverted=True)) == {"learner_loss", "reference_loss"}

    def own(learner_loss, labels, sigma, *, size, generator, temperature=2.0, **kwargs):
        return torch.arange(size)

    assert requirements_of(own) == {"learner_loss", "labels", "sigma"}

    def wrong(learner_loss, gradients, *, size, generator):
        return None

    with pytest.raises(ValueError, match="wrong requires 'gradients'"):
        requirements_of(wrong)


def test_hard_loss_takes_the_largest():
    losses = torch.tensor([3.0, 1, 9, 7, 7, 0])
    assert sf.hard_loss(losses, size=2).tolist()[0] == 2
    assert set(sf.hard_loss(losses, size=3).tolist()) == {2, 3, 4}
    seconds = {sf.hard_loss(losses, size=2, generator=generator(s)).tolist()[1] for s in range(20)}
    assert seconds == {3, 4}


def test_proportional_draws_by_loss():
    losses = torch.tensor([0.0, 1, 2, 5])
    g = generator()
    first = np.bincount([int(sf.proportional(losses, size=1, generator=g)) for _ in range(3000)], minlength=4)
    assert first[0] == 0
    assert scipy.stats.chisquare(first[1:], np.array([1, 2, 5]) / 8 * 3000).pvalue > 1e-3
    assert sorted(sf.proportional(losses, size=4).tolist()) == [0, 1, 2, 3]
    shifted = np.bincount([int(sf.proportional(losses - 1, size=1, generator=g)) for _ in range(500)], minlength=4)
    assert shifted[0] == 0 and shifted[3] > shifted[2] > shifted[1] > 0


def test_diversity_gain_is_the_log_determinant():
    torch.manual_seed(0)
    x = torch.randn(12, 4, dtype=torch.float64)
    selected = torch.tensor([1, 5, 8])
    ridge = 0.7
    logdet = lambda rows: torch.linalg.slogdet(torch.eye(len(rows)).double() + x[rows] @ x[rows].T / ridge)[1]
    gains = sf.diversity_gains(x, selected, ridge)
    for i in (0, 3, 11):
        expected = logdet(torch.tensor([1, 5, 8, i])) - logdet(selected)
        assert float(gains[i]) == pytest.approx(float(expected), rel=1e-10)
    torch.testing.assert_close(sf.diversity_gains(x, selected[:0], ridge), (1 + x.square().sum(1) / ridge).log())


def test_diverse_selection_interacts_and_jest_does_not():
    """Two kinds, 9 to 1, equal losses: diversity draws more of the rare kind; JEST draws in proportion."""
    torch.manual_seed(0)
    kind = torch.zeros(200).long().index_fill(0, torch.arange(20), 1)
    features = torch.nn.functional.one_hot(kind, 2) + 0.05 * torch.randn(200, 2)
    losses = torch.zeros(200)
    rare = lambda f: np.mean([int(kind[f(generator(s))].sum()) for s in range(30)]) / 40
    options = {"size": 40, "num_chunks": 10}
    jest = rare(lambda g: jointly_sample_batch(losses, losses, **options, generator=g))
    diverse = rare(lambda g: sf.diverse_learnability(losses, losses, features, **options, generator=g))
    off = rare(lambda g: sf.diverse_learnability(losses, losses, features, diversity=0.0, **options, generator=g))
    assert jest == pytest.approx(0.1, abs=0.03) and off == pytest.approx(0.1, abs=0.03)
    assert diverse > 0.15


def test_sketch_approximates_a_gaussian_kernel():
    x = torch.randn(30, 3, 2, 2, generator=generator()) + 4
    sketch = sf.sketch_features(x, sketch_dim=20000, bandwidth=0.8, generator=generator())
    flat = x.flatten(1)
    h2 = 0.8**2 * flat.var(dim=0, correction=0).sum()
    expected = (-torch.cdist(flat, flat).square() / (2 * h2)).exp()
    assert (sketch @ sketch.T - expected).abs().max() < 0.05
    same = sf.sketch_features(torch.ones(5, 2), sketch_dim=8)
    torch.testing.assert_close(same, same[:1].expand(5, 8))


@pytest.mark.parametrize(
    "learner, reference, options, message",
    [
        ([1.0, math.nan, 2], [0.0, 0, 0], {}, "learner_loss holds 1 NaN of 3"),
        ([1.0, 1, 2], [0.0, math.nan, math.nan], {}, "reference_loss holds 2 NaN"),
        ([1.0, 1, 2], [0.0, 0], {}, r"reference_loss is \[2\]"),
        ([[1.0], [2.0]], [[1.0], [2.0]], {}, "one loss per candidate"),
        ([1.0] * 40, [0.0] * 40, {"num_chunks": 16}, "num_chunks=16"),
        ([1.0] * 40, [0.0] * 40, {"filter_ratio": 1.0}, "filter_ratio=1.0"),
        ([1.0] * 40, [0.0] * 40, {"size": 4, "num_chunks": 0}, "num_chunks=0"),
    ],
)
def test_user_errors(learner, reference, options, message):
    with pytest.raises(ValueError, match=message):
        jointly_sample_batch(torch.tensor(learner), torch.tensor(reference), **options)
    with pytest.raises(ValueError, match="NaN"):
        sf.hard_loss(torch.tensor([math.nan, 1.0]), size=1)
