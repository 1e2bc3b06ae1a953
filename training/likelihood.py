"""Log-likelihoods in nats of any denoiser under any process: the ELBO, and the probability-flow ODE.

Both work with the reduced state y = x0 + sigma n, which is all that the state of a linear diffusion says about the data.
So processes differ only in their end points: the range of sigma, and the prior.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_utils import random
from torch_utils.random import Generator
from training.guidance import for_sampling
from training.processes import Process
from training.processes.score import DenoiserScore, brings_score, make_score, require_linear
from training.processes.states import expand
from training.processes.time_density import snr_law
from training.samplers import endpoints


def per_sample(values: Tensor) -> Tensor:
    """Sum over all axes but the first, in float64."""
    return values.to(torch.float64).flatten(1).sum(1)


def _gaussian_log_prob(residual, variance):
    """log N(residual; 0, variance), summed over all axes but the first; residual [N, ...], variance scalar."""
    return per_sample(-(residual.to(torch.float64) ** 2) / (2 * variance) - 0.5 * torch.log(2 * math.pi * variance))


def _white_log_prob(white, L):
    """log density [N] of u = L white, for `white` [N, V, ...] that is standard normal."""
    log_det = L.diagonal().log().sum() * white[0, 0].numel()
    return _gaussian_log_prob(white, torch.ones([], dtype=torch.float64)) - log_det


def discretised_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log probability of the level that x is, for a Gaussian integrated over bins on [-1, 1], summed per sample.

    x: one of the levels 2 k / 255 - 1, as pixels are encoded. The outermost bins are open.
    """
    half = 1 / 255
    x, mean = x.to(torch.float64), mean.to(torch.float64)
    upper, lower = (x + half - mean) / std, (x - half - mean) / std
    flip = upper + lower > 0  # the tail that does not round to 1
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    inside = log_upper + torch.log(-torch.expm1((log_lower - log_upper).clamp_max(-1e-300)))
    first = torch.special.log_ndtr((x + half - mean) / std)  # x is the lowest level
    last = torch.special.log_ndtr((mean - x + half) / std)  # x is the highest
    inside = torch.where(x < -1 + half, first, torch.where(x > 1 - half, last, inside))
    return per_sample(inside)


def _decoder_log_prob(decoder, x, denoised, sigma, sigma_data):
    """log p(x | y_min) per sample: Gaussian around D(y; sigma) with variance (sigma sigma_data)^2 / (sum of squares)."""
    variance = sigma**2 * sigma_data**2 / (sigma**2 + sigma_data**2)
    if decoder == "gaussian":
        return _gaussian_log_prob(x.to(torch.float64) - denoised, variance)
    if decoder == "discretised":
        return discretised_log_prob(x, denoised, variance.sqrt())
    raise ValueError(f"decoder {decoder!r}: choose gaussian or discretised")


def endpoint_kl(
    process: Process, x: Tensor, t: float | Tensor, prior: str = "stationary", sigma_data: float = 0.5
) -> Tensor:
    """KL(q(u_t | x) || prior) in nats [N], exact, differentiable in Q and D.

    prior: "stationary", N(0, S), or "matched", N(0, C + sigma_data^2 m m').
    """
    mean, cov = process.kernel(t)
    target = process.prior_covariance(prior, t, sigma_data)
    L, white = torch.linalg.cholesky(target), process.cholesky(t)
    inner = torch.linalg.solve_triangular(L, cov, upper=False)
    trace = torch.linalg.solve_triangular(L, inner.mT, upper=False).diagonal().sum()
    shift = torch.linalg.solve_triangular(L, mean[:, None], upper=False).square().sum()
    log_det = torch.logdet(cov) if cov.requires_grad else 2 * torch.log(white.diagonal()).sum()
    constant = 0.5 * (trace - process.V + (2 * torch.log(L.diagonal()).sum() - log_det))
    x = x.to(torch.float64).flatten(1)
    return constant * x.shape[1] + 0.5 * shift * x.square().sum(1)


