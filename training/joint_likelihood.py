"""The evidence lower bound of joint networks, as MDM publishes it: with and without offset, two integrands, less variance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_utils import random
from torch_utils.random import Generator
from training.losses.denoising import Draws
from training.losses.joint import JointLoss, per_sample
from training.processes import Process
from training.processes.score import make_score
from training.processes.states import apply_matrix

BINS = 20  # of t, each with a coefficient of its own


class _ByScore:
    """The noise prediction of whatever has a score(u, t): -L' score, of the variables that receive noise."""

    def __init__(self, score: Callable, process: Process):
        self.of, self.first = score, process.first_noised()

    def score(self, u: Tensor, t: Tensor | float, labels: Tensor | None = None) -> Tensor:
        return self.of(u, t)

    def noise(self, u: Tensor, t: Tensor, labels: Tensor | None, root: Tensor) -> Tensor:
        return -apply_matrix(root[..., self.first :, self.first :].mT, self.of(u, t)[:, self.first :])


def joint_elbo(
    net: Any,  # a network or guided score with .score(u, t, labels), or a denoiser
    process: Process,
    x: Tensor,  # [N, *data_shape]
    labels: Tensor | None = None,  # [N, K]
    *,
    num_samples: int = 1,  # times and noises per x, stratified in t
    t_min: float = 1e-3,
    hybrid: bool = True,
    integrand: str = "dsm",  # "ism": implicit score matching, a check of the network's score against its own divergence
    probes: int = 1,  # ism: Gaussian probes of the divergence; 0: the exact trace
    controls: bool = False,  # dsm: two control variates, fitted on the other half of the draws
    generator: Generator = None,
    terms: bool = False,
) -> Tensor | tuple[Tensor, dict]:
    """One draw of the bound on log p(x), nats [N] float64: `with_offset`; terms=True also gives `no_offset` [N].

    Without offset, the number that MDM selects on, it is no bound on log p(x) but on that of the state at t_min (MDM §8).
    integrand "ism" has the same mean. controls (MDM §20.5): 1/2 |grad log q|^2 less its mean, with a coefficient per range of
    t, and the trace and divergence at t less their integral; unbiased, but an x then depends on the others of its batch.
    Raises ValueError for an unknown integrand, or controls of ism.
    """
    if integrand not in ("dsm", "ism") or (controls and integrand == "ism"):
        raise ValueError(f"integrand {integrand!r}, controls {controls}: choose dsm or ism, controls with dsm only")
    loss = JointLoss(process, "elbo", t_min=t_min, hybrid=hybrid, elbo_samples=num_samples)

    def repeated(labels):
        return None if labels is None else labels.repeat_interleave(num_samples, 0)

    with torch.no_grad():
        draws = loss.draw(x.to(torch.float64), None, generator)
        net, once = (_ByScore(make_score(net, process, given), process) for given in (repeated(labels), labels))
        weight = draws.weight.flatten()
        if integrand == "ism":
            no_offset = _ism(loss, net, draws, weight, probes, generator)
        else:
            error, L, t = loss.errors(net, draws)
            integral = weight * loss.mismatch(error, L, t)
            if controls:
                integral = _controlled(loss, draws, integral, weight, L, t)
            no_offset = loss.ends(draws) - integral.unflatten(0, draws.t.shape).mean(1)
        start = random.randn([len(x), process.V - 1, *x.shape[1:]], generator, x.device)
        noise = random.randn([len(x), process.V, *x.shape[1:]], generator, x.device)
        bound = no_offset + loss.offset(once, Draws(draws, start=start), noise)
    return (bound, {"no_offset": no_offset}) if terms else bound


def _power(process, t, device):
    """2 D beta(t) [M, V, V]."""
    return (2 * process.D.detach() * process.beta(t.cpu())[:, None, None]).to(device)


def _controlled(loss, draws, integral, weight, L, t):
    """`integral` [M] less two control variates of mean zero, whose coefficients come from the other half of the draws."""
    process, d = loss.process, draws.images[0].numel()
    eps = draws.noise.flatten(0, 1).to(torch.float64).flatten(2)
    inverse = torch.linalg.inv(L).to(eps.device)
    inner = inverse @ _power(process, t, eps.device) @ inverse.mT  # L^-1 G G' L^-T
    sampled = 0.5 * (eps * (inner @ eps)).sum((1, 2))
    trace = 0.5 * d * torch.diagonal(inner, dim1=-2, dim2=-1).sum(-1)
    first = weight * (sampled - trace)
    ends = torch.tensor([loss.t_min, process.T], dtype=torch.float64)
    log_det = 2 * torch.diagonal(process.perturbation(ends, loss.hybrid)[1], dim1=-2, dim2=-1).log().sum(-1)
    drift = d * process.beta(t.cpu()).to(trace) * float(torch.trace(process.A))
    second = weight * (trace + drift) - 0.5 * d * float(log_det[1] - log_det[0])
    order = t.flatten().argsort().argsort()
    bins, half = order * BINS // len(order), order % 2
    result = integral.clone()

    def fitted(value, control, use):
        control, value = control[use] - control[use].mean(), value[use]
        return (control * value).sum() / control.square().sum().clamp_min(1e-300)

    for part in (0, 1):  # coefficients from one half, applied to the other
        for bin in range(BINS):
            inside = bins == bin
            use, to = inside & (half == part), inside & (half != part)
            if use.sum() > 2:
                result[to] = result[to] - fitted(integral, first, use) * first[to]
    rest = result.clone()
    for part in (0, 1):
        use, to = half == part, half != part
        result[to] = rest[to] - fitted(rest, second, use) * second[to]
    return result


def _ism(loss, net, draws, weight, probes, generator):
    """The bound without offset by -1/2 |s|^2 - div(G G' s) + div f, [N] (MDM §8)."""
    process, d = loss.process, draws.images[0].numel()
    R, t = draws.t.shape[1], draws.t.flatten()
    F, L = process.perturbation(t, loss.hybrid)
    u = apply_matrix(F, loss.start(draws).repeat_interleave(R, 0))
    u = u + apply_matrix(L, draws.noise.flatten(0, 1).to(torch.float64))
    power = _power(process, t, u.device)
    size = u[0].numel()
    if probes:
        vectors = [random.randn(u.shape, generator, u.device, torch.float64) for _ in range(probes)]
    else:
        vectors = [
            unit.reshape(u[:1].shape).expand(u.shape) for unit in torch.eye(size, dtype=u.dtype, device=u.device)
        ]
    with torch.enable_grad():
        u.requires_grad_()
        s = net.score(u, t)
        flow = apply_matrix(power, s)
        divergence = 0
        for v in vectors:
            (grad,) = torch.autograd.grad(flow, u, v, retain_graph=True)
            divergence = divergence + per_sample(grad * v) / max(probes, 1)
    drift = d * process.beta(t.cpu()).to(u.device) * float(torch.trace(process.A))
    integrand = -0.5 * per_sample(s * flow) - divergence + drift
    volume = _prior(loss, draws)  # ends without the log determinants, which the drift's divergence replaces
    return volume + (weight * integrand.detach()).unflatten(0, (-1, R)).mean(1)


def _prior(loss, draws):
    """E log N(u_T; 0, S) + H(v_0) [N]."""
    ends = torch.tensor([loss.t_min, loss.process.T], dtype=torch.float64)
    log_det = 2 * torch.diagonal(loss.process.perturbation(ends, loss.hybrid)[1], dim1=-2, dim2=-1).log().sum(-1)
    return loss.ends(draws) - 0.5 * draws.images[0].numel() * float(log_det[1] - log_det[0])
