"""How to get back: solvers. Each exists as a plain function that returns images and as a generator of its states."""

import functools
import math
import warnings
from typing import NamedTuple

import scipy.integrate
import torch

from training.processes.score import make_score, require_linear
from training.processes.states import apply_matrix


class State(NamedTuple):
    """What a solver's generator yields: after `step` steps the state stands at `time` (heun: the noise level)."""

    step: int
    time: float
    state: torch.Tensor


@torch.no_grad()
def heun_states(
    net,                            # denoiser net(x, sigma, labels)
    noise,                          # unit noise [N, *data_shape], scaled by sigma_max inside
    labels=None,                    # [N, K], or None
    gnet=None,                      # guiding denoiser; needed if guidance != 1
    num_steps=32,                   # N; evaluates the network 2 N - 1 times
    sigma_min=0.002,                # lowest noise level but zero
    sigma_max=80,                   # highest noise level
    rho=7,                          # exponent of the grid
    guidance=1,                     # D_g = G + guidance (D - G)
    S_churn=0,                      # amount of stochasticity; 0 draws nothing
    S_min=0,                        # churn only at noise levels in [S_min, S_max]
    S_max=float("inf"),
    S_noise=1,                      # scale of the added noise
    dtype=torch.float32,            # of state and grid
    randn_like=torch.randn_like,    # source of the churn noise
):  # fmt: skip
    """Generator of `State`s of `heun`: the noise, then the image after every step; `time` is the noise level."""
    if num_steps < 1 or num_steps != int(num_steps):
        raise ValueError(f"num_steps = {num_steps}: at least one step is needed, and whole ones")
    if not 0 < sigma_min <= sigma_max:
        raise ValueError(f"sigma_min = {sigma_min}, sigma_max = {sigma_max}: need 0 < sigma_min <= sigma_max")
    if guidance != 1 and gnet is None:
        raise ValueError(f"guidance = {guidance} needs a guiding network (gnet)")

    def denoise(x, sigma):
        denoised = net(x, sigma, labels).to(dtype)
        return denoised if guidance == 1 else gnet(x, sigma, labels).to(dtype).lerp(denoised, guidance)

    # EDM eq. 5. One step has sigma_max as its only noise level: the image is D(x, sigma_max).
    index = torch.arange(num_steps, dtype=dtype, device=noise.device)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (high + index / max(num_steps - 1, 1) * (low - high)) ** rho
    sigmas = torch.cat([sigmas, torch.zeros_like(sigmas[:1])])

    levels = sigmas.tolist()
    x_next = noise.to(dtype) * sigmas[0]
    yield State(0, levels[0], x_next)
    for step, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        x = x_next
        if S_churn > 0 and S_min <= levels[step] <= S_max:
            gamma = min(S_churn / num_steps, 2**0.5 - 1)
            sigma_hat = sigma + gamma * sigma
            x = x + (sigma_hat**2 - sigma**2).sqrt() * S_noise * randn_like(x)
            sigma = sigma_hat
        slope = (x - denoise(x, sigma)) / sigma
        x_next = x + (sigma_next - sigma) * slope
        if step < num_steps - 1:  # second order, except for the step to zero
            slope_next = (x_next - denoise(x_next, sigma_next)) / sigma_next
            x_next = x + (sigma_next - sigma) * (0.5 * slope + 0.5 * slope_next)
        yield State(step + 1, levels[step + 1], x_next)


def heun(
    net, noise, labels=None, gnet=None, num_steps=32, sigma_min=0.002, sigma_max=80, rho=7, guidance=1,
    S_churn=0, S_min=0, S_max=float("inf"), S_noise=1, dtype=torch.float32, randn_like=torch.randn_like,
):  # fmt: skip
    """EDM's second-order Heun sampler (Karras et al. 2022, Algorithm 2) with guidance and churn, as in EDM2.

    Arguments as in `heun_states`. Returns images [N, *data_shape] of type `dtype`. Raises ValueError for less than
    one step, or guidance without a guiding network.
    """
    states = heun_states(
        net, noise, labels, gnet, num_steps, sigma_min, sigma_max, rho, guidance,
        S_churn, S_min, S_max, S_noise, dtype, randn_like,
    )  # fmt: skip
    return last_of(states).state


