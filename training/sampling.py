"""How to sample, every option once: for generate_images.py and `calculate_metrics.py gen`, and its part on the process for
the commands that take a process. Imports no torch, so that help costs nothing; `generation.batches` does what they say.
"""

import functools
import math
import warnings
from dataclasses import dataclass

from dnnlib import cli, options, outputs
from dnnlib.options import opt
from training import presets

_opt = functools.partial(opt, group="What to generate")
_running = functools.partial(opt, group="Running")
process_opt = functools.partial(opt, group="Process and solver")
sampler_opt = functools.partial(opt, group="Sampler")
ablation_opt = functools.partial(opt, group="Solver ablation (EDM table 1)")
guidance_opt = functools.partial(opt, group="Guidance")

# Options that act in one solver only.
_CHURN = ("S_churn", "S_min", "S_max", "S_noise")
OWN = {"sscs": ("half_step",), "ode": ("rtol", "atol"), "heun": _CHURN}
OWN["ablation"] = ("method", "disc", "schedule", "scaling", "alpha", *_CHURN)

IMAGES = outputs.Kind(
    "a folder of generated images",
    outputs.folder_of(r"\d{6,}(\.png|\.npy)?", r".*\.json"),
    folder=True,
    beside=("-grid.png",),
)


@dataclass
class ProcessChoice:
    """Which process; `training.processes.options.make_process` makes it."""

    process: str | None = process_opt(
        None, "edm, vp, cld, alda, malda, learned, linear, or a snapshot whose process to take", metavar="NAME|SNAPSHOT"
    )
    process_options: dict = process_opt(
        {}, "Of the process: M=0.25,beta=4:4,init_aux_var=0.01; V=3; full=true; Q=0:-1;1:0 (lists by :, rows by ;)"
    )


