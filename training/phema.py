"""Averages of the weights over training: power-function profiles (EDM2 sec. 3), half-life and fixed-decay averages.

Every average has update(cur_nimg, batch_size), get() -> [(module, suffix)], state_dict() and load_state_dict().
"""

import copy
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch


def exp_to_std(exp: npt.ArrayLike) -> npt.NDArray[np.float64] | np.float64:
    """Relative standard deviation of the power-function profile with exponent gamma >= 0 (EDM2 eq. 126)."""
    exp = np.float64(exp)
    return np.sqrt((exp + 1) / (np.square(exp + 2) * (exp + 3)))


def std_to_exp(std: npt.ArrayLike) -> npt.NDArray[np.float64] | np.float64:
    """Inverse of `exp_to_std` (EDM2 eq. 126), elementwise for arrays. Raises ValueError outside (0, 1/sqrt(12)]."""
    std = np.asarray(std, dtype=np.float64)
    if not np.all((std > 0) & (std <= 1 / np.sqrt(12) * (1 + 1e-12))):
        raise ValueError(f"EMA std={std} must lie in (0, 0.2887)")
    flat = [np.roots([1, 7, 16 - s**-2, 12 - s**-2]).real.max() for s in std.reshape(-1)]
    return np.asarray(flat, dtype=np.float64).reshape(std.shape)[()]


def power_function_beta(std: npt.ArrayLike, t_next: npt.ArrayLike, t_delta: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Decay of a step from t_next - t_delta to t_next images for a profile of the given std (EDM2 eq. 127)."""
    return (1 - t_delta / t_next) ** (std_to_exp(std) + 1)


def power_function_correlation(
    a_ofs: npt.ArrayLike, a_std: npt.ArrayLike, b_ofs: npt.ArrayLike, b_std: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """Inner product of two power-function profiles that end at a_ofs, b_ofs (EDM2 eq. 151). Broadcasts."""
    a_ofs, b_ofs = np.broadcast_arrays(np.asarray(a_ofs, np.float64), np.asarray(b_ofs, np.float64))
    a_exp, b_exp = std_to_exp(a_std), std_to_exp(b_std)
    t_min, t_max = np.minimum(a_ofs, b_ofs), np.maximum(a_ofs, b_ofs)
    later = np.where(a_ofs > b_ofs, a_exp, b_exp)  # with equal ends the ratio is 1 and either will do
    return (a_exp + 1) * (b_exp + 1) * (t_min / t_max) ** later / ((a_exp + b_exp + 1) * t_max)


def solve_posthoc_coefficients(
    in_ofs: npt.ArrayLike, in_std: npt.ArrayLike, out_ofs: npt.ArrayLike, out_std: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """Least-squares weights that make the outputs' profiles from the inputs' (EDM2 eq. 152-154).

    in_ofs, in_std: ends (images) and stds of the stored averages, [I]; out_ofs, out_std of the wanted ones, [O]; scalars
    broadcast. Returns [I, O] float64, each column summing to one.
    """
    in_ofs, in_std = np.broadcast_arrays(np.float64(in_ofs), np.float64(in_std))
    out_ofs, out_std = np.broadcast_arrays(np.float64(out_ofs), np.float64(out_std))
    rows = in_ofs.reshape(-1, 1), in_std.reshape(-1, 1)
    gram = power_function_correlation(*rows, in_ofs.reshape(1, -1), in_std.reshape(1, -1))
    right = power_function_correlation(*rows, out_ofs.reshape(1, -1), out_std.reshape(1, -1))
    x = np.linalg.solve(gram, right)
    return x / x.sum(axis=0)


class _Averages:
    """Copies of a module, updated in place; buffers are copied when read. Subclasses give `betas`, the decay of each."""

    def __init__(self, module: torch.nn.Module, names: Sequence[str]) -> None:
        self.module = module
        self.names = list(names)
        self.copies = [copy.deepcopy(module).eval().requires_grad_(False) for _ in self.names]

    @torch.no_grad()
    def update(self, cur_nimg: int, batch_size: int) -> None:
        """cur_nimg: images seen after the step; batch_size: images of the step."""
        source = [p.detach() for p in self.module.parameters()]
        for average, beta in zip(self.copies, self.betas(cur_nimg, batch_size), strict=True):
            if source:
                torch._foreach_lerp_(list(average.parameters()), source, 1 - beta)

    @torch.no_grad()
    def get(self) -> list[tuple[torch.nn.Module, str]]:
        """[(module, name)]: averaged modules in eval mode, with the current buffers."""
        for average in self.copies:
            for p, q in zip(average.buffers(), self.module.buffers(), strict=True):
                p.copy_(q)
        return list(zip(self.copies, self.names, strict=True))

    def state_dict(self) -> dict:
        return dict(names=list(self.names), emas=[dict(average.state_dict()) for average in self.copies])

    def load_state_dict(self, state: dict) -> None:
        if list(state["names"]) != self.names:
            raise ValueError(f"the checkpoint holds the averages {state['names']}, the options ask for {self.names}")
        for average, values in zip(self.copies, state["emas"], strict=True):
            average.load_state_dict(values)


class PowerFunctionEMA(_Averages):
    """Power-function averages of the given relative stds (EDM2 sec. 3.1)."""

    def __init__(self, module: torch.nn.Module, stds: Sequence[float] = (0.050, 0.100)) -> None:
        self.exps = [float(std_to_exp(std)) for std in stds]
        super().__init__(module, [f"{std:.3f}" for std in stds])

    def betas(self, cur_nimg: int, batch_size: int) -> list[float]:
        return [(1 - batch_size / cur_nimg) ** (exp + 1) for exp in self.exps]


class HalfLifeEMA(_Averages):
    """Exponential average with a half-life in million images (EDM's), ramped up as `rampup_ratio` of the images seen."""

    def __init__(
        self, module: torch.nn.Module, halflife_Mimg: float = float("inf"), rampup_ratio: float | None = 0.09
    ) -> None:
        super().__init__(module, ["ema"])
        self.halflife_Mimg = halflife_Mimg
        self.rampup_ratio = rampup_ratio

    def betas(self, cur_nimg: int, batch_size: int) -> list[float]:
        halflife = self.halflife_Mimg * 1e6
        if self.rampup_ratio is not None:
            halflife = min(halflife, cur_nimg * self.rampup_ratio)
        return [0.5 ** (batch_size / max(halflife, 1e-8))]


class DecayEMA(_Averages):
    """Exponential average with a fixed decay per step, ramped up as (1 + n) / (10 + n) over the first n steps (DDPM, CLD)."""

    def __init__(self, module: torch.nn.Module, decay: float = 0.9999) -> None:
        super().__init__(module, ["ema"])
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must lie in [0, 1)")
        self.decay = decay

    def betas(self, cur_nimg: int, batch_size: int) -> list[float]:
        step = cur_nimg / batch_size
        return [min(self.decay, (1 + step) / (10 + step))]