def last_of(states):
    """Run a generator of States to its end and return the last one."""
    for state in states:
        last = state
    return last


# Solvers of linear processes (and of EDM as one of them). States u [N, V, *data_shape] are float64.


def end_time(process):
    """Largest forward time: 1, for EDM sigma_max."""
    return getattr(process, "T", 1.0)


@torch.no_grad()
def endpoints(net, process, *, grid="sigma", t_min=None, t_max=None, sigma_min=None, sigma_max=None):
    """(t_max, t_min) that a solver runs between, forward times.

    t_min: default t(sigma_min); sigma_min: default 0.002, or the network's if that is larger.
    t_max: default t(sigma_max), or T where the process does not get so far; sigma_max: default 80, or the network's if
    smaller. With a uniform or quadratic grid and an explicit t_min the default is T: the published grids.

    Warns if the data still shows at t_max (sigma < 10 sigma_data). Raises ValueError if t_min >= t_max.
    """
    require_linear(process)
    top = float(process.sigma(end_time(process)))
    if t_max is None:
        if sigma_max is None:
            sigma_max = min(80.0, float(getattr(net, "sigma_max", math.inf)))
        published = grid != "sigma" and t_min is not None
        t_max = end_time(process) if published or sigma_max >= top else float(process.time(sigma_max))
    if t_min is None:
        if sigma_min is None:
            sigma_min = max(0.002, float(getattr(net, "sigma_min", 0.0)))
        t_min = float(process.time(min(sigma_min, top)))
    if not 0 < t_min < t_max <= end_time(process) * (1 + 1e-9):
        raise ValueError(f"t_min = {t_min:g}, t_max = {t_max:g}: need 0 < t_min < t_max <= {end_time(process):g}")
    reached, sigma_data = float(process.sigma(t_max)), float(getattr(net, "sigma_data", 0.5))
    if reached < 10 * sigma_data:
        warnings.warn(
            f"{process!r} reaches only sigma = {reached:.3g} < 10 sigma_data: the start of sampling depends on the data",
            stacklevel=3,
        )
    return float(t_max), float(t_min)


@torch.no_grad()
def time_grid(
    net, process, num_steps, *, grid="sigma", t_min=None, t_max=None, sigma_min=None, sigma_max=None, rho=7.0
):
    """Forward times of `num_steps` steps, [num_steps + 1] decreasing float64, between `endpoints`.

    grid: "sigma" is EDM's in noise levels (exponent rho), "uniform" is linear in t, "quadratic" is
    t_min + (t_max - t_min) ((K - i) / K)^2, large steps first (CLD, MDM).
    """
    if num_steps is None or num_steps < 1:
        raise ValueError(f"num_steps = {num_steps}: at least one step is needed")
    t_max, t_min = endpoints(
        net, process, grid=grid, t_min=t_min, t_max=t_max, sigma_min=sigma_min, sigma_max=sigma_max
    )
    left = 1 - torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    if grid == "uniform":
        times = t_min + (t_max - t_min) * left
    elif grid == "quadratic":
        times = t_min + (t_max - t_min) * left**2
    elif grid == "sigma":
        low, high = (float(process.sigma(t)) ** (1 / rho) for t in (t_min, t_max))
        times = process.time((low + (high - low) * left).clamp(low, high) ** rho)
    else:
        raise ValueError(f"grid {grid!r}: choose sigma, uniform or quadratic")
    times[0], times[-1] = t_max, t_min
    return times


@torch.no_grad()
def start_state(net, process, shape, generator=None, *, prior="matched", device=None, times=None, **options):
    """Latents [N, V, *data_shape] for the solvers below, at the time where they start.

    shape: that of the images, [N, *data_shape]. prior: "matched", N(0, C + sigma_data^2 m m') as the data really are
    at that time, or "stationary", N(0, S) as published, with its mismatch. times and options as given to the solver.
    """
    options = {key: value for key, value in options.items() if key in ENDPOINT_OPTIONS}
    t = float(times[0]) if times is not None else endpoints(net, process, **options)[0]
    sigma_data = float(getattr(net, "sigma_data", 0.5))
    shape = (shape[0], process.V, *shape[1:])
    return process.prior_sample(shape, generator, prior=prior, t=t, sigma_data=sigma_data, device=device)


