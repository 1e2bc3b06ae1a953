"""Training for a process: the denoising loss with the process's own noise levels and weight, and learned processes.

An EDM denoiser serves every process, so training "for CLD" is the denoising loss with CLD's law of t and its weight.
Learned matrices get their gradient where the evidence lower bound depends on them, at the ends: KL(q(u_T | x) || N(0, S))
and the noise level sigma(T) at which the integral of |D - x|^2 over d snr begins.
"""

import torch

from training import likelihood
from training.losses import DenoisingLoss
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

    def __init__(
        self, process, sigma_data=0.5, time_sampling="snr", weighting="likelihood", t_min=None, lr_scale=0.1,
        uncertainty=False, **kwargs,
    ):  # fmt: skip
        kwargs.pop("kernel", None)  # a process makes Gaussian noise
        super().__init__(sigma_data=sigma_data, uncertainty=uncertainty, **kwargs)
        self.process, self.lr_scale = process, lr_scale
        self.time_sampling, self.weighting, self.t_min = time_sampling, weighting, t_min
        self.learned = isinstance(process, torch.nn.Module)
        self._levels = self._make_levels()  # fail now

    @torch.no_grad()
    def _make_levels(self):
        t_min = self.process.time(SIGMA_MIN) if self.t_min is None else self.t_min
        return NoiseLevels(self.process, self.time_sampling, self.weighting, float(t_min), self.sigma_data)

    @torch.no_grad()
    def draw_levels(self, uniform):
        """(sigma, weight over density) float64 for float64 uniform numbers in [0, 1)."""
        if self.learned and (self.time_sampling, self.weighting, self.t_min) == ("snr", "likelihood", None):
            ends = torch.tensor([SIGMA_MAX, SIGMA_MIN], dtype=torch.float64) ** -2
            return snr_law(uniform, *ends, self.sigma_data)
        levels = self._make_levels() if self.learned else self._levels
        return levels.draw(uniform)

    def sample_sigma(self, shape, generator, device):
        sigma, weight = self.draw_levels(torch.rand(shape, generator=generator, device=device).double().cpu())
        self._weight = weight.to(device, torch.float32)  # for `draw`, which calls this
        return sigma.to(device, torch.float32)

    def draw(self, images, labels=None, generator=None):
        draws = super().draw(images, labels, generator)
        draws["weight"], self._weight = self._weight, None  # [N, 1, ...]
        if self.learned:  # unit noise at the end of the process, where the bound depends on its matrices
            draws["end_noise"] = self.kernel.unit_noise(images.shape, generator=generator).to(images.device)
        return draws

    def evaluate(self, net, draws):
        extra = {} if draws.augment_labels is None else dict(augment_labels=draws.augment_labels)
        # First, since a training forward pass may overwrite weights that an earlier one needs for its gradient (EDM2).
        ends = self.endpoints(net, draws, extra) if self.learned else 0
        noisy = draws.images + draws.noise
        # What float32 lost in the sum, with the slope c_skip that every EDM denoiser nearly has at low noise.
        lost = draws.noise - (noisy - draws.images)
        skip = self.sigma_data**2 / (draws.sigma**2 + self.sigma_data**2)
        target = draws.images if draws.targets is None else draws.targets
        out = net(noisy, draws.sigma, draws.labels, **(extra | dict(return_logvar=True) if self.uncertainty else extra))
        denoised, logvar = out if self.uncertainty else (out, None)
        loss = draws.weight * (denoised - target + skip * lost) ** 2
        if self.uncertainty:
            loss = loss / logvar.exp() + logvar
        return loss + ends

    def endpoints(self, net, draws, extra):
        """What of the negative bound depends on the matrices, per element [N, ...]: KL, and the integral's upper end.

        The second term has value 0 and the gradient -1/2 E |D(y_T) - x|^2 d snr(T): the integral itself is estimated by
        the loss over a range of noise levels of its own.
        """
        images = draws.images
        snr = self.process.snr(self.process.T)
        with torch.no_grad():
            sigma = snr.rsqrt().to(images).expand([len(images)] + [1] * (images.ndim - 1))
            training = net.training
            denoised = net.eval()(images + sigma * draws.end_noise, sigma, draws.labels, **extra)
            net.train(training)
            error = likelihood.per_sample((denoised - images) ** 2)  # [N]
        kl = likelihood.endpoint_kl(self.process, images, self.process.T)  # [N]
        end = -0.5 * error * (snr - snr.detach()).to(error.device)
        per_element = (kl + end) / images[0].numel()
        return per_element.to(images.dtype).reshape([-1] + [1] * (images.ndim - 1)).expand_as(images)