@dataclass(frozen=True)
class Setting:
    """Between which ends a likelihood is computed, and in which precision: further keywords of the functions below."""

    prior: str = "stationary"  # or "matched", see endpoint_kl
    t_min: float | None = None  # lower end, or sigma_min; default sigma 0.002, joint states of diffusions t = 1e-5
    sigma_min: float | None = None
    t_max: float | None = None  # upper end; default T, or as far as the network goes
    sigma_max: float | None = None
    net_dtype: torch.dtype = torch.float32  # what the network is fed

    def ends(self, net: Any, process: Process) -> tuple[float, float]:
        """(t_max, t_min), which the samplers have too but for the default of t_max. Raises ValueError if impossible."""
        require_linear(process)
        sigma_max = self.sigma_max
        if sigma_max is None and self.t_max is None:
            with torch.no_grad():
                top = float(process.sigma(process.T))
            sigma_max = min(top, getattr(net, "sigma_max", math.inf) if hasattr(net, "score") else net.sigma_max)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a mismatched prior shows in the KL
            low = dict(t_min=self.t_min, sigma_min=self.sigma_min)
            return endpoints(net, process, t_max=self.t_max, sigma_max=sigma_max, **low)


def elbo(
    net: Callable,  # denoiser D(y, sigma, labels)
    process: Process,  # EDM or a linear process
    x: Tensor,  # [N, *data_shape]
    labels: Tensor | None = None,  # [N, K]
    *,
    num_samples: int = 1,  # network evaluations of the integral per x, stratified; one more for the decoder
    decoder: str = "gaussian",  # density of x; "discretised": probability of a 256-level x in [-1, 1]
    generator: Generator = None,  # or a StackedRandomGenerator of N seeds
    integrand: str = "dsm",  # "ism": MDM's check, by the divergence of the score, of whatever has one
    terms: bool = False,  # also return the parts
    **options: Any,  # see Setting
) -> Tensor | tuple[Tensor, dict]:
    """Unbiased draw of the evidence lower bound on log p(x), nats [N] float64.

        -KL(q(u_T | x) || prior) - 1/2 int E |D - x|^2 d snr + E log p(x | y_min)

    with log(1 + sigma_data^2 snr) uniform: exact for every process, which enters by its ends only. The decoder is
    Gaussian around the denoiser's output, of the variance that Gaussian data would have. Differentiable, also in Q and
    D of the process (t_min and t_max stay fixed). terms=True returns (elbo, dict) with kl, diffusion, decoder [N] and
    sigma_min, sigma_max. A joint network (or score) under its own process has MDM's bound, from its t_min 1e-3, with its term
    no_offset (training/joint_likelihood.py); where the data are levels of pixels it is used as the denoiser that it also is.
    integrand="ism" is that bound of any network by implicit score matching, with one Gaussian probe: the same in the mean.
    Raises ValueError for noise kernels that are no process (PFGM++) and impossible ends.
    """
    own = brings_score(net, process) and not (decoder == "discretised" and callable(net))
    if own or integrand != "dsm":
        return _joint_bound(net, process, x, labels, num_samples, decoder, generator, integrand, terms, options)
    if num_samples < 1:
        raise ValueError(f"num_samples = {num_samples}: at least one is needed")
    setting = Setting(**options)
    t_max, t_min = setting.ends(net, process)
    denoiser = DenoiserScore(for_sampling(net), process, labels, setting.net_dtype)
    sigma_data = denoiser.sigma_data
    x = x.to(torch.float64)
    snr_min, snr_max = process.snr(t_max), process.snr(t_min)  # numbers meet every device

    diffusion = 0
    for index in range(num_samples):
        uniform = random.rand((len(x),), generator, x.device, torch.float64)
        sigma, weight = snr_law((index + uniform) / num_samples, snr_min, snr_max, sigma_data)
        noise = random.randn(x.shape, generator, x.device, torch.float64)
        error = denoiser.denoise(x + expand(sigma, x) * noise, sigma) - x
        diffusion = diffusion - weight * per_sample(error**2) / num_samples

    sigma = snr_max.rsqrt()
    noise = random.randn(x.shape, generator, x.device, torch.float64)
    denoised = denoiser.denoise(x + sigma * noise, sigma)
    decoded = _decoder_log_prob(decoder, x, denoised, sigma, sigma_data)
    kl = endpoint_kl(process, x, t_max, setting.prior, sigma_data)
    bound = diffusion + decoded - kl
    if not terms:
        return bound
    parts = {"kl": kl, "diffusion": diffusion, "decoder": decoded}
    return bound, parts | {"sigma_min": float(sigma), "sigma_max": float(snr_min.rsqrt())}


