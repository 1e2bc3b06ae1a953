"""What noise: the kernels (Gaussian, PFGM++) and the processes (EDM, linear diffusions) behind one contract.

A new linear process is a class with its Q and D; decorated, snapshots can hold it:

    @persistent
    class Underdamped(LinearProcess):
        def __init__(self, friction=1.0, **options):
            super().__init__(Q=[[0, -1], [1, 0]], D=[[0, 0], [0, friction]], **options)
"""

from dnnlib.util import one_of
from training.processes.base import GaussianKernel, Process, aug_dim, is_linear, noise_law
from training.processes.edm import EDM
from training.processes.linear import LinearProcess
from training.processes.named import ALDA, CLD, MALDA, VP, Learned
from training.processes.pfgmpp import PFGMpp

__all__ = ["ALDA", "CLD", "EDM", "MALDA", "VP", "GaussianKernel", "Learned", "LinearProcess", "PFGMpp", "Process"]
__all__ += ["REGISTRY", "aug_dim", "get", "is_linear", "noise_law"]

REGISTRY = dict(edm=EDM, pfgmpp=PFGMpp, vp=VP, cld=CLD, alda=ALDA, malda=MALDA, learned=Learned, linear=LinearProcess)


def get(name: str, **options: object) -> GaussianKernel:
    """Make a process by name, e.g. `get("pfgmpp", D=128)`. Raises ValueError for unknown names or options."""
    if name not in REGISTRY:
        raise ValueError(f"process {name!r} {one_of(name, REGISTRY)}")
    try:
        return REGISTRY[name](**options)
    except TypeError as error:
        raise ValueError(f"process {name!r}: {error}") from None
