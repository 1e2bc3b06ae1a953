"""Selectors: from candidates to the examples that are trained on.

A selection function is f(learner_loss [B], ..., *, size, generator) -> indices [size], distinct, on the input's device. It
receives by name whichever of learner_loss, reference_loss, features, labels, sigma it declares; what it needs is read
from its signature. Adding one is writing that function.
"""

import contextlib
import inspect
import math
import time
from fractions import Fraction

import torch

from torch_utils import distributed as dist
from training.losses import Draws
from training.selection.functions import requirements_of

CHEAP = ("half", "lowres", "levels")
CHEAP_SHARE = 0.5  # of the candidates that `levels` scores
MAX_SOURCES = 256  # with more sources, shares per source are not reported


def check_choice(function, has_reference, when="always", options=None):
    """Raises ValueError if `function` needs a reference that is not there, or does not know one of `options`."""
    if not has_reference and ("reference_loss" in requirements_of(function) or when != "always"):
        raise ValueError("this selection compares with a reference network: give one with --reference")
    unknown = set(options or {}) - set(inspect.signature(function).parameters)
    if unknown:
        name = {"num_chunks": "--chunks"}.get(min(unknown), min(unknown))
        raise ValueError(f"{name} means nothing to this selection ({function.__name__}): leave it out")


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

    def progress(self):
        """What a learning-rate schedule may ask: selecting (in the last step), when, ratio (candidates per trained image),
        beaten_at (images trained on before the step in which the learner first beat the reference, or None)."""
        return dict(selecting=False, when="always", ratio=1.0, beaten_at=None)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class LossSelector(IdentitySelector):
    """Score a super-batch without gradients, keep what `function` chooses, train on that alone.

    Learner and reference are evaluated in eval mode on the same Draws. (JEST: Evans et al. 2024, arXiv 2406.17711; for
    diffusion: Pais et al. 2025, arXiv 2509.15267.) Losses are means over elements times `score_scale`: the softmax of the
    published scores is not scale-free.

    early and late switch for good after the first step in which the learner's mean loss over the candidates of all
    processes is below the reference's. cheap scoring: "half" computes in bfloat16; "lowres" halves the resolution, and
    with it the noise level (the mean of 2 x 2 pixels has half the noise); "levels" evaluates only the middle half of the
    noise levels, the other candidates get the mean loss of these. Training is never cheapened.

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
        cheap=None,  # "half", "lowres" or "levels": cheaper scores; None: exact ones
        features=None,  # Draws -> [B, F] for functions that declare `features`; None: the clean images
        options=None,  # further keywords of the function
    ):
        if not 0 <= filter_ratio < 1:
            raise ValueError(f"filter_ratio={filter_ratio} must lie in [0, 1): it is the share that is discarded")
        if scope not in ("global", "rank"):
            raise ValueError(f"scope={scope!r} is none of global, rank")
        if when not in ("always", "early", "late"):
            raise ValueError(f"when={when!r} is none of always, early, late")
        if cheap is not None and cheap not in CHEAP:
            raise ValueError(f"--select-cheap={cheap} is none of {', '.join(CHEAP)}")
        self.wanted = sorted(requirements_of(function))
        check_choice(function, reference is not None, when, options)
        self.function, self.reference = function, reference
        self.filter_ratio, self.scope, self.score_scale = filter_ratio, scope, score_scale
        self.when, self.select_from, self.select_until = when, select_from, select_until
        self.cheap = cheap
        self.features = features or (lambda draws: draws.images.flatten(1))
        self.options = options or {}
        self.beaten_at = None  # images trained on when the learner first beat the reference
        self.cur_nimg = 0
        self.selecting = False  # whether the last step selected
        self.read = 0  # candidates read so far
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
        self.selecting = candidates.count > candidates.batch or (self.active and self.filter_ratio == 0)
        self.read = candidates.position + candidates.count
        if not self.selecting and not waiting:
            yield from candidates
            self.cur_nimg = candidates.cur_nimg + candidates.batch
            return
        begin = time.time()
        parts = list(candidates)
        scores = self._scores(objective, parts, waiting)
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

    # --- scores -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _scores(self, objective, parts, waiting):
        """{name: [B, ...]} over all candidates of the scope: what the function declares, what the trigger needs, and what
        is reported (source: label ids, -1 without one; sigma)."""
        device = next(objective.parameters()).device
        count_only = getattr(self.function, "count_only", False) and not waiting
        losses = {} if count_only else {"learner_loss": objective.net}
        if "reference_loss" in self.wanted or waiting:
            losses["reference_loss"] = self.reference
        sizes = [len(draws) for draws in parts]
        scores = {
            "source": self._gather([_source(draws) for draws in parts], device, torch.int64),
            "sigma": self._gather([_sigma(draws) for draws in parts], device),
        }
        for name in {"features", "labels"} & set(self.wanted):
            columns = [(self.features(d) if name == "features" else d.labels).float() for d in parts]
            scores[name] = self._gather(columns, device, wide=True)
        low, high = _middle(scores["sigma"]) if self.cheap == "levels" else (-math.inf, math.inf)
        was_training = objective.training
        objective.eval()
        with self._precision(device):
            for name, net in losses.items():
                columns = [self._losses(objective.loss, net, draws, low, high) for draws in parts]
                scores[name] = _fill(self._gather(columns, device), scores["sigma"], low, high)
        objective.train(was_training)
        if count_only:
            total = self._gather([torch.zeros(sum(sizes), device=device)], device)
            scores["learner_loss"] = total
            scores["unscored"] = True
        return scores

    def _losses(self, loss, net, draws, low, high):
        """Mean loss [B] of a network on its draws; zero where the noise level is outside [low, high]."""
        if self.cheap == "lowres":
            draws = _half_resolution(draws)
        if math.isinf(low):
            return self._mean_loss(loss.evaluate(net, draws))
        sigma = _sigma(draws)
        inside = ((sigma >= low) & (sigma <= high)).nonzero().flatten()
        result = sigma.new_zeros(len(draws), dtype=torch.float32)
        if len(inside):
            result[inside] = self._mean_loss(loss.evaluate(net, draws[inside]))
        return result

    def _mean_loss(self, losses):
        losses = losses.float()
        return losses.flatten(1).mean(dim=1) * self.score_scale if losses.ndim > 1 else losses * self.score_scale

    def _precision(self, device):
        if self.cheap != "half":
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def _gather(self, columns, device, dtype=torch.float32, wide=False):
        """This rank's micro-batches as one tensor, over all candidates of the scope in data order."""
        width = [0]
        if wide:  # a rank without candidates does not know it
            width = torch.tensor([columns[0].shape[1] if columns else 0], device=device)
            width = dist.all_reduce_(width, "max").tolist()
        shape = [0, *width] if wide else [0]
        local = torch.cat(columns).to(dtype) if columns else torch.zeros(shape, device=device, dtype=dtype)
        return local if self.scope == "rank" else dist.all_gather_varying(local)

    def _beaten(self, scores):
        """Whether the learner's mean loss is below the reference's, over the candidates of all processes."""
        sums = torch.stack([scores[f"{who}_loss"].double().sum() for who in ("learner", "reference")])
        if self.scope == "rank":
            sums = dist.all_reduce_(sums)
        return bool(sums[0] < sums[1])

    # --- choice -------------------------------------------------------------------------------------------------------

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
        chosen = _checked(chosen, size, scores["sigma"])
        self._record_choice(scores, chosen, parts)
        mine = chosen[(chosen >= first) & (chosen < first + num_local)] - first
        if not len(mine):
            return []
        draws = parts[0].cat(parts)[mine]
        step = candidates.max_batch
        return [draws[i : i + step] for i in range(0, len(draws), step)]

    # --- reports ------------------------------------------------------------------------------------------------------

    def _record_choice(self, scores, chosen, parts):
        if "unscored" not in scores:
            self._record("Selection/learner_loss", scores["learner_loss"])
            self._record("Selection/learner_loss_selected", scores["learner_loss"][chosen])
        if "reference_loss" in scores:
            self._record("Selection/reference_loss", scores["reference_loss"])
            self._record("Selection/reference_loss_selected", scores["reference_loss"][chosen])
        log_sigma = scores["sigma"].log()
        self._record("Selection/log_sigma", log_sigma)
        self._record("Selection/log_sigma_selected", log_sigma[chosen])
        num = next((draws.labels.shape[1] for draws in parts if draws.get("labels") is not None), 0)
        if 0 < num <= MAX_SOURCES:
            for name, sources in (("", scores["source"][chosen]), ("_candidates", scores["source"])):
                counts = torch.bincount(sources + 1, minlength=num + 1)[1:]
                total = self.sums.setdefault(f"sources{name}", [0, 0])
                total[0] = total[0] + counts
        self._record("Selection/active", torch.ones(1))

    def _record(self, name, values):
        total = self.sums.setdefault(name, [0.0, 0])
        total[0] = total[0] + values.detach().double().sum()  # a tensor: no synchronization here
        total[1] += values.numel()

    def statistics(self):
        """Mean scores of candidates and selected, shares of the sources among both, and the share of time spent selecting.

        Over all processes; time is this process's own. Collective in scope "rank".
        """
        result = {}
        for name in dist.broadcast_object(list(self.sums)):
            total, count = self.sums.get(name, [torch.zeros([]), 0])
            if name.startswith("sources"):
                counts = torch.as_tensor(total).clone()
                counts = dist.all_reduce_(counts) if self.scope == "rank" else counts
                kind = "share" if name == "sources" else "candidate_share"
                shares = counts / counts.sum().clamp(min=1)
                result.update({f"Selection/{kind}_source{k}": v for k, v in enumerate(shares.tolist())})
                continue
            pair = torch.stack([torch.as_tensor(total).double(), torch.tensor(float(count)).to(total.device)])
            pair = dist.all_reduce_(pair) if self.scope == "rank" else pair
            mean = float(pair[0] / pair[1].clamp(min=1))
            if math.isfinite(mean):
                result[name] = mean
        result["Selection/active"] = float(self.active)
        result["Selection/candidates_kimg"] = self.read / 1e3
        result["Selection/time_share"] = self.seconds / max(time.time() - self.begin, 1e-9)
        self._reset()
        return result

    def progress(self):
        ratio = float(1 / (1 - Fraction(str(self.filter_ratio))))
        return dict(selecting=self.selecting, when=self.when, ratio=ratio, beaten_at=self.beaten_at)

    def state_dict(self):
        return {"beaten_at": self.beaten_at, "cur_nimg": self.cur_nimg}

    def load_state_dict(self, state):
        self.beaten_at, self.cur_nimg = state["beaten_at"], state["cur_nimg"]


