"""Training on points, sampling them through any process and solver, and the pictures of both: the library of run_toy.py."""

import math

import numpy as np
import torch
from matplotlib.colors import PowerNorm

from metrics import figures
from simulations import toy_data
from simulations.studies.solvers import sliced_wasserstein
from torch_utils.persistence import load_snapshot
from torch_utils.random import hash_seed, seeded_generator
from training import likelihood, presets, samplers, setup
from training.choices import EMAS, OPTIMIZERS, SCHEDULES, given
from training.config import make_config
from training.dataset import ArrayDataset
from training.encoders import IdentityEncoder
from training.feed import Feed
from training.losses import EDM2Loss, Objective
from training.losses.joint import JointLoss
from training.losses.process import ProcessLoss
from training.networks_joint import JointPrecond
from training.networks_toy import MLPDenoiser
from training.phema import PowerFunctionEMA
from training.processes import is_linear
from training.processes.options import make_process
from training.processes.score import make_score
from training.schedules import learning_rate_schedule
from training.selection import IdentitySelector
from training.setup import Run
from training.training_loop import Periods

TOLERANCE = dict(probe="exact", rtol=1e-3, atol=1e-3)  # of likelihoods


def train(c, outdir):
    """Train an MLPDenoiser, or a network of the whole state, on points [N, 2, 1, 1] by the project's own loop.

    c: run_toy.Training. Returns the TrainingLoop. Snapshots, stats.jsonl and checkpoints lie in `outdir`. Raises ValueError
    for unknown names, and for options of networks that are not trained.
    """
    points = toy_data.get(c.dataset)(c.points, seeded_generator("cpu", c.seed, 3))
    data = ArrayDataset(points.reshape(-1, 2, 1, 1).numpy(), name=c.dataset)
    if c.preset is not None:
        return _as_published(c, data).start(outdir)
    sigma_data = float(points.std(dim=0).square().mean().sqrt())
    torch.manual_seed(hash_seed(c.seed, 0))
    steps, lr = c.steps or 2000, c.lr or 2e-3
    process = c.process or "edm"
    own = given(**{name: getattr(c, name) for name in ("prediction", "transition", "objective", "cov_eps")})
    laws = given(time_sampling=c.time_sampling, weighting=c.weighting, t_min=c.t_min)
    if c.arch == "residual" and own:
        raise ValueError(f"{', '.join(own)}: belongs to a network of the whole state, --arch=mlp or resnet")
    if process == "edm" and c.arch != "residual":
        raise ValueError(f"--arch={c.arch}: sees the whole state of a linear diffusion; give --process=cld or another")
    net = MLPDenoiser(hidden_dim=c.hidden_dim or 128, num_layers=4, sigma_data=sigma_data)
    if process == "edm":
        loss = EDM2Loss(P_mean=math.log(sigma_data) - 1.2, P_std=1.5, sigma_data=sigma_data, uncertainty=False)
    else:
        made = make_process(process, c.process_options, seed=c.seed, learn=True)
        if c.arch == "residual":
            loss = ProcessLoss(made, sigma_data, **laws)
        else:
            net, loss = _joint(c, made, sigma_data, laws)
    objective = Objective(net, loss)
    optimizer = torch.optim.Adam(objective.param_groups(), lr=lr, betas=(0.9, 0.99))
    rate = lambda nimg: learning_rate_schedule(nimg, c.batch, lr, steps / 4, 0)
    clip = None if c.arch == "residual" else 1.0
    options = dict(process=process, lr=lr)
    return _run(c, data, objective, optimizer, PowerFunctionEMA(objective, [0.05]), rate, clip, steps, options).start(
        outdir
    )


