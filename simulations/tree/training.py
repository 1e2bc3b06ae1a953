"""Training the toy network on the tree through the project's own loop: a feed of fresh points, and an exact-score loss.

Karras et al. 2024 (arXiv 2406.02507) for the task and its options; Pais et al. 2025 (arXiv 2509.15267) for selection.
"""

import inspect
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dnnlib import logged
from simulations import tree
from simulations.configs import TreeConfig
from torch_utils import persistence
from torch_utils.random import hash_seed, seeded_generator
from training import selection
from training.encoders import IdentityEncoder
from training.feed import Candidates, block_slices, share
from training.guidance import GuidedDenoiser
from training.losses import EDM2Loss, Objective
from training.networks_toy import ToyModel
from training.phema import PowerFunctionEMA
from training.schedules import learning_rate_schedule
from training.selection.functions import requirements_of
from training.setup import Run
from training.training_loop import Periods, TrainingLoop


class TreeFeed:
    """Fresh points of a mixture as one-pixel images, in the blocks that the loop asks for (training.feed's contract).

    A block is a function of (seed, first position, size) alone; every step of at most `block` points is one block.
    """

    def __init__(self, mixture, seed=0, block=4096, device="cpu", rank=0, world_size=1):
        self.mixture, self.seed, self.block, self.device = mixture, seed, block, torch.device(device)
        self.rank, self.world_size = rank, world_size

    def blocks(self, position, count):
        """(first position, points [b, 2, 1, 1], no labels [b, 0])."""
        for first, size in share(block_slices(position, count, self.block), self.rank, self.world_size):
            generator = seeded_generator(self.device, self.seed, first, 2)
            points = self.mixture.sample((size,), generator=generator)
            yield first, points.reshape(size, 2, 1, 1), points.new_zeros([size, 0])


class TreeLoss(EDM2Loss):
    """sigma^2 mean |score_true - score|^2 over the two coordinates, [N] (the toy loss of EDM2's autoguidance paper).

    With D = x + sigma^2 score this is mean |D_true - D|^2 / sigma^2: a denoising loss whose targets are the exact
    posterior means, the limit of stable targets with all of the data as references.

    guide, guidance: evaluate networks other than `plain` ones as guided by it (AJEST's interpolation).
    memory: a dict that keeps the draws of every block; runs that share a seed share them, and save the exact scores.
    """

    def __init__(self, mixture, P_mean=-2.3, P_std=1.5, sigma_data=0.5, guide=None, guidance=3.0, memory=None):
        exact = mixture.denoiser(sigma_data)
        targets = lambda draws, generator: exact(draws.images + draws.noise, draws.sigma)
        super().__init__(P_mean, P_std, sigma_data, uncertainty=False, stable_targets=targets)
        self.guide, self.guidance, self.memory = [guide], guidance, memory  # in a list: not a part of what is trained

    def weight(self, sigma):
        return 1 / sigma**2

    def draw(self, images, labels=None, generator=None):
        if self.memory is None or generator is None:
            return super().draw(images, None, generator)
        key = generator.initial_seed(), len(images)
        if key not in self.memory:
            self.memory[key] = super().draw(images, None, generator)
        return self.memory[key]

    def evaluate(self, net, draws):
        guide = self.guide[0]
        if guide is not None and net is not guide:
            net = GuidedDenoiser(net, guide, self.guidance)
        return super().evaluate(net, draws).flatten(1).mean(dim=1)


class SelectToTheEnd(selection.LossSelector):
    """Early selection that leaves its end to the phase: the batch grows at the next multiple of both batch sizes."""

    active = True


class Phase(NamedTuple):
    """A stretch of training with one batch size: AJEST's early and late runs have two."""

    selector: selection.IdentitySelector
    batch: int
    waits: bool = False


def _phases(config, reference):
    """The stretches of a run, in order; one that waits ends when the learner first beats the reference."""
    if config.select == "none":
        return [Phase(selection.IdentitySelector(), config.batch_size)]
    batch = config.trained_batch()
    function = selection.FUNCTIONS[config.select]
    keywords = dict(num_chunks=config.chunks, learnability=config.learnability, inverted=config.inverted)
    keywords = {name: value for name, value in keywords.items() if name in inspect.signature(function).parameters}
    ratio = 1 - batch / config.batch_size  # so that exactly `batch_size` candidates are read
    arguments = dict(function=function, reference=reference, filter_ratio=ratio, options=keywords)
    if config.when == "early" and config.grow:
        first = SelectToTheEnd(when="early", **arguments)
        return [Phase(first, batch, waits=True), Phase(selection.IdentitySelector(), config.batch_size)]
    if config.when == "late" and config.grow:
        watcher = selection.LossSelector(when="late", select_until=0, **arguments)  # waits, never selects
        return [Phase(watcher, config.batch_size, waits=True), Phase(selection.LossSelector(**arguments), batch)]
    return [Phase(selection.LossSelector(when=config.when, **arguments), batch)]


def load_toy(path, device="cpu"):
    """The network of a toy snapshot (or of the newest one in a run folder), None of None. Raises ValueError for another."""
    if path is None:
        return None
    net = persistence.load_snapshot(path, device).net
    if net.img_channels != 2 or net.img_resolution != 1:
        raise ValueError(f"{path}: not a network of 2-D points")
    return net


