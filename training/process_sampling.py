"""Any network through any process and solver: what `generate_images.py --process --solver` chooses between."""

import math
import warnings

import torch

from training import processes, samplers
from training.processes.options import make_process, require_gaussian


@torch.no_grad()
def heun_in_sigma(
    net, process, latents, labels=None, *, num_steps=32, times=None, grid="sigma", t_min=None, denoise=True,
    randn_like=torch.randn_like, t_max=None, sigma_min=None, sigma_max=None, rho=7.0, **churn,
):  # fmt: skip
    """EDM's Heun sampler as a solver of any process, which enters by its range of noise levels and its prior only.

    latents: state [N, V, *data_shape] at the start; y = m' C^-1 u / snr is all that it says about the image, and Heun in
    sigma is the probability flow of y. Evaluates the network 2 num_steps - 1 times. denoise has no effect: the last step
    goes to noise level 0. churn: S_churn, S_min, S_max, S_noise. Raises ValueError for grids other than sigma.
    """
    if grid != "sigma" or times is not None:
        raise ValueError("heun steps in noise levels: its grid is sigma; take em, sscs or flow for a grid in time")
    t_max, t_min = samplers.endpoints(net, process, t_min=t_min, t_max=t_max, sigma_min=sigma_min, sigma_max=sigma_max)
    y, sigma = process.project(latents, t_max)
    low, high = float(process.sigma(t_min)), float(sigma)
    return samplers.heun(
        net, (y / high).float(), labels, num_steps=num_steps, sigma_min=low, sigma_max=high, rho=rho,
        randn_like=randn_like, **churn,
    )  # fmt: skip


def adaptive_flow(net, process, latents, labels=None, *, num_steps=None, times=None, **options):
    """Probability-flow ODE by SciPy's RK45; num_steps has no effect, rtol and atol decide."""
    return samplers.probability_flow(net, process, latents, labels, times=times, method="rk45", **options)


SOLVERS = {
    "heun": heun_in_sigma,
    "em": samplers.euler_maruyama,
    "sscs": samplers.sscs,
    "ode": adaptive_flow,
    "flow": samplers.probability_flow,
}

# Options that belong to some solvers only: {name: (default, solvers)}.
_OWN = {
    "half_step": ("exact", ("sscs",)),
    "rtol": (1e-5, ("ode",)),
    "atol": (1e-5, ("ode",)),
    "S_churn": (0, ("heun",)),
    "S_min": (0, ("heun",)),
    "S_max": (math.inf, ("heun",)),
    "S_noise": (1, ("heun",)),
}
DENOISE = {"yes": True, "no": False, "mean": "mean", "euler": "euler"}


def choose(
    process=None, process_options=None, solver=None, time_grid="sigma", prior="matched", t_min=None, denoise="yes",
    trained=None, sigma_max=80.0, **options,
):  # fmt: skip
    """(process or None, keywords for generate_images) from the options of a command line.

    None is EDM's own sampler, as in EDM2: no process, solver or option of theirs was asked for. trained: noise of the
    network's snapshot. options: num_steps, sigma_min, sigma_max, rho, churn, half_step, rtol, atol. Raises ValueError
    for unknown names and for what cannot be combined; warns of options without effect.
    """
    if solver is not None and solver not in SOLVERS:
        raise ValueError(f"--solver={solver} is unknown: choose {', '.join(SOLVERS)}")
    solver = solver or "heun"
    plain = process in (None, "edm") and solver == "heun" and not process_options
    given = {name: value for name, value in options.items() if value is not None}
    for name, (default, owners) in _OWN.items():
        if solver not in owners and given.pop(name, default) != default:
            warnings.warn(f"--{name.replace('_', '-')} has no effect with --solver={solver}", stacklevel=2)
    if plain:
        if t_min is not None or time_grid != "sigma" or denoise != "yes":
            raise ValueError("--t-min, --time-grid and --denoise need --process or --solver (em, sscs, ode or flow)")
        return None, {**given, "sigma_max": sigma_max}
    if process in (None, "edm") and not process_options:
        made = processes.EDM(sigma_max=sigma_max)
    else:
        made = make_process(process or "edm", process_options, trained=trained)
    require_gaussian(trained, made)
    if t_min is not None:
        given.pop("sigma_min", None)
    chosen = dict(sampler=SOLVERS[solver], prior=prior, grid=time_grid, t_min=t_min, denoise=DENOISE[denoise])
    return made, {**given, **chosen, "sigma_max": sigma_max}
