"""Guidance: two denoisers make a sharper one, which is a denoiser again, so every solver takes it.

guided = G + w (D - G), D the main network, G the guide (EDM2 / autoguidance, Karras et al. 2024, arXiv 2406.02507):

* autoguidance: G is a weaker network for the same labels (smaller, less trained, its own EMA);
* classifier-free guidance (Ho & Salimans 2022): G is the same network without its label. The null label is the zero
  vector that label dropout trains, or a reserved last class; a network trained without either has no null label;
* in an interval of noise levels (Kynkaanniemi et al. 2024).

Denoisers and scores at the same state mix alike: the score is affine in the denoiser.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from training import fit
from training.processes import Process
from training.processes.score import make_score
from training.processes.states import expand

NULL_LABELS = ("zero", "last")
Level = float | Tensor  # noise level or time, scalar or [N]
Labels = Tensor | None  # [N, K]
Interval = Sequence[float] | None  # low < sigma <= high

FORWARDED = ("label_dim", "sigma_data", "sigma_min", "sigma_max", "img_channels", "img_resolution")


def for_sampling(net: Any, **options: Any) -> Any:
    """`net` for many evaluations with the weights that it has now, where it knows how: see Preconditioned.folded."""
    fold = getattr(net, "folded", None)
    if fold is None and options.get("compiled"):
        warnings.warn(f"--compile has no effect: {type(net).__name__} is no network that can be compiled", stacklevel=2)
    return net if fold is None else fold(**options)


def guided(
    net: Any,
    gnet: Any,
    guidance: float = 1.0,
    interval: Interval = None,
    process: Process | None = None,
    compiled: bool = False,
) -> Any:
    """`net` guided by `gnet`: a denoiser, or a score of `process` where one of them brings its own; weight 1: `net`.

    Both are made ready for sampling, see `for_sampling`; compiled: by torch.compile.
    """
    options = {"compiled": True} if compiled else {}
    if guidance == 1:
        return for_sampling(net, **options)
    if process is not None and (hasattr(net, "score") or hasattr(gnet, "score")):
        return GuidedScore(for_sampling(net, **options), for_sampling(gnet, **options), process, guidance, interval)
    return GuidedDenoiser(net, gnet, guidance, interval).folded(**options)


def _inside(sigma, interval):
    """Where to guide: None everywhere, else bool of sigma's shape, on the CPU."""
    if interval is None:
        return None
    sigma = torch.as_tensor(sigma).cpu().double()
    return (sigma > interval[0]) & (sigma <= interval[1])


def _mix(main, guide, inside, guidance):
    """G + w (D - G) for D = `main` [N, ...], G = `guide()`; outside the interval D itself, without G if all N are there."""
    if inside is None:
        return guide().lerp(main, guidance)
    if inside.ndim == 0:
        return guide().lerp(main, guidance) if inside else main
    return torch.where(expand(inside, main), guide().lerp(main, guidance), main) if inside.any() else main


def _check(net, gnet, guidance, interval):
    """A guide must speak of the same images and the same labels; an unconditional guide ignores labels."""
    if not math.isfinite(guidance):
        raise ValueError(f"guidance={guidance} is not a finite number; 1 means no guidance (--guidance)")
    if interval is not None and not (len(interval) == 2 and 0 <= interval[0] < interval[1]):
        raise ValueError(
            f"guidance interval {tuple(interval)} is not 0 <= low < high; give two noise levels (--guidance-interval)"
        )
    if gnet is None:
        if guidance != 1:
            raise ValueError(f"guidance={guidance} needs a guiding network; give one (--gnet) or leave guidance at 1")
        return
    fit.check(fit.of_network("the network", net), fit.of_network("the guide (--gnet)", gnet))


def _forward_attributes(wrapper, net):
    for name in (*FORWARDED, "round_sigma"):
        if hasattr(net, name):
            setattr(wrapper, name, getattr(net, name))


