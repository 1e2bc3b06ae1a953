"""Guidance: two denoisers make a sharper one, which is a denoiser again, so every solver takes it.

guided = G + w (D - G), D the main network, G the guide (EDM2 / autoguidance, Karras et al. 2024, arXiv 2406.02507):

* autoguidance: G is a weaker network for the same labels (smaller, less trained, its own EMA);
* classifier-free guidance (Ho & Salimans 2022): G is the same network without its label. The null label is the zero
  vector that label dropout trains, or a reserved last class; a network trained without either has no null label;
* in an interval of noise levels (Kynkaanniemi et al. 2024), or with a weight that varies with the noise level.

Denoisers and scores at the same state mix alike: the score is affine in the denoiser.
"""

import math

import torch

from training.processes.score import GivenScore, make_score

NULL_LABELS = ("zero", "last")
FORWARDED = ("label_dim", "sigma_data", "sigma_min", "sigma_max", "img_channels", "img_resolution")


def guidance_weight(sigma, guidance=1.0, interval=None, schedule=None):
    """Weight w at noise level sigma (scalar or [N]): 1 + (guidance - 1) schedule(sigma) inside the interval, else 1.

    interval (lo, hi): guidance acts for lo < sigma <= hi; None: everywhere. schedule: callable sigma -> share of the
    guidance, usually in [0, 1]; None: all of it. Returns a float if the weight is the same everywhere, else a float64
    tensor in sigma's shape.
    """
    if guidance == 1 or (interval is None and schedule is None):
        return float(guidance)
    sigma = torch.as_tensor(sigma)
    sigma = sigma.to(torch.float32 if sigma.device.type == "mps" else torch.float64)
    share = torch.ones_like(sigma) if schedule is None else torch.as_tensor(schedule(sigma)).to(sigma).expand_as(sigma)
    weight = 1 + (guidance - 1) * share
    if interval is None:
        return weight
    lo, hi = interval
    return torch.where((sigma > lo) & (sigma <= hi), weight, torch.ones_like(weight))


def _check(guidance, interval, schedule):
    if not math.isfinite(guidance):
        raise ValueError(f"guidance={guidance} is not a finite number; 1 means no guidance (--guidance)")
    if interval is not None and not (len(interval) == 2 and 0 <= interval[0] < interval[1]):
        raise ValueError(
            f"guidance interval {tuple(interval)} is not 0 <= low < high; give two noise levels (--guidance-interval)"
        )
    if schedule is not None and not callable(schedule):
        raise ValueError(f"guidance schedule {schedule!r} is no callable sigma -> share; see training.guidance.ramp")


def _check_pair(net, gnet):
    """A guide must speak of the same images and the same labels; an unconditional guide ignores labels."""
    for name in ("img_resolution", "img_channels"):
        ours, theirs = getattr(net, name, None), getattr(gnet, name, None)
        if ours is not None and theirs is not None and ours != theirs:
            raise ValueError(
                f"the guide has {name}={theirs}, the network {ours}; choose a guide of the same data (--gnet)"
            )
    ours, theirs = getattr(net, "label_dim", 0), getattr(gnet, "label_dim", 0)
    if theirs and ours != theirs:
        raise ValueError(
            f"the guide has label_dim={theirs}, the network {ours}; use the same or an unconditional guide"
        )


def _blend(weight, main, guide):
    """guide + w (main - guide) for w a float or a tensor [N] or []; exactly `main` where w = 1."""
    if not torch.is_tensor(weight):
        return guide.lerp(main, weight)
    weight = weight.to(device=main.device, dtype=main.dtype)
    weight = weight.reshape(weight.shape + (1,) * (main.ndim - weight.ndim)) if weight.ndim else weight
    return torch.where(weight == 1, main, guide.lerp(main, weight))


def _acts(weight):
    return bool((weight != 1).any()) if torch.is_tensor(weight) else weight != 1