def _joint_bound(net, process, x, labels, num_samples, decoder, generator, integrand, terms, options):
    """`elbo` of a joint network: MDM's bound with offset, and its parts."""
    from training.joint_likelihood import joint_elbo

    if decoder != "gaussian":
        raise ValueError("the bound of a joint score is one of densities: give --encoder=center (or logit)")
    setting = Setting(**{"t_min": 1e-3, **options} if options.get("sigma_min") is None else options)
    t_max, t_min = setting.ends(net, process)
    if setting.prior != "stationary" or abs(t_max - process.T) > 1e-9:
        raise ValueError(
            "the bound of a joint network ends at T with the stationary prior: leave --prior, --sigma-max out"
        )
    how = dict(num_samples=num_samples, t_min=t_min, integrand=integrand, generator=generator)
    bound, parts = joint_elbo(net, process, x, labels, **how, terms=True)
    ends = {"sigma_min": float(process.sigma(t_min)), "sigma_max": float(process.sigma(t_max))}
    return (bound, parts | {"kl": endpoint_kl(process, x, t_max)} | ends) if terms else bound


@torch.no_grad()
def ode_log_likelihood(
    net: Any,  # denoiser, or a joint network with .score(u, t)
    process: Process,  # EDM or a linear process
    x: Tensor,  # [N, *data_shape]
    labels: Tensor | None = None,  # [N, K]
    *,
    probe: str = "rademacher",  # "gaussian"; "exact": the trace, for a handful of dimensions
    hutch_probes: int = 1,  # Hutchinson probes, averaged
    rtol: float = 1e-5,  # of SciPy's RK45
    atol: float = 1e-5,
    state: str | None = None,  # "reduced" (default for denoisers) or "joint" (default for .score)
    decoder: str | None = None,  # None: log density of x at t_min, as published. Else as in elbo
    generator: Generator = None,
    terms: bool = False,  # also return a dict with sigma_min, sigma_max, nfe
    **options: Any,  # see Setting
) -> Tensor | tuple[Tensor, dict]:
    """log p(x) in nats [N] float64 by the probability-flow ODE (Song et al. 2021; CLD, appendix).

    state="reduced" integrates dy/dsigma = (y - D)/sigma from sigma_min to sigma_max, exact for every process. "joint"
    integrates the whole state from (x, v0): log p(x, v0) - log q(v0), one draw of the auxiliaries per x, whose mean is
    a lower bound (CLD). Without decoder, x stands for the state at t_min; with one, y or u at t_min is drawn given x
    and the result is a lower bound on the log density (gaussian) or log probability (discretised) of x itself.
    """
    if hutch_probes < 1:
        raise ValueError(f"hutch_probes = {hutch_probes}: at least one is needed")
    if probe not in ("rademacher", "gaussian", "exact"):
        raise ValueError(f"probe {probe!r}: choose rademacher, gaussian or exact")
    own = brings_score(net, process)
    state = ("joint" if own else "reduced") if state is None else state
    if state not in ("reduced", "joint") or (state == "reduced" and own):
        raise ValueError(f"state {state!r}: choose reduced (denoisers only) or joint")
    setting = Setting(**options)
    if state == "joint" and setting.t_min is None and setting.sigma_min is None and process.beta is not None:
        setting = replace(setting, t_min=1e-5)  # CLD's: at a later time v is no longer N(0, init_aux_var)
    t_max, t_min = setting.ends(net, process)
    score = make_score(for_sampling(net), process, labels, setting.net_dtype)
    flow = _Flow(score, process, t_min, t_max, setting.prior, probe, hutch_probes, generator, rtol, atol)
    x, sigma = x.to(torch.float64), float(process.sigma(t_min))
    run = flow.reduced if state == "reduced" else flow.joint
    log_prob, denoised = run(x, noisy=decoder is not None)
    if decoder is not None:
        log_prob = log_prob + _decoder_log_prob(decoder, x, denoised, torch.tensor(sigma), score.sigma_data)
    if not terms:
        return log_prob
    return log_prob, {"sigma_min": sigma, "sigma_max": float(process.sigma(t_max)), "nfe": flow.nfe}


