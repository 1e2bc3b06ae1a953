"""Scores of a super-batch: what a selection function, the early / late switch and the statistics are told of it."""

import contextlib
import math
from collections.abc import Callable, Sequence

import torch

from torch_utils import distributed as dist
from training.losses import Draws, Loss, Objective
from training.selection.functions import requirements_of

CHEAP = ("half", "lowres", "levels")
CHEAP_SHARE = 0.5  # of the candidates that `levels` scores


class Scorer:
    """Losses of learner and reference on the same Draws, in eval mode and without gradient, and what else is declared.

    cheap: "half" computes in bfloat16; "lowres" halves the resolution, and with it the noise level (the mean of 2 x 2
    pixels has half the noise); "levels" evaluates only the middle half of the noise levels, the other candidates get the
    mean loss of these. Losses are means over elements times `score_scale`.
    """

    def __init__(
        self,
        function: Callable,  # selection function: what it declares is scored
        reference: Callable | None = None,  # denoiser in eval mode
        scope: str = "global",  # "global": candidates of all processes; "rank": of this one
        score_scale: float = 1.0,
        cheap: str | None = None,
    ):
        self.wanted = requirements_of(function)
        self.count_only = getattr(function, "count_only", False)
        self.reference, self.scope, self.score_scale, self.cheap = reference, scope, score_scale, cheap

    @torch.no_grad()
    def __call__(self, objective: Objective, parts: Sequence[Draws], compare: bool = False) -> dict[str, torch.Tensor]:
        """{name: [B, ...]} in data order: sigma, source (label ids, -1 without one), and what the function declares.

        Features are the clean images. compare: both losses, whatever it declares; else the learner's is left out where the
        function only counts. Raises ValueError for losses that are not finite: any choice by them would be arbitrary.
        """
        device = next(objective.parameters()).device
        scores = {
            "source": self._gather([_source(draws) for draws in parts], device, torch.int64),
            "sigma": self._gather([_sigma(draws) for draws in parts], device),
        }
        if "features" in self.wanted:
            scores["features"] = self._gather([d.images.flatten(1).float() for d in parts], device, wide=True)
        if "labels" in self.wanted:
            scores["labels"] = self._gather([d.labels.float() for d in parts], device, wide=True)
        nets = {} if self.count_only and not compare else {"learner_loss": objective.net}
        if "reference_loss" in self.wanted or compare:
            nets["reference_loss"] = self.reference
        low, high = _middle(scores["sigma"]) if self.cheap == "levels" else (-math.inf, math.inf)
        was_training = objective.training
        objective.eval()
        with torch.autocast(device.type, dtype=torch.bfloat16) if self.cheap == "half" else contextlib.nullcontext():
            for name, net in nets.items():
                columns = [self._losses(objective.loss, net, draws, low, high) for draws in parts]
                scores[name] = _fill(self._gather(columns, device), scores["sigma"], low, high)
        objective.train(was_training)
        found = [(~scores[name].isfinite()).sum() for name in nets]
        for name, bad in zip(nets, torch.stack(found).tolist() if found else [], strict=True):
            if bad:
                raise ValueError(
                    f"{name} of {bad} of {len(scores[name])} candidates is not finite: nothing can be selected"
                )
        return scores

    def _losses(self, loss, net, draws, low, high):
        """Mean loss [B] of a network on its draws; zero where the noise level is outside [low, high]."""
        if self.cheap == "lowres":
            draws = half_resolution(draws, loss)
        if math.isinf(low):
            return self._mean(loss.evaluate(net, draws))
        inside = _inside(_sigma(draws), low, high).nonzero().flatten()
        result = torch.zeros(len(draws), device=_device(draws))
        if len(inside):
            result[inside] = self._mean(loss.evaluate(net, draws[inside]))
        return result

    def _mean(self, losses):
        return losses.float().reshape(len(losses), -1).mean(dim=1) * self.score_scale

    def _gather(self, columns, device, dtype=torch.float32, wide=False):
        """This rank's micro-batches as one tensor, over all candidates of the scope in data order."""
        width = [columns[0].shape[1] if columns else 0] if wide else []
        if wide and dist.get_world_size() > 1:  # a rank without candidates does not know it
            width = dist.all_reduce_(torch.tensor(width, device=device), "max").tolist()
        local = torch.cat(columns).to(dtype) if columns else torch.zeros([0, *width], device=device, dtype=dtype)
        return local if self.scope == "rank" else dist.all_gather_varying(local)


def half_resolution(draws: Draws, loss: Loss) -> Draws:
    """The same examples with means over 2 x 2 pixels: images, noise and targets at half the noise level.

    Their weight is the loss's at that level, where it is a function of it. Raises ValueError for images of odd side.
    """
    side = draws.images.shape[-1]
    if draws.images.ndim != 4 or side % 2 or draws.images.shape[-2] % 2:
        raise ValueError(f"--select-cheap=lowres needs images of even side, not {list(draws.images.shape[1:])}")
    small = Draws(draws, sigma=draws.sigma / 2)
    for name in ("images", "noise", "targets"):
        if draws.get(name) is not None:
            small[name] = torch.nn.functional.avg_pool2d(draws[name], 2)
    if getattr(loss, "weight", None) is not None:
        small["weight"] = loss.weight(small.sigma)
    return small


def _source(draws):
    """Label ids [B] of one-hot labels, -1 for none (unconditional, or dropped)."""
    labels = draws.get("labels")
    if labels is None:
        return torch.full([len(draws)], -1, device=_device(draws))
    return torch.where(labels.any(dim=1), labels.argmax(dim=1), -1)


def _sigma(draws):
    """Noise levels [B]; NaN for losses of your own that have none."""
    sigma = draws.get("sigma")
    return torch.full([len(draws)], math.nan, device=_device(draws)) if sigma is None else sigma.float()


def _device(draws):
    return next(value.device for value in draws.values() if value is not None)


def _middle(sigma):
    """(low, high) noise levels between which the middle CHEAP_SHARE of the candidates lies."""
    ordered = sigma.sort().values
    cut = int(len(ordered) * (1 - CHEAP_SHARE) / 2)
    return (float(ordered[cut]), float(ordered[-1 - cut])) if len(ordered) else (0.0, math.inf)


def _inside(sigma, low, high):
    return (sigma >= low) & (sigma <= high)


def _fill(losses, sigma, low, high):
    """Losses [B] with the mean of those inside [low, high] put where nothing was evaluated."""
    if math.isinf(low):
        return losses
    inside = _inside(sigma, low, high)
    return torch.where(inside, losses, losses[inside].mean())
