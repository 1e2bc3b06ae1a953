"""Log-likelihoods in nats of any denoiser under any process: the ELBO, and the probability-flow ODE.

Both work with the reduced state y = x0 + sigma n, which is all that the state of a linear diffusion says about the data.
So processes differ only in their end points: the range of sigma, and the prior.
"""

import math
import warnings

import numpy as np
import scipy.integrate
import torch

from torch_utils import random
from training.processes.score import DenoiserScore, make_score, require_linear
from training.processes.states import expand
from training.processes.time_density import snr_law
from training.samplers import endpoints


def per_sample(values):
    """Sum over all axes but the first, in float64."""
    return values.to(torch.float64).flatten(1).sum(1)


def gaussian_log_prob(residual, variance):
    """log N(residual; 0, variance), summed over all axes but the first; residual [N, ...], variance scalar."""
    return per_sample(-(residual.to(torch.float64) ** 2) / (2 * variance) - 0.5 * torch.log(2 * math.pi * variance))


def discretised_log_prob(x, mean, std, levels=256):
    """log probability of the level that x is, for a Gaussian integrated over bins on [-1, 1], summed per sample.

    x: one of the levels 2 k / (levels - 1) - 1, as pixels are encoded. The outermost bins are open.
    """
    half = 1 / (levels - 1)
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


def decoder_log_prob(decoder, x, denoised, sigma, sigma_data):
    """log p(x | y_min) per sample: Gaussian around D(y; sigma) with variance (sigma sigma_data)^2 / (sum of squares)."""
    variance = sigma**2 * sigma_data**2 / (sigma**2 + sigma_data**2)
    if decoder == "gaussian":
        return gaussian_log_prob(x.to(torch.float64) - denoised, variance)
    if decoder == "discretised":
        return discretised_log_prob(x, denoised, variance.sqrt())
    raise ValueError(f"decoder {decoder!r}: choose gaussian or discretised")


def endpoint_kl(process, x, t, prior="stationary", sigma_data=0.5):
    """KL(q(u_t | x) || prior) in nats [N], exact, differentiable in Q and D.

    prior: "stationary", N(0, S), or "matched", N(0, C + sigma_data^2 m m').
    """
    mean, cov = process.kernel(t)
    target = process.prior_covariance(prior, t, sigma_data)
    L, white = torch.linalg.cholesky(target), process.cholesky(t)
    inner = torch.linalg.solve_triangular(L, cov, upper=False)
    trace = torch.linalg.solve_triangular(L, inner.mT, upper=False).diagonal().sum()
    shift = torch.linalg.solve_triangular(L, mean[:, None], upper=False).square().sum()
    log_det = 2 * torch.log(L.diagonal()).sum() - (
        torch.logdet(cov) if cov.requires_grad else 2 * torch.log(white.diagonal()).sum()
    )
    constant = 0.5 * (trace - process.V + log_det)
    x = x.to(torch.float64).flatten(1)
    return constant.to(x.device) * x.shape[1] + 0.5 * shift.to(x.device) * x.square().sum(1)