def prepare(config: TreeConfig, memory):
    """Draw all points of a run into `memory` (see TreeLoss), so that no run that uses them pays for their exact scores."""
    mixture = tree.ground_truth(config.cls, device=config.device)
    loss = TreeLoss(mixture, config.P_mean, config.P_std, config.sigma_data, memory=memory)
    feed = TreeFeed(mixture, config.seed, config.batch_size, config.device)
    for step in range(config.total_iter):
        position = step * config.batch_size
        list(Candidates(feed, IdentityEncoder(), loss, position, config.batch_size, config.batch_size, position))


def _now():
    """CPU and wall seconds."""
    return np.array([time.process_time(), time.time()])


def train(config: TreeConfig, outdir, on_status=None, memory=None):
    """Train one toy network in the folder `outdir`; returns the last TrainingLoop.

    Snapshots of the average (`-0.010`) every snapshot_iter steps, and of the raw network (`-raw`) at the end, stats.jsonl
    with iteration, CPU seconds and trained points beside. on_status: (loop) -> dict of further statistics; its time is not
    counted. memory: see TreeLoss. Raises ValueError for options that cannot work, and for a folder that holds a run.
    """
    config.check()
    outdir, device = Path(outdir), torch.device(config.device)
    if (outdir / "stats.jsonl").exists():
        raise ValueError(f"--outdir={outdir} holds a run already: give another folder, or remove it")
    mixture = tree.ground_truth(config.cls, device=device)
    guide = load_toy(config.guide, device)
    torch.manual_seed(hash_seed(config.seed, 0))
    net = ToyModel(num_layers=config.layers, hidden_dim=config.dim, sigma_data=config.sigma_data).to(device)
    interpolated = guide if config.interpol else None
    loss = TreeLoss(mixture, config.P_mean, config.P_std, config.sigma_data, interpolated, config.guidance, memory)
    objective = Objective(net, loss)
    ema = PowerFunctionEMA(objective, [config.ema_std])
    needs = config.select != "none" and "reference_loss" in requirements_of(selection.FUNCTIONS[config.select])
    reference = guide if guide is not None else (ema.get()[0][0].net if needs or config.when != "always" else None)
    outdir.mkdir(parents=True, exist_ok=True)
    header = dict(options=asdict(config), dataset=dict(path=f"tree:{config.cls}", label_dim=0))
    parts = dict(
        objective=objective,
        feed=TreeFeed(mixture, config.seed, config.batch_size, device),
        encoder=IdentityEncoder(),
        optimizer=torch.optim.Adam(objective.param_groups(), lr=config.lr, betas=(0.9, 0.99)),
        ema=ema,
        seed=config.seed,
        header=header,
    )
    loop, done, clock = None, 0, _now()  # when training began, later by what the hooks took
    with logged(outdir / "log.txt"):
        for phase in _phases(config, reference):
            if done < config.total_iter:
                loop, done = _train_phase(config, parts, outdir, phase, loop, done, clock, on_status)
    path, header = outdir / f"learner-{loop.kimg:07d}.safetensors", dict(nimg=loop.state.cur_nimg, ema="raw", **header)
    persistence.save_snapshot(path, net, encoder=IdentityEncoder(), process=objective.noise, **header)
    return loop


def _train_phase(config, parts, outdir, phase, earlier, done, clock, on_status):
    """Train until the end of a phase: the last step, or the switch it waits for.

    parts: of the Run of every phase. done: steps of earlier phases. Returns the loop and the steps of all phases so far.
    """
    begin = 0 if earlier is None else earlier.state.cur_nimg

    def iteration(nimg):
        return done + (nimg - begin) // phase.batch

    def status(loop):
        begun = _now()
        cpu, wall = (begun - clock).tolist()
        fields = {"Progress/iteration": iteration(loop.state.cur_nimg), "Progress/candidates": loop.state.position}
        fields |= {"Timing/cpu_sec": cpu, "Timing/wall_sec": wall, **(on_status(loop) if on_status else {})}
        clock[:] += _now() - begun
        return fields

    unit, steps = math.lcm(phase.batch, 1024), config.snapshot_iter or 10**9  # 0: at the end only
    period = max(1, round(steps * phase.batch / unit)) * unit  # about so many steps, in multiples of 1024 images
    run = Run(
        **parts,
        selector=phase.selector,
        learning_rate=lambda nimg: learning_rate_schedule(iteration(nimg), 1, config.lr, config.lr_iter, 0),
        periods=Periods(begin + (config.total_iter - done) * phase.batch, 0, period, period, 0),
        batch_size=phase.batch,
    )
    loop = TrainingLoop(run, outdir, on_status=status)
    if earlier is not None:
        loop.state = earlier.state
    if phase.waits:
        whole = math.lcm(config.trained_batch(), config.batch_size)  # both batch sizes divide what is trained so far
        loop.stop_requested = lambda: (
            phase.selector.beaten_at is not None and (loop.state.cur_nimg + phase.batch) % whole == 0
        )
    loop.run()
    return loop, iteration(loop.state.cur_nimg)
