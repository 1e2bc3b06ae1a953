"""Transition matrices and square roots of covariances of linear diffusions, in float64, without a subtraction.

For du = A u dB + sqrt(2 D) dW in the time variable B, F = expm(A B) and the accumulated noise is
C(B) = int_0^B F(b) 2D F(b)' db. The textbook form C = S - F S F' cancels to nothing for small B, an inverse amplifies
what is left. Here only sums of positive semi-definite terms occur: Gauss-Legendre square roots on an interval with
|A| b <= 1/2, doubled as often as needed (C(2b) = C(b) + F C(b) F'), and triangularised by QR.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

NODES, WEIGHTS = np.polynomial.legendre.leggauss(10)
NODES, WEIGHTS = torch.from_numpy(NODES / 2 + 0.5), torch.from_numpy(WEIGHTS / 2)


def expm_small(X: torch.Tensor) -> torch.Tensor:
    """Matrix exponential of X [..., V, V] with norm of at most about 1/2, by Horner's rule.

    Entry by entry accurate also where low orders vanish, e.g. along a chain of variables.
    """
    identity = torch.eye(X.shape[-1], dtype=X.dtype)
    terms = 13 + X.shape[-1]  # relative to its first term, which has order V - 1 at most, an entry is off by < 1e-16
    result = identity + X / terms
    for order in range(terms - 1, 0, -1):
        result = identity + X @ result / order
    return result


def psd_root(D: torch.Tensor) -> torch.Tensor:
    """Symmetric square root of a positive semi-definite matrix; exact and elementwise for diagonal ones."""
    if torch.equal(D, torch.diag(torch.diagonal(D))):
        return torch.diag(torch.diagonal(D).clamp_min(0).sqrt())
    values, vectors = torch.linalg.eigh(D)
    return vectors * values.clamp_min(0).sqrt() @ vectors.mT


def lower_root(X: torch.Tensor) -> torch.Tensor:
    """L [..., V, V], lower triangular with diagonal >= 0 and L L' = X X', for X [..., V, K], K >= V, by QR."""
    R = torch.linalg.qr(X.mT, mode="r").R  # [..., V, V]
    sign = torch.where(torch.diagonal(R, dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return (sign.to(R.dtype)[..., None] * R).mT


def halvings(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Number of halvings [...] after which |A| B <= 1/2."""
    size = torch.linalg.matrix_norm(A.detach(), ord=1) * B
    return torch.ceil(torch.log2((2 * size).clamp_min(1e-300))).clamp_min(0).to(torch.int64)


def doubled(A: torch.Tensor, B: torch.Tensor, start: Callable, double: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """Values at B of a quantity with `start(F_nodes, step) -> value` on a small step and `double(F, value) -> value`.

    Returns (F [..., V, V], value). Each entry of B is halved as often as it needs.
    """
    count = halvings(A, B)
    step = B * 0.5**count
    F = expm_small(step[..., None, None] * A)  # [..., V, V]
    value = start(expm_small((step[..., None] * NODES)[..., None, None] * A), step)
    for index in range(int(count.max()) if count.numel() else 0):
        more = (count > index)[..., None, None]
        value = torch.where(more, double(F, value), value)
        F = torch.where(more, F @ F, F)
    return F, value


def transition(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """F = expm(A B) [..., V, V] for B [...], differentiable."""
    return doubled(A, B, lambda nodes, step: step[..., None, None], lambda F, value: value)[0]


def noise_root(A: torch.Tensor, D: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(F [..., V, V], L [..., V, V]): transition matrix and lower root of the accumulated noise. Not differentiable."""
    with torch.no_grad():
        root = psd_root(2 * D)

        def start(nodes, step):
            X = (step[..., None] * WEIGHTS).sqrt()[..., None, None] * (nodes @ root)  # [..., 10, V, V]
            return lower_root(X.movedim(-3, -2).flatten(-2))

        return doubled(A, B, start, lambda F, L: lower_root(torch.cat([F @ L, L], dim=-1)))


def noise_covariance(A: torch.Tensor, D: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(F [..., V, V], C [..., V, V]): transition matrix and accumulated noise, differentiable in A and D."""

    def start(nodes, step):
        C = (nodes @ (2 * D) @ nodes.mT * WEIGHTS[:, None, None]).sum(-3)
        return step[..., None, None] * C

    return doubled(A, B, start, lambda F, C: C + F @ C @ F.mT)


def attach_gradient(L: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """L, with the gradient that the Cholesky factor of C has; C is differentiable and equals L L' up to rounding."""
    solve = torch.linalg.solve_triangular
    inner = solve(L, solve(L, C - C.detach(), upper=False).mT, upper=False)
    inner = inner.tril() - torch.diag_embed(torch.diagonal(inner, dim1=-2, dim2=-1)) / 2
    return L + L @ inner