ENDPOINT_OPTIONS = ("grid", "t_min", "t_max", "sigma_min", "sigma_max")


class Problem:
    """What the solvers share: the score, the times, the state, and how a run ends."""

    def __init__(
        self, net, process, latents, labels, num_steps, times, grid, t_min, denoise, randn_like,
        *, t_max=None, sigma_min=None, sigma_max=None, rho=7.0, dtype=torch.float64, net_dtype=torch.float32,
    ):  # fmt: skip
        if denoise not in (True, False, "mean", "euler"):
            raise ValueError(f"denoise {denoise!r}: choose True, False, mean or euler")
        self.process, self.denoise, self.randn_like = process, denoise, randn_like
        self.score = make_score(net, process, labels, net_dtype)
        self.state = latents.to(dtype)
        if times is None:
            count = num_steps - 1 if denoise == "euler" and num_steps is not None else num_steps
            times = time_grid(
                net, process, count, grid=grid, t_min=t_min, t_max=t_max,
                sigma_min=sigma_min, sigma_max=sigma_max, rho=rho,
            )  # fmt: skip
        self.times = torch.as_tensor(times, dtype=torch.float64).cpu()
        steps = len(self.times) - 1
        if self.times.ndim != 1 or steps < 1 or not (self.times.diff() < 0).all() or not self.times[-1] > 0:
            raise ValueError("times: give at least two forward times, decreasing, the last one > 0")
        if num_steps is not None and steps != num_steps - (denoise == "euler"):
            raise ValueError(f"times has {len(self.times)} entries: {steps} steps, but num_steps = {num_steps}")

    def states(self, step):
        """States from `step(u, index) -> u`, which goes from times[index] to times[index + 1]."""
        u = self.state
        if hasattr(self.process, "prepare"):
            self.process.prepare(self.times)
        yield State(0, float(self.times[0]), u)
        for index in range(len(self.times) - 1):
            u = step(u, index)
            yield State(index + 1, float(self.times[index + 1]), u)

    def reverse_drift(self, u, t, strength=1.0):
        """Drift of the reverse SDE (strength 1) or of the probability-flow ODE (1/2), per unit of falling time."""
        G = self.process.diffusion(t)
        return apply_matrix(strength * G @ G.mT, self.score(u, t)) - self.process.drift(u, t)

    def noise(self, u):
        return self.randn_like(u).to(u)

    def finish(self, last, dtype):
        """Images [N, *data_shape] from the last State."""
        u, t = last.state, self.times[-1]
        if self.denoise is True:
            return self.score.denoised(u, t).to(dtype)
        if self.denoise == "euler":
            u = u + self.reverse_drift(u, t) * t.to(u.dtype)
            self.noise(u)  # the original draws here, to no effect
        return u[:, 0].to(dtype)


@torch.no_grad()
def euler_maruyama_states(
    net, process, latents, labels=None, *, num_steps=None, times=None, grid="sigma", t_min=None, denoise=True,
    randn_like=torch.randn_like, **options,
):  # fmt: skip
    """Generator of the `State`s of `euler_maruyama`."""
    problem = Problem(net, process, latents, labels, num_steps, times, grid, t_min, denoise, randn_like, **options)
    yield from problem.states(euler_maruyama_step(problem))


def euler_maruyama_step(problem):
    times, deltas = problem.times, -problem.times.diff()
    G = problem.process.diffusion(times[:-1]) * deltas.sqrt()[:, None, None]

    def step(u, index):
        u_next = u + problem.reverse_drift(u, times[index]) * deltas[index]
        noise = problem.noise(u)
        if problem.denoise == "mean" and index == len(deltas) - 1:
            return u_next
        return u_next + apply_matrix(G[index], noise)

    return step


