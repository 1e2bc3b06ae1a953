"""One denoiser through many processes and solvers: error against the number of network evaluations (NFE)."""

import functools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from dnnlib.cells import digest
from dnnlib.cells import run as run_cells
from dnnlib.util import one_of
from metrics.detectors import get_detectors
from metrics.distances import frechet_distance
from metrics.evaluate import choose_encoder
from metrics.table import grouped, mean_and_error, mean_interval, p_of_zero
from simulations import toy_data
from torch_utils import persistence
from torch_utils.random import StackedRandomGenerator, hash_seed, seeded_generator
from training import fit, likelihood, samplers
from training.dataset import ImageFolderDataset, label_rows, load_arrays
from training.processes import VP, Learned, LinearProcess
from training.processes.options import make_process, require_gaussian
from training.processes.states import expand
from training.samplers import SOLVERS

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
    "learned EM": ("learned", {}, "em"),
    "learned SSCS": ("learned", {}, "sscs"),
}
RUN = {**SOLVERS, "churn": functools.partial(SOLVERS["heun"], S_churn=30, S_min=0.05, S_max=50)}  # Heun with noise
IN_SIGMA = ("heun", "churn")  # solvers with one grid only
GRIDS = ("sigma", "uniform", "quadratic")
TOLERANCES = (1e-1, 1e-2, 1e-3)  # of RK45, which chooses its steps
ENDS = dict(sigma_min=0.002, sigma_max=80.0)
REFERENCE = "EDM Heun"  # which the other arms are compared with


def steps_for(solver: str, nfe: int) -> int:
    """Steps that spend at most `nfe` evaluations, the closing denoising included."""
    return (nfe + 1) // 2 if solver in IN_SIGMA else (nfe - 1) // 2 if solver == "flow" else nfe - 1


def cells(nfes: Sequence[int], grids: Sequence[str] = GRIDS, arms: Sequence[str] = ()) -> list[tuple[str, str, float]]:
    """All (arm, grid, budget): Heun has one grid only; RK45 none, its budget is a tolerance < 1, not an NFE.

    arms: names, all by default. Raises ValueError for an unknown arm or grid, or less than the 3 evaluations that a step
    of every solver and its end need.
    """
    for option, names, known in (("--arms", arms, ARMS), ("--grids", grids, GRIDS)):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"{option}: {unknown[0]!r} {one_of(unknown[0], known)}")
    if min(nfes) < 3:
        raise ValueError(f"--nfe={min(nfes)}: give at least 3 network evaluations")
    grids_of = {"ode": ["adaptive"], **dict.fromkeys(IN_SIGMA, ["sigma"])}
    return [
        (arm, grid, budget)
        for arm in arms or ARMS
        for grid in grids_of.get(ARMS[arm][2], grids)
        for budget in (TOLERANCES if grid == "adaptive" else nfes)
    ]


def open_study(study) -> tuple[list[tuple[str, str, float]], Learned | None]:
    """(cells, learned process or None) of a run_solvers.Study. Raises ValueError for a snapshot without such a process."""
    chosen = cells(study.nfes, study.grids, study.arms)
    if study.learned is None:
        return chosen, None
    process = persistence.load_snapshot(study.learned).process
    if not isinstance(process, Learned):
        raise ValueError(f"--learned={study.learned} holds no learned process; train one with --process=learned")
    return chosen, process


@torch.no_grad()
def sample(
    net: torch.nn.Module, cell: tuple, shape: tuple, seed: int, labels=None, learned: Learned | None = None
) -> tuple[torch.Tensor, int]:
    """(samples [N, *data_shape], network evaluations) of a cell, with all draws from one seed.

    learned: stands in for the process of `learned` arms, whose matrices are random.
    """
    arm, grid, budget = cell
    name, options, solver = ARMS[arm]
    process, generator = make_process(name, options, trained=learned, learn=True), seeded_generator("cpu", seed, 5)
    if grid == "adaptive":
        ends, options = dict(ENDS, grid="sigma"), dict(rtol=budget, atol=budget)
    else:
        randn_like = lambda u: torch.randn(u.shape, generator=generator, dtype=u.dtype)
        ends, options = dict(ENDS, grid=grid), dict(num_steps=steps_for(solver, budget), randn_like=randn_like)
    start, calls = samplers.start_state(net, process, shape, generator, prior="matched", **ends), []
    with net.register_forward_pre_hook(lambda *_: calls.append(1)):
        images = RUN[solver](net, process, start, labels, **options, **ends)
    return images.to(torch.float32), len(calls)


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


class Affine(torch.nn.Module):
    """The best denoiser of N(0.3, 0.5^2)."""

    label_dim, sigma_min, sigma_max, sigma_data, mean = 0, 0.0, math.inf, 0.5, 0.3

    def forward(self, y, sigma, class_labels=None):
        sigma = expand(sigma, y).to(y)
        return self.mean + (y - self.mean) / (1 + sigma**2 / self.sigma_data**2)


