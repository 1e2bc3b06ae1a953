"""What the experiments vary: one dataclass each, whose fields are options as well. Needs no torch."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction

from dnnlib import cli
from dnnlib.options import check, opt
from dnnlib.util import one_of

budget = functools.partial(opt, shown="")  # an option whose default depends on the budget
count = functools.partial(budget, at_least=1)
SIMILARITY = "True similarity, unless it varies: share of the random field that all sources have in common"
FAMILIES = ("path", "independent")


def exact_fraction(value: float | str) -> Fraction:
    """The decimal number that is written, not the binary one that is stored: 0.29 is 29/100."""
    return Fraction(str(value))


def shared_count(share: float, count: int) -> int:
    """floor(share * count) in exact decimals: (0.29, 100) is 29, where int(0.29 * 100) is 28."""
    return math.floor(exact_fraction(share) * count)


class _Checked:
    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class GaussianConfig(_Checked):
    """One cell of the Gaussian experiment."""

    K: int = opt(5, "Sources, unless they vary", at_least=1)
    n: int = opt(500, "Training points of all sources together, unless they vary", at_least=1)
    D: int = opt(10, "Data dimension", "--D", "--d", at_least=1)
    sim: float = opt(0.5, "Share of the dimensions whose mean is common, unless it varies", at_least=0, at_most=1)
    test_size: int = opt(500, "Test pairs behind the empirical TV", at_least=1)

    @property
    def d1(self) -> int:
        """Dimensions in which sources differ: D - floor(sim * D), in exact decimals."""
        return self.D - shared_count(self.sim, self.D)


@dataclass(frozen=True)
class ArmConfig(_Checked):
    """One cell of the autoregressive experiment: data, ground truth and network."""

    K: int = count(3, "Sources, unless they vary; p(y) = 1/K")
    n: int = count(10_000, "Training samples of all sources together, unless they vary")
    D: int = count(10, "Sequence length, unless it varies")
    M: int = count(2, "Vocabulary")
    sim: float = budget(0.8, SIMILARITY, at_least=0, at_most=1)
    family: str = budget(
        "path", "Sources differ in one number, in everything, or have no structure", choices=(*FAMILIES, "dirichlet")
    )
    order: int = budget(3, "Tokens that interact at most; 0 draws the probability of every outcome", at_least=0)
    scale: float = budget(2.0, "Size of the log-probability field; 0: uniform", at_least=0)
    de: int = count(64, "Embedding width")
    W: int = count(64, "Hidden width")
    L: int = count(5, "Affine layers")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.family == "dirichlet" and (self.order, self.scale) != (ArmConfig.order, ArmConfig.scale):
            raise ValueError("--order, --scale: random fields have them, --family=dirichlet does not; leave them out")
        if self.M**self.D * self.K > 2**26:
            raise ValueError(f"M^D * K = {self.M**self.D * self.K} outcomes are too many to enumerate; lower D, M or K")


@dataclass(frozen=True)
class EbmConfig(_Checked):
    """One cell of the energy-based experiment: data, ground truth and network."""

    K: int = count(8, "Sources, unless they vary; p(y) = 1/K")
    n: int = count(1000, "Training samples of all sources together, unless they vary")
    D: int = count(1, "Data dimension; normalisation is by quadrature", at_most=2)
    sim: float = budget(0.8, SIMILARITY, at_least=0, at_most=1)
    family: str = budget("path", "Sources differ in one number or in everything", choices=FAMILIES)
    scale: float = budget(2.0, "Size of the log-density field; 0: uniform", at_least=0)
    modes: int = count(4, "Highest cosine frequency of the log-densities per axis, in half periods")
    de: int = count(4, "Embedding width")
    W: int = count(64, "Hidden width")
    L: int = count(3, "Affine layers")


@dataclass(frozen=True)
class Rule(_Checked):
    """How every network of these experiments is trained and chosen."""

    lrs: tuple[float, ...] = budget(
        (1e-2,), "Adam's learning rates to try, with cosine decay", type=cli.FLOATS, above=0
    )
    batches: tuple[int, ...] = count((500,), "Batch sizes to try", type=cli.INTS)
    steps: tuple[int, ...] = count((800,), "Training steps to try", "--train-steps", "--steps", type=cli.INTS)
    early: bool = budget(
        True, "Keep a try's best weights and end it when none better come, or its last", "--early/--last"
    )
    eval_every: int = count(25, "Steps between looks at the selection likelihood on the way")
    patience: int = count(12, "A try ends after so many looks without improvement")
    holdout: float = budget(0.1, "Share of a network's own data that is held out for selection", above=0, below=1)
    select: str = budget("holdout", "Choose by held-out or by training likelihood", choices=("holdout", "train"))
    bound: float = budget(1.0, "Every parameter is clipped to [-B, B] after each step", "--bound", "--B", above=0)


@dataclass
class TreeConfig(_Checked):
    """One toy run on the tree; the defaults are EDM2's and AJEST's."""

    cls: str = opt("A", "Classes of the tree", choices=("A", "B", "AB"))
    layers: int = opt(4, "Hidden layers", at_least=1)
    dim: int = opt(64, "Width; guides have 32", at_least=1)
    total_iter: int = opt(4096, "Training steps", "--train-steps", "--total-iter", at_least=1)
    batch_size: int = opt(
        4096, "Points drawn per step; selection trains on a part of them", "--batch", "--batch-size", at_least=1
    )
    P_mean: float = -2.3
    P_std: float = 1.5
    sigma_data: float = 0.5
    lr: float = 0.01
    lr_iter: int = 512  # steps before the learning rate decays
    ema_std: float = 0.010
    select: str = opt("none", "none, or a function of training/selection/functions.py", metavar="NAME")
    filter_ratio: float = opt(0.8, "Share that is discarded", "--filter-ratio", "--filt", at_least=0, below=1)
    chunks: int = opt(16, "Chunks of the selection", "--chunks", "--n", at_least=1)
    learnability: bool = opt(
        True, "jest: learner minus reference loss, or minus the reference's alone", "--diff/--no-diff"
    )
    inverted: bool = opt(False, "jest: prefer the least learnable", "--invert/--no-invert")
    when: str = "always"  # early: select until the learner beats the reference; late: from then on
    grow: bool = opt(True, "With --early, --late: train on all points while not selecting", "--grow/--no-grow")
    guide: str | None = opt(None, "Reference of the selection, guide of the metrics", "--guide", "--guide-path")
    interpol: bool = opt(False, "While selecting, score and train the guided network", "--interpol/--no-interpol")
    guidance: float = opt(3.0, "Guidance weight of test metrics and --interpol", "--guide-weight")
    seed: int = opt(0, "Of points, noise and weights", at_least=0)
    snapshot_iter: int = opt(256, "Steps between snapshots; 0: at the end only", at_least=0)
    device: str = opt("cpu", "cuda, cpu, ...", metavar="NAME")

    def check(self) -> TreeConfig:
        """Raises ValueError, naming the option, for values that cannot work together. Returns self."""
        from training import selection

        if self.select != "none" and self.select not in selection.FUNCTIONS:
            raise ValueError(f"--select={self.select} {one_of(self.select, ['none', *selection.FUNCTIONS])}")
        if self.when != "always" and self.select == "none":
            raise ValueError(f"--{self.when} says when to select, and nothing does: give --select")
        if self.interpol and self.guide is None:
            raise ValueError("--interpol needs a guide: give --guide")
        if self.select != "jest" and (self.inverted or not self.learnability):
            raise ValueError(f"--invert and --no-diff belong to --select=jest, not --select={self.select}")
        self.trained_batch()
        return self

    def trained_batch(self) -> int:
        """Points trained on per selecting step: the size rule of JEST, for every function, so that arms compare."""
        from training.selection.functions import selection_size

        if self.select == "none":
            return self.batch_size
        return selection_size(self.batch_size, self.filter_ratio, self.chunks)