@torch.no_grad()
def euler_maruyama(
    net,                            # denoiser, or anything with .score(u, t)
    process,                        # EDM or a linear process
    latents,                        # state at the start, [N, V, *data_shape], see start_state
    labels=None,                    # [N, K], or None
    *,
    num_steps=None,                 # steps, one network evaluation each, and one for denoise=True
    times=None,                     # explicit grid instead: decreasing forward times [num_steps + 1]
    grid="sigma",                   # or "uniform", "quadratic", see time_grid
    t_min=None,                     # last time; default t(sigma_min)
    denoise=True,                   # see below
    randn_like=torch.randn_like,    # called once per step with the state
    **options,                      # t_max, sigma_min, sigma_max, rho; dtype (state, float64), net_dtype (float32)
):  # fmt: skip
    """Reverse SDE by Euler-Maruyama steps (CLD §7.3, MDM's sampler). Returns images [N, *data_shape] in latents' type.

    denoise=True returns the denoiser's output at t_min, False the data variable of the last state. "mean" leaves out
    the noise of the last step (MDM). "euler" takes num_steps - 1 steps and then one noise-free step of the reverse SDE
    from t_min to 0 (CLD's published denoising, which costs a last draw). Raises ValueError for impossible grids.
    """
    problem = Problem(net, process, latents, labels, num_steps, times, grid, t_min, denoise, randn_like, **options)
    return problem.finish(last_of(problem.states(euler_maruyama_step(problem))), latents.dtype)


@torch.no_grad()
def sscs_states(
    net, process, latents, labels=None, *, num_steps=None, times=None, grid="sigma", t_min=None, denoise=True,
    randn_like=torch.randn_like, half_step="exact", **options,
):  # fmt: skip
    """Generator of the `State`s of `sscs`."""
    problem = Problem(net, process, latents, labels, num_steps, times, grid, t_min, denoise, randn_like, **options)
    yield from problem.states(sscs_step(problem, half_step))


def sscs_step(problem, half_step):
    if half_step not in ("exact", "published"):
        raise ValueError(f"half_step {half_step!r}: choose exact or published")
    process, t, t_next = problem.process, problem.times[:-1], problem.times[1:]
    middle, precision = (t + t_next) / 2, process.precision()
    first = process.splitting(t, middle)
    if half_step == "exact":
        second, power = process.splitting(middle, t_next), process.noise_power(t, t_next)
    else:
        G = process.diffusion(t)
        second, power = first, G @ G.mT * (t - t_next)[:, None, None]

    def half(u, flow, index):
        return apply_matrix(flow[0][index], u) + apply_matrix(flow[1][index], problem.noise(u))

    def step(u, index):
        u = half(u, first, index)
        kick = problem.score(u, t[index]) + apply_matrix(precision, u)
        return half(u + apply_matrix(power[index], kick), second, index)

    return step


@torch.no_grad()
def sscs(
    net, process, latents, labels=None, *, num_steps=None, times=None, grid="sigma", t_min=None, denoise=True,
    randn_like=torch.randn_like,    # called twice per step
    half_step="exact",              # integrals of beta; "published": see below
    **options,
):  # fmt: skip
    """Symmetric splitting sampler (CLD §4, SSCS) for any number of variables. Arguments as in `euler_maruyama`.

    A step is A(delta/2) S(delta) A(delta/2): A is the exact Ornstein-Uhlenbeck flow with generator -(D - Q) S^-1, S
    the kick u += 2 D beta delta (score + S^-1 u), with the score at the time where the step starts. half_step="exact"
    integrates beta over each of the three; "published" uses the first half's integral twice and the starting beta in S,
    which is the same for constant beta and worse than Euler-Maruyama for many steps of a steep one.
    """
    problem = Problem(net, process, latents, labels, num_steps, times, grid, t_min, denoise, randn_like, **options)
    return problem.finish(last_of(problem.states(sscs_step(problem, half_step))), latents.dtype)


@torch.no_grad()
def probability_flow_states(
    net, process, latents, labels=None, *, num_steps=None, times=None, grid="sigma", t_min=None, denoise=True,
    randn_like=torch.randn_like, method="heun", rtol=1e-5, atol=1e-5, **options,
):  # fmt: skip
    """Generator of the `State`s of `probability_flow`."""
    problem = Problem(net, process, latents, labels, num_steps, times, grid, t_min, denoise, randn_like, **options)
    yield from flow_states(problem, method, rtol, atol)