@dataclass
class _Flow:
    """The probability flow from t_min to t_max, and how the density changes along it."""

    score: Any
    process: Process
    t_min: float
    t_max: float
    prior: str
    probe: str
    hutch_probes: int
    generator: Generator
    rtol: float
    atol: float
    nfe: int = 0  # evaluations

    def reduced(self, x, noisy):
        """(log density of y, D(y; sigma_min) or None): flow of y over log sigma, dy/dlog sigma = y - D."""
        process = self.process
        low, high = (float(process.sigma(t)) for t in (self.t_min, self.t_max))
        y, log_q, denoised = x, 0.0, None
        if noisy:
            noise = random.randn(x.shape, self.generator, x.device, torch.float64)
            y = x + low * noise
            log_q = _gaussian_log_prob(noise * low, torch.tensor(low**2))
            denoised = self.score.denoise(y, torch.tensor(low))

        def change(log_sigma, y):
            return y - self.score.denoise(y, torch.tensor(math.exp(log_sigma), dtype=torch.float64))

        end, divergence = self._solve(change, y, math.log(low), math.log(high))
        # The prior of u, seen in y = m' C^-1 u / snr.
        units = torch.eye(process.V, dtype=torch.float64, device=x.device)[..., None]  # [V, V, 1]
        weights = process.project(units, self.t_max)[0][:, 0]  # [V]
        variance = weights @ self._prior_covariance().to(weights) @ weights
        return _gaussian_log_prob(end, variance) + divergence - log_q, denoised

    def joint(self, x, noisy):
        """As `reduced` for the whole state: du/dt = A u beta - D beta score."""
        process = self.process
        noise = random.randn((len(x), process.V, *x.shape[1:]), self.generator, x.device, torch.float64)
        denoised = None
        if noisy:  # u ~ q(u_t_min | x)
            L = process.cholesky(self.t_min).to(x.device)
            mean = process.kernel(self.t_min)[0].to(x.device)
            u = torch.einsum("vw,nw...->nv...", L, noise) + torch.einsum("v,n...->nv...", mean, x)
            log_q = _white_log_prob(noise, L)
            denoised = self.score.denoised(u, self.t_min)
        else:  # u = (x, v0)
            variance = torch.tensor(getattr(process, "init_aux_var", 1.0), dtype=torch.float64)
            if process.V > 1 and variance == 0:
                raise ValueError("init_aux_var = 0: v0 has no density, so the joint likelihood needs a decoder")
            u = noise * variance.sqrt()
            u[:, 0] = x
            log_q = _gaussian_log_prob(u[:, 1:], variance)

        def change(t, u):
            t = torch.tensor(t, dtype=torch.float64)
            G = process.diffusion(t).to(u.device)
            kick = torch.einsum("vw,nw...->nv...", G @ G.mT, self.score(u, t))
            return process.drift(u, t) - 0.5 * kick

        end, divergence = self._solve(change, u, self.t_min, self.t_max)
        L = torch.linalg.cholesky(self._prior_covariance()).to(x.device)
        white = torch.linalg.solve_triangular(L, end.flatten(2), upper=False)
        return _white_log_prob(white, L) + divergence - log_q, denoised

    def _prior_covariance(self):
        known = {"sigma_data": self.score.sigma_data} if self.prior == "matched" else {}
        return self.process.prior_covariance(self.prior, self.t_max, **known)

    def _solve(self, change, start, begin, end):
        """The state at the end of d state = change(time, state) by SciPy's RK45, and the integral [N] of its divergence."""
        probes, size = self._probes(start), start.numel()

        def slope(time, flat):
            here = torch.from_numpy(flat[:size]).reshape(start.shape).to(start.device)
            with torch.enable_grad():
                there = change(time, here.requires_grad_())
            divergence = 0
            for probe in probes:
                (grad,) = torch.autograd.grad(there, here, probe.to(there.dtype), retain_graph=probe is not probes[-1])
                divergence = divergence + per_sample(grad * probe)
            divergence = divergence if self.probe == "exact" else divergence / len(probes)
            return np.concatenate([there.detach().cpu().numpy().ravel(), divergence.cpu().numpy()])

        import scipy.integrate  # takes as long to load as a short run

        first = np.concatenate([start.cpu().numpy().ravel(), np.zeros(len(start))])
        result = scipy.integrate.solve_ivp(slope, (begin, end), first, method="RK45", rtol=self.rtol, atol=self.atol)
        if not result.success:
            raise RuntimeError(f"probability flow: {result.message}")
        self.nfe = result.nfev
        last = torch.from_numpy(result.y[:, -1]).to(start.device)
        return last[:size].reshape(start.shape), last[size:]

    def _probes(self, x):
        """Hutchinson probes, a list of [N, ...] float64."""
        if self.probe == "exact":
            units = torch.eye(x[0].numel(), dtype=torch.float64, device=x.device)
            return [unit.reshape(1, *x.shape[1:]).expand(x.shape) for unit in units]
        draw = random.randn if self.probe == "gaussian" else random.rand
        draws = [draw(x.shape, self.generator, x.device, torch.float64) for _ in range(self.hutch_probes)]
        if self.probe == "rademacher":
            draws = [torch.where(draw < 0.5, -1.0, 1.0).to(torch.float64) for draw in draws]
        return draws
