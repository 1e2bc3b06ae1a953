"""How to get back: solvers. Each exists as a plain function that returns images and as a generator of its states."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from torch_utils.devices import send
from training.ablation import ablation_states, roots
from training.guidance import for_sampling, guided
from training.processes import Process
from training.processes.score import make_score, require_linear
from training.processes.states import apply_matrix
from training.states import State, last_of
from training.time_grids import ENDPOINT_OPTIONS, Level, endpoints, start_state, time_grid  # noqa: F401

Draw = Callable[[Tensor], Tensor]  # standard normal noise in the shape of what it gets
Labels = Tensor | None  # [N, K]


@torch.no_grad()
def heun_states(
    net: Callable,  # denoiser net(x, sigma, labels)
    noise: Tensor,  # unit noise [N, *data_shape], scaled by sigma_max inside
    labels: Labels = None,  # [N, K]
    gnet: Callable | None = None,  # guiding denoiser; needed if guidance != 1
    num_steps: int = 32,  # N; evaluates the network 2 N - 1 times
    sigma_min: float = 0.002,  # lowest noise level but zero
    sigma_max: float = 80,  # highest noise level
    rho: float = 7,  # exponent of the grid
    guidance: float = 1,  # D_g = G + guidance (D - G)
    S_churn: float = 0,  # amount of stochasticity; 0 draws nothing
    S_min: float = 0,  # churn only at noise levels in [S_min, S_max]
    S_max: float = float("inf"),
    S_noise: float = 1,  # scale of the added noise
    dtype: torch.dtype = torch.float32,  # of state and grid
    randn_like: Draw = torch.randn_like,  # source of the churn noise
) -> Iterator[State]:
    """Generator of `State`s of `heun`: the noise, then the image after every step; `time` is the noise level."""
    if num_steps < 1 or num_steps != int(num_steps):
        raise ValueError(f"num_steps = {num_steps}: at least one step is needed, and whole ones")
    if not 0 < sigma_min <= sigma_max:
        raise ValueError(f"sigma_min = {sigma_min}, sigma_max = {sigma_max}: need 0 < sigma_min <= sigma_max")
    net = guided(net, gnet, guidance)
    rounded = getattr(net, "round_sigma", lambda sigma: sigma)  # to levels that the network was trained for

    def grid(device):  # EDM eq. 5. One step has sigma_max as its only noise level: the image is D(x, sigma_max).
        index = torch.arange(num_steps, dtype=dtype, device=device)
        low, high = roots(rho, sigma_min, sigma_max)
        sigmas = rounded((high + index / max(num_steps - 1, 1) * (low - high)) ** rho)
        return torch.cat([sigmas, torch.zeros_like(sigmas[:1])])

    sigmas = grid(noise.device)
    # What the host asks for is computed there: only levels that the network rounds are waited for.
    levels = (sigmas if hasattr(net, "round_sigma") else grid("cpu")).tolist()
    x_next = noise.to(dtype) * sigmas[0]
    yield State(0, levels[0], x_next)
    for step, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        x = x_next
        if S_churn > 0 and S_min <= levels[step] <= S_max:
            gamma = min(S_churn / num_steps, 2**0.5 - 1)
            sigma_hat = rounded(sigma + gamma * sigma)
            x = x + (sigma_hat**2 - sigma**2).sqrt() * S_noise * randn_like(x)
            sigma = sigma_hat
        slope = (x - net(x, sigma, labels).to(dtype)) / sigma
        x_next = x + (sigma_next - sigma) * slope
        if step < num_steps - 1:  # second order, except for the step to zero
            slope_next = (x_next - net(x_next, sigma_next, labels).to(dtype)) / sigma_next
            x_next = x + (sigma_next - sigma) * (0.5 * slope + 0.5 * slope_next)
        yield State(step + 1, levels[step + 1], x_next)


@functools.wraps(heun_states, assigned=())
def heun(*args: Any, **kwargs: Any) -> Tensor:
    """EDM's second-order Heun sampler (Karras et al. 2022, Algorithm 2) with guidance and churn, as in EDM2.

    Arguments as in `heun_states`. Returns images [N, *data_shape] of type `dtype`. Raises ValueError for less than
    one step, or guidance without a guiding network.
    """
    return last_of(heun_states(*args, **kwargs)).state


def noisy_heun(alpha: float | None) -> Callable:
    """`heun` with x += alpha sigma_i eps before each of its steps i (PFGM++, sec. 5.3); alpha 0 or None is `heun` itself.

    eps comes from the sampler's `randn_like`, once per step, also before the last one: with per-sample generators it
    depends on the sample's seed alone. Raises ValueError for a negative alpha.
    """
    if not alpha:
        return heun
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"inject_noise={alpha}: give a number >= 0 (--inject-noise)")

    @functools.wraps(heun)
    def sampler(*args, randn_like=torch.randn_like, **kwargs):
        for state in heun_states(*args, randn_like=randn_like, **kwargs):
            if state.time > 0:  # the last state starts no step; the others are gone on from
                state.state.add_(alpha * state.time * randn_like(state.state))
        return state.state

    sampler.alpha = alpha  # for those who note how images were made
    return sampler


# Solvers of linear processes (and of EDM as one of them). States are u [N, V, *data_shape], matrices float64.


@dataclass
class Plan:
    """How a solver goes back: what does not depend on the batch, found once. `plan(latents, labels)` gives images.

    denoise=True returns the denoiser's output at the last time, False the data variable of the last state. "mean" leaves
    out the noise of the last step of Euler-Maruyama (MDM). "euler" takes num_steps - 1 steps and then one noise-free step
    of the reverse SDE from t_min to 0 (CLD's published denoising, which costs a last draw). Raises ValueError for
    impossible grids.
    """

    net: Any  # denoiser, or anything with .score(u, t)
    process: Process  # EDM or a linear process
    _: KW_ONLY
    num_steps: int | None = None  # steps, one network evaluation each, and one for denoise=True
    times: Tensor | Sequence[float] | None = None  # explicit grid instead: decreasing forward times [num_steps + 1]
    grid: str = "sigma"  # or "uniform", "quadratic", see time_grid
    t_min: Level = None  # last time; default t(sigma_min)
    denoise: bool | str = True
    randn_like: Draw = torch.randn_like  # called with the state
    t_max: Level = None  # first time; default t(sigma_max)
    sigma_min: Level = None
    sigma_max: Level = None
    rho: float = 7.0
    dtype: torch.dtype | None = None  # of the state; None: the latents'
    net_dtype: torch.dtype = torch.float32

    @torch.no_grad()
    def __post_init__(self) -> None:
        require_linear(self.process)
        self.net = for_sampling(self.net)
        if self.denoise not in (True, False, "mean", "euler"):
            raise ValueError(f"denoise {self.denoise!r}: choose True, False, mean or euler")
        if self.times is None:
            count = self.num_steps - 1 if self.denoise == "euler" and self.num_steps is not None else self.num_steps
            self.times = time_grid(self.net, self.process, count, rho=self.rho, **self.ends())
        self.times = torch.as_tensor(self.times, dtype=torch.float64).cpu()
        self.deltas = -self.times.diff()
        steps = len(self.deltas)
        if self.times.ndim != 1 or steps < 1 or not (self.deltas > 0).all() or not self.times[-1] > 0:
            raise ValueError("times: give at least two forward times, decreasing, the last one > 0")
        if self.num_steps is not None and steps != self.num_steps - (self.denoise == "euler"):
            raise ValueError(f"times has {len(self.times)} entries: {steps} steps, but num_steps = {self.num_steps}")
        if hasattr(self.process, "prepare"):
            self.process.prepare(self.times)
        self.setup()

    def ends(self) -> dict[str, Any]:
        """The options of `endpoints`."""
        return {name: getattr(self, name) for name in ENDPOINT_OPTIONS}

    matrices = ()  # names of what `setup` makes

    def setup(self) -> None:
        """Matrices of all steps."""

    def step(self, u: Tensor, index: int) -> Tensor:
        """The state at times[index + 1] from the one at times[index], by self.score(u, t) and self.noise(u)."""
        raise NotImplementedError

    @torch.no_grad()
    def states(self, latents: Tensor, labels: Labels = None, randn_like: Draw | None = None) -> Iterator[State]:
        """Generator of the states of one batch; the next begins when it has ended."""
        self.score = make_score(self.net, self.process, labels, self.net_dtype)
        self.randn_like = randn_like or self.randn_like
        for name in self.matrices:  # sent once, not at every step
            value = getattr(self, name)
            several = isinstance(value, tuple)
            setattr(
                self, name, tuple(send(v, latents.device) for v in value) if several else send(value, latents.device)
            )
        yield from self.way(latents.to(self.dtype or latents.dtype))

    def way(self, u: Tensor) -> Iterator[State]:
        """The states from u on."""
        yield State(0, float(self.times[0]), u)
        for index in range(len(self.deltas)):
            u = self.step(u, index)
            yield State(index + 1, float(self.times[index + 1]), u)

    @torch.no_grad()
    def __call__(self, latents: Tensor, labels: Labels = None, randn_like: Draw | None = None) -> Tensor:
        """Images [N, *data_shape] in latents' type."""
        u, t = last_of(self.states(latents, labels, randn_like)).state, self.times[-1]
        if self.denoise is True:
            return self.score.denoised(u, t).to(latents.dtype)
        if self.denoise == "euler":
            u = u + self.reverse_drift(u, t) * t.to(u.dtype)
            self.noise(u)  # the original draws here, to no effect
        return u[:, 0].to(latents.dtype)

    def noise(self, u: Tensor) -> Tensor:
        """Standard normal noise like u."""
        return self.randn_like(u).to(u)

    def reverse_drift(self, u: Tensor, t: Tensor, strength: float = 1.0, power: Tensor | None = None) -> Tensor:
        """Drift of the reverse SDE (strength 1) or of the probability-flow ODE (1/2), per unit of falling time.

        power: G G' at t, where it is known.
        """
        power = noise_powers(self.process, t[None])[0] if power is None else power
        return apply_matrix(strength * power, self.score(u, t)) - self.process.drift(u, t)


class Solver:
    """A solver of the contract, made of a Plan: `solver(net, process, latents, labels, num_steps=...) -> images`.

    latents: [N, V, *data_shape], see start_state; options: the fields of the plan. For many batches of the same options:
    `plan = solver.plan(net, process, **options)`, then `plan(latents, labels)`.
    """

    def __init__(self, kind: type[Plan], **fixed: Any) -> None:
        self.kind, self.fixed, self.__doc__ = kind, fixed, kind.__doc__

    def plan(self, net: Any, process: Process, **options: Any) -> Plan:
        return self.kind(net, process, **options | self.fixed)

    def states(
        self, net: Any, process: Process, latents: Tensor, labels: Labels = None, **options: Any
    ) -> Iterator[State]:
        return self.plan(net, process, **options).states(latents, labels)

    def __call__(self, net: Any, process: Process, latents: Tensor, labels: Labels = None, **options: Any) -> Tensor:
        return self.plan(net, process, **options)(latents, labels)


def noise_powers(process: Process, times: Tensor) -> Tensor:
    """G G' [K, V, V] at each of the times [K]."""
    return torch.stack([G @ G.mT for G in process.diffusion(times)])


class EulerMaruyama(Plan):
    """Reverse SDE by Euler-Maruyama steps (CLD §7.3, MDM's sampler); draws once per step."""

    matrices = "G", "powers"

    def setup(self) -> None:
        self.G = self.process.diffusion(self.times[:-1]) * self.deltas.sqrt()[:, None, None]
        self.powers = noise_powers(self.process, self.times[:-1])

    def step(self, u: Tensor, index: int) -> Tensor:
        u_next = u + self.reverse_drift(u, self.times[index], power=self.powers[index]) * self.deltas[index]
        noise = self.noise(u)
        if self.denoise == "mean" and index == len(self.deltas) - 1:
            return u_next
        return u_next + apply_matrix(self.G[index], noise)


@dataclass
class SSCS(Plan):
    """Symmetric splitting sampler (CLD §4) for any number of variables; draws twice per step.

    A step is A(delta/2) S(delta) A(delta/2): A is the exact Ornstein-Uhlenbeck flow with generator -(D - Q) S^-1, S
    the kick u += 2 D beta delta (score + S^-1 u), with the score at the time where the step starts. half_step="exact"
    integrates beta over each of the three; "published" uses the first half's integral twice and the starting beta in S,
    which is the same for constant beta and worse than Euler-Maruyama for many steps of a steep one.
    """

    half_step: str = "exact"
    matrices = "first", "second", "power", "precision"

    def setup(self) -> None:
        if self.half_step not in ("exact", "published"):
            raise ValueError(f"half_step {self.half_step!r}: choose exact or published")
        process, t, t_next = self.process, self.times[:-1], self.times[1:]
        middle, self.precision = (t + t_next) / 2, process.precision()
        self.first = self.second = process.splitting(t, middle)
        if self.half_step == "exact":
            self.second, self.power = process.splitting(middle, t_next), process.noise_power(t, t_next)
        else:
            self.power = noise_powers(process, t) * self.deltas[:, None, None]

    def step(self, u: Tensor, index: int) -> Tensor:
        def half(u, flow):
            return apply_matrix(flow[0][index], u) + apply_matrix(flow[1][index], self.noise(u))

        u = half(u, self.first)
        kick = self.score(u, self.times[index]) + apply_matrix(self.precision, u)
        return half(u + apply_matrix(self.power[index], kick), self.second)


@dataclass
class Flow(Plan):
    """Probability-flow ODE du = [A u beta - D beta score] dt, integrated back; it draws nothing.

    method="heun": fixed steps of second order, 2 evaluations each, in the frame that turns with Q, so only
    -D beta (score + S^-1 u) is approximated; for EDM it is EDM's Heun. "rk45": SciPy's adaptive Runge-Kutta method of
    order 5(4), where num_steps are the states reported, not the steps taken; default 1.
    """

    method: str = "heun"
    rtol: float = 1e-5  # rk45 only
    atol: float = 1e-5

    def __post_init__(self) -> None:
        if self.method not in ("heun", "rk45"):
            raise ValueError(f"method {self.method!r}: choose heun or rk45")
        if self.method == "rk45":
            self.dtype = self.dtype or torch.float64  # its control of errors needs the digits
            if self.num_steps is None and self.times is None:
                self.num_steps = 1 + (self.denoise == "euler")  # which takes the last one
        super().__post_init__()

    def setup(self) -> None:
        process, times = self.process, self.times
        self.turns = process.rotation(times[:-1], times[1:]) if hasattr(process, "rotation") else None
        if self.turns is not None:
            self.precision, self.power = process.precision(), noise_powers(process, times) / 2
            self.matrices = "turns", "precision", "power"

    def step(self, u: Tensor, index: int) -> Tensor:
        delta, times = self.deltas[index], self.times
        if self.turns is None:
            first = self.reverse_drift(u, times[index], 0.5)
            second = self.reverse_drift(u + delta * first, times[index + 1], 0.5)
            return u + delta / 2 * (first + second)

        def kick(u, index):
            return apply_matrix(self.power[index], self.score(u, times[index]) + apply_matrix(self.precision, u))

        # In the frame that turns with Q only D's part is left, which vanishes where the state has its stationary law.
        turn, first = self.turns[index], kick(u, index)
        second = kick(apply_matrix(turn, u + delta * first), index + 1)
        return apply_matrix(turn, u + delta / 2 * first) + delta / 2 * second

    def way(self, u: Tensor) -> Iterator[State]:
        if self.method == "heun":
            yield from super().way(u)
            return

        def state(flat):
            return torch.from_numpy(flat).reshape(u.shape).to(u)

        def slope(t, flat):
            return -self.reverse_drift(state(flat), torch.tensor(t, dtype=torch.float64), 0.5).cpu().numpy().ravel()

        import scipy.integrate  # takes as long to load as a short run

        times, start = self.times.numpy(), u.cpu().numpy().ravel().astype("float64")
        span = times[0], times[-1]
        result = scipy.integrate.solve_ivp(slope, span, start, "RK45", times, rtol=self.rtol, atol=self.atol)
        if not result.success:
            raise RuntimeError(f"probability flow: {result.message}")
        for index, (t, flat) in enumerate(zip(times, result.y.T, strict=True)):
            yield State(index, float(t), state(flat.copy()))


@dataclass
class HeunInSigma(Plan):
    """EDM's Heun sampler as a solver of any process, which enters by its range of noise levels and its prior only.

    y = m' C^-1 u / snr is all that the state says about the image, and Heun in sigma is the probability flow of y.
    Evaluates the network 2 num_steps - 1 times. denoise has no effect: the last step goes to noise level 0. Raises
    ValueError for grids other than sigma.
    """

    num_steps: int = 32
    dtype: torch.dtype = torch.float32
    S_churn: float = 0
    S_min: float = 0
    S_max: float = math.inf
    S_noise: float = 1

    own = "num_steps", "sigma_min", "sigma_max", "rho", "S_churn", "S_min", "S_max", "S_noise", "dtype"
    way_back = staticmethod(heun_states)  # whose options are `own`

    @torch.no_grad()
    def __post_init__(self) -> None:
        if self.grid != "sigma" or self.times is not None:
            raise ValueError("heun steps in noise levels: its grid is sigma; take em, sscs or flow for a grid in time")
        self.times = endpoints(self.net, self.process, **self.ends())
        self.sigma_max, self.sigma_min = (float(self.process.sigma(t)) for t in self.times)

    @torch.no_grad()
    def states(self, latents: Tensor, labels: Labels = None, randn_like: Draw | None = None) -> Iterator[State]:
        y = (self.process.project(latents, self.times[0])[0] / self.sigma_max).float()
        options = {name: getattr(self, name) for name in self.own}
        return type(self).way_back(self.net, y, labels, randn_like=randn_like or self.randn_like, **options)

    def __call__(self, latents: Tensor, labels: Labels = None, randn_like: Draw | None = None) -> Tensor:
        return last_of(self.states(latents, labels, randn_like)).state


@dataclass
class AblationInSigma(HeunInSigma):
    """EDM's sampler of ablations (training/ablation.py) as a solver of any process, as HeunInSigma."""

    num_steps: int = 18
    dtype: torch.dtype = torch.float64
    method: str = "heun"
    disc: str = "edm"
    schedule: str = "linear"
    scaling: str = "none"
    alpha: float = 1.0

    own = (*HeunInSigma.own, "method", "disc", "schedule", "scaling", "alpha")
    way_back = staticmethod(ablation_states)


euler_maruyama, sscs, probability_flow = Solver(EulerMaruyama), Solver(SSCS), Solver(Flow)
euler_maruyama_states, sscs_states = euler_maruyama.states, sscs.states
probability_flow_states = probability_flow.states

# A new solver is one more entry: a function of the contract, or the Solver of a Plan with its `step`.
SOLVERS: dict[str, Callable] = {
    "heun": Solver(HeunInSigma),
    "em": euler_maruyama,
    "sscs": sscs,
    "ode": Solver(Flow, method="rk45", num_steps=None),
    "flow": probability_flow,
    "ablation": Solver(AblationInSigma),
}
