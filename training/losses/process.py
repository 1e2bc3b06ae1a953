"""Training for a process: the denoising loss with the process's own noise levels and weight, and learned processes.

An EDM denoiser serves every process, so training "for CLD" is the denoising loss with CLD's law of t and its weight.
Learned matrices get their gradient where the evidence lower bound depends on them, at the ends: KL(q(u_T | x) || N(0, S))
and the noise level sigma(T) at which the integral of |D - x|^2 over d snr begins.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_utils import random
from torch_utils.devices import send
from torch_utils.random import Generator
from training import likelihood
from training.losses.denoising import DenoisingLoss, Draws, network_options
from training.processes.states import expand
from training.processes.time_density import NoiseLevels, snr_law

SIGMA_MIN = 0.002  # where the integral ends by default: EDM's and the samplers' lowest noise level
SIGMA_MAX = 80.0  # learned processes: the network is trained up to here, wherever sigma(T) moves


class ProcessLoss(DenoisingLoss):
    """weight(t) / density(t) |D(x + sigma(t) n; sigma(t)) - x|^2 for the noise levels of a process.

    Its mean over elements and draws is the integral over t of the published objective; with weighting "likelihood" the
    evidence lower bound's, in nats per element. time_sampling "snr", "uniform" or "importance" and weighting
    "likelihood", "reweightedv1" or "reweightedv2": see `training.processes.time_density`. t_min: lower end of t; default
    where sigma = 0.002 (CLD: 1e-5; MDM: 1e-3). A process with parameters (`Learned`) is trained along, at `lr_scale`
    times the learning rate, by the bound itself whatever the weighting. Raises ValueError for unknown laws.
    """

    head = False
    weight = None  # a function of t, drawn with it

    def __init__(
        self,
        process: object,
        sigma_data: float = 0.5,
        time_sampling: str = "snr",
        weighting: str = "likelihood",
        t_min: float | None = None,
        lr_scale: float = 0.1,
        **kwargs: Any,
    ):
        kwargs.pop("kernel", None)  # a process makes Gaussian noise
        super().__init__(sigma_data, **kwargs)
        self.process, self.lr_scale = process, lr_scale
        self.time_sampling, self.weighting, self.t_min = time_sampling, weighting, t_min
        self.learned = isinstance(process, torch.nn.Module)
        self._levels = self._make_levels()  # fail now

    @torch.no_grad()
    def _make_levels(self):
        t_min = self.process.time(SIGMA_MIN) if self.t_min is None else self.t_min
        return NoiseLevels(self.process, self.time_sampling, self.weighting, float(t_min), self.sigma_data)

    @property
    def separable(self) -> bool:  # Newton's method for times stops when all have converged
        return super().separable and (self.time_sampling, self.weighting) == ("snr", "likelihood")

    @torch.no_grad()
    def draw_levels(self, n: int, generator: Generator, device: torch.device) -> tuple[Tensor, Tensor]:
        """Noise levels and their weights over the density, computed in float64."""
        uniform = random.rand([n], generator, device)
        # The laws of times work on the CPU, and what has no float64 does.
        by_time = (self.time_sampling, self.weighting) != ("snr", "likelihood")
        uniform = (uniform.cpu() if by_time or device.type == "mps" else uniform).double()
        if self.learned and (self.time_sampling, self.weighting, self.t_min) == ("snr", "likelihood", None):
            ends = torch.tensor([SIGMA_MAX, SIGMA_MIN], dtype=torch.float64) ** -2
            levels = snr_law(uniform, *ends, self.sigma_data)
        else:
            levels = (self._make_levels() if self.learned else self._levels).draw(uniform)
        return tuple(send(values.to(torch.float32), device) for values in levels)

    def draw(self, images: Tensor, labels: Tensor | None = None, generator: Generator | None = None) -> Draws:
        draws = super().draw(images, labels, generator)
        if self.learned:  # unit noise at the end of the process, where the bound depends on its matrices
            draws["end_noise"] = self.kernel.unit_noise(images.shape, generator=generator).to(images.device)
        return draws

    def error(self, net: Callable, draws: Draws) -> tuple[Tensor, Tensor | None]:
        error, logvar = super().error(net, draws)
        # What float32 lost in the sum, with the slope c_skip that every EDM denoiser nearly has at low noise.
        lost = draws.noise - (draws.images + draws.noise - draws.images)
        skip = self.sigma_data**2 / (draws.sigma**2 + self.sigma_data**2)
        return error + expand(skip, lost) * lost, logvar

    def evaluate(self, net: torch.nn.Module, draws: Draws) -> Tensor:
        # First, since a training forward pass may overwrite weights that an earlier one needs for its gradient (EDM2).
        ends = self.endpoints(net, draws) if self.learned else 0
        error, logvar = self.error(net, draws)
        loss = expand(draws.weight, error) * error**2
        return (loss if logvar is None else loss / logvar.exp() + logvar) + ends

    def endpoints(self, net: torch.nn.Module, draws: Draws) -> Tensor:
        """What of the negative bound depends on the matrices, per element [N, ...]: KL, and the integral's upper end.

        The second term has value 0 and the gradient -1/2 E |D(y_T) - x|^2 d snr(T): the integral itself is estimated by
        the loss over a range of noise levels of its own.
        """
        with getattr(self.process, "held", contextlib.nullcontext)():
            return self._endpoints(net, draws)

    def _endpoints(self, net, draws):
        images = draws.images
        snr = self.process.snr(self.process.T)
        with torch.no_grad():
            sigma = send(snr.rsqrt().to(images.dtype), images.device)
            training = net.training
            noisy = images + sigma * draws.end_noise
            denoised = net.eval()(noisy, sigma.expand(len(images)), draws.labels, **network_options(draws, net))
            net.train(training)
            error = likelihood.per_sample((denoised - images) ** 2)  # [N]
        kl = likelihood.endpoint_kl(self.process, images, self.process.T)  # [N]
        end = -0.5 * error * send(snr - snr.detach(), error.device)
        per_element = (kl + end) / images[0].numel()
        return expand(per_element.to(images.dtype), images).expand_as(images)
