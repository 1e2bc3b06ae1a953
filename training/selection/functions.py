"""Selection functions: given the losses of a super-batch, which examples are worth training on.

A selection function is `f(learner_loss [B], ..., *, size, generator) -> indices [size]`: distinct int64 indices on the
input's device. Beside learner_loss it may declare reference_loss, features, labels or sigma; it receives by name what
its signature declares (`requirements_of`). Draws come from `generator` on its own device, so that the same losses and
seed select the same examples on every process.

JEST (Evans et al. 2024, arXiv 2406.17711), as used by AJEST (Pais et al. 2025, arXiv 2509.15267), scores pairs by
s_ij = l_i - r_j. That is additive, so the "joint" logits of example i given the selected set S collapse to
((n + 1) s_ii + const)/(2n + 1), n = |S|: **there is no interaction between examples**, only a softmax of each
example's own score without replacement, at an inverse temperature between 1 (n = 0) and 1/2. Hence O(B) memory and
time. `diverse_learnability` does interact: what is already selected lowers the chance of examples like it.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Generator, Tensor

from torch_utils import random
from torch_utils.devices import send

KNOWN_INPUTS = ("learner_loss", "reference_loss", "features", "labels", "sigma")


def requirements_of(function: Callable) -> set[str]:
    """Names among learner_loss, reference_loss, features, labels, sigma that `function` declares.

    Raises ValueError for a required parameter that no selector can supply.
    """
    names = set()
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if name in KNOWN_INPUTS:
            names.add(name)
        elif parameter.default is parameter.empty and name not in ("size", "generator"):
            label = getattr(function, "__name__", repr(function))
            raise ValueError(
                f"selection function {label} requires {name!r}, which is not supplied; "
                f"declare only {', '.join(KNOWN_INPUTS)}, size, generator, or give a default"
            )
    return names


def selection_size(num_candidates: int, filter_ratio: float = 0.8, num_chunks: int = 1) -> int:
    """num_chunks * floor(B (1 - filter_ratio) / num_chunks) in exact rationals (AJEST, size rule).

    filter_ratio is the fraction discarded, taken at its decimal value (0.8 is 4/5). Raises ValueError if nothing
    would be selected.
    """
    ratio = Fraction(str(filter_ratio))
    if not 0 <= ratio < 1:
        raise ValueError(f"filter_ratio={filter_ratio} is outside [0, 1); it is the fraction discarded")
    if num_chunks < 1:
        raise ValueError(f"num_chunks={num_chunks} must be at least 1")
    size = num_chunks * math.floor(num_candidates * (1 - ratio) / num_chunks)
    if size < 1:
        raise ValueError(
            f"filter_ratio={filter_ratio} of {num_candidates} candidates leaves less than one example for each of "
            f"num_chunks={num_chunks} chunks; enlarge the super-batch or lower --chunks or --filter-ratio"
        )
    return size


def _losses(**named):
    """Check losses [B] and return them detached in float64 (float32 where the device has none), infinities clamped."""
    out = []
    first = next(iter(named.values()))
    for name, loss in named.items():
        if not torch.is_tensor(loss) or loss.ndim != 1 or loss.shape != first.shape:
            shape = list(loss.shape) if torch.is_tensor(loss) else type(loss).__name__
            raise ValueError(f"{name} is {shape}; give one loss per candidate, a tensor of shape {[len(first)]}")
        dtype = torch.float32 if first.device.type == "mps" else torch.float64
        loss = loss.detach().to(device=first.device, dtype=dtype)
        limit = torch.finfo(dtype).max / 8  # sums and differences stay finite
        out.append(loss.clamp(-limit, limit))  # NaN stay
    for name, bad in zip(named, torch.stack([loss.isnan().sum() for loss in out]).tolist(), strict=True):
        if bad:
            raise ValueError(f"{name} holds {bad} NaN of {len(first)} values; nothing can be selected")
    return out if len(out) > 1 else out[0]


def _check_size(size, num_candidates):
    if not 1 <= size <= num_candidates:
        raise ValueError(f"size={size} is not within 1 .. {num_candidates}, the number of candidates")


def _gumbel_top(logits, size, generator):
    """`size` indices without replacement, by successive softmax draws (Plackett-Luce) == the largest Gumbel-noised logits."""
    device = logits.device if generator is None else generator.device
    noise = torch.empty(logits.shape, dtype=logits.dtype, device=device).exponential_(generator=generator)
    return (logits - send(noise, logits.device).log()).topk(size).indices


def _scores(learner_loss, reference_loss, learnability, inverted):
    """Diagonal scores s_ii [B]: l - r, or -r (easy reference), or the negative of either."""
    learner, reference = _losses(learner_loss=learner_loss, reference_loss=reference_loss)
    scores = learner - reference if learnability else -reference
    return -scores if inverted else scores


def _by_chunks(scores, size, num_chunks, generator, bonus=None):
    """`size` distinct indices in nearly equal chunks, the first ones one larger, each by JEST's law given those before.

    bonus: selected -> [B], added to the logits.
    """
    _check_size(size, len(scores))
    if num_chunks < 1:
        raise ValueError(f"num_chunks={num_chunks} must be at least 1")
    base, extra = divmod(size, num_chunks)
    selected = torch.empty(0, dtype=torch.int64, device=scores.device)
    free = torch.zeros_like(scores)  # 0, or -inf once selected
    for chunk in [base + 1] * extra + [base] * (num_chunks - extra if base else 0):
        n = len(selected)
        logits = ((n + 1) / (2 * n + 1) if n else 0.0) * scores  # the first chunk is uniform
        if bonus is not None:
            logits = logits + bonus(selected)
        picked = _gumbel_top(logits + free, chunk, generator)
        free[picked] = -math.inf
        selected = torch.cat([selected, picked])
    return selected


def conditional_logits(
    learner_loss: Tensor,
    reference_loss: Tensor,
    selected: Sequence[int] | set[int] | Tensor,
    learnability: bool = True,
    inverted: bool = False,
) -> Tensor:
    """JEST's logits [B] of the next chunk, given what is already selected: indices in any container, or a bool mask [B].

    ((n + 1) s_ii + sum over selected k of s_kk) / (2n + 1), n = len(selected), -inf on selected; in the type of
    learner_loss. s = l - r (learnability) or -r (easy reference), negated if inverted. Evans et al. 2024, algorithm 1.
    """
    scores = _scores(learner_loss, reference_loss, learnability, inverted)
    selected = list(selected) if isinstance(selected, (set, frozenset)) else selected
    selected = torch.as_tensor(selected, device=scores.device).flatten()
    selected = (selected.nonzero().flatten() if selected.dtype == torch.bool else selected).to(torch.int64)
    n = len(selected)
    logits = ((n + 1) * scores + scores[selected].sum()) / (2 * n + 1)
    logits[selected] = -math.inf
    return logits.to(learner_loss.dtype)


def jointly_sample_batch(
    learner_loss: Tensor,
    reference_loss: Tensor,
    *,
    size: int | None = None,  # number to select, spread evenly over the chunks; None: by filter_ratio, equal chunks
    filter_ratio: float = 0.8,  # fraction discarded
    num_chunks: int = 16,  # the first chunk is uniform, each later one conditioned on those before
    learnability: bool = True,  # False: easy reference, the learner's loss is ignored
    inverted: bool = False,  # prefer the least learnable
    generator: Generator | None = None,
) -> Tensor:
    """Joint example selection (JEST; Evans et al. 2024, algorithm 1, with AJEST's normalised logits).

    learner_loss, reference_loss [B] -> distinct indices in the order of the chunks. O(B) memory and O(B num_chunks)
    time by the closed form of the logits (see the module). Raises ValueError for NaN losses, unequal shapes and sizes
    that select nothing.
    """
    scores = _scores(learner_loss, reference_loss, learnability, inverted)
    size = selection_size(len(scores), filter_ratio, num_chunks) if size is None else size
    return _by_chunks(scores, size, num_chunks, generator)


def easy_reference(
    learner_loss: Tensor, reference_loss: Tensor, *, size: int, num_chunks: int = 16, generator: Generator | None = None
) -> Tensor:
    """JEST without the learner: prefers what the reference already finds easy, s = -r (Evans et al. 2024)."""
    return _by_chunks(_scores(learner_loss, reference_loss, False, False), size, num_chunks, generator)


def random_baseline(learner_loss: Tensor, *, size: int, generator: Generator | None = None) -> Tensor:
    """Uniform without replacement; of the losses only their number matters."""
    _check_size(size, len(learner_loss))
    device = learner_loss.device if generator is None else generator.device
    return send(torch.randperm(len(learner_loss), generator=generator, device=device)[:size], learner_loss.device)


random_baseline.count_only = True  # a selector need not compute losses whose values are not used


def hard_loss(learner_loss: Tensor, *, size: int, generator: Generator | None = None) -> Tensor:
    """The examples of largest learner loss, largest first. Equal losses are ordered at random."""
    losses = _losses(learner_loss=learner_loss)
    _check_size(size, len(losses))
    shuffled = random_baseline(losses, size=len(losses), generator=generator)
    return shuffled[losses[shuffled].argsort(descending=True, stable=True)[:size]]


def proportional(learner_loss: Tensor, *, size: int, generator: Generator | None = None) -> Tensor:
    """Successive draws without replacement with probability proportional to the learner loss.

    Losses with an uncertainty term can be negative: then all are shifted so that the smallest is 0. Candidates of
    weight 0 are taken only when nothing else is left.
    """
    losses = _losses(learner_loss=learner_loss)
    _check_size(size, len(losses))
    weights = losses - losses.min().clamp(max=0)
    return _gumbel_top(weights.clamp(min=torch.finfo(weights.dtype).tiny).log(), size, generator)


def diversity_gains(features: Tensor, selected: Tensor, ridge: float = 1.0) -> Tensor:
    """log-determinant gained by adding each example to the selected set: log(1 + x_i' A^-1 x_i) [B].

    features x [B, F] float; A = ridge * identity + sum over selected of x x'. This is the conditional log-odds of a
    determinantal point process with kernel I + X X'/ridge, hence an interaction: near-duplicates of selected examples
    gain little. O(B F^2).
    """
    eye = torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
    chosen = features[selected]  # [n, F]
    factor = torch.linalg.cholesky_ex(
        ridge * eye + chosen.T @ chosen
    ).L  # [F, F]; positive definite: no check to wait for
    whitened = torch.linalg.solve_triangular(factor, features.T, upper=False)  # [F, B]
    return whitened.square().sum(dim=0).log1p()


def sketch_features(
    features: Tensor, sketch_dim: int = 64, bandwidth: float = 0.5, generator: Generator | None = None
) -> Tensor:
    """Features [B, ...] -> random Fourier features [B, sketch_dim] of a Gaussian kernel (Rahimi & Recht 2007).

    Inner products approximate exp(-|x - y|^2 / (2 h^2)), with error of order 1/sqrt(sketch_dim); h is `bandwidth` times
    the total standard deviation of the batch, so neither the scale nor the origin of the features matters.
    """
    x = features.detach().flatten(1).float()
    if x.isnan().any():
        raise ValueError("features hold NaN values; nothing can be selected")
    weight = random.randn([x.shape[1], sketch_dim], generator, x.device)
    phase = random.rand([sketch_dim], generator, x.device) * (2 * math.pi)
    x = x - x.mean(dim=0)
    scale = bandwidth * x.square().sum(dim=1).mean().sqrt()
    x = x / scale.clamp(min=torch.finfo(x.dtype).tiny)
    return (x @ weight + phase).cos() * math.sqrt(2 / sketch_dim)


def diverse_learnability(
    learner_loss: Tensor,
    reference_loss: Tensor,
    features: Tensor,  # [B, ...], what makes examples alike: activations, gradients, down-sampled images
    *,
    size: int,
    num_chunks: int = 16,  # more chunks: finer interaction; num_chunks=size is fully sequential
    diversity: float = 1.0,  # exponent of the determinantal gain; 0: JEST's law
    sketch_dim: int = 64,
    bandwidth: float = 0.5,  # of the likeness, in standard deviations of the features
    ridge: float = 1.0,
    generator: Generator | None = None,
) -> Tensor:
    """Learnable *and* unlike what is already selected: JEST's chunks with a determinantal interaction.

    In each chunk example i is drawn with probability proportional to exp(beta s_ii) * (det gain of i given S)^diversity
    (see diversity_gains). Near-linear: O(B sketch_dim^2) per chunk. Raises ValueError as jointly_sample_batch.
    """
    scores = _scores(learner_loss, reference_loss, True, False)
    if len(features) != len(scores):
        raise ValueError(f"features of {len(features)} candidates do not match {len(scores)} losses")
    x = sketch_features(features, sketch_dim, bandwidth, generator).to(scores)

    def bonus(selected):
        return diversity * diversity_gains(x, selected, ridge).clamp(min=torch.finfo(x.dtype).tiny).log()

    return _by_chunks(scores, size, num_chunks, generator, bonus)


FUNCTIONS = {  # the names a command line offers
    "jest": jointly_sample_batch,
    "random": random_baseline,
    "hard": hard_loss,
    "easy": easy_reference,
    "proportional": proportional,
    "diverse": diverse_learnability,
}
