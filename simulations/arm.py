"""Autoregressive models on discrete sequences, one for all sources or one per source (theory paper, Sec. 4.2, App. E.2).

The network is the paper's. The paper does not say how its ground truth is drawn; here it is a random field with a knob
for the true similarity of the sources (`ground_truth`). All errors are exact: the M^D outcomes are enumerated.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from scipy.special import softmax

from simulations.configs import ArmConfig, Rule
from simulations.mle import MLP, Conditional, Outcome, compare, fit, mixed_fields


def ground_truth(config: ArmConfig, seed: int) -> np.ndarray:
    """Probability tables of the sources, float64 [K, M^D]; the first token is the most significant digit.

    family=dirichlet has no structure: p_k = sim q_0 + (1 - sim) q_k, every q uniform on the simplex (Dirichlet(1)). Otherwise
    log p_k = scale * mixed_fields + const. A random field is a sum over all sets of 1 to `order` positions of a table of
    standard normals, one entry per value of these tokens, divided by the square root of the number of sets, so that each
    outcome's value is N(0, 1).
    """
    rng = np.random.default_rng([seed, 0])
    if config.family == "dirichlet":
        common, *own = rng.dirichlet(np.ones(config.M**config.D), 1 + config.K)
        return config.sim * common + (1 - config.sim) * np.stack(own)
    return softmax(config.scale * mixed_fields(config, lambda: _field(config, rng)), axis=1)


def _field(config: ArmConfig, rng: np.random.Generator) -> np.ndarray:
    D, M = config.D, config.M
    if config.order == 0:
        return rng.standard_normal(M**D)
    sets = [s for size in range(1, min(config.order, D) + 1) for s in itertools.combinations(range(D), size)]
    field = np.zeros([M] * D)
    for positions in sets:
        shape = [M if d in positions else 1 for d in range(D)]
        field += rng.standard_normal([M] * len(positions)).reshape(shape)
    return field.reshape(-1) / math.sqrt(len(sets))


def sample(tables: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n i.i.d. pairs: outcome codes [n] and sources [n]. Nested: fewer samples are the first of more."""
    rng = np.random.default_rng([seed, 1])
    sources = rng.integers(0, len(tables), size=n)
    uniform = np.random.default_rng([seed, 2]).random(n)
    codes = np.empty(n, dtype=np.int64)
    for k, table in enumerate(tables):
        at = sources == k
        codes[at] = np.minimum(np.searchsorted(np.cumsum(table), uniform[at], side="right"), table.size - 1)
    return codes, sources


