"""How to get back: solvers. Each exists as a plain function that returns images and as a generator of its states."""

from typing import NamedTuple

import torch


class State(NamedTuple):
    """What a solver's generator yields: after `step` steps the state stands at `time` (heun: the noise level)."""

    step: int
    time: float
    state: torch.Tensor


@torch.no_grad()
def heun_states(
    net,                            # denoiser net(x, sigma, labels)
    noise,                          # unit noise [N, *data_shape], scaled by sigma_max inside
    labels=None,                    # [N, K], or None
    gnet=None,                      # guiding denoiser; needed if guidance != 1
    num_steps=32,                   # N; evaluates the network 2 N - 1 times
    sigma_min=0.002,                # lowest noise level but zero
    sigma_max=80,                   # highest noise level
    rho=7,                          # exponent of the grid
    guidance=1,                     # D_g = G + guidance (D - G)
    S_churn=0,                      # amount of stochasticity; 0 draws nothing
    S_min=0,                        # churn only at noise levels in [S_min, S_max]
    S_max=float("inf"),
    S_noise=1,                      # scale of the added noise
    dtype=torch.float32,            # of state and grid
    randn_like=torch.randn_like,    # source of the churn noise
):  # fmt: skip
    """Generator of `State`s of `heun`: the noise, then the image after every step; `time` is the noise level."""
    if num_steps < 1:
        raise ValueError(f"num_steps = {num_steps}: at least one step is needed")
    if guidance != 1 and gnet is None:
        raise ValueError(f"guidance = {guidance} needs a guiding network (gnet)")

    def denoise(x, sigma):
        denoised = net(x, sigma, labels).to(dtype)
        return denoised if guidance == 1 else gnet(x, sigma, labels).to(dtype).lerp(denoised, guidance)

    # EDM eq. 5. One step has sigma_max as its only noise level: the image is D(x, sigma_max).
    index = torch.arange(num_steps, dtype=dtype, device=noise.device)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (high + index / max(num_steps - 1, 1) * (low - high)) ** rho
    sigmas = torch.cat([sigmas, torch.zeros_like(sigmas[:1])])

    x_next = noise.to(dtype) * sigmas[0]
    yield State(0, float(sigmas[0]), x_next)
    for step, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        x = x_next
        if S_churn > 0 and S_min <= sigma <= S_max:
            gamma = min(S_churn / num_steps, 2**0.5 - 1)
            sigma_hat = sigma + gamma * sigma
            x = x + (sigma_hat**2 - sigma**2).sqrt() * S_noise * randn_like(x)
            sigma = sigma_hat
        slope = (x - denoise(x, sigma)) / sigma
        x_next = x + (sigma_next - sigma) * slope
        if step < num_steps - 1:  # second order, except for the step to zero
            slope_next = (x_next - denoise(x_next, sigma_next)) / sigma_next
            x_next = x + (sigma_next - sigma) * (0.5 * slope + 0.5 * slope_next)
        yield State(step + 1, float(sigma_next), x_next)


def heun(
    net, noise, labels=None, gnet=None, num_steps=32, sigma_min=0.002, sigma_max=80, rho=7, guidance=1,
    S_churn=0, S_min=0, S_max=float("inf"), S_noise=1, dtype=torch.float32, randn_like=torch.randn_like,
):  # fmt: skip
    """EDM's second-order Heun sampler (Karras et al. 2022, Algorithm 2) with guidance and churn, as in EDM2.

    Arguments as in `heun_states`. Returns images [N, *data_shape] of type `dtype`. Raises ValueError for less than
    one step, or guidance without a guiding network.
    """
    states = heun_states(
        net, noise, labels, gnet, num_steps, sigma_min, sigma_max, rho, guidance,
        S_churn, S_min, S_max, S_noise, dtype, randn_like,
    )  # fmt: skip
    return last_state(states)


def last_state(states):
    """Run a generator of States to its end and return the last state's tensor."""
    for state in states:
        last = state
    return last.state