class GuidedDenoiser(torch.nn.Module):
    """Denoiser G + w(sigma) (D - G) of two denoisers, in the images' type; attributes of the main network are its own.

    forward(x [N, *data_shape], sigma [N] or scalar, class_labels [N, K] or None, **kwargs) -> [N, *data_shape], and the
    main network's log-variance if return_logvar. Where w = 1 the result is the main network's, bit for bit, and the
    guide is not evaluated if no sample of the batch needs it. Raises ValueError for networks that do not fit together,
    or that bring their own score (see GuidedScore).
    """

    def __init__(
        self,
        net: Any,  # main denoiser
        gnet: Any = None,  # guide; None needs guidance = 1
        guidance: float = 1.0,  # w; 1: no guidance
        interval: Interval = None,  # (low, high) noise levels between which to guide; None: all
    ) -> None:
        super().__init__()
        _check(net, gnet, guidance, interval)
        if any(hasattr(part, "score") and not callable(part) for part in (net, gnet)):
            raise ValueError("a network brings its own score(u, t): use GuidedScore(net, gnet, process, guidance)")
        _forward_attributes(self, net)
        self.net, self.gnet, self.guidance, self.interval = net, gnet, guidance, interval
        self.unlabelled = isinstance(gnet, NullLabels) and gnet.net is net  # both in one batch

    def forward(
        self, x: Tensor, sigma: Level, class_labels: Labels = None, return_logvar: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        more = kwargs | {"return_logvar": True} if return_logvar else kwargs
        inside = _inside(sigma, self.interval)
        everywhere = self.guidance != 1 and (inside is None or bool(inside.all()))
        if everywhere and self.unlabelled and not kwargs.keys() - {"force_fp32"}:
            found = self.net(*self._doubled(x, sigma, class_labels), **more)
            both, *logvar = found if return_logvar else (found,)
            main, guide = both.to(x.dtype).chunk(2)
            logvar = [u[: len(x)] for u in logvar]
            denoised = guide.lerp(main, self.guidance)
        else:
            found = self.net(x, sigma, class_labels, **more)
            main, *logvar = found if return_logvar else (found,)
            guide = lambda: self.gnet(x, sigma, class_labels, **kwargs).to(x.dtype)
            main = main.to(x.dtype)
            denoised = main if self.guidance == 1 else _mix(main, guide, inside, self.guidance)
        return (denoised, *logvar) if return_logvar else denoised

    def _doubled(self, x, sigma, labels):
        """Images, levels and labels of one batch for the network with and without its label."""
        null = self.gnet.null_labels(x)
        labels = torch.zeros_like(null) if labels is None else labels.reshape(-1, self.label_dim).expand_as(null)
        if torch.is_tensor(sigma) and sigma.numel() > 1:
            sigma = sigma.flatten().repeat(2)
        return torch.cat([x, x]), sigma, torch.cat([labels.to(null), null])

    def folded(self, **options: Any) -> "GuidedDenoiser":
        """Both networks made ready for sampling; one for both where they are one."""
        net = for_sampling(self.net, **options)
        gnet = NullLabels(net, self.gnet.null) if self.unlabelled else for_sampling(self.gnet, **options)
        if net is self.net and (self.unlabelled or gnet is self.gnet):
            return self
        return GuidedDenoiser(net, gnet, self.guidance, self.interval)


class GuidedScore:
    """Score s_G + w(sigma(t)) (s_D - s_G) under a linear process, for networks of any kind.

    Denoisers and networks with their own score (joint networks) can guide each other. Solvers of the process take it in
    place of a network. Arguments as of GuidedDenoiser.
    """

    def __init__(self, net: Any, gnet: Any, process: Process, guidance: float = 1.0, interval: Interval = None) -> None:
        _check(net, gnet, guidance, interval)
        _forward_attributes(self, net)
        self.net, self.gnet, self.process, self.guidance, self.interval = net, gnet, process, guidance, interval

    def score(self, u: Tensor, t: Level, class_labels: Labels = None) -> Tensor:
        """u [N, V, *data_shape], t scalar or [N] -> [N, V, *data_shape]."""
        main, guide = (make_score(net, self.process, class_labels) for net in (self.net, self.gnet))
        inside = _inside(self.process.sigma(t), self.interval)
        return main(u, t) if self.guidance == 1 else _mix(main(u, t), lambda: guide(u, t), inside, self.guidance)


class NullLabels(torch.nn.Module):
    """The same network without its label: the guide of classifier-free guidance.

    null="zero": the zero vector, which label dropout trains. null="last": one-hot of the last class, reserved for it.
    """

    def __init__(self, net: Any, null: str = "zero") -> None:
        super().__init__()
        if null not in NULL_LABELS:
            raise ValueError(f"null label {null!r} is none of {', '.join(NULL_LABELS)}")
        if not net.label_dim:
            raise ValueError(
                "classifier-free guidance needs a class-conditional network, this one has label_dim=0; "
                "guide it by a weaker network (autoguidance, --gnet)"
            )
        _forward_attributes(self, net)
        self.net, self.null = net, null
        if hasattr(net, "score"):  # a joint network without its label is one still
            self.process = net.process
            self.score = lambda u, t: net.score(u, t, self.null_labels(u))

    def forward(
        self, x: Tensor, sigma: Level, class_labels: Labels = None, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        return self.net(x, sigma, self.null_labels(x), **kwargs)

    def null_labels(self, x: Tensor) -> Tensor:
        """The label that means none, [N, K], for images x [N, ...]."""
        labels = torch.zeros([len(x), self.label_dim], device=x.device)
        if self.null == "last":
            labels[:, -1] = 1
        return labels

    def folded(self, **options: Any) -> "NullLabels":
        """The same of the network made ready for sampling."""
        net = for_sampling(self.net, **options)
        return self if net is self.net else NullLabels(net, self.null)