@torch.no_grad()
def exact_error(cell: tuple, learned: Learned | None = None) -> float:
    """2-Wasserstein distance between the law of `Affine` and the exact one that an arm samples for it: no Monte Carlo.

    Every fixed-step solver is affine in its normal draws for a Gaussian: one run with unit vectors for draws gives the law.
    """
    arm, grid, nfe = cell
    name, options, solver = ARMS[arm]
    process, net = make_process(name, options, trained=learned, learn=True), Affine()
    steps, ends = steps_for(solver, nfe), dict(ENDS, grid=grid)
    calls = steps * {"em": 1, "sscs": 2, "churn": 1}.get(solver, 0)
    units = torch.eye(1 + process.V * (1 + calls), dtype=torch.float64)[:, 1:]  # row 0: the mean
    draws = iter(units.reshape(len(units), 1 + calls, process.V, 1).unbind(1))
    t_max = samplers.endpoints(net, process, **ends)[0]
    root = torch.linalg.cholesky(process.prior_covariance("matched", t_max, net.sigma_data))
    precision = {"dtype" if solver in IN_SIGMA else "net_dtype": torch.float64}
    start, randn_like = root @ next(draws), lambda u: next(draws).reshape(u.shape).to(u)
    out = RUN[solver](net, process, start, num_steps=steps, randn_like=randn_like, **precision, **ends)
    out = out.double().flatten()
    return math.hypot(float(out[0]) - net.mean, float((out[1:] - out[0]).norm()) - net.sigma_data)


def exact_rows(study) -> list[dict]:
    """Rows of `exact_error` for the cells of a study; RK45, whose steps depend on the state, is left out."""
    chosen, learned = open_study(study)
    fixed = [cell for cell in chosen if cell[1] != "adaptive"]
    return [row(cell, cell[2], 0, exact_error(cell, learned)) for cell in tqdm(fixed, unit="cell")]


def mixture_rows(study, seeds: Sequence[int], num: int) -> list[dict]:
    """Rows of a study: sliced W2 to fresh exact samples, and the seconds of sampling; arm "data" is the floor."""
    chosen, learned = open_study(study)
    truth = toy_data.mixture()
    net = truth.denoiser(0.5)
    exact = [truth.sample((num,), generator=seeded_generator("cpu", hash_seed(s, 6))) for s in [*seeds, 10**6]]
    rows = [row(("data", "", 0), 0, s, sliced_wasserstein(exact[i], exact[i + 1])) for i, s in enumerate(seeds)]
    for cell in tqdm(chosen, unit="cell"):
        for seed, points in zip(seeds, exact[:-1], strict=True):
            begin = time.time()
            x, nfe = sample(net, cell, (num, 2, 1, 1), seed, learned=learned)
            seconds = time.time() - begin
            rows.append(row(cell, nfe, seed, sliced_wasserstein(x, points), seconds=seconds))
    return rows


def open_both(net: str, data: str) -> tuple[persistence.Snapshot, ImageFolderDataset]:
    """--net and --data of a study. Raises ValueError unless they fit, and the noise is what linear processes make."""
    snapshot, dataset = persistence.load_snapshot(net), ImageFolderDataset(data)
    require_gaussian(snapshot.kernel, VP())
    fit.check_data(f"--data={data}", dataset, fit.of_snapshot("--net", snapshot))
    return snapshot, dataset


@torch.no_grad()
def digit_rows(study, path: str, data: str, detector: str, seeds: Sequence[int], per_source: int) -> list[dict]:
    """Rows of a study per source: Fréchet distance to the images of `data` in the features of a classifier.

    Other rows of the file stay, and finished cells are kept. Raises ValueError for a file of another number of samples.
    """
    (chosen, learned), dest = open_study(study), Path(study.dest) / "digits.json"
    rows = json.loads(dest.read_text(encoding="utf-8")) if dest.is_file() else []
    if any(row.get("per_source") != per_source for row in rows):
        found = f"{dest} has rows of another number of samples"
        raise ValueError(f"--per-source={per_source}: {found}; take another --dest")
    ((name, judge),) = get_detectors(f"classifier:{detector}").items()

    def moments(images, ids):
        features = {k: torch.as_tensor(judge.features(images[ids == k])).double() for k in ids.unique().tolist()}
        return {k: (seen.mean(0), seen.T.cov()) for k, seen in features.items()}

    snapshot, dataset = open_both(path, data)
    images, labels = load_arrays(dataset)
    heldout = moments(images, labels.argmax(dim=1))
    net, ids = snapshot.net, torch.tensor([*heldout]).repeat_interleave(per_source)
    shape = (len(ids), net.img_channels, net.img_resolution, net.img_resolution)
    inputs = [per_source, name, dataset.content_hash()]
    inputs += [digest(persistence.resolve(file)) for file in (path, study.learned) if file]

    def work(seed, cell):
        images, nfe = sample(net, cell, shape, seed, label_rows(ids, net.label_dim) if net.label_dim else None, learned)
        found = moments(snapshot.encoder.decode(images), ids)
        errors = {k: frechet_distance(*found[k], *heldout[k]) for k in heldout}
        return [row(cell, nfe, seed, error, source=k, per_source=per_source) for k, error in errors.items()]

    found = run_cells(
        [(seed, cell) for seed in seeds for cell in chosen], work, dest.with_suffix(""),
        identity=lambda seed, cell: [seed, cell, inputs], progress=functools.partial(tqdm, unit="cell"),
    )  # fmt: skip
    return list({(cell_of(row), row["seed"], row["source"]): row for row in [*rows, *sum(found, [])]}.values())


