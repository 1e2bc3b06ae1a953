"""Averages of the weights over training: power-function profiles (EDM2 sec. 3), half-life and fixed-decay averages.

Every average has update(cur_nimg, batch_size), get() -> [(module, suffix)], state_dict() and load_state_dict(). Averages of
power-function profiles that were stored during training make those of any other profile afterwards: `reconstruct`.
"""

import copy
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from dnnlib import outputs
from torch_utils import conversion, foreign, persistence


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
        # Walking through the modules costs more than averaging a small network.
        self.source, *self.averages = ([*m.parameters()] for m in (module, *self.copies))

    @torch.no_grad()
    def update(self, cur_nimg: int, batch_size: int) -> None:
        """cur_nimg: images seen after the step; batch_size: images of the step."""
        if self.source:
            for average, beta in zip(self.averages, self.betas(cur_nimg, batch_size), strict=True):
                torch._foreach_lerp_(average, self.source, 1 - beta)

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


# --- reconstruction ---------------------------------------------------------------------------------------------------


def profile_error(
    in_ofs: npt.ArrayLike, in_std: npt.ArrayLike, out_ofs: npt.ArrayLike, out_std: npt.ArrayLike, x: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """Distance of the combinations x [I, O] from the wanted profiles, in L2 over time and relative to these; [O]."""
    ofs, std = (np.broadcast_to(np.float64(v), len(x)).reshape(-1, 1) for v in (in_ofs, in_std))
    gram = power_function_correlation(ofs, std, ofs.T, std.T)
    right = power_function_correlation(ofs, std, out_ofs, out_std)
    own = power_function_correlation(out_ofs, out_std, out_ofs, out_std)
    square = (x * (gram @ x)).sum(axis=0) - 2 * (x * right).sum(axis=0) + own
    return np.sqrt(np.maximum(square / own, 0))


@dataclass(frozen=True)
class Stored:
    """A snapshot file of a power-function average."""

    path: Path
    nimg: int  # images seen
    std: float  # of the profile, three decimals


def parse_stds(text: str) -> list[float]:
    """EMA stds such as 0.050,0.100 or, evenly spaced, 0.010,0.015,...,0.050; ascending, three decimals. Raises ValueError."""
    values, gap = [], False
    for part in str(text).split(","):
        if part.strip() == "...":
            if gap or len(values) < 2:
                raise ValueError(f"{text!r}: ... stands between two numbers and one, as in 0.010,0.015,...,0.050")
            gap = True
            continue
        try:
            value = float(part)
        except ValueError:
            raise ValueError(f"{text!r} is no list of EMA stds: {part!r} is no number") from None
        if not 0 < round(value, 3) < 0.2887:
            raise ValueError(
                f"{text!r}: the EMA std {part.strip()} must lie in 0.001..0.288 (names have three decimals)"
            )
        if gap:
            first, step = values[-1], values[-1] - values[-2]
            count = (value - first) / step if step else 0
            if count < 1 or abs(count - round(count)) > 1e-4 or count > 10_000:
                raise ValueError(f"{text!r}: no number of equal steps leads from {first:g} to {value:g}")
            values += [first + step * k for k in range(1, round(count))]
            gap = False
        values.append(value)
    if gap:
        raise ValueError(f"{text!r}: ... stands between two numbers and one, as in 0.010,0.015,...,0.050")
    return sorted({round(value, 3) for value in values})


def stored_profiles(folder: str | Path, prefix: str | None = None, stds: Sequence[float] | None = None) -> list[Stored]:
    """The snapshots <prefix>-<kimg>-<std>.safetensors or .pkl of a folder, by time and std. stds: keep only these.

    Raises ValueError where there are none, of several prefixes or of several files for one profile.
    """
    found, prefixes = {}, set()
    for path in sorted(Path(folder).iterdir()):
        match = re.fullmatch(r"(.*)-\d+-\d+\.\d+\.(pkl|safetensors)", path.name)
        if match is None or prefix not in (None, match[1]):
            continue
        nimg, std = foreign.nimg_of(path)
        if nimg is None:
            raise ValueError(
                f"{path}: its number is that of no multiple of 1024 images; profiles need the time in images"
            )
        if stds is not None and round(float(std), 3) not in stds:
            continue
        prefixes.add(match[1])
        if (nimg, std) in found:
            raise ValueError(f"{found[nimg, std].path} and {path.name} are one profile: leave one, or give --inprefix")
        found[nimg, std] = Stored(path, nimg, round(float(std), 3))
    if not found:
        raise ValueError(f"{folder} holds no snapshots <prefix>-<kimg>-<std>.safetensors (or .pkl) of that kind")
    if len(prefixes) > 1:
        raise ValueError(f"{folder} holds snapshots of several kinds ({', '.join(sorted(prefixes))}): give --inprefix")
    return sorted(found.values(), key=lambda s: (s.nimg, s.std))


def select_inputs(stored: Sequence[Stored], nimg: int | None = None) -> tuple[list[Stored], int]:
    """(those that can enter a profile that ends at `nimg`, nimg); None: the latest. Raises ValueError."""
    nimg = max(s.nimg for s in stored) if nimg is None else nimg
    inputs = [s for s in stored if 0 < s.nimg <= nimg]
    if nimg not in {s.nimg for s in inputs}:
        times = ", ".join(str(t // 1000) for t in sorted({s.nimg for s in stored if s.nimg}))
        raise ValueError(f"no snapshot at {nimg // 1000} kimg, where the profile is to end; there are: {times}")
    return inputs, nimg


@dataclass
class Reconstructed:
    """An average that was made from stored ones."""

    std: float
    snapshot: persistence.Snapshot
    dtype: torch.dtype | None  # of the parameters in the inputs
    fit_error: float  # see profile_error


@torch.no_grad()
def reconstruct(
    stored: Sequence[Stored],
    stds: Sequence[float],
    nimg: int | None = None,
    batch: int = 8,
    progress: Callable[[list], Iterable] = iter,
) -> Iterator[Reconstructed]:
    """Averages of any power-function profiles that end at `nimg` (None: the latest input), EDM2 sec. 3.2 and app. C.

    Every `batch` of them takes one pass over the files; memory holds these, their sums in float32, and one file. Buffers are
    those of the last input. progress: wraps the list of files of a pass. Raises ValueError for files that are not averages
    of one network in one run, or not finite.
    """
    inputs, nimg = select_inputs(stored, nimg)
    if not stds:
        return
    about = [s.nimg for s in inputs], [s.std for s in inputs], nimg, np.float64(stds)
    x = solve_posthoc_coefficients(*about)
    errors = profile_error(*about, x)
    shapes = lambda state: {name: value.shape for name, value in state.items()}
    count = -(-len(stds) // batch)
    for part in np.array_split(np.arange(len(stds)), count):
        first = None
        for entry, weights in zip(progress(inputs), x[:, part].tolist(), strict=True):
            header, state = persistence.read_snapshot(entry.path)
            for said, named in zip(_profile_of(header), (entry.nimg, entry.std), strict=True):
                if said not in (None, named):
                    raise ValueError(
                        f"{entry.path}: is of {named} by its name, of {said} by its header: name it as it was"
                    )
            if first is None:
                first, layout = header, shapes(state)
                names, dtype = _parameters(persistence.assemble(entry.path, header, state), state)
                sums = [{name: torch.zeros(state[name].shape) for name in names} for _ in part]
            elif header["net"] != first["net"] or shapes(state) != layout:
                raise ValueError(f"{entry.path}: another network than {inputs[0].path.name}")
            elif other := _other_run(first, header):
                raise ValueError(f"{entry.path}: of another run than {inputs[0].path.name}: {other}")
            for name in names:
                value = state[name].to(torch.float32)
                if not value.isfinite().all():
                    raise ValueError(f"{entry.path}: {name} is not finite")
                for total, weight in zip(sums, weights, strict=True):
                    total[name].add_(value, alpha=weight)
        for index, total in zip(part, sums, strict=True):
            header = first | {"nimg": nimg, "ema": f"{stds[index]:.3f}"}
            made = persistence.assemble(inputs[0].path, header, {**state, **total})
            yield Reconstructed(stds[index], made, dtype, float(errors[index]))


def _profile_of(header):
    """(images seen, std) by a header; None where it does not say, and the word where its average is of another kind."""
    nimg, ema = header.get("nimg"), header.get("ema")
    return nimg, round(float(ema), 3) if re.fullmatch(r"\d\.\d+", str(ema)) else ema


def _other_run(first, header):
    """What headers of two averages say differently that is the same all through a run; empty: nothing."""
    from training.config import differences

    parts = [name for name in ("encoder", "process", "sources") if header.get(name) != first.get(name)]
    return "; ".join(parts + differences(first.get("options") or {}, header.get("options") or {}))


def _parameters(snapshot, state):
    """(names in the file of what is averaged, stored type of the network's parameters)."""
    modules = {"net": snapshot.net, "process": snapshot.process}
    modules = {where: module for where, module in modules.items() if isinstance(module, torch.nn.Module)}
    names = [f"{where}.{name}" for where, module in modules.items() for name, _ in module.named_parameters()]
    return names, conversion.stored_type(snapshot, state)


def reconstruct_command(
    indir: str,
    outdir: str,
    outstd: str,
    inprefix: str | None = None,
    instd: str | None = None,
    outprefix: str = "phema",
    outkimg: int | None = None,
    skip: bool = False,
    batch: int = 8,
) -> dict:
    """What reconstruct_phema.py does; returns what it found and wrote, as plain data. Raises ValueError."""
    from tqdm import tqdm

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("averages are reconstructed by one process: start without torchrun")
    if Path(outprefix).name != outprefix:
        raise ValueError(f"--outprefix={outprefix}: a name without folders; these are for --outdir")
    stored = stored_profiles(indir, inprefix, None if instd is None else parse_stds(instd))
    times = {s.nimg // 1000: s.nimg for s in stored}
    inputs, nimg = select_inputs(stored, None if outkimg is None else times.get(outkimg, outkimg * 1000))
    path = lambda std: Path(outdir) / f"{outprefix}-{nimg // 1000:07d}-{std:.3f}.safetensors"
    stds = [std for std in parse_stds(outstd) if not (skip and path(std).exists())]
    for std in stds:
        outputs.check("--outdir", path(std), outputs.SNAPSHOT, [outputs.Named("--indir", str(s.path)) for s in stored])
    made = []
    for found in reconstruct(inputs, stds, nimg, batch, lambda files: tqdm(files, unit="file", desc="profiles")):
        conversion.save_alike(path(found.std), found.snapshot, found.dtype, ema=f"{found.std:.3f}")
        made.append({"file": str(path(found.std)), "std": found.std, "fit_error": found.fit_error})
    return {"inputs": [s.path.name for s in inputs], "kimg": nimg // 1000, "outputs": made}
