"""Rounded weights: how much of their precision a sampler needs (PFGM++, arXiv 2302.04265, sec. 5.3)."""

import copy
import re

import torch

from dnnlib.util import one_of

LEVEL = re.compile(r"(?:^|\.)(?:enc|dec)\.(\d+)x\d+_")  # a layer of a U-Net's resolution level
ORIGINAL_EXEMPT = ("norm", "affine", "map", "32")


def quantize_tensor(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x rounded to 2^bits levels between its minimum and maximum, as float of x's shape and type.

    The rule of the published experiment, in float32: scale = (max - min) / (2^bits - 1), zero point
    z = trunc(clamp(-min / scale, 0, 2^bits - 1)), code q = round(clamp(z + x / scale, 0, 2^bits - 1)) half to even,
    result scale (q - z). Zero stays zero where the range holds it. As published, a range that does not hold zero
    saturates, and a constant becomes 0 (all zeros stay so; the published rule fails there).
    """
    if int(bits) != bits or not 1 <= bits <= 24:
        raise ValueError(f"bits={bits}: give a whole number from 1 to 24 (--quantize-bits)")
    w = x.detach().to(torch.float32)
    top = 2 ** int(bits) - 1
    low, high = (w.min(), w.max()) if w.numel() else (0.0, 0.0)
    if not high > low:
        return torch.zeros_like(x)
    scale = (high - low) / top
    zero = int((-low / scale).clamp(0, top))
    code = (zero + w / scale).clamp(0, top).round()
    return (scale * (code - zero)).to(x.dtype)


def _by_role(net):
    """Convolutions of the inner resolution levels.

    Exempt are the first and last level (the image's own resolution), embeddings and modulation by them, norms, biases and
    gains.
    """
    found = [(name, p, LEVEL.search(name)) for name, p in net.named_parameters()]
    levels = {int(match[1]) for _, _, match in found if match}
    if len(levels) < 2:
        raise ValueError("this network has no inner resolution levels to quantize: give --quantize-policy=original")
    return [name for name, p, match in found if match and p.ndim == 4 and int(match[1]) < max(levels)]


def _original(net):
    """The published rule: "weight" in the name, and none of four substrings; "32" exempts the 32x32 level of CIFAR-10."""
    names = [name for name, _ in net.named_parameters()]
    return [name for name in names if "weight" in name and not any(part in name for part in ORIGINAL_EXEMPT)]


POLICIES = {"role": _by_role, "original": _original}


def quantized_names(net: torch.nn.Module, policy: str = "role") -> list[str]:
    """Names of the parameters that a policy rounds; for the CIFAR-10 networks of EDM both policies name the same.

    Raises ValueError for an unknown policy, and for "role" on a network without inner resolution levels.
    """
    if policy not in POLICIES:
        raise ValueError(f"--quantize-policy={policy} {one_of(policy, POLICIES)}")
    return POLICIES[policy](net)


@torch.no_grad()
def quantize_weights(net: torch.nn.Module, bits: int | None, policy: str = "role") -> torch.nn.Module:
    """A copy of `net` whose weights are rounded to `bits` bits, each tensor on its own; bits None: `net` itself.

    Activations stay as they are. policy: "role" or "original", see `quantized_names`.
    """
    if bits is None:
        return net
    net = copy.deepcopy(net)
    for name in quantized_names(net, policy):
        p = net.get_parameter(name)
        p.copy_(quantize_tensor(p, bits))
    return net