def summarise(rows: Sequence[dict]) -> dict[tuple, tuple[float, float]]:
    """{(arm, grid, nfe, source or None): (mean, standard error over seeds)}; nfe of RK45: the mean, rounded."""
    stats = {}
    for (arm, grid, _, source), entries in grouped(((*cell_of(r), r.get("source")), r) for r in rows).items():
        nfe = round(sum(entry["nfe"] for entry in entries) / len(entries))
        stats[arm, grid, nfe, source] = mean_and_error(entry["error"] for entry in entries)
    return stats


def differences(rows: Sequence[dict]) -> dict[tuple, tuple[float, float, float, float, float]]:
    """{(arm, grid, source or None): (*`mean_interval`, p)} of the errors less the reference's, at the largest budgets.

    Paired by seed: the arms of a seed share denoiser and start. Arms with one seed, which have no error, are left out.
    """
    cells, best = grouped(((*cell_of(r), r.get("source")), r) for r in rows), {}
    for (arm, grid, _, source), found in cells.items():
        nfe = sum(row["nfe"] for row in found) / len(found)
        if nfe >= best.get((arm, grid, source), (0,))[0]:
            best[arm, grid, source] = nfe, {row["seed"]: row["error"] for row in found}
    base = {source: errors for (arm, _, source), (_, errors) in best.items() if arm == REFERENCE}
    found = {}
    for (arm, grid, source), (nfe, errors) in best.items():
        seeds = [seed for seed in errors if seed in base.get(source, ())]
        if arm != REFERENCE and nfe and len(seeds) > 1:
            pairs = [errors[seed] - base[source][seed] for seed in seeds]
            found[arm, grid, source] = (*mean_interval(pairs), p_of_zero(pairs))
    return found


@torch.no_grad()
def bound_rows(study, net: str, data: str, num: int, num_samples: int, seed: int) -> list[dict]:
    """Rows {process, image, bits, sigma_min, sigma_max, draws} of the ELBO with a 256-level decoder, between the same ends.

    Of the first `num` images. Matched prior; sigma from 0.002 to the least sigma(T) of the processes: the named ones, one
    with random matrices, and the learned one if there is. draws: "common" to all processes, or each its "own".
    """
    (snapshot, dataset), (_, learned) = open_both(net, data), open_study(study)
    images, labels = (part[:num] for part in load_arrays(dataset))
    net, encoder = snapshot.net, choose_encoder("discrete", snapshot.encoder)
    x, labels = encoder.encode_latents(images), labels if net.label_dim else None
    generator = torch.Generator().manual_seed(0)
    q, b = (torch.randn(3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    processes = {
        "VP": make_process("vp"),
        "CLD": make_process("cld"),
        "MALDA": make_process("malda", dict(V=3)),
        "random V=3": LinearProcess(q - q.mT, b @ b.mT / 3 + 0.1 * torch.eye(3, dtype=torch.float64)),
    } | ({} if learned is None else {"learned": learned})
    ends = dict(ENDS, sigma_max=min(float(process.sigma(process.T)) for process in processes.values()))
    rows = []
    for draws in ("own", "common"):
        for index, (name, process) in enumerate(tqdm(processes.items(), unit="cell")):
            seeds = [hash_seed(seed, image, 0 if draws == "common" else index) for image in range(len(x))]
            bound, parts = likelihood.elbo(
                net, process, x, labels, num_samples=num_samples, decoder="discretised", prior="matched", terms=True,
                generator=StackedRandomGenerator("cpu", seeds), **ends,
            )  # fmt: skip
            bits = (-bound / (x[0].numel() * math.log(2))).tolist()
            same = {"sigma_min": parts["sigma_min"], "sigma_max": parts["sigma_max"], "draws": draws}
            rows += [dict(process=name, image=i, bits=value, **same) for i, value in enumerate(bits)]
    return rows


# Of run_solvers.py: the rows of a study, and of what else its command takes.
EXPERIMENTS = {"gaussian": exact_rows, "mixture": mixture_rows, "digits": digit_rows, "bound": bound_rows}