class Prefixes:
    """Sequences as a tree: equal prefixes of the same source are one row, so that a batch costs its distinct prefixes.

    codes: outcome codes [n]. sources: [n], 0..K-1. K, D, M: as in `ArmConfig`.
    """

    def __init__(self, codes: np.ndarray, sources: np.ndarray, K: int, D: int, M: int) -> None:
        self.M = M
        tokens = codes[:, None] // M ** np.arange(D - 1, -1, -1) % M  # [n, D]
        rows, index, first = [], [], 0
        for depth in range(D):
            keys, inverse = np.unique(codes // M ** (D - depth) * K + sources, return_inverse=True)
            rows.append((keys % K, keys // K, np.full(len(keys), depth)))
            index.append(first + inverse.reshape(-1))
            first += len(keys)
        source, prefix, depth = (torch.from_numpy(np.concatenate(part)) for part in zip(*rows, strict=True))
        self.source, self.depth = source, depth  # [R]
        self.tokens = prefix_tokens(prefix, depth, D, M)  # [R, D - 1]
        self.index = torch.from_numpy(np.stack(index, axis=1) * M + tokens)  # [n, D], row * M + next token

    def __len__(self) -> int:
        return len(self.index)

    def nll(self, model: ARM, samples: torch.Tensor) -> torch.Tensor:
        """Mean negative log-likelihood of the samples with these indices: the exact minibatch objective."""
        counts = torch.bincount(self.index[samples].reshape(-1), minlength=len(self.source) * self.M)
        counts = counts.reshape(-1, self.M)
        rows = counts.sum(dim=1).nonzero().squeeze(1)
        log_p = model(self.source[rows], self.tokens[rows], self.depth[rows])  # [r, M]
        return -(log_p * counts[rows]).sum() / len(samples)


def prefix_tokens(prefix: torch.Tensor, depth: torch.Tensor, D: int, M: int) -> torch.Tensor:
    """Digits of prefix codes: int64 [R, D - 1], the first `depth` columns are used, the others arbitrary."""
    power = (depth[:, None] - 1 - torch.arange(D - 1)).clamp(min=0)
    return prefix[:, None] // M**power % M


class ARM(Conditional):
    """p(x_d | x_<d, y) of the theory paper, Sec. 4.2.

    Label and token embeddings in [0, 1]^de; row d of the stacked sequence (label, x_1, ..., x_{D-1}) becomes the scalar
    v_d = sigmoid(<A0[d], row_d> + b0[d]); position d sees v_1..v_d and zeros; one MLP for all positions; softmax.

    forward(source [R], tokens [R, D - 1], depth [R]) -> log-probabilities of the next token [R, M], where `depth` tokens
    are known (position depth + 1).
    """

    embeddings = ("labels", "vocabulary")

    def __init__(self, K: int, D: int, M: int = 2, de: int = 64, W: int = 64, L: int = 5) -> None:
        super().__init__()
        self.D, self.M = D, M
        self.labels = torch.nn.Parameter(torch.rand(K, de))
        self.vocabulary = torch.nn.Parameter(torch.rand(M, de))
        encoder = 2 * torch.rand(D, de) - 1
        self.encoder = torch.nn.Parameter(encoder - encoder.mean(dim=1, keepdim=True))  # keeps the sigmoid central
        self.offset = torch.nn.Parameter(torch.zeros(D))
        self.mlp = MLP(D, M, W, L)

    def forward(self, source: torch.Tensor, tokens: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
        label = torch.sigmoid(self.labels @ self.encoder[0] + self.offset[0])[source]  # [R]
        table = torch.sigmoid(self.encoder[1:] @ self.vocabulary.T + self.offset[1:, None])  # [D - 1, M]
        place = torch.arange(self.D - 1, device=depth.device)
        seen = table[place, tokens] * (place < depth[:, None])  # [R, D - 1]
        return torch.log_softmax(self.mlp(torch.cat([label[:, None], seen], dim=1)), dim=1)

    @torch.no_grad()
    def table(self, source: int, rows: int = 1 << 16) -> np.ndarray:
        """Probabilities of all outcomes of one source, float64 [M^D]."""
        log_p = torch.zeros(1, dtype=torch.float64)
        for depth in range(self.D):
            parts = []
            for prefix in torch.arange(self.M**depth).split(rows):
                known = torch.full_like(prefix, depth)
                tokens = prefix_tokens(prefix, known, self.D, self.M)
                # Normalised again in float64: the float32 softmax is off by 1e-7 per token.
                parts.append(torch.log_softmax(self(torch.full_like(prefix, source), tokens, known).double(), dim=1))
            log_p = (log_p[:, None] + torch.cat(parts)).reshape(-1)
        return log_p.exp().numpy()


def tv(p: np.ndarray, q: np.ndarray) -> float:
    """Total variation: half the L1 distance of two probability tables."""
    return 0.5 * float(np.abs(p - q).sum())


def run_cell(config: ArmConfig, rule: Rule, seed: int) -> Outcome:
    """Draw sources and data, fit one multi-source and K single-source networks by the same rule, measure exactly."""
    D, M = config.D, config.M
    tables = ground_truth(config, seed)
    codes, sources = sample(tables, config.n, seed)

    def train(own, labels, count):
        data = Prefixes(codes[own], labels, count, D, M)
        return fit(lambda: ARM(count, D, M, config.de, config.W, config.L), data.nll, len(data), rule, seed)

    def histogram(own):
        return np.bincount(codes[own], minlength=M**D) / len(own)

    return compare(tables, np.full(M**D, 1 / M**D), tv, sources, train, ARM.table, histogram)