def ends(net, process, t_min, t_max, sigma_min, sigma_max):
    """(t_max, t_min): as the samplers', but up to T unless the network cannot go so far."""
    require_linear(process)
    if sigma_max is None and t_max is None:
        with torch.no_grad():
            top = float(process.sigma(process.T))
        sigma_max = min(top, float(getattr(net, "sigma_max", math.inf)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a mismatched prior shows in the KL
        return endpoints(net, process, t_min=t_min, t_max=t_max, sigma_min=sigma_min, sigma_max=sigma_max)


def elbo(
    net,                            # denoiser D(y, sigma, labels)
    process,                        # EDM or a linear process
    x,                              # [N, *data_shape]
    labels=None,                    # [N, K], or None
    *,
    num_samples=1,                  # network evaluations of the integral per x, stratified; one more for the decoder
    decoder="gaussian",             # density of x; "discretised": probability of a 256-level x in [-1, 1]
    prior="stationary",             # or "matched", see endpoint_kl
    t_min=None, sigma_min=None,     # lower end: one of them; default sigma 0.002
    t_max=None, sigma_max=None,     # upper end; default T
    generator=None,                 # None, torch.Generator, or StackedRandomGenerator of N seeds
    net_dtype=torch.float32,
    terms=False,                    # also return the parts
):  # fmt: skip
    """Unbiased draw of the evidence lower bound on log p(x), nats [N] float64.

        -KL(q(u_T | x) || prior) - 1/2 int E |D - x|^2 d snr + E log p(x | y_min)

    with log(1 + sigma_data^2 snr) uniform: exact for every process, which enters by its ends only. The decoder is
    Gaussian around the denoiser's output, of the variance that Gaussian data would have. Differentiable, also in Q and
    D of the process (t_min and t_max stay fixed). terms=True returns (elbo, dict) with kl, diffusion, decoder [N] and
    sigma_min, sigma_max. Raises ValueError for noise kernels that are no process (PFGM++) and impossible ends.
    """
    if hasattr(net, "score"):
        raise ValueError("elbo takes a denoiser; a joint network has its own loss")
    if num_samples < 1:
        raise ValueError(f"num_samples = {num_samples}: at least one is needed")
    t_max, t_min = ends(net, process, t_min, t_max, sigma_min, sigma_max)
    denoiser = DenoiserScore(net, process, labels, net_dtype)
    sigma_data = denoiser.sigma_data
    x = x.to(torch.float64)
    snr_min, snr_max = process.snr(t_max).to(x.device), process.snr(t_min).to(x.device)

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
    decoded = decoder_log_prob(decoder, x, denoised, sigma, sigma_data)
    kl = endpoint_kl(process, x, t_max, prior, sigma_data)
    bound = diffusion + decoded - kl
    if not terms:
        return bound
    parts = {"kl": kl, "diffusion": diffusion, "decoder": decoded}
    return bound, parts | {"sigma_min": float(sigma), "sigma_max": float(snr_min.rsqrt())}


def probes_like(x, probe, count, generator):
    """Hutchinson probes [count, *x.shape] float64."""
    if probe == "gaussian":
        draws = [random.randn(x.shape, generator, x.device, torch.float64) for _ in range(count)]
    elif probe == "rademacher":
        draws = [random.rand(x.shape, generator, x.device, torch.float64) for _ in range(count)]
        draws = [torch.where(draw < 0.5, -1.0, 1.0).to(torch.float64) for draw in draws]
    elif probe == "exact":
        units = torch.eye(x[0].numel(), dtype=torch.float64, device=x.device)
        draws = [unit.reshape(1, *x.shape[1:]).expand(x.shape) for unit in units]
    else:
        raise ValueError(f"probe {probe!r}: choose rademacher, gaussian or exact")
    return torch.stack(draws)


def trace(value, x, probes, exact):
    """Divergence [N] of `value` [N, ...] with respect to `x`, estimated with `probes`."""
    total = 0
    for index, probe in enumerate(probes):
        (grad,) = torch.autograd.grad(value, x, probe.to(value.dtype), retain_graph=index < len(probes) - 1)
        total = total + per_sample(grad * probe)
    return total if exact else total / len(probes)


def integrate(slope, state, span, rtol, atol):
    """Integrate (state, int of divergence) with SciPy's RK45. slope(time, state) -> (d state, d log density [N])."""
    shape, size = state.shape, state.numel()

    def flat_slope(time, flat):
        here = torch.from_numpy(flat[:size]).reshape(shape).to(state.device)
        change, divergence = slope(time, here)
        return np.concatenate([change.cpu().numpy().ravel(), divergence.cpu().numpy()])

    start = np.concatenate([state.cpu().numpy().ravel(), np.zeros(len(state))])
    result = scipy.integrate.solve_ivp(flat_slope, span, start, method="RK45", rtol=rtol, atol=atol)
    if not result.success:
        raise RuntimeError(f"probability flow: {result.message}")
    end = torch.from_numpy(result.y[:, -1]).to(state.device)
    return end[:size].reshape(shape), end[size:], result.nfev


def ode_log_likelihood(
    net,                            # denoiser, or a joint network with .score(u, t)
    process,                        # EDM or a linear process
    x,                              # [N, *data_shape]
    labels=None,                    # [N, K], or None
    *,
    probe="rademacher",             # "gaussian"; "exact": the trace, for a handful of dimensions
    hutch_probes=1,                 # Hutchinson probes, averaged
    rtol=1e-5, atol=1e-5,           # of SciPy's RK45
    state=None,                     # "reduced" (default for denoisers) or "joint" (default for .score)
    decoder=None,                   # None: log density of x at t_min, as published. Else as in elbo
    prior="stationary",             # or "matched"
    t_min=None, sigma_min=None,     # lower end; default sigma 0.002, joint: t = 1e-5
    t_max=None, sigma_max=None,     # upper end; default T
    generator=None,
    net_dtype=torch.float32,
    terms=False,                    # also return a dict with sigma_min, sigma_max, nfe
):  # fmt: skip
    """log p(x) in nats [N] float64 by the probability-flow ODE (Song et al. 2021; CLD, appendix).

    state="reduced" integrates dy/dsigma = (y - D)/sigma from sigma_min to sigma_max, exact for every process. "joint"
    integrates the whole state from (x, v0): log p(x, v0) - log q(v0), one draw of the auxiliaries per x, whose mean is
    a lower bound (CLD). Without decoder, x stands for the state at t_min; with one, y or u at t_min is drawn given x
    and the result is a lower bound on the log density (gaussian) or log probability (discretised) of x itself.
    """
    if hutch_probes < 1:
        raise ValueError(f"hutch_probes = {hutch_probes}: at least one is needed")
    state = ("joint" if hasattr(net, "score") else "reduced") if state is None else state
    if state not in ("reduced", "joint") or (state == "reduced" and hasattr(net, "score")):
        raise ValueError(f"state {state!r}: choose reduced (denoisers only) or joint")
    if state == "joint" and t_min is None and sigma_min is None and process.beta is not None:
        t_min = 1e-5  # CLD's: at a later time v is no longer N(0, init_aux_var)
    t_max, t_min = ends(net, process, t_min, t_max, sigma_min, sigma_max)
    score = make_score(net, process, labels, net_dtype)
    x, sigma = x.to(torch.float64), float(process.sigma(t_min))
    run = reduced_flow if state == "reduced" else joint_flow
    with torch.no_grad():
        log_prob, denoised, nfe = run(
            score, process, x, (t_min, t_max), decoder is not None, prior, (probe, hutch_probes, generator), rtol, atol
        )
        if decoder is not None:
            log_prob = log_prob + decoder_log_prob(decoder, x, denoised, torch.tensor(sigma), score.sigma_data)
    if not terms:
        return log_prob
    return log_prob, {"sigma_min": sigma, "sigma_max": float(process.sigma(t_max)), "nfe": nfe}


def reduced_flow(score, process, x, span, noisy, prior, probing, rtol, atol):
    """(log density, D(y; sigma_min) or None, evaluations): flow of y over log sigma; dy/dlog sigma = y - D."""
    probe, count, generator = probing
    low, high = (float(process.sigma(t)) for t in span)
    y, log_q, denoised = x, 0.0, None
    if noisy:
        noise = random.randn(x.shape, generator, x.device, torch.float64)
        y = x + low * noise
        log_q = gaussian_log_prob(noise * low, torch.tensor(low**2))
        denoised = score.denoise(y, torch.tensor(low))
    probes = probes_like(x, probe, count, generator)

    def slope(log_sigma, y):
        with torch.enable_grad():
            y = y.requires_grad_()
            change = y - score.denoise(y, torch.tensor(math.exp(log_sigma), dtype=torch.float64))
            divergence = trace(change, y, probes, probe == "exact")
        return change.detach(), divergence

    end, divergence, nfe = integrate(slope, y.clone(), (math.log(low), math.log(high)), rtol, atol)
    # The prior of u, seen in y = m' C^-1 u / snr.
    gain = process.score(unit_states(process, x.device), span[1], torch.zeros(process.V, 1, device=x.device))
    mean = process.kernel(span[1])[0].to(x.device)
    weights = -(gain[..., 0] @ mean.to(gain)) * high**2  # [V]
    variance = weights @ process.prior_covariance(prior, span[1], score.sigma_data).to(weights) @ weights
    return gaussian_log_prob(end, variance) + divergence - log_q, denoised, nfe


def unit_states(process, device):
    """The V unit states, [V, V, 1]."""
    return torch.eye(process.V, dtype=torch.float64, device=device)[..., None]


def joint_flow(score, process, x, span, noisy, prior, probing, rtol, atol):
    """As `reduced_flow` for the whole state: du/dt = A u beta - D beta score."""
    probe, count, generator = probing
    shape = (len(x), process.V, *x.shape[1:])
    noise = random.randn(shape, generator, x.device, torch.float64)
    denoised, log_det = None, 0.0
    if noisy:  # u ~ q(u_t_min | x)
        L = process.cholesky(span[0]).to(x.device)
        mean = process.kernel(span[0])[0].to(x.device)
        u = torch.einsum("vw,nw...->nv...", L, noise) + expand(mean, torch.empty(process.V, *[1] * (x.ndim - 1))) * (
            x.unsqueeze(1)
        )
        log_det = float(torch.log(L.diagonal()).sum()) * x[0].numel()
        denoised = score.denoised(u, span[0])
    else:  # u = (x, v0)
        std = math.sqrt(getattr(process, "init_aux_var", 1.0))
        if process.V > 1 and std == 0:
            raise ValueError("init_aux_var = 0: v0 has no density, so the joint likelihood needs a decoder")
        noise[:, 0] = 0
        u = noise * std
        u[:, 0] = x
        log_det = (process.V - 1) * math.log(std) * x[0].numel() if process.V > 1 else 0.0
    random_size = noise[0].numel() if noisy else noise[0, 1:].numel()
    log_q = -0.5 * per_sample(noise**2) - 0.5 * math.log(2 * math.pi) * random_size - log_det
    probes = probes_like(u, probe, count, generator)

    def slope(t, u):
        t = torch.tensor(t, dtype=torch.float64)
        with torch.enable_grad():
            u = u.requires_grad_()
            G = process.diffusion(t).to(u.device)
            kick = torch.einsum("vw,nw...->nv...", G @ G.mT, score(u, t))
            change = process.drift(u, t) - 0.5 * kick
            divergence = trace(change, u, probes, probe == "exact")
        return change.detach(), divergence

    end, divergence, nfe = integrate(slope, u.clone(), span, rtol, atol)
    L = torch.linalg.cholesky(process.prior_covariance(prior, span[1], score.sigma_data)).to(x.device)
    white = torch.linalg.solve_triangular(L, end.flatten(2), upper=False)
    log_prior = -0.5 * per_sample(white**2) - white[0].numel() * 0.5 * math.log(2 * math.pi)
    log_prior = log_prior - float(torch.log(L.diagonal()).sum()) * x[0].numel()
    return log_prior + divergence - log_q, denoised, nfe
