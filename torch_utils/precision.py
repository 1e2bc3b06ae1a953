"""Precision of the arithmetic, one meaning for training and sampling.

fp32: float32 throughout. tf32: convolutions and matrix products of float32 with 10 bits of mantissa, on GPUs. bf16, fp16: the
body of the network computes in that type; weights, their normalisation, embeddings, preconditioning, loss, optimizer and
averages stay float32 (EDM2 appendix B.6).
"""

import contextlib
import copy
import warnings
from collections.abc import Iterator

import torch

REDUCED = {"bf16": "bfloat16", "fp16": "float16"}
PRECISIONS = ("fp32", "tf32", *REDUCED)


def use(precision: str | None, device: torch.device | str) -> None:
    """Set the process up for a precision (None: as fp32). Raises ValueError for one that the device does not have."""
    kind = torch.device(device).type
    if kind == "cpu":
        if precision == "fp16":
            raise ValueError("--precision=fp16 needs a GPU: on the CPU take fp32, or bf16 where the processor has AMX")
        if precision == "tf32":
            warnings.warn("--precision=tf32 is for GPUs: the CPU computes in float32", stacklevel=3)
        if precision == "bf16" and not getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)():
            warnings.warn("--precision=bf16: this processor has no AMX, float32 is faster", stacklevel=3)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@contextlib.contextmanager
def full() -> Iterator[None]:
    """Where products and convolutions of float32 are computed in float32, whatever `use` has set: of what measures."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = before


def arguments(precision: str | None, fp16: bool) -> dict:
    """Constructor arguments of a network: of `precision`, or without it of EDM2's `fp16` (float16 on GPUs alone)."""
    if precision == "bf16":
        return dict(use_fp16=True, reduced_dtype="bfloat16")
    return dict(use_fp16=fp16 if precision is None else precision == "fp16")


def precise(net: torch.nn.Module, precision: str | None) -> torch.nn.Module:
    """A denoiser that computes in `precision`, with the same weights; itself where it does already, or for None.

    Raises ValueError for a network that knows float32 only.
    """
    if precision is None:
        return net
    reduced, there = REDUCED.get(precision), hasattr(net, "use_fp16") and hasattr(net, "reduced_dtype")
    if not there:
        if reduced is not None:
            raise ValueError(f"--precision={precision}: {type(net).__name__} computes in float32 alone, give fp32")
        return net
    if net.use_fp16 == (reduced is not None) and reduced in (None, net.reduced_dtype):
        return net
    net = copy.copy(net)
    net.use_fp16, net.reduced_dtype = reduced is not None, reduced or net.reduced_dtype
    return net
