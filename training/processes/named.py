"""The published linear diffusions: each is its numbers. M is the stationary variance of the auxiliaries (the mass)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch

from torch_utils.persistence import persistent
from training.processes.base import number, positive
from training.processes.linear import MOST_VARIABLES, Ends, LinearProcess


@persistent
class VP(LinearProcess):
    """Variance preserving: dx = -x beta/2 dt + sqrt(beta) dW (DDPM; Song et al. 2021). One variable."""

    def __init__(self, beta: Ends = (0.1, 10.0)):
        super().__init__(Q=[[0.0]], D=[[0.5]], beta=beta)


@persistent
class CLD(LinearProcess):
    """Critically damped Langevin diffusion (Dockhorn et al. 2022, eq. 5), friction 2 sqrt(M).

    The defaults are MDM's; `CLD.published()` takes the CLD paper's own parameters.
    """

    def __init__(self, M: float = 1.0, beta: Ends = (0.1, 10.0), init_aux_var: float = 0.01):
        M = positive("M", M)
        super().__init__([[0, -1], [1, 0]], [[0, 0], [0, 2 * math.sqrt(M)]], [1, M], beta, init_aux_var)

    @classmethod
    def published(cls, m_inv: float = 4.0, gamma: float = 0.04, beta0: float = 4.0, beta1: float = 0.0) -> CLD:
        """The CLD paper's parameters: inverse mass, initial variance gamma M, and beta(t) = beta0 + beta1 t.

        Its beta1 is a slope. The defaults are its CIFAR-10 process: M = 0.25, beta = (4, 4), init_aux_var = 0.01.
        """
        M, gamma = 1 / positive("m_inv", m_inv), number("gamma", gamma)
        beta0, beta1 = number("beta0", beta0), number("beta1", beta1)
        return cls(M=M, beta=(beta0, beta0 + beta1), init_aux_var=gamma * M)


@persistent
class ALDA(LinearProcess):
    """Accelerated Langevin diffusion (third-order Langevin; MDM, appendix), three variables."""

    def __init__(
        self, M: float = 1.0, gamma: float = 1.0, psi: float = 1.0, beta: Ends = (0.1, 10.0), init_aux_var: float = 0.01
    ):
        M, gamma, psi = positive("M", M), number("gamma", gamma), positive("psi", psi)
        Q = [[0, -M, 0], [M, 0, -gamma], [0, gamma, 0]]
        super().__init__(Q, [[0, 0, 0], [0, 0, 0], [0, 0, psi * M]], [1, M, M], beta, init_aux_var)


@persistent
class MALDA(LinearProcess):
    """Modified ALDA (MDM): every pair of variables coupled, noise on every auxiliary. V = 2 is CLD."""

    def __init__(self, V: int = 3, M: float = 1.0, beta: Ends = (0.1, 10.0), init_aux_var: float = 0.01):
        V, M = count("V", V, 2), positive("M", M)
        upper = torch.ones(V, V, dtype=torch.float64).triu(1)
        D = torch.full((V,), 2 * math.sqrt(M), dtype=torch.float64)
        D[0] = 0
        super().__init__(upper.mT - upper, torch.diag(D), [1] + [M] * (V - 1), beta, init_aux_var)


@persistent
class Learned(LinearProcess, torch.nn.Module):
    """Learned Q and D (MDM): Q = q - q' is skew-symmetric and D positive definite by construction.

    full=False: D = diag(softplus(d) + 0.001), as published. full=True: D = B B' + 0.001 I (the published code applies
    softplus entry by entry, which is not positive semi-definite in general). The overall speed is fixed,
    tr(D S^-1) = V: scaling Q and D alike is a change of beta, and would raise the likelihood bound for free.

    The raw parameters `q` and `d` start uniform on (-1/sqrt V, 1/sqrt V).
    """

    floor = 1e-3  # noise that every variable keeps

    def __init__(
        self, V: int = 2, full: bool = False, M: float = 1.0, beta: Ends = (0.1, 10.0), init_aux_var: float = 0.01
    ):
        torch.nn.Module.__init__(self)
        V, M, self.full = count("V", V, 1), positive("M", M), bool(full)
        bound = 1 / math.sqrt(V)
        self.q = torch.nn.Parameter(torch.empty(V, V).uniform_(-bound, bound))
        self.d = torch.nn.Parameter(torch.empty((V, V) if full else (V,)).uniform_(-bound, bound))
        self._setup(V, [1.0] + [M] * (V - 1), beta, init_aux_var)

    def _matrices(self):
        q, d = self.q.cpu().to(torch.float64), self.d.cpu().to(torch.float64)
        if self.full:
            D = d @ d.mT + self.floor * torch.eye(len(d), dtype=torch.float64)
        else:
            D = torch.diag(torch.nn.functional.softplus(d) + self.floor)
        speed = (torch.diagonal(D) / torch.diagonal(self.S)).sum() / len(d)
        return (q - q.mT) / speed, D / speed

    _held = None
    Q = property(lambda self: (self._held or self._matrices())[0])
    D = property(lambda self: (self._held or self._matrices())[1])

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within, Q and D are computed, and fetched from the parameters' device, once: for what asks for them often."""
        self._held = self._matrices()
        try:
            yield
        finally:
            self._held = None


def count(name: str, value: object, least: int) -> int:
    """An option as an integer from `least` to MOST_VARIABLES; else ValueError."""
    if not (number(name, value).is_integer() and least <= float(value) <= MOST_VARIABLES):  # neither inf nor NaN is
        raise ValueError(f"{name} = {value}: give an integer >= {least} and <= {MOST_VARIABLES}")
    return int(value)
