"""Bits per dimension of a snapshot on images: mean and standard error, overall and per source, with the ends beside it."""

import math

import torch

from torch_utils.random import StackedRandomGenerator, hash_seed
from training import encoders, likelihood
from training.dataset import load_arrays

METHODS = ("elbo", "ode")
ENCODERS = {"center": encoders.CenterEncoder, "logit": encoders.LogitEncoder, "discrete": encoders.StandardRGBEncoder}
OFFSET_BITS = 8  # densities are of y in [0, 1], levels are 1/256 apart


def choose_encoder(name, trained):
    """The transform that likelihoods are computed in. trained: the snapshot's encoder.

    None: the snapshot's own if it dequantises, else "discrete", the probability of the 256 levels. Raises ValueError for
    VAE latents, and for a transform that is not the one that the network knows (center and discrete share a scale).
    """
    if isinstance(trained, encoders.StabilityVAEEncoder):
        raise ValueError("VAE latents have no bits/dim: decoding is not invertible; train on pixels for likelihoods")
    if name is None:
        if isinstance(trained, (encoders.UniformDequantizer, encoders.IdentityEncoder)):
            return trained
        return encoders.StandardRGBEncoder()
    if name not in ENCODERS:
        raise ValueError(f"--encoder={name} is unknown: choose {', '.join(ENCODERS)}")
    made = ENCODERS[name]()
    trained = trained or encoders.StandardRGBEncoder()
    scale = (encoders.StandardRGBEncoder, encoders.CenterEncoder)
    if made != trained and not (isinstance(made, scale) and isinstance(trained, scale)):
        raise ValueError(f"--encoder={name}: the network was trained behind {trained!r}, which has another scale")
    return trained if made == trained else made


def summary(bits):
    """{"bits_per_dim", "standard_error", "num"} of float64 values [n]."""
    error = float(bits.std() / math.sqrt(len(bits))) if len(bits) > 1 else None
    return {"bits_per_dim": float(bits.mean()), "standard_error": error, "num": len(bits)}


def likelihood_report(
    net,                      # denoiser
    dataset,                  # training.dataset.Dataset of uint8 images, or of float arrays (IdentityEncoder)
    process,                  # EDM or a linear process
    encoder,                  # see choose_encoder
    method="elbo",            # or "ode", the probability flow
    num=None,                 # at most so many images, a seeded subset; None: all
    seed=0,                   # draws of image i depend on (seed, i) alone
    per_source=True,
    batch=256,
    num_samples=8,            # elbo: network evaluations per image
    probe="rademacher",       # ode: Hutchinson probes, see training.likelihood
    hutch_probes=1,
    rtol=1e-5, atol=1e-5,
    progress=None,            # called with the number of images done
    **ends,                   # prior, t_min, t_max, sigma_min, sigma_max
):  # fmt: skip
    """Bits per dimension of uint8 images (float arrays: of their density), as plain data.

    elbo with dequantising encoders: the bound of the density, -(elbo + log_abs_det) / (d ln 2) + 8; discrete: of the
    probability of the levels. ode: as published, x stands for the state at t_min; discrete: a bound, with a decoder.
    Returns {"bits_per_dim", "standard_error", "num", "nats", "endpoint_kl" (bits per dimension), "sigma_min",
    "sigma_max", "sources": {label: {...}}}. Raises ValueError for an unknown method, or an empty data set.
    """
    if method not in METHODS:
        raise ValueError(f"--method={method} is unknown: choose {', '.join(METHODS)}")
    index = torch.arange(len(dataset))
    if num is not None and num < len(dataset):
        index = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:num].sort().values
    images, labels = load_arrays(dataset.subset(index.numpy()))
    device = next(iter(net.parameters())).device if hasattr(net, "parameters") else torch.device("cpu")
    decoder = "discretised" if isinstance(encoder, encoders.StandardRGBEncoder) else "gaussian"
    columns, info = [], {}
    for start in range(0, len(images), batch):
        rows = slice(start, start + batch)
        generator = StackedRandomGenerator(device, [hash_seed(seed, int(i)) for i in index[rows]])
        x = encoder.encode_latents(images[rows].to(device), generator)
        onehot = labels[rows].to(device) if labels.shape[1] and getattr(net, "label_dim", 0) else None
        if method == "elbo":
            with torch.no_grad():
                nats, parts = likelihood.elbo(
                    net,
                    process,
                    x,
                    onehot,
                    num_samples=num_samples,
                    decoder=decoder,
                    generator=generator,
                    terms=True,
                    **ends,
                )
            kl, info = parts["kl"], {name: parts[name] for name in ("sigma_min", "sigma_max")}
        else:
            nats, info = likelihood.ode_log_likelihood(
                net, process, x, onehot, probe=probe, hutch_probes=hutch_probes, rtol=rtol, atol=atol,
                decoder="discretised" if decoder == "discretised" else None, generator=generator, terms=True, **ends,
            )  # fmt: skip
            t_max = process.time(min(info["sigma_max"], float(process.sigma(process.T))))
            kl = likelihood.endpoint_kl(
                process, x, t_max, ends.get("prior", "stationary"), float(getattr(net, "sigma_data", 0.5))
            )
        if isinstance(encoder, encoders.UniformDequantizer):
            nats = nats + encoder.log_abs_det(x).to(nats)
        columns.append(torch.stack([nats.detach().cpu(), kl.detach().double().cpu()]))
        if progress is not None:
            progress(len(x))
    nats, kl = torch.cat(columns, dim=1)
    dims = x[0].numel()
    dequantised = isinstance(encoder, encoders.UniformDequantizer)
    bits = -nats / (dims * math.log(2)) + (OFFSET_BITS if dequantised else 0)
    result = {
        **summary(bits),
        "nats": float(nats.mean()),
        "endpoint_kl": float(kl.mean()) / (dims * math.log(2)),
        **info,
    }
    if per_source and labels.shape[1]:
        ids = labels.argmax(dim=1)
        result["sources"] = {str(int(k)): summary(bits[ids == k]) for k in ids.unique()}
    return result