@dataclass
class Sampling(ProcessChoice):
    """What is sampled, and how. Without process and solver, or with edm and heun, it is EDM2's sampler."""

    net: str | None = _opt(None, "Network snapshot, or a run folder (its newest)", metavar="SNAPSHOT")
    preset: str | None = _opt(None, "Published combination of --net, --gnet and --guidance", metavar="NAME")
    models: str | None = _opt(
        None, "Folder or URL with the files of --preset; default: NVIDIA's, downloaded once", metavar="DIR"
    )
    class_idx: str | int | None = _opt(
        None, "Class label, or balanced: seed modulo sources; default: random per seed", "--class", metavar="N|balanced"
    )
    sources: list | None = _opt(None, "With --class=balanced: cycle through these labels only", type=cli.INTS)
    vae: str | None = _running(
        None, "VAE of latents: local folder, or name on the hub to download [default: local]", metavar="DIR|NAME"
    )
    labels: str | None = _opt(
        None, "Draw label vectors from this data set [default: those trained on]", metavar="DIR|ZIP|JSON"
    )
    max_batch_size: int = _running(32, "Largest batch per process", "--batch", at_least=1)
    aug_dim: float | None = _opt(
        None, "Refuse a snapshot that was not trained with this D of PFGM++", metavar="D", infinite=True
    )
    compile: bool = _running(False, "Compile the networks: pays back over many images; outputs differ by rounding")
    quantize_bits: int | None = _running(None, "Round weights to so many bits", metavar="B", at_least=1, at_most=24)
    quantize_policy: str = _running(
        "role", "Weights to round: inner resolution levels, or by name as published", choices=("role", "original")
    )

    precision: str | None = _running(
        None, "Of the networks' arithmetic", choices=("fp32", "tf32", "bf16", "fp16"), shown="what they were trained in"
    )

    num_steps: int = sampler_opt(32, "Sampling steps", "--steps", at_least=1)
    sigma_min: float = sampler_opt(0.002, "Lowest noise level", "--sigma_min", above=0)
    sigma_max: float = sampler_opt(80.0, "Highest noise level", "--sigma_max", above=0)
    rho: float = sampler_opt(7.0, "Exponent of the time steps", above=0)
    S_churn: float = sampler_opt(0.0, "Stochasticity strength", at_least=0)
    S_min: float = sampler_opt(0.0, "Lowest noise level of churn", at_least=0)
    S_max: float = sampler_opt(math.inf, "Highest noise level of churn", at_least=0, infinite=True)
    S_noise: float = sampler_opt(1.0, "Noise inflation of churn")
    inject_noise: float | None = sampler_opt(None, "Add ALPHA sigma eps before every step", metavar="ALPHA", at_least=0)

    solver: str | None = process_opt(
        None, "heun, em, sscs, ode (adaptive RK45), flow or ablation", metavar="NAME", shown="heun"
    )
    time_grid: str = process_opt("sigma", "Grid of steps", choices=("sigma", "uniform", "quadratic"))
    prior: str = process_opt("matched", "Start of a process", choices=("matched", "stationary"))
    t_min: float | None = process_opt(None, "Last time, instead of --sigma_min", above=0)
    denoise: str = process_opt(
        "yes",
        "End with the denoiser; the state; without the last noise (MDM); a noise-free step (CLD)",
        choices=("yes", "no", "mean", "euler"),
    )
    half_step: str = process_opt("exact", "sscs: integrals of beta", choices=("exact", "published"))
    rtol: float = process_opt(1e-5, "ode: relative tolerance", above=0)
    atol: float = process_opt(1e-5, "ode: absolute tolerance", above=0)

    method: str = ablation_opt("heun", "Order: two evaluations a step, or one", choices=("heun", "euler"))
    disc: str = ablation_opt("edm", "Where the noise levels lie", choices=("edm", "vp", "ve", "iddpm"))
    schedule: str = ablation_opt("linear", "Noise level over time", choices=("linear", "vp", "ve"))
    scaling: str = ablation_opt("none", "Scale of the image over time", choices=("none", "vp"))
    alpha: float = ablation_opt(1.0, "Place of the second evaluation in a step", above=0, at_most=1)

    gnet: str | None = guidance_opt(
        None, "Guiding network; null: --net without its label; null-last: with its last label", metavar="SNAPSHOT"
    )
    guidance: float = guidance_opt(1.0, "Guidance strength; 1: none")
    guidance_interval: list | None = guidance_opt(
        None, "Guide only at noise levels in (LO, HI]", metavar="LO,HI", infinite=True
    )

    @property
    def plain(self) -> bool:
        """Whether EDM2's sampler runs, with the noise that the network was trained with, rather than a process."""
        edm = self.process in (None, "edm") and not self.process_options
        return edm and self.solver in (None, "heun", "ablation")

    def check(self) -> "Sampling":
        """Fill in the preset and return self; ValueError for what cannot be together, warnings for what has no effect."""
        if self.preset is not None:
            row = presets.generation_preset(self.preset, self.models or presets.MODEL_ROOT)
            self.net, self.gnet = self.net or row["net"], self.gnet or row["gnet"]
            self.guidance = row["guidance"] if self.guidance == 1 else self.guidance
        elif self.models is not None:
            raise ValueError(
                f"--models={self.models} holds the files of a --preset: give one, or name the file by --net"
            )
        if self.net is None:
            raise ValueError("--net is missing: give a snapshot, or a --preset")
        self._check_guidance()
        if isinstance(self.class_idx, str) and self.class_idx != "balanced":
            if not self.class_idx.isdecimal():
                raise ValueError(f"--class={self.class_idx} is neither a class index nor 'balanced'")
            self.class_idx = int(self.class_idx)
        if self.sources and self.class_idx != "balanced":
            raise ValueError(f"--sources={','.join(map(str, self.sources))} needs --class=balanced")
        if self.labels is not None and self.class_idx is not None:
            raise ValueError(f"--labels={self.labels} and --class={self.class_idx} exclude each other: give one")
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"--sigma_min={self.sigma_min:g} must be below --sigma_max={self.sigma_max:g}")
        if self.plain and (self.t_min is not None or self.time_grid != "sigma" or self.denoise != "yes"):
            raise ValueError("--t-min, --time-grid and --denoise need --process or --solver (em, sscs, ode or flow)")
        if self.inject_noise and not (self.plain and self.solver != "ablation"):
            alpha = f"--inject-noise={self.inject_noise:g}"
            raise ValueError(f"{alpha} is for EDM's own sampler: leave --process and --solver out")
        solver = self.solver or "heun"
        for name in sorted({name for names in OWN.values() for name in names} - {*OWN.get(solver, ())}):
            if getattr(self, name) != getattr(Sampling, name):
                warnings.warn(f"{options.flag(Sampling, name)} has no effect with --solver={solver}", stacklevel=2)
        return self

    def _check_guidance(self):
        if self.guidance != 1 and self.gnet is None:
            message = f"--guidance={self.guidance} needs a guiding network: give --gnet"
            raise ValueError(f"{message} (null: the network without label)")
        if self.guidance == 1:
            if self.gnet is not None and self.preset is None:
                warnings.warn(f"--gnet={self.gnet} has no effect without --guidance", stacklevel=3)
            self.gnet = None
        if self.guidance_interval is not None and (self.gnet is None or len(self.guidance_interval) != 2):
            raise ValueError("--guidance-interval=LO,HI needs two noise levels, --gnet and --guidance")

    def solver_options(self) -> dict:
        """Keywords of the solver: levels and steps, its own options, and of a process grid and end."""
        names = ["num_steps", "sigma_min", "sigma_max", "rho", *OWN.get(self.solver or "heun", ())]
        keywords = {name: getattr(self, name) for name in names}
        if self.plain:
            if self.solver == "ablation":  # each discretisation has levels of its own
                levels = {name: keywords[name] for name in ("sigma_min", "sigma_max")}
                keywords |= {name: None if v == getattr(Sampling, name) else v for name, v in levels.items()}
            return keywords
        denoise = {"yes": True, "no": False}.get(self.denoise, self.denoise)
        return keywords | {"grid": self.time_grid, "t_min": self.t_min, "denoise": denoise}


listings = cli.under(
    "Options",
    cli.listing("--list-presets", presets.generation_listed, "Print the published combinations that --preset takes"),
    cli.listing("--list-processes", cli.names_in("training.processes", "REGISTRY"), "Print the values of --process"),
    cli.listing("--list-solvers", cli.names_in("training.samplers", "SOLVERS"), "Print the values of --solver"),
)


def take(given: dict) -> Sampling:
    """The checked object of a command's options, which are taken out of `given`; what is None keeps its default."""
    names = options.declared(Sampling)
    return options.from_options(Sampling, {name: given.pop(name) for name in [*given] if name in names}).check()