def flow_states(problem, method, rtol, atol):
    if method == "rk45":
        return rk45_states(problem, rtol, atol)
    if method != "heun":
        raise ValueError(f"method {method!r}: choose heun or rk45")

    process, times, deltas = problem.process, problem.times, -problem.times.diff()
    if not hasattr(process, "rotation"):
        return problem.states(plain_heun_step(problem, times, deltas))
    turns, precision, G = process.rotation(times[:-1], times[1:]), process.precision(), process.diffusion(times)
    power = G @ G.mT / 2

    def kick(u, index):
        return apply_matrix(power[index], problem.score(u, times[index]) + apply_matrix(precision, u))

    # In the frame that turns with Q only D's part is left, which vanishes where the state has its stationary law.
    def step(u, index):
        delta, turn, first = deltas[index], turns[index], kick(u, index)
        second = kick(apply_matrix(turn, u + delta * first), index + 1)
        return apply_matrix(turn, u + delta / 2 * first) + delta / 2 * second

    return problem.states(step)


def plain_heun_step(problem, times, deltas):
    """For processes that are not given by Q and D."""

    def step(u, index):
        first = problem.reverse_drift(u, times[index], 0.5)
        second = problem.reverse_drift(u + deltas[index] * first, times[index + 1], 0.5)
        return u + deltas[index] / 2 * (first + second)

    return step


def rk45_states(problem, rtol, atol):
    """States at problem.times from SciPy's adaptive Runge-Kutta method of order 5(4)."""
    like = problem.state

    def slope(t, flat):
        u = torch.from_numpy(flat).reshape(like.shape).to(like)
        return -problem.reverse_drift(u, torch.tensor(t, dtype=torch.float64), 0.5).cpu().numpy().ravel()

    times = problem.times.numpy()
    start = like.cpu().numpy().ravel().astype("float64")
    result = scipy.integrate.solve_ivp(slope, (times[0], times[-1]), start, "RK45", times, rtol=rtol, atol=atol)
    if not result.success:
        raise RuntimeError(f"probability flow: {result.message}")
    for index, (t, flat) in enumerate(zip(times, result.y.T, strict=True)):
        yield State(index, float(t), torch.from_numpy(flat.copy()).reshape(like.shape).to(like))


@torch.no_grad()
def probability_flow(
    net, process, latents, labels=None, *,
    num_steps=None,                 # rk45: states reported, not steps taken; default 1
    times=None, grid="sigma", t_min=None, denoise=True,
    randn_like=torch.randn_like,    # not used: the flow is deterministic
    method="heun",                  # fixed steps, 2 evaluations each, or "rk45": adaptive
    rtol=1e-5, atol=1e-5,           # rk45 only
    **options,
):  # fmt: skip
    """Probability-flow ODE du = [A u beta - D beta score] dt, integrated back. Arguments as in `euler_maruyama`.

    heun: second order in the frame that turns with Q, so only -D beta (score + S^-1 u) is approximated; for EDM it is
    EDM's Heun.
    """
    if method == "rk45" and num_steps is None and times is None:
        num_steps = 1
    problem = Problem(net, process, latents, labels, num_steps, times, grid, t_min, denoise, randn_like, **options)
    return problem.finish(last_of(flow_states(problem, method, rtol, atol)), latents.dtype)


def inject_noise(states, alpha, randn_like=torch.randn_like):
    """The states of a solver, with x += alpha sigma_i eps before each of its steps i, eps standard normal.

    states: generator of `State`s whose `time` is the noise level, such as `heun_states`; the state it goes on from is
    changed in place. randn_like: source of eps, called once per step, also before the last one.
    """
    for state in states:
        if state.time > 0:  # the last state starts no step
            state.state.add_(alpha * state.time * randn_like(state.state))
        yield state


def noisy_heun(alpha):
    """`heun` with `inject_noise`, same signature; alpha 0 or None is `heun` itself.

    eps comes from the sampler's `randn_like`: with per-sample generators it depends on the sample's seed alone. Raises
    ValueError for a negative alpha.
    """
    if not alpha:
        return heun
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"inject_noise={alpha}: give a number >= 0 (--inject-noise)")

    @functools.wraps(heun)
    def sampler(net, noise, labels=None, gnet=None, *args, randn_like=torch.randn_like, **kwargs):
        states = heun_states(net, noise, labels, gnet, *args, randn_like=randn_like, **kwargs)
        return last_of(inject_noise(states, alpha, randn_like)).state

    return sampler
