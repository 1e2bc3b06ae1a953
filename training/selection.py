"""Which examples to train on: selectors, and the selection functions they call.

A selection function is f(learner_loss [B], ..., *, size, generator) -> indices [size], distinct, on the input's device. It
receives by name whichever of learner_loss, reference_loss, features, labels, sigma it declares; what it needs is read
from its signature. Adding one is writing that function.
"""

import math
import time
from fractions import Fraction

import torch

from torch_utils import distributed as dist
from training.selection_functions import (
    FUNCTIONS,
    conditional_logits,
    diverse_learnability,
    easy_reference,
    hard_loss,
    jointly_sample_batch,
    proportional,
    random_baseline,
    requirements_of,
)

__all__ = [
    "FUNCTIONS", "IdentitySelector", "LossSelector", "conditional_logits", "diverse_learnability", "easy_reference",
    "hard_loss", "jointly_sample_batch", "proportional", "random_baseline", "requirements_of",
]  # fmt: skip


class IdentitySelector:
    """Train on everything, in data order, drawn lazily."""

    def candidates(self, batch):
        """Number of candidates to read for a batch of `batch` trained images."""
        return batch

    def minibatches(self, objective, candidates):
        """Iterator of Draws to train on, for this process."""
        yield from candidates

    def statistics(self):
        """{name: number} for stats.jsonl, since the last call; called on every process."""
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class LossSelector(IdentitySelector):
    """Score a super-batch without gradients, keep what `function` chooses, train on that alone.

    Learner and reference are evaluated in eval mode on the same Draws. (JEST: Evans et al. 2024, arXiv 2406.17711; for
    diffusion: Pais et al. 2025, arXiv 2509.15267.) Losses are means over elements times `score_scale`: the softmax of the
    published scores is not scale-free.

    Raises ValueError for a filter ratio outside [0, 1), or a function that needs a reference where none is given.
    """

    def __init__(
        self,
        function,  # selection function
        reference=None,  # denoiser in eval mode; needed if the function declares reference_loss, or for early / late
        filter_ratio=0.8,  # share of the candidates that is discarded
        scope="global",  # "global": one choice over all processes; "rank": each process among its own candidates
        score_scale=1.0,  # factor on the losses
        when="always",  # "always"; "early": until the learner first beats the reference; "late": from then on
        select_from=0,  # select only from so many images on ...
        select_until=math.inf,  # ... and before so many
        features=None,  # Draws -> [B, F] for functions that declare `features`; None: the clean images
        options=None,  # further keywords of the function
    ):
        if not 0 <= filter_ratio < 1:
            raise ValueError(f"filter_ratio={filter_ratio} must lie in [0, 1): it is the share that is discarded")
        if scope not in ("global", "rank"):
            raise ValueError(f"scope={scope!r} is none of global, rank")
        if when not in ("always", "early", "late"):
            raise ValueError(f"when={when!r} is none of always, early, late")
        self.wanted = sorted(requirements_of(function))
        if reference is None and ("reference_loss" in self.wanted or when != "always"):
            raise ValueError("this selection compares with a reference network: give one with --reference")
        self.function, self.reference = function, reference
        self.filter_ratio, self.scope, self.score_scale = filter_ratio, scope, score_scale
        self.when, self.select_from, self.select_until = when, select_from, select_until
        self.features = features or (lambda draws: draws.images.flatten(1))
        self.options = options or {}
        self.beaten_at = None  # images trained on when the learner first beat the reference
        self.cur_nimg = 0
        self._reset()

    def _reset(self):
        self.begin, self.seconds = time.time(), 0.0
        self.sums = {}  # name -> [sum, count]

    @property
    def active(self):
        """Whether the next step selects."""
        if not self.select_from <= self.cur_nimg < self.select_until:
            return False
        return {"always": True, "early": self.beaten_at is None, "late": self.beaten_at is not None}[self.when]

    def candidates(self, batch):
        if not self.active:
            return batch
        return math.ceil(batch / (1 - Fraction(str(self.filter_ratio))))

    def minibatches(self, objective, candidates):
        self.cur_nimg = candidates.cur_nimg
        waiting = self.when != "always" and self.beaten_at is None
        selecting = candidates.count > candidates.batch or (self.active and self.filter_ratio == 0)
        if not selecting and not waiting:
            yield from candidates
            self.cur_nimg = candidates.cur_nimg + candidates.batch
            return
        begin = time.time()
        parts = list(candidates)
        scores = self._scores(objective, parts)
        if waiting and bool(scores["learner_loss"].mean() < scores["reference_loss"].mean()):
            self.beaten_at = candidates.cur_nimg  # takes effect with the next step, whose candidates it decides
        if selecting:
            parts = self._select(parts, scores, candidates)
        self.seconds += time.time() - begin
        self.cur_nimg = candidates.cur_nimg + candidates.batch
        yield from parts

    @torch.no_grad()
    def _scores(self, objective, parts):
        """What the function declares (and the trigger needs) for all candidates of the scope, each [B, ...]."""
        names = {*self.wanted, "learner_loss"} | ({"reference_loss"} if self.when != "always" else set())
        was_training = objective.training
        objective.eval()
        columns = {name: [] for name in names}
        for draws in parts:
            made = {
                "learner_loss": lambda d=draws: self._mean_loss(objective(d)),
                "reference_loss": lambda d=draws: self._mean_loss(objective.loss.evaluate(self.reference, d)),
                "features": lambda d=draws: self.features(d),
                "labels": lambda d=draws: d.labels,
                "sigma": lambda d=draws: d.sigma.flatten(),
            }
            for name in names:
                columns[name].append(made[name]())
        objective.train(was_training)
        device = next(objective.parameters()).device
        local = {name: torch.cat(c) if c else torch.zeros(0, device=device) for name, c in columns.items()}
        if self.scope == "rank":
            return local
        return {name: dist.all_gather_varying(local[name]) for name in sorted(local)}

    def _mean_loss(self, losses):
        return losses.flatten(1).mean(dim=1) * self.score_scale if losses.ndim > 1 else losses * self.score_scale

    def _select(self, parts, scores, candidates):
        size, generator, first = candidates.batch, candidates.generator, candidates.first
        num_local = sum(len(draws) for draws in parts)
        if self.scope == "rank":
            total = dist.get_world_size()
            size = size // total + (dist.get_rank() < size % total)
            generator = torch.Generator().manual_seed(generator.initial_seed() + dist.get_rank())
            first = 0
        chosen = self.function(
            **{name: scores[name] for name in self.wanted}, size=size, generator=generator, **self.options
        )
        self._record("Selection/learner_loss", scores["learner_loss"])
        self._record("Selection/learner_loss_selected", scores["learner_loss"][chosen])
        if "reference_loss" in scores:
            self._record("Selection/reference_loss", scores["reference_loss"])
        mine = chosen[(chosen >= first) & (chosen < first + num_local)] - first
        if not len(mine):
            return []
        draws = parts[0].cat(parts)[mine]
        if draws.get("labels") is not None:
            for source, share in enumerate(draws.labels.mean(dim=0).tolist()):
                self._record(f"Selection/share_source{source}", torch.tensor(share))
        step = candidates.max_batch
        return [draws[i : i + step] for i in range(0, len(draws), step)]

    def _record(self, name, values):
        total = self.sums.setdefault(name, [0.0, 0])
        total[0] += float(values.sum())
        total[1] += values.numel()

    def statistics(self):
        """Mean scores, shares of the sources among the selected, and the share of the time that selection took."""
        result = {name: total / count for name, (total, count) in self.sums.items() if count}
        result["Selection/active"] = float(self.active)
        result["Selection/time_share"] = self.seconds / max(time.time() - self.begin, 1e-9)
        self._reset()
        return result

    def state_dict(self):
        return {"beaten_at": self.beaten_at, "cur_nimg": self.cur_nimg}

    def load_state_dict(self, state):
        self.beaten_at, self.cur_nimg = state["beaten_at"], state["cur_nimg"]
