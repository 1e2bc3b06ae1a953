"""Selectors: from candidates to the examples that are trained on."""

import inspect
import math
import time
from collections.abc import Callable, Iterator
from fractions import Fraction

import torch

from torch_utils import distributed as dist
from training.feed import Candidates
from training.losses import Draws, Objective
from training.selection.functions import requirements_of
from training.selection.scores import CHEAP, Scorer

MAX_SOURCES = 256  # with more sources, shares per source are not reported


class IdentitySelector:
    """Train on everything, in data order, drawn lazily."""

    keeps_all = True  # every process trains on all of its candidates

    def candidates(self, batch: int) -> int:
        """Number of candidates to read for a batch of `batch` trained images."""
        return batch

    def minibatches(self, objective: Objective, candidates: Candidates) -> Iterator[Draws]:
        """Draws to train on, for this process."""
        yield from candidates

    def statistics(self) -> dict[str, float]:
        """{name: number} for stats.jsonl, since the last call; called on every process."""
        return {}

    def progress(self) -> dict:
        """What a learning-rate schedule may ask: selecting (in the last step), when, ratio (candidates per trained image),
        beaten_at (images trained on before the step in which the learner first beat the reference, or None)."""
        return dict(selecting=False, when="always", ratio=1.0, beaten_at=None)

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class LossSelector(IdentitySelector):
    """Score a super-batch without gradients, keep what `function` chooses, train on that alone.

    (JEST: Evans et al. 2024, arXiv 2406.17711; for diffusion: Pais et al. 2025, arXiv 2509.15267.) The softmax of the
    published scores is not scale-free: `score_scale` multiplies the losses. early and late switch for good after the first
    step in which the learner's mean loss over the candidates of all processes is below the reference's. Training is never
    cheapened.

    Raises ValueError for a filter ratio outside [0, 1), or a function that needs a reference where none is given.
    """

    keeps_all = False

    def __init__(
        self,
        function: Callable,  # selection function
        reference: Callable | None = None,  # denoiser in eval mode, where the function or `when` compares with one
        filter_ratio: float = 0.8,  # share of the candidates that is discarded
        scope: str = "global",  # one choice over all processes; "rank": each process among its own candidates
        score_scale: float = 1.0,  # factor on the losses
        when: str = "always",  # "early": until the learner first beats the reference; "late": from then on
        select_from: int = 0,  # select only from so many images on ...
        select_until: float = math.inf,  # ... and before so many
        cheap: str | None = None,  # "half", "lowres" or "levels": cheaper scores, see Scorer; None: exact ones
        options: dict | None = None,  # further keywords of the function
    ):
        if not 0 <= filter_ratio < 1:
            raise ValueError(f"filter_ratio={filter_ratio} must lie in [0, 1): it is the share that is discarded")
        if scope not in ("global", "rank"):
            raise ValueError(f"scope={scope!r} is none of global, rank")
        if when not in ("always", "early", "late"):
            raise ValueError(f"when={when!r} is none of always, early, late")
        if cheap is not None and cheap not in CHEAP:
            raise ValueError(f"--select-cheap={cheap} is none of {', '.join(CHEAP)}")
        self.function, self.options, self.scope = function, options or {}, scope
        _check_choice(function, reference is not None, when, self.options)
        self.scorer = Scorer(function, reference, scope, score_scale, cheap)
        self.ratio = 1 / (1 - Fraction(str(filter_ratio)))  # candidates per trained image, exactly
        self.when, self.select_from, self.select_until = when, select_from, select_until
        self.beaten_at = None  # images trained on when the learner first beat the reference
        self.cur_nimg = 0
        self.selecting = False  # whether the last step selected
        self.read = 0  # candidates read so far
        self._reset()

    def _reset(self):
        self.begin, self.seconds = time.time(), 0.0
        self.sums = {}  # name -> [sum, count], or counts of the sources

    @property
    def active(self) -> bool:
        """Whether the next step selects."""
        if not self.select_from <= self.cur_nimg < self.select_until:
            return False
        return {"always": True, "early": self.beaten_at is None, "late": self.beaten_at is not None}[self.when]

    def candidates(self, batch: int) -> int:
        return math.ceil(batch * self.ratio) if self.active else batch

    def minibatches(self, objective: Objective, candidates: Candidates) -> Iterator[Draws]:
        self.cur_nimg = candidates.cur_nimg
        waiting = self.when != "always" and self.beaten_at is None
        self.selecting = candidates.count > candidates.batch or (self.active and self.ratio == 1)
        self.read = candidates.position + candidates.count
        parts = candidates
        if self.selecting or waiting:
            begin = time.time()
            parts = list(candidates)
            scores = self.scorer(objective, parts, compare=waiting)
            if waiting and self._beaten(scores):
                self.beaten_at = candidates.cur_nimg  # takes effect with the next step, whose candidates it decides
                dist.print0(
                    f"Selection: the learner first beat the reference after {self.beaten_at / 1e3:g} kimg; "
                    f"{'no' if self.when == 'early' else 'every'} later step selects"
                )
            if self.selecting:
                parts = self._select(parts, scores, candidates)
            self.seconds += time.time() - begin
        self.cur_nimg = candidates.cur_nimg + candidates.batch
        yield from parts

    def _beaten(self, scores):
        """Whether the learner's mean loss is below the reference's, over the candidates of all processes."""
        sums = torch.stack([scores[f"{who}_loss"].double().sum() for who in ("learner", "reference")])
        if self.scope == "rank":
            sums = dist.all_reduce_(sums)
        return bool(sums[0] < sums[1])

    def _select(self, parts, scores, candidates):
        size, generator, first = candidates.batch, candidates.generator, candidates.first
        num_local = sum(len(draws) for draws in parts)
        if self.scope == "rank":
            total = dist.get_world_size()
            size = size // total + (dist.get_rank() < size % total)
            generator = torch.Generator().manual_seed(generator.initial_seed() + dist.get_rank())
            first = 0
        given = {"learner_loss": torch.zeros_like(scores["sigma"]), **scores}  # functions that count need no losses
        given = {name: given[name] for name in self.scorer.wanted}
        chosen = self.function(**given, size=size, generator=generator, **self.options)
        chosen = _checked(chosen, size, scores["sigma"])
        self._record_choice(scores, chosen, parts)
        if num_local < len(scores["sigma"]):
            chosen = chosen[(chosen >= first) & (chosen < first + num_local)]
        mine = chosen - first
        if not len(mine):
            return []
        draws = Draws.cat(parts)[mine]
        step = candidates.max_batch
        return [draws[i : i + step] for i in range(0, len(draws), step)]

    # --- reports ------------------------------------------------------------------------------------------------------

    def _record_choice(self, scores, chosen, parts):
        known = {name: scores[name] for name in ("learner_loss", "reference_loss") if name in scores}
        for name, values in {**known, "log_sigma": scores["sigma"].log()}.items():
            self._record(f"Selection/{name}", values)
            self._record(f"Selection/{name}_selected", values[chosen])
        num = next((draws.labels.shape[1] for draws in parts if draws.get("labels") is not None), 0)
        if 0 < num <= MAX_SOURCES:
            for name, sources in (("", scores["source"][chosen]), ("_candidates", scores["source"])):
                ids = torch.arange(num, device=sources.device)  # bincount would wait for the device
                self._add(f"sources{name}", (sources[:, None] == ids).sum(dim=0))

    def _record(self, name, values):
        count = torch.ones_like(values, dtype=torch.float64).sum()
        self._add(name, torch.stack([values.detach().double().sum(), count]))

    def _add(self, name, values):
        self.sums[name] = self.sums.get(name, 0) + values  # tensors: no synchronization here

    def statistics(self) -> dict[str, float]:
        """Mean scores of candidates and selected, shares of the sources among both, and the share of time spent selecting.

        Over all processes; time is this process's own. Collective in scope "rank".
        """
        result = {}
        for name in dist.broadcast_object(list(self.sums)):
            total = self.sums.get(name, torch.zeros(2, dtype=torch.float64))
            total = dist.all_reduce_(total) if self.scope == "rank" else total
            if name.startswith("sources"):
                kind = "share" if name == "sources" else "candidate_share"
                shares = (total / total.sum().clamp(min=1)).tolist()
                result.update({f"Selection/{kind}_source{k}": share for k, share in enumerate(shares)})
            elif math.isfinite(mean := float(total[0] / total[1].clamp(min=1))):
                result[name] = mean
        result["Selection/active"] = float(self.active)
        result["Selection/candidates_kimg"] = self.read / 1e3
        result["Selection/time_share"] = self.seconds / max(time.time() - self.begin, 1e-9)
        self._reset()
        return result

    def progress(self) -> dict:
        return dict(selecting=self.selecting, when=self.when, ratio=float(self.ratio), beaten_at=self.beaten_at)

    def state_dict(self) -> dict:
        return {"beaten_at": self.beaten_at, "cur_nimg": self.cur_nimg}

    def load_state_dict(self, state: dict) -> None:
        self.beaten_at, self.cur_nimg = state["beaten_at"], state["cur_nimg"]


