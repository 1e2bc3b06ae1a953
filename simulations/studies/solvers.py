"""One denoiser through many processes and solvers: error against the number of network evaluations (NFE)."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence

import torch

from metrics.distances import frechet_distance
from metrics.table import mean_and_error
from simulations import toy_data
from torch_utils.random import StackedRandomGenerator, hash_seed, seeded_generator
from training import likelihood, samplers
from training.process_sampling import SOLVERS
from training.processes import Learned, LinearProcess
from training.processes.options import make_process

# name: (process, options, solver). All start from the matched prior and run between the same noise levels.
PAPER_CLD = dict(M=0.25, beta=[4, 4])
ARMS = {
    "EDM Heun": ("edm", {}, "heun"),
    "EDM churn": ("edm", {}, "churn"),
    "VP EM": ("vp", {}, "em"),
    "CLD EM": ("cld", PAPER_CLD, "em"),
    "CLD SSCS": ("cld", PAPER_CLD, "sscs"),
    "CLD flow": ("cld", PAPER_CLD, "flow"),
    "CLD RK45": ("cld", PAPER_CLD, "ode"),
    "MALDA EM": ("malda", dict(V=3), "em"),
    "MALDA SSCS": ("malda", dict(V=3), "sscs"),
    "learned EM": ("learned", dict(V=2), "em"),
    "learned SSCS": ("learned", dict(V=2), "sscs"),
}
RUN = {**SOLVERS, "churn": functools.partial(SOLVERS["heun"], S_churn=30, S_min=0.05, S_max=50)}  # Heun with noise
IN_SIGMA = ("heun", "churn")  # solvers with one grid only
GRIDS = ("sigma", "uniform", "quadratic")
TOLERANCES = (1e-1, 1e-2, 1e-3)  # of RK45, which chooses its steps
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
REFERENCE = "EDM Heun"  # which the other arms are compared with


def steps_for(solver: str, nfe: int) -> int:
    """Steps that spend at most `nfe` evaluations, the closing denoising included."""
    return (nfe + 1) // 2 if solver in IN_SIGMA else (nfe - 1) // 2 if solver == "flow" else nfe - 1


def cells(
    nfes: Sequence[int], grids: Sequence[str] = GRIDS, arms: Sequence[str] | None = None
) -> list[tuple[str, str, float]]:
    """All (arm, grid, budget): Heun has one grid only; RK45 none, its budget is a tolerance < 1, not an NFE.

    Raises ValueError for an unknown arm or grid, or less than the 3 evaluations that a step of every solver and its end
    need. arms: names, all by default.
    """
    for option, names, known in (("--arms", arms or (), ARMS), ("--grids", grids, GRIDS)):
        if unknown := next((name for name in names if name not in known), None):
            raise ValueError(f"{option}: {unknown!r} is unknown; choose some of {', '.join(known)}")
    if min(nfes) < 3:
        raise ValueError(f"--nfe={min(nfes)}: give at least 3 network evaluations")
    chosen = []
    for arm in arms or ARMS:
        solver = ARMS[arm][2]
        if solver == "ode":
            chosen += [(arm, "adaptive", tolerance) for tolerance in TOLERANCES]
        else:
            chosen += [(arm, g, n) for g in (("sigma",) if solver in IN_SIGMA else grids) for n in nfes]
    return chosen


def arm_process(arm: str, learned: Learned | None = None):
    """The process of an arm. learned: stands in for the one that `learned` arms have, whose matrices are random."""
    name, options, _ = ARMS[arm]
    if name == "learned" and learned is not None:
        return learned
    process = make_process(name, options, learn=True)
    return process.requires_grad_(False) if isinstance(process, Learned) else process


class Counted:
    """A denoiser that counts its calls."""

    def __init__(self, net):
        self.net, self.calls = net, 0

    def __getattr__(self, name):
        return getattr(self.net, name)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.net(*args, **kwargs)


@torch.no_grad()
def sample(net, cell: tuple, shape: tuple, seed: int, labels=None, learned=None) -> tuple[torch.Tensor, int]:
    """(samples [N, *data_shape], network evaluations) of a cell, with all draws from one seed."""
    arm, grid, budget = cell
    solver, process, net = ARMS[arm][2], arm_process(arm, learned), Counted(net)
    generator = seeded_generator("cpu", seed, 5)
    ends = dict(grid="sigma" if grid == "adaptive" else grid, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX)
    start = samplers.start_state(net, process, shape, generator, prior="matched", **ends)

    def randn_like(u):
        return torch.randn(u.shape, generator=generator, dtype=u.dtype)

    if grid == "adaptive":
        options = dict(rtol=budget, atol=budget)
    else:
        options = dict(num_steps=max(1, steps_for(solver, budget)), randn_like=randn_like)
    images = RUN[solver](net, process, start, labels, **options, **ends)
    return images.to(torch.float32), net.calls


def row(cell: tuple, nfe: int, seed: int, error: float, **more) -> dict:
    """A result as plain data; RK45's budget is kept as its tolerance."""
    arm, grid, budget = cell
    more = {"tolerance": budget, **more} if grid == "adaptive" else more
    return dict(arm=arm, grid=grid, nfe=nfe if grid == "adaptive" else budget, seed=seed, error=error, **more)