def _checked(chosen, size, like):
    """What a selection function returned as int64 indices on like's device. Raises ValueError if it broke its contract."""
    chosen = torch.as_tensor(chosen, device=like.device)
    wrong = chosen.ndim != 1 or chosen.dtype.is_floating_point or chosen.dtype == torch.bool or len(chosen) != size
    if wrong or (size and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(like)) or len(chosen.unique()) < size:
        raise ValueError(
            f"the selection function returned {chosen.dtype} of shape {list(chosen.shape)}: "
            f"it must return {size} distinct indices below {len(like)}"
        )
    return chosen.to(torch.int64)


def _source(draws):
    """Label ids [B] of one-hot labels, -1 for none (unconditional, or dropped)."""
    labels = draws.get("labels")
    if labels is None:
        return torch.full([len(draws)], -1, device=_device(draws))
    return torch.where(labels.any(dim=1), labels.argmax(dim=1), -1)


def _sigma(draws):
    """Noise levels [B]; NaN for losses of your own that have none."""
    sigma = draws.get("sigma")
    return torch.full([len(draws)], math.nan, device=_device(draws)) if sigma is None else sigma.flatten().float()


def _device(draws):
    return next(value.device for value in draws.values() if value is not None)


def _middle(sigma):
    """(low, high) noise levels between which the middle CHEAP_SHARE of the candidates lies."""
    ordered = sigma.sort().values
    cut = int(len(ordered) * (1 - CHEAP_SHARE) / 2)
    return (float(ordered[cut]), float(ordered[-1 - cut])) if len(ordered) else (0.0, math.inf)


def _fill(losses, sigma, low, high):
    """Losses [B] with the mean of those inside [low, high] put where nothing was evaluated."""
    if math.isinf(low):
        return losses
    inside = (sigma >= low) & (sigma <= high)
    return torch.where(inside, losses, losses[inside].mean())


def _half_resolution(draws):
    """The same examples with means over 2 x 2 pixels: images, noise and targets at half the noise level."""
    side = draws.images.shape[-1]
    if draws.images.ndim != 4 or side % 2 or draws.images.shape[-2] % 2:
        raise ValueError(f"--select-cheap=lowres needs images of even side, not {list(draws.images.shape[1:])}")
    small = Draws(draws)
    for name in ("images", "noise", "targets"):
        if draws.get(name) is not None:
            small[name] = torch.nn.functional.avg_pool2d(draws[name], 2)
    small["sigma"] = draws.sigma / 2
    return small