def _check_choice(function, has_reference, when, options):
    """Raises ValueError if `function` needs a reference that is not there, or does not know one of `options`."""
    if not has_reference and ("reference_loss" in requirements_of(function) or when != "always"):
        raise ValueError("this selection compares with a reference network: give one with --reference")
    unknown = set(options) - set(inspect.signature(function).parameters)
    if unknown:
        name = {"num_chunks": "--chunks"}.get(min(unknown), min(unknown))
        raise ValueError(f"{name} means nothing to this selection ({function.__name__}): leave it out")


def _checked(chosen, size, like):
    """What a selection function returned as int64 indices on like's device. Raises ValueError if it broke its contract."""
    chosen = torch.as_tensor(chosen, device=like.device)
    wrong = chosen.ndim != 1 or chosen.dtype.is_floating_point or chosen.dtype == torch.bool or len(chosen) != size
    if not wrong and size:
        ordered = chosen.sort().values
        sound = (ordered[0] >= 0) & (ordered[-1] < len(like)) & (ordered[1:] > ordered[:-1]).all()
        wrong = not bool(sound)  # the one wait for the device
    if wrong:
        raise ValueError(
            f"the selection function returned {chosen.dtype} of shape {list(chosen.shape)}: "
            f"it must return {size} distinct indices below {len(like)}"
        )
    return chosen.to(torch.int64)
