"""CLD's toy problem as its official code solves it: the bound, and solvers by sliced Wasserstein distance."""

import glob
from pathlib import Path

import torch

from dnnlib.reading import read_json
from dnnlib.util import write_text
from metrics.table import grouped, markdown, write_csv
from simulations import toy_data
from simulations.studies.solvers import sliced_wasserstein
from torch_utils.persistence import load_snapshot
from torch_utils.random import seeded_generator
from training import likelihood, samplers

GRIDS = {
    "em-uniform": "EM",
    "em-quadratic": "EM, quadratic",
    "sscs-uniform": "SSCS",
    "sscs-quadratic": "SSCS, quadratic",
}
STEPS = (20, 50)
COLUMNS = ("nll", *(f"{name}-{steps}" for name in GRIDS for steps in STEPS), "ode", "nfe")
# The official code, MLP, batch 512, 20000 iterations, one seed each, as measured on it; +-: standard error over 2000 points.
OFFICIAL = {
    "noise": dict(zip(COLUMNS, (-0.31, 0.26, 0.098, 0.077, 0.055, 0.15, 0.064, 0.082, 0.044, None, 219), strict=True)),
    "mixed": dict(zip(COLUMNS, (-0.96, 0.26, 0.092, 0.054, 0.045, 0.18, 0.047, 0.067, 0.044, None, 225), strict=True)),
}
T_MIN = 1e-3  # of sampling


class Counted:
    """A score that counts its evaluations."""

    def __init__(self, net):
        self.net, self.sigma_data, self.calls = net, net.sigma_data, 0
        self.sigma_min, self.sigma_max = net.sigma_min, net.sigma_max

    def score(self, u, t):
        self.calls += 1
        return self.net.score(u, t)


def measure(path, how):
    """{"options", "seed", "nll", "nll_error", "nfe", "floor", "sliced_w2": {solver-grid-steps: distance}} of a network.

    As published: stationary prior, CLD's Euler denoising from t = 1e-3, its half steps; the bound by the probability flow of
    the whole state with the exact divergence, from t = 1e-5, in nats of two dimensions. how: run_toy.Measured. Raises
    ValueError for another network.
    """
    num, seed, tolerance = how.num, how.seed, how.tolerance
    snapshot = load_snapshot(path)
    net, process = snapshot.net, snapshot.process
    if getattr(net, "variables", 0) != 2 or net.img_resolution != 1:
        raise ValueError(
            f"--net={path}: not a network of points that sees the state of CLD; train one with --preset=cld-toy"
        )
    fresh = [toy_data.get("multimodal_swissroll")(num, seeded_generator("cpu", seed, k)) for k in (8, 9)]
    score = Counted(net)

    def points(solver, **options):
        generator = seeded_generator("cpu", seed, 5)
        start = samplers.start_state(score, process, (num, 2, 1, 1), generator, prior="stationary")
        draw = lambda u: torch.randn(u.shape, generator=generator, dtype=u.dtype)
        options |= dict(half_step="published") if solver == "sscs" else {}
        found = samplers.SOLVERS[solver](
            score, process, start, t_min=T_MIN, denoise="euler", randn_like=draw, **options
        )
        return sliced_wasserstein(found.flatten(1), fresh[0])

    with torch.no_grad():
        errors = {
            f"{name}-{steps}": points(name.split("-")[0], num_steps=steps, grid=name.split("-")[1])
            for name in GRIDS
            for steps in STEPS
        }
        score.calls = 0
        errors["ode"] = points("ode", rtol=tolerance, atol=tolerance)
    nfe = score.calls
    x = fresh[1][: num // 5].reshape(-1, 2, 1, 1).double()
    generator = seeded_generator("cpu", seed, 10)
    nll = -likelihood.ode_log_likelihood(
        net, process, x, probe="exact", generator=generator, rtol=tolerance, atol=tolerance
    )
    about = {
        "net": str(path),
        "options": snapshot.options,
        "seed": seed,
        "num": num,
        "floor": sliced_wasserstein(*fresh),
    }
    return about | {
        "nll": float(nll.mean()),
        "nll_error": float(nll.std() / len(x) ** 0.5),
        "nfe": nfe,
        "sliced_w2": errors,
    }


def table(scores, dest):
    """Write `dest`, a line per network, and its .md: beside the official code and the data's own density. Returns the text."""
    found = [read_json(path) for path in sorted(glob.glob(str(scores)))]
    if not found:
        raise ValueError(f"--scores={scores}: no files; run run_toy.py compare first")
    rows = [
        {"prediction": one["options"]["prediction"], "seed": one["options"]["seed"], "steps": one["options"]["steps"]}
        | {
            "nll": one["nll"],
            "nll_error": one["nll_error"],
            **one["sliced_w2"],
            "nfe": one["nfe"],
            "floor": one["floor"],
        }
        for one in found
    ]
    write_csv(dest, rows)
    lines = []
    for prediction, mine in grouped((row["prediction"], row) for row in rows).items():
        lines += [[f"{prediction}, seed {row['seed']}", *(f"{row[name]:.3g}" for name in COLUMNS)] for row in mine]
        official = OFFICIAL.get(prediction, {})
        lines.append([f"{prediction}, official code", *("" if (v := official.get(n)) is None else v for n in COLUMNS)])
    points = toy_data.get("multimodal_swissroll")(20000, seeded_generator("cpu", 0))
    truth = -float(toy_data.logp("multimodal_swissroll")(points).mean())
    lines.append(["the data (entropy)", f"{truth:.3g}", *[""] * (len(COLUMNS) - 1)])
    heads = [f"{name} {steps}" for name in GRIDS.values() for steps in STEPS]
    text = markdown(["prediction", "NLL bound", *heads, "ODE", "its NFE"], lines)
    write_text(Path(dest).with_suffix(".md"), f"{text}\n")
    return text