class GuidedDenoiser(torch.nn.Module):
    """Denoiser G + w(sigma) (D - G); attributes of the main network are forwarded.

    forward(x [N, *data_shape], sigma [N] or scalar, class_labels [N, K] or None, **kwargs) -> [N, *data_shape], and the
    main network's log-variance if return_logvar. Where w = 1 the result is the main network's, bit for bit, and the
    guide is not evaluated if no sample of the batch needs it. If both networks bring their own `score(u, t)`, so has
    this one (constant weight; otherwise see GuidedScore). Raises ValueError for networks that do not fit together.
    """

    def __init__(
        self,
        net,  # main denoiser
        gnet=None,  # guide; None needs guidance = 1
        guidance=1.0,  # w; 1: no guidance
        interval=None,  # (low, high) noise levels between which to guide; None: all
        schedule=None,  # callable sigma -> share of the guidance; None: all of it
    ):
        super().__init__()
        _check(guidance, interval, schedule)
        if gnet is None and guidance != 1:
            raise ValueError(f"guidance={guidance} needs a guiding network; give one (--gnet) or leave guidance at 1")
        if gnet is not None:
            _check_pair(net, gnet)
            if guidance != 1 and hasattr(net, "score") != hasattr(gnet, "score"):
                raise ValueError(
                    "only one of network and guide brings its own score(u, t); mix them as scores of a process: "
                    "GuidedScore(net, gnet, process, guidance)"
                )
        self.net = net
        self.gnet = gnet
        self.guidance = guidance
        self.interval = interval
        self.schedule = schedule

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in FORWARDED:
                return getattr(self.net, name)
            if name == "score" and hasattr(self.net, "score"):
                return self._score
            raise

    def weight(self, sigma):
        """w at noise level sigma: a float, or a tensor in sigma's shape."""
        return guidance_weight(sigma, self.guidance, self.interval, self.schedule)

    def forward(self, x, sigma, class_labels=None, return_logvar=False, **kwargs):
        main_kwargs = {**kwargs, "return_logvar": True} if return_logvar else kwargs
        denoised = self.net(x, sigma, class_labels, **main_kwargs)
        weight = self.weight(sigma)
        if not _acts(weight):
            return denoised
        denoised, logvar = denoised if return_logvar else (denoised, None)
        denoised = _blend(weight, denoised, self.gnet(x, sigma, class_labels, **kwargs))
        return (denoised, logvar) if return_logvar else denoised

    def _score(self, u, t, labels=None):
        """Guided score [N, V, *data_shape] of two networks that bring their own."""
        score = GivenScore(self.net, None, labels)(u, t)
        if self.guidance == 1:
            return score
        if self.interval is not None or self.schedule is not None:
            raise ValueError(
                "a guidance interval or schedule needs sigma(t), hence the process: use GuidedScore(net, gnet, process, ...)"
            )
        return _blend(float(self.guidance), score, GivenScore(self.gnet, None, labels)(u, t))


class GuidedScore:
    """Score s_G + w(sigma(t)) (s_D - s_G) under a linear process, for networks of any kind.

    Denoisers and networks with their own score (joint networks) can guide each other. Solvers take it in place of a
    network: `solver(GuidedScore(net, gnet, process, 2.0, labels=labels), process, latents)`.
    """

    def __init__(self, net, gnet, process, guidance=1.0, interval=None, schedule=None, labels=None):
        _check(guidance, interval, schedule)
        _check_pair(net, gnet)
        self.net, self.process = net, process
        self.guidance, self.interval, self.schedule = guidance, interval, schedule
        self._main, self._guide = make_score(net, process, labels), make_score(gnet, process, labels)

    def __getattr__(self, name):
        if name in FORWARDED:
            return getattr(self.net, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def score(self, u, t):
        """u [N, V, *data_shape], t scalar or [N] -> [N, V, *data_shape]."""
        score = self._main(u, t)
        weight = guidance_weight(self.process.sigma(t), self.guidance, self.interval, self.schedule)
        return _blend(weight, score, self._guide(u, t)) if _acts(weight) else score


class NullLabels(torch.nn.Module):
    """The same network without its label: the guide of classifier-free guidance.

    null="zero": the zero vector, which label dropout trains. null="last": one-hot of the last class, reserved for it.
    """

    def __init__(self, net, null="zero"):
        super().__init__()
        if null not in NULL_LABELS:
            raise ValueError(f"null label {null!r} is none of {', '.join(NULL_LABELS)}")
        if not getattr(net, "label_dim", 0):
            raise ValueError(
                "classifier-free guidance needs a class-conditional network, this one has label_dim=0; "
                "guide it by a weaker network (autoguidance, --gnet)"
            )
        self.net = net
        self.null = null

    def __getattr__(self, name):
        return getattr(self.net, name) if name in FORWARDED else super().__getattr__(name)

    def forward(self, x, sigma, class_labels=None, **kwargs):
        labels = torch.zeros([len(x), self.label_dim], device=x.device)
        if self.null == "last":
            labels[:, -1] = 1
        return self.net(x, sigma, labels, **kwargs)


def classifier_free(net, guidance, null="zero", interval=None, schedule=None):
    """Classifier-free guidance: the conditional network guided by itself without label, as one denoiser."""
    return GuidedDenoiser(net, NullLabels(net, null), guidance, interval, schedule)


def autoguidance(net, gnet, guidance, interval=None, schedule=None):
    """Autoguidance: the network guided by a weaker version of itself, as one denoiser."""
    return GuidedDenoiser(net, gnet, guidance, interval, schedule)


def ramp(low, high):
    """Schedule 0 below noise level low, 1 above high, linear in ln sigma between. Raises ValueError unless 0 < low < high."""
    if not 0 < low < high:
        raise ValueError(f"ramp({low}, {high}) needs 0 < low < high")
    return lambda sigma: ((sigma.log() - math.log(low)) / math.log(high / low)).clamp(0, 1)


def bump(low, high):
    """Schedule 0 outside (low, high), a raised cosine in ln sigma inside. Raises ValueError unless 0 < low < high."""
    position = ramp(low, high)
    return lambda sigma: (1 - (2 * math.pi * position(sigma)).cos()) / 2
