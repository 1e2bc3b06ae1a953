"""Linear diffusions: a process is two matrices (MDM, Singhal et al. 2023; CLD, Dockhorn et al. 2022).

Per data dimension the state is u = (x, v_1, ..., v_{V-1}) with

    du = A u beta(t) dt + sqrt(2 D beta(t)) dW,    A = -(Q + D) S^-1,

Q skew-symmetric, D positive semi-definite, S the diagonal stationary covariance. The auxiliaries start as
N(0, init_aux_var), independent of x0, and are integrated out: p(u_t | x0) = N(m x0, C).
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from torch_utils.devices import send
from torch_utils.persistence import persistent
from training.processes import numerics
from training.processes.base import Process, Times, as_time, number
from training.processes.states import apply_matrix, expand, flatten

MOST_VARIABLES = 64  # per data dimension; states and matrices grow with them
Matrix = torch.Tensor | Sequence
Ends = Sequence[float]  # beta at t = 0 and t = 1


class Kernel(NamedTuple):
    """p(u_t | x0) = N(m x0, C) at one or several times: the whitening W with W C W' = 1, and a = W m.

    W = L^-1 T. The shear T u = (x - w v, v) removes what the start of the auxiliaries put into x: for small t nearly all
    of x's variance, and C itself would be numerically singular for chains of variables. L is a triangular root of
    T C T'; its inverse is as accurate as solving.
    """

    F: torch.Tensor  # [..., V, V]
    T: torch.Tensor  # [..., V, V]
    L: torch.Tensor  # [..., V, V]
    W: torch.Tensor  # [..., V, V]
    a: torch.Tensor  # [..., V]
    snr: torch.Tensor  # [...]

    def to(self, device: str | torch.device) -> Kernel:
        return Kernel(*(send(part, device) for part in self))


def as_matrix(name: str, value: object) -> torch.Tensor:
    """An option as a square float64 matrix. Raises ValueError that names it for anything else."""
    shown = " ".join(repr(value).split())  # a tensor's takes several lines
    try:
        matrix = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError):
        raise ValueError(f"{name} = {shown}: give a square matrix, rows of equal length") from None
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.isfinite().all():
        raise ValueError(f"{name} = {shown}: give a square matrix of finite numbers")
    return matrix


@persistent
class LinearProcess(Process):
    """Linear diffusion given by its matrices; time t in [0, 1], all V x V work in float64 on the CPU.

    Q: [V, V] skew-symmetric. D: [V, V] positive semi-definite. S: diagonal, [V] or [V, V], default ones.
    beta: values at t = 0 and t = 1, linear between. init_aux_var: variance of the auxiliaries at t = 0.

    Subclasses pass their Q and D, or define them as properties (see `Learned`). Raises ValueError if the matrices do
    not define a process, or if no noise ever reaches some variable.
    """

    def __init__(
        self, Q: Matrix, D: Matrix, S: Matrix | None = None, beta: Ends = (0.1, 10.0), init_aux_var: float = 0.01
    ):
        self.Q, self.D = as_matrix("Q", Q), as_matrix("D", D)
        self._setup(len(self.Q), S, beta, init_aux_var)

    def _setup(self, V, S, beta, init_aux_var):
        """Everything but Q and D."""
        if V > MOST_VARIABLES:
            raise ValueError(f"{V} variables per data dimension: at most {MOST_VARIABLES}")
        self.V = V  # variables per data dimension
        try:
            S = torch.as_tensor([1.0] * V if S is None else S, dtype=torch.float64).detach().cpu()
        except (TypeError, ValueError):
            raise ValueError(f"S = {S!r}: give its diagonal, {V} numbers > 0") from None
        self.S = torch.diag(S) if S.ndim == 1 else as_matrix("S", S)
        try:
            self.beta_range = tuple(float(value) for value in beta)
            low, high = self.beta_range
        except (TypeError, ValueError):
            raise ValueError(f"beta = {beta!r}: give two numbers, the values at t = 0 and t = 1") from None
        if not (min(low, high) >= 0 and 0 < low + high < math.inf):
            raise ValueError(f"beta = {beta!r}: give two numbers >= 0, not both 0")
        self.init_aux_var = number("init_aux_var", init_aux_var)
        if not 0 <= self.init_aux_var < math.inf:
            raise ValueError(f"init_aux_var = {init_aux_var}: give a variance >= 0")
        self._cache = collections.OrderedDict()
        self._tables = {}
        self._check()

    def _check(self):
        Q, D, S = self.Q.detach(), self.D.detach(), self.S
        if not Q.shape == D.shape == S.shape:
            raise ValueError(f"Q {tuple(Q.shape)}, D {tuple(D.shape)} and S {tuple(S.shape)} must be of one size")
        if (Q + Q.mT).abs().max() > 1e-10 * (1 + Q.abs().max()):
            raise ValueError("Q must be skew-symmetric: Q = -Q'")
        if (D - D.mT).abs().max() > 1e-10 * (1 + D.abs().max()):
            raise ValueError("D must be symmetric")
        if torch.linalg.eigvalsh(D)[0] < -1e-10 * (1 + D.abs().max()):
            raise ValueError("D must be positive semi-definite")
        if not D.any():
            raise ValueError("D is zero: without noise nothing is forgotten, and sigma(t) does not grow")
        if not torch.equal(S, torch.diag(torch.diagonal(S))) or (torch.diagonal(S) <= 0).any():
            raise ValueError("S must be diagonal with entries > 0")
        # Kalman's rank condition: C(t) is regular for t > 0 iff the noises, carried along by A, span the state.
        A = self.A.detach() / torch.linalg.matrix_norm(self.A.detach()).clamp_min(1e-300)
        reach = [torch.cat([numerics.psd_root(D) / D.abs().max().sqrt().clamp_min(1e-300), self.initial_root()], dim=1)]
        for _ in range(self.V - 1):
            reach.append(A @ reach[-1])
        if torch.linalg.matrix_rank(torch.cat(reach, dim=1), rtol=1e-13) < self.V:
            raise ValueError(
                "no noise reaches some variable: C(t) is singular; give it noise of its own in D, or a coupling in Q"
            )

    def __repr__(self):
        return f"{type(self).__name__}(V={self.V}, beta={self.beta_range}, init_aux_var={self.init_aux_var:g})"

    @property
    def A(self) -> torch.Tensor:
        """Drift matrix -(Q + D) S^-1, [V, V]."""
        return -(self.Q + self.D) / torch.diagonal(self.S)

    def precision(self) -> torch.Tensor:
        return torch.diag(1 / torch.diagonal(self.S))

    def initial_root(self) -> torch.Tensor:
        """Root of the covariance at t = 0: diag(0, sqrt(init_aux_var), ...)."""
        return torch.diag(torch.tensor([0.0] + [math.sqrt(self.init_aux_var)] * (self.V - 1), dtype=torch.float64))

    def _version(self):
        """Changes whenever Q or D may have changed; None while a gradient is wanted."""
        Q, D = self.Q, self.D
        if torch.is_grad_enabled() and (Q.requires_grad or D.requires_grad):
            return None
        return bytes(Q.detach().numpy().tobytes() + D.detach().numpy().tobytes())

    def beta(self, t: Times) -> torch.Tensor:
        """beta(t), linear in t."""
        low, high = self.beta_range
        return low + (high - low) * as_time(t)

    def beta_integral(self, t: Times, start: Times = 0.0) -> torch.Tensor:
        """int_start^t beta."""
        t, start, (low, high) = as_time(t), as_time(start), self.beta_range
        return (t - start) * (low + (high - low) * (t + start) / 2)

    def beta_integral_inverse(self, B: Times) -> torch.Tensor:
        """Time t with int_0^t beta = B."""
        B, (low, high) = as_time(B), self.beta_range
        return torch.where(B > 0, 2 * B / (low + (low**2 + 2 * (high - low) * B).clamp_min(0).sqrt()), 0.0)

    def _kernel_at(self, B):
        """Kernel for B [K] > 0, differentiable if Q or D are."""
        A, D, start = self.A, self.D, self.initial_root()
        F, L = numerics.noise_root(A, D, B)
        small = (numerics.halvings(A, B) == 0)[..., None]  # [..., 1]; beyond, F_vv may be singular and T is 1
        T = torch.eye(self.V, dtype=torch.float64).repeat(*B.shape, 1, 1)
        inner = torch.where(small[..., None], F[..., 1:, 1:], torch.eye(self.V - 1, dtype=F.dtype))
        shear = torch.linalg.solve(inner.mT, F[..., 0, 1:, None])[..., 0]  # w = F_xv F_vv^-1
        T[..., 0, 1:] = -torch.where(small, shear, 0.0)
        X = T @ F @ start
        X[..., 0, :] = torch.where(small, 0.0, X[..., 0, :])
        L = numerics.lower_root(torch.cat([X, T @ L], dim=-1))
        if torch.is_grad_enabled() and (A.requires_grad or D.requires_grad):
            F, C = numerics.noise_covariance(A, D, B)
            X = T @ F @ start
            L = numerics.attach_gradient(L, T @ C @ T.mT + X @ X.mT)
        both = torch.linalg.solve_triangular(L, torch.cat([T @ F[..., :1], T], dim=-1), upper=False)
        a = both[..., 0]
        return Kernel(F, T, L, both[..., 1:], a, a.square().sum(-1))

    def kernel_parts(self, t: Times, device: str | torch.device = "cpu") -> Kernel:
        """`Kernel` at t (any batch shape, t > 0), the CPU's work; cached by time and device while no gradient is wanted."""
        t = as_time(t).detach().cpu()
        version = self._version()
        key = (version, float(t), str(device)) if t.ndim == 0 and version is not None else None
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        if str(device) != "cpu":
            parts = self.kernel_parts(t).to(device)
            if key is not None:
                self._remember_at(key, parts)
            return parts
        if not bool(((t > 0) & (t <= 1 + 1e-9)).all()):
            raise ValueError(f"t = {t.tolist()}: the kernel is a density for times in (0, 1]")
        times, inverse = torch.unique(t, return_inverse=True)
        parts = self._kernel_at(self.beta_integral(times))
        parts = Kernel(*(part[inverse] for part in parts))
        if key is not None:
            self._remember_at(key, parts)
        return parts

    def _remember_at(self, key, parts):
        self._cache[key] = parts
        while len(self._cache) > 4096:
            self._cache.popitem(last=False)

    @torch.no_grad()
    def prepare(self, times: Sequence[float] | torch.Tensor) -> None:
        times, version = as_time(times).cpu(), self._version()
        parts = self.kernel_parts(times)
        for index, t in enumerate(times.tolist()):
            self._remember_at((version, t, "cpu"), Kernel(*(part[index] for part in parts)))

    def transition(self, t: Times) -> torch.Tensor:
        t = as_time(t)
        return numerics.transition(self.A, self.beta_integral(t.cpu())).to(t.device)

    def kernel(self, t: Times, hybrid: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        t = as_time(t)
        F, C = numerics.noise_covariance(self.A, self.D, self.beta_integral(t.cpu()))
        if hybrid:
            X = F @ self.initial_root()
            F, C = F[..., 0], C + X @ X.mT
        return F.to(t.device), C.to(t.device)

    def cholesky(self, t: Times) -> torch.Tensor:
        parts = self.kernel_parts(t)
        X = torch.linalg.solve_triangular(parts.T, parts.L.detach(), upper=True, unitriangular=True)
        return numerics.lower_root(X).to(as_time(t).device)

    def perturbation(self, t: Times, hybrid: bool = True, cov_eps: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """(F, L) [..., V, V] on the CPU with u_t = F u_0 + L noise: what joint networks are trained on; differentiable.

        hybrid=True: L L' = C, with u_0 = (x0, 0), the auxiliaries integrated out. False: u_0 = (x0, v_0), all given.
        cov_eps: added to the diagonal of L L' (CLD's numerical_eps, §3.5), after which it is no marginal of the process.
        """
        times, inverse = torch.unique(as_time(t).detach().cpu(), return_inverse=True)
        if not bool(((times > 0) & (times <= 1 + 1e-9)).all()):
            raise ValueError(f"t = {times.tolist()}: the kernel is a density for times in (0, 1]")
        A, D, B = self.A, self.D, self.beta_integral(times)
        F, L = numerics.noise_root(A, D, B)

        def more(F):
            roots = [F @ self.initial_root()] if hybrid else []
            eye = torch.eye(self.V, dtype=torch.float64).expand(*F.shape)
            return roots + ([math.sqrt(cov_eps) * eye] if cov_eps else [])

        if more(F):
            L = numerics.lower_root(torch.cat([L, *more(F)], dim=-1))
        if torch.is_grad_enabled() and (A.requires_grad or D.requires_grad):
            F, C = numerics.noise_covariance(A, D, B)
            L = numerics.attach_gradient(L, sum((X @ X.mT for X in more(F)), C))
        return F[inverse], L[inverse]

    def first_noised(self) -> int:
        """Index of the first variable that receives noise of its own: CLD 1, ALDA 2, MALDA 1, VP and learned ones 0."""
        return int(torch.diagonal(self.D.detach()).nonzero()[0])

    def snr(self, t: Times) -> torch.Tensor:
        t = as_time(t)
        if not bool((t >= 0).all()):
            raise ValueError(f"t = {t.tolist()}: time runs from 0 to 1")
        safe = torch.where(t > 0, t, self.T)
        return torch.where(t > 0, self.kernel_parts(safe).snr.to(t.device), math.inf)

    def snr_rate(self, t: Times) -> torch.Tensor:
        """m' C^-1 (2 D beta) C^-1 m."""
        t = as_time(t)
        return (self._rate(self.kernel_parts(t)) * self.beta(t.cpu())).to(t.device)

    def _rate(self, parts):
        gain = parts.W.mT @ parts.a[..., None]  # C^-1 m
        return (gain.mT @ (2 * self.D) @ gain)[..., 0, 0]

    @torch.no_grad()
    def time(self, sigma: Times) -> torch.Tensor:
        """Time in (0, 1] with sigma(t) = sigma > 0, to about 1e-12 relative.

        Raises ValueError above sigma(1), the noisiest state the process reaches.
        """
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        target, inverse = torch.unique(sigma.detach().cpu(), return_inverse=True)
        top = float(self.sigma(1.0))
        if not bool(((target > 0) & (target <= top * (1 + 1e-9))).all()):
            raise ValueError(f"sigma = {sigma.tolist()}: this process reaches noise levels in (0, {top:.4g}]")
        log_B = self._invert(target.clamp_max(top).log())
        t = self.beta_integral_inverse(log_B.exp()).clamp_max(1.0)
        return t[inverse].to(sigma.device)

    def _invert(self, goal):
        """log B for log sigma [K]: Newton's method, by bisection where it would leave its bracket."""
        version = self._version()
        if version not in self._tables:
            end = math.log(float(self.beta_integral(1.0)))
            grid = torch.linspace(end - 40, end, 321, dtype=torch.float64)
            self._tables = {version: (grid, -self._kernel_at(grid.exp()).snr.log() / 2)}
        grid, values = self._tables[version]
        right = torch.searchsorted(values.contiguous(), goal).clamp(1, len(grid) - 1)
        low, high = grid[right - 1], grid[right]
        below = goal < values[0]  # outside the table sigma is a power of B
        low = torch.where(below, low - 600, low)
        slope = (high - grid[right - 1]) / (values[right] - values[right - 1])
        log_B = torch.where(below, grid[0] + slope * (goal - values[0]), high + slope * (goal - values[right]))
        for _ in range(80):
            parts = self._kernel_at(log_B.exp())
            error = -parts.snr.log() / 2 - goal
            low, high = torch.where(error < 0, log_B, low), torch.where(error > 0, log_B, high)
            newton = log_B - error / (0.5 * log_B.exp() * self._rate(parts) / parts.snr)
            bad = ~((newton >= low) & (newton <= high))
            update = torch.where(bad, (low + high) / 2, newton)
            done = (error.abs() < 1e-13 * (1 + goal.abs())) | ((update - log_B).abs() < 1e-14)
            log_B = torch.where(done, log_B, update)
            if bool(done.all()):
                break
        return log_B

    # States u [N, V, *data_shape].

    def _whiten(self, u, t):
        """(parts on u's device, W u [N, V, d])."""
        parts = self.kernel_parts(t, u.device)
        return parts, parts.W @ flatten(u, self.V).to(torch.float64)

    def project(self, u: torch.Tensor, t: Times) -> tuple[torch.Tensor, torch.Tensor]:
        parts, white = self._whiten(u, t)
        y = (parts.a[..., None, :] @ white)[:, 0] / parts.snr[..., None]
        return y.reshape(u.shape[0], *u.shape[2:]).to(u.dtype), parts.snr.rsqrt()

    def score(
        self, u: torch.Tensor, t: Times, denoised: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """-C^-1 (u - m D). Below sigma of about 1e-5 the rounding of D costs the digits of variables without noise of their
        own, which no solver uses (ALDA at t = 1e-3: all of them); those that solvers use keep theirs.

        residual: y - D where it is known without a subtraction, in place of D; then all variables keep their digits.
        """
        parts, white = self._whiten(u, t)
        if residual is None:
            white = white - parts.a[..., None] * denoised.reshape(len(u), 1, -1).to(torch.float64)  # [N, V, d]
            return (-parts.W.mT @ white).reshape(u.shape).to(u.dtype)
        # P = (1 - a a'/snr) W is what of u says nothing about the data, so P m = 0 and its large first column follows.
        a, m, W = parts.a[..., None], parts.F[..., :1], parts.W[..., 1:]
        along = a.mT @ W / parts.snr[..., None, None]  # of y = along u, whose first entry follows from along m = 1
        P = W - a * along
        P = torch.cat([-P @ m[..., 1:, :] / m[..., :1, :], P], dim=-1)
        along = torch.cat([(1 - along @ m[..., 1:, :]) / m[..., :1, :], along], dim=-1)
        rest = P.mT @ (P @ flatten(u, self.V).to(torch.float64))
        moved = parts.snr[..., None, None] * residual.reshape(len(u), 1, -1).to(torch.float64)
        return -(rest + along.mT * moved).reshape(u.shape).to(u.dtype)

    def drift(self, u: torch.Tensor, t: Times) -> torch.Tensor:
        return apply_matrix(self.A, u) * expand(self.beta(t), u).to(u.dtype)

    def diffusion(self, t: Times) -> torch.Tensor:
        """The symmetric root of 2 D beta(t) (MDM)."""
        t = as_time(t)
        return (self.beta(t.cpu()).sqrt()[..., None, None] * numerics.psd_root(2 * self.D.detach())).to(t.device)

    def splitting(self, t: Times, t_next: Times) -> tuple[torch.Tensor, torch.Tensor]:
        """Generator -(D - Q) S^-1, stationary law N(0, S)."""
        A = -(self.D - self.Q) / torch.diagonal(self.S)
        return numerics.noise_root(A.detach(), self.D.detach(), self.beta_integral(t, t_next).cpu())

    def noise_power(self, t: Times, t_next: Times) -> torch.Tensor:
        """2 D int beta."""
        return self.beta_integral(t, t_next).cpu()[..., None, None] * (2 * self.D.detach())

    def rotation(self, t: Times, t_next: Times) -> torch.Tensor:
        """expm(Q S^-1 int beta)."""
        return numerics.transition((self.Q / torch.diagonal(self.S)).detach(), self.beta_integral(t, t_next).cpu())

    def stationary(self, t: Times) -> torch.Tensor:
        return self.S