def cell_of(row: dict) -> tuple[str, str, float]:
    """The cell that a row belongs to."""
    return row["arm"], row["grid"], row.get("tolerance", row["nfe"])


def sliced_wasserstein(x: torch.Tensor, y: torch.Tensor, num: int = 64) -> float:
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


def exact_error(cell: tuple, mean: float = 0.3, std: float = 0.5, learned: Learned | None = None) -> float:
    """2-Wasserstein distance between N(mean, std^2) and the exact law that an arm samples for it: no Monte Carlo.

    Every fixed-step solver is affine in its normal draws for a Gaussian: one run with unit vectors for draws gives the law.
    """
    arm, grid, nfe = cell
    solver, process, net = ARMS[arm][2], arm_process(arm, learned), Affine(mean, std)
    steps = max(1, steps_for(solver, nfe))
    ends = dict(grid=grid, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX)
    calls = steps * {"em": 1, "sscs": 2, "churn": 1}.get(solver, 0)
    units = torch.eye(1 + process.V * (1 + calls), dtype=torch.float64)[:, 1:]  # row 0: the mean
    draws = iter(units.reshape(len(units), 1 + calls, process.V, 1).unbind(1))
    t_max = samplers.endpoints(net, process, **ends)[0]
    root = torch.linalg.cholesky(process.prior_covariance("matched", t_max, std).detach())
    precision = {"dtype" if solver in IN_SIGMA else "net_dtype": torch.float64}
    start, randn_like = root @ next(draws), lambda u: next(draws).reshape(u.shape).to(u)
    out = RUN[solver](net, process, start, num_steps=steps, randn_like=randn_like, **precision, **ends)
    out = out.double().flatten()
    return math.hypot(float(out[0]) - mean, float((out[1:] - out[0]).norm()) - std)


def exact_rows(chosen: list, learned: Learned | None = None, progress: Callable = iter) -> list[dict]:
    """Rows of `exact_error` for the chosen cells, see `row`; RK45, whose steps depend on the state, is left out."""
    chosen = [cell for cell in chosen if cell[1] != "adaptive"]
    return [row(cell, cell[2], 0, exact_error(cell, learned=learned)) for cell in progress(chosen)]


def mixture_rows(
    chosen: list, seeds: Sequence[int], num: int = 4096, learned: Learned | None = None, progress: Callable = iter
) -> list[dict]:
    """Rows of the chosen cells: sliced W2 to fresh exact samples, and the seconds of sampling; arm "data" is the floor."""
    truth = toy_data.mixture()
    net = truth.denoiser(0.5)
    exact = [truth.sample((num,), generator=seeded_generator("cpu", hash_seed(s, 6))) for s in [*seeds, 10**6]]
    rows = [row(("data", "", 0), 0, s, sliced_wasserstein(exact[i], exact[i + 1])) for i, s in enumerate(seeds)]
    for cell in progress(chosen):
        for index, seed in enumerate(seeds):
            begin = time.time()
            x, nfe = sample(net, cell, (num, 2, 1, 1), seed, learned=learned)
            seconds = time.time() - begin
            rows.append(row(cell, nfe, seed, sliced_wasserstein(x, exact[index]), seconds=seconds))
    return rows


