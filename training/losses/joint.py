"""Losses of networks that see the whole state, as CLD and MDM train them: noise prediction and the evidence lower bound.

The bound on log p(x) in nats, with H(v_0) the entropy of the auxiliaries' start (MDM §8, in the closed form of its §20.5):

    E log N(u_T; 0, S) + d/2 [logdet C(T) - logdet C(t_min)] + H(v_0) - 1/2 int_{t_min}^T E |s - grad log q|^2_{2 D beta} dt

It stands for the state at t_min as if x lived there ("no offset"). With the offset, what a Gaussian decoder from t_min to 0
gains, it is a bound on log p(x).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_utils import random
from torch_utils.random import Generator
from training.losses.denoising import Draws, Loss
from training.processes import GaussianKernel, Process
from training.processes.states import apply_matrix, expand
from training.processes.time_density import SAMPLINGS, WEIGHTINGS, importance_density, importance_time

OBJECTIVES = ("noise", "elbo")


def per_sample(values: Tensor) -> Tensor:
    """Sum over all axes but the first, in float64."""
    return values.to(torch.float64).flatten(1).sum(1)


class JointLoss(Loss):
    """Objective of a JointPrecond for a linear process, summed over dimensions: [N], as published.

    objective "noise": weighted error of the noise prediction, a mean over t in [t_min, 1]. `weighting` reweightedv2 is the
    error itself (CLD's choice; MDM's noise_pred, and cld_noise_pred where the network predicts the noised variables only),
    reweightedv1 times D beta of each variable, likelihood that of the score, 1/2 |s - grad log q|^2 in 2 D beta. "elbo": the
    negative bound without offset in nats (MDM's dsm_elbo); its Q and D learn from all of it. switch_at: images after which
    noise prediction, at uniform t, becomes the bound (MDM's noise_pred_to_elbo).

    hybrid=False conditions on the drawn v_0, too (CLD's dsm). Raises ValueError for unknown names and impossible times.
    """

    def __init__(
        self,
        process: Process,
        objective: str = "noise",
        weighting: str = "reweightedv2",
        time_sampling: str | None = None,  # default: uniform for noise, importance for elbo
        t_min: float = 1e-3,
        hybrid: bool = True,
        cov_eps: float = 0.0,
        elbo_samples: int = 1,  # times and noises per example
        switch_at: int | None = None,
        label_dropout: float = 0.0,
        lr_scale: float = 0.1,  # of learned matrices
    ):
        super().__init__()
        for name, value, known in (
            ("objective", objective, OBJECTIVES),
            ("weighting", weighting, WEIGHTINGS),
            ("time_sampling", time_sampling or "uniform", SAMPLINGS[:2]),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r}: choose one of {', '.join(known)}")
        if getattr(process, "beta", None) is None:
            raise ValueError(f"{process!r}: a joint network needs a linear diffusion, such as vp, cld or malda")
        if not 0 < t_min < process.T:
            raise ValueError(f"t_min = {t_min}: give a time in (0, {process.T:g})")
        if elbo_samples < 1:
            raise ValueError(f"elbo_samples = {elbo_samples}: at least one is needed")
        if cov_eps and (objective == "elbo" or switch_at is not None):
            raise ValueError(
                f"cov_eps = {cov_eps}: the kernel is no marginal of the process then, and there is no bound"
            )
        if process.V > 1 and process.init_aux_var == 0 and (objective == "elbo" or switch_at is not None):
            raise ValueError("init_aux_var = 0: the start of the auxiliaries has no density, and there is no bound")
        if isinstance(process, torch.nn.Module) and objective == "noise" and switch_at is None:
            raise ValueError("learned matrices need the bound: objective elbo, or switch_at")
        self.process, self.kernel, self.lr_scale = process, GaussianKernel(), lr_scale
        self.objective, self.weighting, self.time_sampling = objective, weighting, time_sampling
        self.t_min, self.hybrid, self.cov_eps = float(t_min), hybrid, float(cov_eps)
        self.elbo_samples, self.switch_at, self.label_dropout = elbo_samples, switch_at, label_dropout
        self.nimg = 0

    def at(self, nimg: int) -> None:
        self.nimg = nimg

    @property
    def phase(self) -> str:
        """The objective now."""
        return self.objective if self.switch_at is None else OBJECTIVES[self.nimg >= self.switch_at]

    def levels(self, uniform: Tensor, objective: str) -> tuple[Tensor, Tensor]:
        """Times in [t_min, 1] and 1 / density from uniform numbers, float64."""
        span = self.process.T - self.t_min
        if (self.time_sampling or ("importance" if objective == "elbo" else "uniform")) == "uniform":
            return self.t_min + span * uniform, torch.full_like(uniform, span)
        t = importance_time(uniform, self.process, self.t_min).clamp(self.t_min, self.process.T)
        return t, 1 / importance_density(t, self.process, self.t_min)

    def draw(self, images: Tensor, labels: Tensor | None = None, generator: Generator | None = None) -> Draws:
        generator = random.default_generator(images.device) if generator is None else generator
        n, R, V = len(images), self.elbo_samples, self.process.V
        uniform = random.rand([n, R], generator, images.device).double()
        noise = random.randn([n, R, V, *images.shape[1:]], generator, images.device)
        if self.label_dropout and labels is not None:
            labels = labels * (random.rand([n, 1], generator, images.device) >= self.label_dropout)
        draws = Draws(images=images, labels=labels, noise=noise)
        t, draws["weight"] = self.levels((uniform + torch.arange(R, device=uniform.device)) / R, self.phase)
        draws["t"] = t
        draws["elbo"] = torch.full([n], self.phase == "elbo", device=images.device)
        if not self.hybrid:
            draws["start"] = random.randn([n, V - 1, *images.shape[1:]], generator, images.device)
        return draws

    def start(self, draws: Draws) -> Tensor:
        """u_0 [N, V, *data_shape] float64 of the kernel's mean: (x, 0), or (x, v_0)."""
        x = draws.images.to(torch.float64)[:, None]
        rest = draws.get("start")
        shape = [len(x), self.process.V - 1, *x.shape[2:]]
        rest = x.new_zeros(shape) if rest is None else rest.to(x) * math.sqrt(self.process.init_aux_var)
        return torch.cat([x, rest], dim=1)

    def errors(
        self, net: torch.nn.Module, draws: Draws, kernel: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(eps_hat - eps of the predicted variables [N R, K, ...], L [N R, V, V], t [N R]), float64."""
        R, t = draws.t.shape[1], draws.t.flatten()
        F, L = kernel or self.process.perturbation(t, self.hybrid, self.cov_eps)
        noise = draws.noise.flatten(0, 1).to(torch.float64)
        u = apply_matrix(F, self.start(draws).repeat_interleave(R, 0)) + apply_matrix(L, noise)
        labels = None if draws.labels is None else draws.labels.repeat_interleave(R, 0)
        return net.noise(u, t, labels, L) - noise[:, net.first :], L, t

    def mismatch(self, error: Tensor, L: Tensor, t: Tensor) -> Tensor:
        """1/2 |s - grad log q|^2 in 2 D beta, [N], where s - grad log q = -L^-T error."""
        first, device = self.process.V - error.shape[1], error.device
        own = max(first, self.process.first_noised())  # the score of the others meets no noise
        error, root = error[:, own - first :].flatten(2), L[..., own:, own:].to(device)
        delta = torch.linalg.solve_triangular(root.mT, error, upper=True)
        D = self.process.D[own:, own:].to(device)
        return self.process.beta(t).to(device) * (delta * (D @ delta)).sum((1, 2))

    def ends(self, draws: Draws) -> Tensor:
        """All of the bound without offset but the integral, [N] float64, differentiable in Q and D."""
        process, d = self.process, draws.images[0].numel()
        times = torch.tensor([self.t_min, process.T], dtype=torch.float64)
        F, L = process.perturbation(times, self.hybrid)
        log_det = 2 * torch.diagonal(L, dim1=-2, dim2=-1).log().sum(-1)
        S, C = torch.diagonal(process.S), L[1] @ L[1].mT
        mean = apply_matrix(F[1], self.start(draws))
        prior = -0.5 * d * ((torch.diagonal(C) / S).sum() + (2 * math.pi * S).log().sum())
        prior = prior.to(mean.device) - 0.5 * per_sample(mean**2 / expand(S, mean[0]).to(mean))
        entropy = 0.5 * d * (process.V - 1) * (math.log(2 * math.pi * process.init_aux_var) + 1) if process.V > 1 else 0
        return prior + (0.5 * d * (log_det[1] - log_det[0])).to(mean.device) + entropy

    def offset(self, net: torch.nn.Module, draws: Draws, noise: Tensor) -> Tensor:
        """What the decoder from t_min to 0 adds to the bound, one draw [N] float64 (MDM §8.5 in the form of its §20.12).

        noise: [N, V, *data_shape], of the kernel given (x, v_0). draws: with `start`, whatever `hybrid` is.
        """
        process, noise = self.process, noise.to(torch.float64)
        F, L = process.perturbation(self.t_min, hybrid=False)
        u = apply_matrix(F, self.start(draws)) + apply_matrix(L, noise)
        predicted = -apply_matrix(L.mT, net.score(u, self.t_min, draws.labels).to(torch.float64))
        gain = 0.5 * per_sample(noise**2) - 0.5 * per_sample((noise - predicted) ** 2)
        volume = process.beta_integral(self.t_min) * torch.trace(process.A)
        return gain + draws.images[0].numel() * volume.to(gain.device)

    def evaluate(self, net: torch.nn.Module, draws: Draws) -> Tensor:
        n, R = draws.t.shape
        elbo, weight = bool(draws.elbo.all()), draws.weight.flatten()  # all examples of a step are drawn for the same
        with torch.set_grad_enabled(torch.is_grad_enabled() and elbo):  # matrices do not learn from noise prediction
            kernel = self.process.perturbation(draws.t.flatten(), self.hybrid, self.cov_eps)
        error, L, t = self.errors(net, draws, kernel)
        if elbo:
            losses = (weight * self.mismatch(error, L, t)).unflatten(0, (n, R)).mean(1) - self.ends(draws)
        else:
            mean = weight / (self.process.T - self.t_min)
            losses = (mean * self.weighted(error, L, t)).unflatten(0, (n, R)).mean(1)
        return losses.to(draws.images.dtype)

    def weighted(self, error: Tensor, L: Tensor, t: Tensor) -> Tensor:
        """The weighted error of the noise prediction, [N]."""
        if self.weighting == "likelihood":
            return self.mismatch(error, L, t)
        if self.weighting == "reweightedv1":
            power = torch.diagonal(self.process.D)[self.process.V - error.shape[1] :].to(error.device)
            return self.process.beta(t).to(error.device) * per_sample(error**2 * expand(power, error[0]))
        return per_sample(error**2)
