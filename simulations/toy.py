"""Training on points, sampling them through any process and solver, and the pictures of both: the library of run_toy.py."""

import math

import numpy as np
import torch

from metrics import figures
from simulations import toy_data
from simulations.studies.solvers import sliced_wasserstein
from torch_utils.random import hash_seed, seeded_generator
from training import likelihood, samplers
from training.dataset import ArrayDataset
from training.encoders import IdentityEncoder
from training.feed import Feed
from training.losses import EDM2Loss, Objective
from training.losses.process import ProcessLoss
from training.networks_toy import MLPDenoiser
from training.phema import PowerFunctionEMA
from training.processes.options import make_process
from training.processes.score import make_score
from training.schedules import learning_rate_schedule
from training.selection import IdentitySelector
from training.setup import Run
from training.training_loop import Periods

STATES = {
    "em": samplers.euler_maruyama_states,
    "sscs": samplers.sscs_states,
    "flow": samplers.probability_flow_states,
}


def train(
    dataset,  # name in toy_data.TOY_DATA
    outdir,  # run folder
    process="edm",  # or a linear process: its noise levels and weight; a learned one is trained along
    process_options=None,
    steps=2000,  # of `batch` points each
    batch=512,
    num_points=1 << 15,  # points of the data set
    hidden_dim=128,
    lr=2e-3,
    seed=0,
    **law,  # of a linear process: time_sampling, weighting, t_min
):
    """Train an MLPDenoiser on points [N, 2, 1, 1] by the project's own loop; returns the TrainingLoop.

    Snapshots, stats.jsonl and checkpoints lie in `outdir`. Raises ValueError for unknown names.
    """
    points = toy_data.get(dataset)(num_points, seeded_generator("cpu", seed, 3))
    data = ArrayDataset(points.reshape(-1, 2, 1, 1).numpy(), name=dataset)
    sigma_data = float(points.std(dim=0).square().mean().sqrt())
    torch.manual_seed(hash_seed(seed, 0))
    net = MLPDenoiser(hidden_dim=hidden_dim, num_layers=4, sigma_data=sigma_data)
    if process == "edm":
        loss = EDM2Loss(P_mean=math.log(sigma_data) - 1.2, P_std=1.5, sigma_data=sigma_data, uncertainty=False)
    else:
        made = make_process(process, process_options, seed=seed, learn=True)
        loss = ProcessLoss(made, sigma_data, **law)
    objective = Objective(net, loss)
    optimizer = torch.optim.Adam(objective.param_groups(), lr=lr, betas=(0.9, 0.99))
    total, period = steps * batch, math.lcm(batch, 1024)
    options = dict(dataset=dataset, process=process, steps=steps, batch=batch, lr=lr, seed=seed)
    return Run(
        objective,
        Feed(data, seed=seed, block=batch),
        IdentityEncoder(),
        IdentitySelector(),
        optimizer,
        PowerFunctionEMA(objective, [0.05]),
        lambda nimg: learning_rate_schedule(nimg, batch, lr, steps / 4, 0),
        Periods(total, 0, batch * max(1, steps // 10), period * max(1, total // period), 0),
        batch_size=batch,
        seed=seed,
        header=dict(options=options, dataset=dict(path=dataset, label_dim=0)),
    ).start(outdir)


@torch.no_grad()
def trajectories(net, process, solver="sscs", num=2048, steps=100, grid="quadratic", prior="matched", seed=0, **ends):
    """(points [num, 2], times [steps + 1], states [steps + 1, num, V, 2]) through a linear process, seeded.

    The points are the denoiser's output at the last time. Raises ValueError for an unknown solver.
    """
    if solver not in STATES:
        raise ValueError(f"--solver={solver} is unknown here: choose {', '.join(STATES)}")
    generator = seeded_generator("cpu", seed, 5)
    ends = dict(grid=grid, **ends)
    start = samplers.start_state(net, process, (num, 2, 1, 1), generator, prior=prior, **ends)

    def randn_like(u):
        return torch.randn(u.shape, generator=generator, dtype=u.dtype)

    run = list(STATES[solver](net, process, start, num_steps=steps, randn_like=randn_like, **ends))
    points = make_score(net, process).denoised(run[-1].state, torch.tensor(run[-1].time, dtype=torch.float64))
    states = torch.stack([s.state.flatten(2) for s in run])
    return points.flatten(1).float(), np.array([s.time for s in run]), states


def measures(net, process, dataset, points, seed=0, num=256):
    """{"sliced_w2", "sliced_w2_floor", "elbo", "elbo_error", "ode", "truth"}: sample quality and nats per point."""
    fresh = [toy_data.get(dataset)(len(points), seeded_generator("cpu", seed, k)) for k in (8, 9)]
    result = {"sliced_w2": sliced_wasserstein(points, fresh[0]), "sliced_w2_floor": sliced_wasserstein(*fresh)}
    x, generator = fresh[0][:num].reshape(-1, 2, 1, 1), seeded_generator("cpu", seed, 10)
    with torch.no_grad():
        bound = likelihood.elbo(net, process, x, num_samples=16, generator=generator)
    flow = likelihood.ode_log_likelihood(net, process, x, probe="exact", rtol=1e-3, atol=1e-3)
    result.update(elbo=float(bound.mean()), elbo_error=float(bound.std() / len(x) ** 0.5), ode=float(flow.mean()))
    truth = toy_data.logp(dataset)
    return result | ({"truth": float(truth(x.flatten(1)).mean())} if truth else {})


def plot(net, process, dataset, stem, solver="sscs", num=2048, steps=100, side=40, seed=0, **options):
    """Six panels at `stem`.png: samples on data, trajectories of x and of v, score field, densities. Returns measures."""
    points, times, states = trajectories(net, process, solver, num, steps, seed=seed, **options)
    found = measures(net, process, dataset, points, seed)
    data = toy_data.get(dataset)(num, seeded_generator("cpu", seed, 8))
    reach = float(data.abs().max()) * 1.15
    fig, axes = figures.figure(3, 3.1, 2.9, rows=2)
    _scatter(axes[0, 0], data, points, reach, found)
    _paths(axes[0, 1], times, states[:, :24, 0], "data variable $x_1$")
    if process.V > 1:
        _paths(axes[0, 2], times, states[:, :24, 1], "auxiliary variable $v_1$")
    else:
        axes[0, 2].set_axis_off()
    grid = torch.linspace(-reach, reach, side)
    cells = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), dim=-1).reshape(-1, 2)
    _score_field(axes[1, 0], net, reach)
    flow = likelihood.ode_log_likelihood(
        net, process, cells.reshape(-1, 2, 1, 1), probe="exact", rtol=1e-3, atol=1e-3, sigma_min=0.01
    )
    truth = toy_data.logp(dataset)
    for axis, values, title in (
        (axes[1, 1], flow, "model density (probability flow)"),
        (axes[1, 2], truth(cells) if truth else None, "true density" if truth else "histogram of data"),
    ):
        if values is None:
            many = toy_data.get(dataset)(1 << 16, seeded_generator("cpu", seed, 11))
            image = torch.histogramdd(many.double(), [side, side], range=[-reach, reach] * 2).hist.T
        else:
            image = values.reshape(side, side).exp()
        axis.imshow(image.sqrt(), origin="lower", extent=(-reach, reach, -reach, reach), cmap="viridis", aspect="equal")
        axis.set_title(title)
        axis.grid(False)
    figures.save(fig, stem, dpi=110)
    return found


def _scatter(axis, data, points, reach, found):
    axis.scatter(*data.T, s=1, color=figures.NEUTRAL, alpha=0.5)
    axis.scatter(*points.T, s=1, color=figures.LINE["single"], alpha=0.5)
    title = f"samples over data (grey), sliced $W_2$ {found['sliced_w2']:.3f}"  # a legend would hide points somewhere
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach), title=title, aspect="equal")


def _paths(axis, times, states, title):
    axis.plot(times, states[:, :, 0], linewidth=0.6)
    axis.set(xlabel="time $t$ (sampling runs to the left)", title=title)


def _score_field(axis, net, reach, sigma=0.15):
    grid = torch.linspace(-reach, reach, 21)
    x = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), dim=-1).reshape(-1, 2)
    with torch.no_grad():
        score = (net(x.reshape(-1, 2, 1, 1), torch.tensor(sigma)).flatten(1) - x) / sigma**2
    arrows = score / score.norm(dim=1, keepdim=True) * score.norm(dim=1, keepdim=True).sqrt()
    axis.quiver(*x.T, *arrows.T, color=figures.LINE["multi"])
    axis.set(title=rf"score at $\sigma$ = {sigma:g}", aspect="equal")