@torch.no_grad()
def digit_rows(
    snapshot, features: Callable, heldout: dict, cell: tuple, seed: int, per_source: int, learned=None
) -> list:
    """Rows of a cell and a sampling seed: Frechet distance per source in `features`.

    snapshot: torch_utils.persistence.Snapshot; features: callable uint8 images -> [N, F]; heldout: {source: uint8 images}.
    """

    def moments(images):
        seen = torch.as_tensor(features(images)).double()
        return seen.mean(0).numpy(), seen.T.cov().numpy()

    ids = torch.tensor(sorted(heldout)).repeat_interleave(per_source)
    shape = (len(ids), snapshot.net.img_channels, *[snapshot.net.img_resolution] * 2)
    labels = torch.eye(snapshot.net.label_dim)[ids]
    images, nfe = sample(snapshot.net, cell, shape, seed, labels, learned)
    images = snapshot.encoder.decode(images)
    errors = {k: frechet_distance(*moments(images[ids == k]), *moments(heldout[k])) for k in sorted(heldout)}
    return [row(cell, nfe, seed, float(e), source=k, per_source=per_source) for k, e in errors.items()]


def summarise(rows: Sequence[dict]) -> dict[tuple, tuple[float, float]]:
    """{(arm, grid, nfe, source or None): (mean, standard error over seeds)}; nfe of RK45: the mean, rounded."""
    groups = {}
    for entry in rows:
        groups.setdefault((*cell_of(entry), entry.get("source")), []).append(entry)
    stats = {}
    for (arm, grid, _, source), entries in groups.items():
        nfe = round(sum(entry["nfe"] for entry in entries) / len(entries))
        stats[arm, grid, nfe, source] = mean_and_error(entry["error"] for entry in entries)
    return stats


def differences(rows: Sequence[dict], reference: str = REFERENCE) -> dict[tuple, tuple[float, float]]:
    """{(arm, grid, source or None): (mean, standard error)} of the errors less the reference's, at the largest budgets.

    The arms' draws are independent of each other in all but the start, so errors add in squares. Arms with one seed, which
    have no error, are left out.
    """
    best = {}
    for (arm, grid, nfe, source), value in summarise(rows).items():
        if nfe >= best.get((arm, grid, source), (0, None))[0]:
            best[arm, grid, source] = nfe, value
    base = {source: value for (arm, _, source), (_, value) in best.items() if arm == reference}
    return {
        key: (value[0] - base[key[2]][0], math.hypot(value[1], base[key[2]][1]))
        for key, (nfe, value) in best.items()
        if key[0] != reference and nfe and value[1] and key[2] in base
    }


def bound_processes(learned: Learned | None = None) -> dict[str, LinearProcess]:
    """{name: process} of `bound_rows`: the named ones, one with random matrices, and a learned one if there is."""
    generator = torch.Generator().manual_seed(0)
    q, b = (torch.randn(3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    made = {
        "VP": make_process("vp"),
        "CLD": make_process("cld"),
        "MALDA": make_process("malda", dict(V=3)),
        "random V=3": LinearProcess(q - q.mT, b @ b.mT / 3 + 0.1 * torch.eye(3, dtype=torch.float64)),
    }
    return made if learned is None else made | {"learned": learned}


@torch.no_grad()
def bound_rows(
    net, x: torch.Tensor, labels, num_samples: int = 64, common: bool = False, seed: int = 0, learned=None,
    progress: Callable = iter,
) -> list[dict]:  # fmt: skip
    """Rows {process, image, bits, sigma_min, sigma_max} of the ELBO with a 256-level decoder, between the same ends.

    x: [N, *data_shape] on [-1, 1]. Matched prior; sigma from 0.002 to the least sigma(T) of the processes. common: the
    same draws for every process, else independent ones.
    """
    made, rows = bound_processes(learned), []
    sigma_max = min(float(process.sigma(process.T)) for process in made.values())
    bits = x[0].numel() * math.log(2)
    for index, (name, process) in enumerate(progress(made.items())):
        seeds = [hash_seed(seed, image, 0 if common else index) for image in range(len(x))]
        bound, parts = likelihood.elbo(
            net, process, x, labels, num_samples=num_samples, decoder="discretised", prior="matched",
            sigma_min=SIGMA_MIN, sigma_max=sigma_max, generator=StackedRandomGenerator("cpu", seeds), terms=True,
        )  # fmt: skip
        ends = {key: parts[key] for key in ("sigma_min", "sigma_max")}
        rows += [dict(process=name, image=i, bits=-float(b) / bits, **ends) for i, b in enumerate(bound)]
    return rows