def _run(c, data, objective, optimizer, ema, rate, grad_clip, steps, options):
    total, period = steps * c.batch, math.lcm(c.batch, 1024)
    options |= dict(dataset=c.dataset, steps=steps, batch=c.batch, seed=c.seed)
    return Run(
        objective,
        Feed(data, seed=c.seed, block=c.batch),
        IdentityEncoder(),
        IdentitySelector(),
        optimizer,
        ema,
        rate,
        Periods(total, 0, c.batch * max(1, steps // 10), period * max(1, total // period), 0),
        batch_size=c.batch,
        seed=c.seed,
        grad_clip=grad_clip,
        header=dict(options=options, dataset=dict(path=c.dataset, label_dim=0)),
    )


CHANGED = (
    "process", "process_options", "prediction", "transition", "objective", "cov_eps", "time_sampling", "weighting", "t_min",
    "lr",
)  # fmt: skip


def _as_published(c, data):
    """The Run of a preset, with what is given in its place."""
    own = {name: getattr(c, name) for name in CHANGED} | {"batch_size": c.batch, "seed": c.seed}
    own["channels"] = c.hidden_dim
    own["process_options"] = own["process_options"] or None
    if own["process"] not in (None, presets.get(c.preset)["process"]):
        own["process_options"] = own["process_options"] or {}  # not those of another process
    own["arch"] = None if c.arch == "residual" else f"points-{c.arch}"
    config = make_config(c.preset, **own, **given(total_nimg=c.steps and c.steps * c.batch))
    net = setup.build_network(config, dict(img_resolution=1, img_channels=2, label_dim=0), torch.device("cpu"))
    objective = Objective(net, setup.build_loss(config, None))
    net.bind(objective.loss.process)
    optimizer = OPTIMIZERS[config.optimizer](config, objective.param_groups())
    schedule = SCHEDULES[config.lr_schedule]
    rate = lambda nimg: schedule(nimg, config.batch_size, config.lr, config.decay, config.rampup)
    options = {"preset": c.preset} | {name: getattr(config, name) for name in CHANGED}
    ema = EMAS[config.ema](config, objective)
    return _run(c, data, objective, optimizer, ema, rate, config.grad_clip, config.total_nimg // c.batch, options)


def _joint(c, process, sigma_data, laws):
    """(network, loss) of the whole state as CLD trains them (CLD §9.2)."""
    kernel = dict(hybrid=c.transition != "conditional", cov_eps=c.cov_eps or 0.0)
    model = dict(
        mlp=dict(model_type="JointMLP", time_code="t"), resnet=dict(model_type="JointResNet", time_code="log-t")
    )
    state = dict(variables=process.V, first=process.first_noised(), parameterization=c.prediction or "noise")
    sizes = given(hidden_dim=c.hidden_dim)
    net = JointPrecond(1, 2, 0, sigma_data, **state, **kernel, **model[c.arch], **sizes).bind(process)
    return net, JointLoss(process, c.objective or "noise", **kernel, **laws)


def open_points(net, o):
    """The snapshot of a network of points, and the process that it is sampled through. o: run_toy.Way."""
    snapshot = load_snapshot(net)
    if snapshot.net.img_channels != 2 or snapshot.net.img_resolution != 1:
        raise ValueError(f"--net={net}: not a network of points; train one with run_toy.py train")
    if o.process is None and not o.process_options and is_linear(snapshot.process):
        return snapshot, snapshot.process
    return snapshot, make_process(o.process or "cld", o.process_options, trained=snapshot.process)


@torch.no_grad()
def trajectories(net, process, o):
    """(points [num, 2], times [steps + 1], states [steps + 1, num, V, 2]) through a linear process, seeded.

    o: run_toy.Way. The points are the denoiser's output at the last time.
    """
    generator = seeded_generator("cpu", o.seed, 5)
    start = samplers.start_state(net, process, (o.num, 2, 1, 1), generator, prior=o.prior, grid=o.time_grid)
    randn_like = lambda u: torch.randn(u.shape, generator=generator, dtype=u.dtype)
    options = dict(num_steps=o.steps, grid=o.time_grid, randn_like=randn_like)
    run = list(samplers.SOLVERS[o.solver].states(net, process, start, **options))
    points = make_score(net, process).denoised(run[-1].state, torch.tensor(run[-1].time, dtype=torch.float64))
    states = torch.stack([s.state.flatten(2) for s in run])
    return points.flatten(1).float(), np.array([s.time for s in run]), states


def measures(net, process, dataset, points, seed):
    """{"sliced_w2", "sliced_w2_floor", "elbo", "elbo_error", "ode", "truth"}: sample quality and nats per point."""
    fresh = [toy_data.get(dataset)(len(points), seeded_generator("cpu", seed, k)) for k in (8, 9)]
    x, generator = fresh[0][:256].reshape(-1, 2, 1, 1), seeded_generator("cpu", seed, 10)
    with torch.no_grad():
        bound = likelihood.elbo(net, process, x, num_samples=16, generator=generator)
    result = {
        "sliced_w2": sliced_wasserstein(points, fresh[0]),
        "sliced_w2_floor": sliced_wasserstein(*fresh),
        "elbo": float(bound.mean()),
        "elbo_error": float(bound.std() / len(x) ** 0.5),
        "ode": float(likelihood.ode_log_likelihood(net, process, x, **TOLERANCE).mean()),
    }
    truth = toy_data.logp(dataset)
    return result | ({"truth": float(truth(x.flatten(1)).mean())} if truth else {})


def _mesh(reach, side):
    """Points [side^2, 2] of a square grid, rows of equal y."""
    return torch.cartesian_prod(*[torch.linspace(-reach, reach, side)] * 2).flip(1)


def plot(net, process, dataset, stem, o, side=40, sigma=0.15):
    """Six panels at `stem`.png: samples on data, trajectories of x and of v, score field, densities. Returns measures."""
    points, times, states = trajectories(net, process, o)
    found = measures(net, process, dataset, points, o.seed)
    data = toy_data.get(dataset)(o.num, seeded_generator("cpu", o.seed, 8))
    reach = float(data.abs().max()) * 1.15
    fig, axes = figures.figure(3, 3.1, 2.9, rows=2)

    axes[0, 0].scatter(*data.T, s=1, color=figures.NEUTRAL, alpha=0.5)
    axes[0, 0].scatter(*points.T, s=1, color=figures.LINE["single"], alpha=0.5)
    title = f"samples on data (grey)\nsliced $W_2$ {found['sliced_w2']:.3f}"  # a legend would hide points somewhere
    axes[0, 0].set(xlim=(-reach, reach), ylim=(-reach, reach), title=title)
    for axis, i, name in ((axes[0, 1], 0, "data variable $x_1$"), (axes[0, 2], 1, "auxiliary variable $v_1$")):
        if i < process.V:
            axis.plot(times, states[:, :24, i, 0], linewidth=0.6, color=figures.LINE["multi"], alpha=0.5)
            axis.set(xlabel="time $t$ (sampling runs to the left)", ylabel=name, title="24 trajectories")
        else:
            axis.set_axis_off()

    x = _mesh(reach, 21)
    with torch.no_grad():
        score = (net(x.reshape(-1, 2, 1, 1), torch.tensor(sigma)).flatten(1) - x) / sigma**2
    size = score.norm(dim=1, keepdim=True)
    axes[1, 0].quiver(*x.T, *(score / size * size.sqrt()).T, color=figures.LINE["multi"])
    axes[1, 0].set(title=rf"score at $\sigma$ = {sigma:g}")

    x = _mesh(reach, side)
    flow = likelihood.ode_log_likelihood(net, process, x.reshape(-1, 2, 1, 1), sigma_min=0.01, **TOLERANCE)
    images = {"model density": flow.reshape(side, side).exp()}
    if truth := toy_data.logp(dataset):
        images["true density"] = truth(x).reshape(side, side).exp()
    else:
        many = toy_data.get(dataset)(1 << 16, seeded_generator("cpu", o.seed, 11)).double()
        counts = torch.histogramdd(many, [side, side], range=[-reach, reach] * 2, density=True).hist
        images["histogram of data"] = counts.T
    extent = (-reach, reach, -reach, reach)
    for axis, (title, image) in zip(axes[1, 1:], images.items(), strict=True):
        shown = axis.imshow(image, origin="lower", extent=extent, cmap="viridis", norm=PowerNorm(0.5), aspect="equal")
        fig.colorbar(shown, ax=axis, label="density (scale by its root)")
        axis.set_title(title)
        axis.grid(False)
    for axis in (axes[0, 0], *axes[1]):
        axis.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    figures.save(fig, stem, dpi=110)
    return found
