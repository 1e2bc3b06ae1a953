"""One denoiser through many processes and solvers: error against the number of network evaluations (NFE)."""

import math
import time

import torch

from simulations import toy_data
from torch_utils.random import hash_seed, seeded_generator
from training import samplers
from training.process_options import make_process
from training.process_sampling import SOLVERS

# name: (process, options, solver). All start from the matched prior and run between the same noise levels.
ARMS = {
    "EDM Heun": ("edm", {}, "heun"),
    "VP EM": ("vp", {}, "em"),
    "CLD EM": ("cld", dict(M=0.25, beta=[4, 4]), "em"),
    "CLD SSCS": ("cld", dict(M=0.25, beta=[4, 4]), "sscs"),
    "CLD flow": ("cld", dict(M=0.25, beta=[4, 4]), "flow"),
    "MALDA EM": ("malda", dict(V=3), "em"),
    "learned EM": ("learned", dict(V=2), "em"),
}
GRIDS = ("sigma", "uniform", "quadratic")
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0


def steps_for(solver, nfe):
    """Steps that spend at most `nfe` evaluations, the closing denoising included."""
    return {"heun": (nfe + 1) // 2, "flow": (nfe - 1) // 2}.get(solver, nfe - 1)


def cells(nfes, grids=GRIDS, arms=ARMS):
    """All (arm, grid, nfe): Heun in sigma has one grid only."""
    return [(a, g, n) for a in arms for g in (("sigma",) if arms[a][2] == "heun" else grids) for n in nfes]


@torch.no_grad()
def sample(net, arm, grid, nfe, shape, seed, labels=None, dtype=torch.float32):
    """Samples [N, *data_shape] of an arm with all draws from one seed; the learned matrices are always the same ones."""
    name, options, solver = ARMS[arm]
    process = make_process(name, options, learn=True)
    if hasattr(process, "requires_grad_"):
        process.requires_grad_(False)
    generator = seeded_generator("cpu", seed, 5)
    ends = dict(grid=grid, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX)
    start = samplers.start_state(net, process, shape, generator, prior="matched", **ends)

    def randn_like(u):
        return torch.randn(u.shape, generator=generator, dtype=u.dtype)

    steps = max(1, steps_for(solver, nfe))
    return SOLVERS[solver](net, process, start, labels, num_steps=steps, randn_like=randn_like, **ends).to(dtype)


def sliced_wasserstein(x, y, num=64, seed=0):
    """Sliced 2-Wasserstein distance of two equally many points [N, 2], over `num` directions."""
    angle = torch.arange(num, dtype=torch.float64) * math.pi / num
    directions = torch.stack([angle.cos(), angle.sin()])  # [2, num]
    a, b = ((p.double().flatten(1) @ directions).sort(dim=0).values for p in (x, y))
    return float((a - b).square().mean().sqrt())


class Affine:
    """The best denoiser of N(mean, std^2)."""

    label_dim, sigma_min, sigma_max = 0, 0.0, math.inf

    def __init__(self, mean=0.3, std=0.5):
        self.mean, self.sigma_data = mean, std

    def __call__(self, y, sigma, class_labels=None):
        sigma = torch.as_tensor(sigma).reshape(-1, *[1] * (y.ndim - 1)).to(y)
        return self.mean + (y - self.mean) / (1 + sigma**2 / self.sigma_data**2)


def exact_error(arm, grid, nfe, mean=0.3, std=0.5):
    """2-Wasserstein distance between N(mean, std^2) and the exact law that an arm samples for it: no Monte Carlo.

    Every solver is affine in its normal draws for a Gaussian, so one run with unit vectors for draws gives the law.
    """
    name, options, solver = ARMS[arm]
    process, net, steps = make_process(name, options, learn=True), Affine(mean, std), max(1, steps_for(solver, nfe))
    ends = dict(grid=grid, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX)
    calls = steps * {"em": 1, "sscs": 2}.get(solver, 0)
    units = torch.eye(1 + process.V * (1 + calls), dtype=torch.float64)[:, 1:]  # row 0: the mean
    draws = iter(units.reshape(len(units), 1 + calls, process.V, 1).unbind(1))
    t_max = samplers.endpoints(net, process, **ends)[0]
    root = torch.linalg.cholesky(process.prior_covariance("matched", t_max, std).detach())
    out = SOLVERS[solver](
        net, process, root @ next(draws), num_steps=steps, randn_like=lambda u: next(draws).to(u), net_dtype=torch.float64,
        **ends,
    ) if solver != "heun" else SOLVERS[solver](
        net, process, root @ next(draws), num_steps=steps, dtype=torch.float64, **ends
    )  # fmt: skip
    out = out.double().flatten()
    return math.hypot(float(out[0]) - mean, float((out[1:] - out[0]).norm()) - std)


def exact_rows(nfes, grids=GRIDS, progress=iter):
    """Rows {arm, grid, nfe, error} of `exact_error`."""
    return [
        dict(arm=arm, grid=grid, nfe=nfe, seed=0, error=exact_error(arm, grid, nfe))
        for arm, grid, nfe in progress(cells(nfes, grids))
    ]


def mixture_rows(nfes, seeds, num=2048, grids=GRIDS, progress=iter):
    """Rows {arm, grid, nfe, seed, error, seconds}: sliced W2 to fresh exact samples; arm "data" is the floor."""
    truth = toy_data.mixture()
    net = truth.denoiser(0.5)
    exact = [truth.sample((num,), generator=seeded_generator("cpu", hash_seed(s, 6))) for s in [*seeds, 10**6]]
    rows = [
        dict(arm="data", grid="", nfe=0, seed=s, error=sliced_wasserstein(exact[i], exact[i + 1]))
        for i, s in enumerate(seeds)
    ]
    for arm, grid, nfe in progress(cells(nfes, grids)):
        for index, seed in enumerate(seeds):
            begin = time.time()
            x = sample(net, arm, grid, nfe, (num, 2, 1, 1), seed)
            error = sliced_wasserstein(x, exact[index])
            rows.append(dict(arm=arm, grid=grid, nfe=nfe, seed=seed, error=error, seconds=time.time() - begin))
    return rows


def digit_rows(snapshot, features, heldout, chosen, seeds, per_source=50):
    """Generator of rows {arm, grid, nfe, seed, source, error}: Frechet distance per source in `features`.

    snapshot: torch_utils.persistence.Snapshot; features: callable uint8 images -> [N, F]; heldout: {source: uint8 images};
    chosen: cells.
    """
    from metrics.distances import frechet_distance

    def moments(images):
        seen = torch.as_tensor(features(images)).double()
        return seen.mean(0).numpy(), seen.T.cov().numpy()

    reference = {source: moments(images) for source, images in heldout.items()}
    sources = sorted(heldout)
    ids = torch.tensor(sources).repeat_interleave(per_source)
    labels = torch.eye(snapshot.net.label_dim)[ids]
    for arm, grid, nfe in chosen:
        for seed in seeds:
            shape = (len(ids), snapshot.net.img_channels, *[snapshot.net.img_resolution] * 2)
            images = snapshot.encoder.decode(sample(snapshot.net, arm, grid, nfe, shape, seed, labels))
            for source in sources:
                error = frechet_distance(*moments(images[ids == source]), *reference[source])
                yield dict(arm=arm, grid=grid, nfe=nfe, seed=seed, source=source, error=float(error))


def summarise(rows):
    """{(arm, grid, nfe, source or None): (mean, standard error over seeds)}."""
    groups = {}
    for row in rows:
        groups.setdefault((row["arm"], row["grid"], row["nfe"], row.get("source")), []).append(row["error"])
    stats = {}
    for key, values in groups.items():
        values = torch.tensor(values, dtype=torch.float64)
        stats[key] = float(values.mean()), float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0
    return stats
