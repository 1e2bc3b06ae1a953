"""What noise: the kernels (Gaussian, PFGM++) and the processes (EDM, linear diffusions) behind one contract."""

from training.processes.edm import EDM
from training.processes.kernels import GaussianKernel, PFGMpp

REGISTRY = {"edm": EDM, "pfgmpp": PFGMpp}


def get(name, **options):
    """Make a process by name, e.g. `get("pfgmpp", D=128)`. Raises ValueError for unknown names or options."""
    if name not in REGISTRY:
        raise ValueError(f"process {name!r} is unknown: choose one of {', '.join(sorted(REGISTRY))}")
    try:
        return REGISTRY[name](**options)
    except TypeError as error:
        raise ValueError(f"process {name!r}: {error}") from None


def from_spec(spec: dict):
    """Rebuild a process from the plain dictionary that `process.spec()` returned (a snapshot header holds it)."""
    options = dict(spec)
    return get(options.pop("name"), **options)


__all__ = ["EDM", "GaussianKernel", "PFGMpp", "REGISTRY", "from_spec", "get"]
