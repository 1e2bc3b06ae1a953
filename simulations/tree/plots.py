"""The autoguidance figure on the tree: samples, densities and trajectories, with and without guidance (arXiv 2406.02507)."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from metrics import figures
from simulations import tree
from simulations.configs import TreeConfig
from simulations.tree import metrics as tree_metrics
from simulations.tree.training import load_toy

WIDE = dict(centre=(0.30, 0.30), half=1.2)
ZOOM = dict(centre=(0.45, 1.22), half=0.3)
FILL, LINE, MARK = "#8FBC8F", "#2F6B2F", "#333333"
LEVELS = np.linspace(-2.12, 0, 9)  # of -sqrt(max log p - log p); the lowest encloses about 99 % of the mass


def thin(points: torch.Tensor, distance: float) -> list[int]:
    """Indices of points [N, 2] kept greedily, in order, so that any two are at least `distance` apart."""
    kept = []
    for i, point in enumerate(points):
        if not kept or float((points[kept] - point).norm(dim=1).min()) >= distance:
            kept.append(i)
    return kept


def _values(view, log_density, sigma, size=400, device="cpu"):
    """(x, y, v): -sqrt(max log p - log p) on a square grid, v [size, size]."""
    x, y = (torch.linspace(c - view["half"], c + view["half"], size, device=device) for c in view["centre"])
    with torch.no_grad():
        v = log_density(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1), sigma).cpu()
    return x.cpu(), y.cpu(), -(v.max() - v).clamp(min=0).sqrt()


def _contour(axis, values, filled=True):
    """Outline of the mass, and its inside in steps."""
    if filled:
        axis.contourf(*values, levels=[*LEVELS, 1e-9], colors=[FILL] * len(LEVELS), alpha=0.12)
    axis.contour(*values, levels=[LEVELS[0]], colors=LINE, linewidths=0.7)


def _frame(axis, view, title):
    (cx, cy), half = view["centre"], view["half"]
    axis.set(xlim=(cx - half, cx + half), ylim=(cy - half, cy + half), aspect="equal", xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)
    axis.grid(False)


def autoguidance_figure(
    net: torch.nn.Module,
    gnet: torch.nn.Module,
    guidance: float = 3.0,
    cls: str = "A",
    seed: int = 1,
    device: str = "cpu",
    size: int = 400,  # of the pictures of densities
    num_wide: int = 1 << 14,  # points
    num_zoom: int = 1 << 12,
) -> Figure:
    """The 2 x 4 panels.

    Row 1: samples of the truth, of the network, of the guided network, and the network's trajectories. Row 2: densities
    of network and guide, their ratio (what guidance climbs), and guided trajectories. Networks are ToyModels.
    """
    truth = tree.ground_truth(cls, device=device)
    wide, zoom = (_values(view, truth.logp, 0, size, device) for view in (WIDE, ZOOM))
    generator = torch.Generator(device).manual_seed(seed)
    fig, axes = figures.figure(columns=4, rows=2, width=2.6, height=2.7)
    start = truth.sample((num_wide,), tree_metrics.SIGMA_MAX, generator)
    clouds = {"Ground truth": truth.sample((num_wide,), generator=generator)}
    clouds["No guidance"] = tree_metrics.trajectories(net, start)[-1]
    clouds[f"Autoguidance, $w$ = {guidance:g}"] = tree_metrics.trajectories(net, start, gnet, guidance)[-1]
    for axis, (title, points) in zip(axes[0], clouds.items(), strict=False):
        _contour(axis, wide)
        axis.scatter(*points.cpu().T, s=0.6, color=MARK, lw=0, rasterized=True)
        _frame(axis, WIDE, title)

    sigma = 0.03  # of the zoomed panels: where the finest branches have just merged
    start = truth.sample((num_zoom,), sigma, generator)
    (cx, cy), half = ZOOM["centre"], ZOOM["half"] * 1.1
    start = start[((start - start.new_tensor([cx, cy])).abs() < half).all(dim=1)]
    start = start[thin(start, 0.045)]
    for axis, guide, weight, title in (
        (axes[0, 3], None, 1.0, "Trajectories, no guidance"),
        (axes[1, 3], gnet, guidance, "Trajectories, autoguidance"),
    ):
        _contour(axis, zoom)
        path = tree_metrics.trajectories(net, start, guide, weight, sigma_max=sigma).cpu()  # [steps, N, 2]
        axis.plot(*path.unbind(-1), color=MARK, lw=0.4, alpha=0.6)
        axis.scatter(*path[-1].T, s=5, color=MARK, lw=0, zorder=3)  # where it ends
        _frame(axis, ZOOM, title)
    ratio = lambda x, s: net.logp(x, s) - gnet.logp(x, s)
    for axis, density, title in (
        (axes[1, 0], net.logp, "Main density $p_1$"),
        (axes[1, 1], gnet.logp, "Guide density $p_0$"),
        (axes[1, 2], ratio, "Ratio $p_1/p_0$"),
    ):
        values = _values(ZOOM, density, sigma, size, device)
        shown = axis.contourf(*values, levels=np.linspace(-3, 0, 13), cmap="Greens", extend="min")
        _contour(axis, zoom, filled=False)
        _frame(axis, ZOOM, title)
    scale = r"$-\sqrt{\max\ \log p - \log p}$"
    fig.colorbar(shown, ax=axes[1, :3], location="bottom", aspect=50, ticks=[-3, -2, -1, 0], label=scale)
    return fig


def write_samples(config: TreeConfig, outdir: str | Path, net: torch.nn.Module, num: int = 1 << 13) -> None:
    """samples.png and .svg of a run: points of its averaged network over the truth, guided if the run has a guide."""
    on, guide = tree_metrics.Points(config.cls, num, device=config.device), load_toy(config.guide, config.device)
    points = tree_metrics.samples(net, on, guide, config.guidance if guide else 1.0)
    fig, axis = figures.figure(width=4.0, height=4.0)
    view = WIDE if config.cls == "A" else dict(centre=(0.0, 0.0), half=1.7)
    _contour(axis, _values(view, tree.ground_truth(config.cls).logp, 0))
    axis.scatter(*points.cpu().T, s=0.6, color=MARK, lw=0, rasterized=True)
    _frame(axis, view, f"{num} samples")
    figures.save(fig, Path(outdir) / "samples")
