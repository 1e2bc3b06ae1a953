"""Processes named on a command line: `--process=NAME --process-options=M=0.25,beta=4:4`."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path

import torch

from dnnlib.util import one_of
from torch_utils import persistence
from training import processes


def parse_value(text: str) -> float | bool | list:
    """A number, true/false, numbers with ':' between them, or rows of them with ';' between (matrices)."""
    if ";" in text:
        return [parse_value(row) if ":" in row else [parse_value(row)] for row in text.split(";")]
    if ":" in text:
        return [parse_value(part) for part in text.split(":")]
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return int(text)
    except ValueError:
        return float(text)


def parse_options(text: str | dict | None) -> dict:
    """{"M": 0.25, "beta": [4, 4]} from "M=0.25,beta=4:4"; a dict stays as it is. Raises ValueError."""
    if not text or isinstance(text, dict):
        return dict(text or {})
    options = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not (name.strip() and equals):
            raise ValueError(f"--process-options={text}: give NAME=VALUE, several with commas, such as M=0.25,beta=4:4")
        try:
            options[name.strip()] = parse_value(value.strip())
        except ValueError:
            raise ValueError(
                f"--process-options={text}: {value!r} is no number; lists are written 4:4, matrices 0:-1;1:0"
            ) from None
    return options


def make_process(
    name: str, options: str | dict | None = None, trained: object = None, seed: int = 0, learn: bool = False
) -> processes.Process:
    """The process that `name` means: one of the registry, or a snapshot (file or run folder) whose process is taken.

    options: dict, or text as on the command line; those of CLD may also be the CLD paper's own (m_inv, gamma, beta0,
    beta1). trained: process of the network's snapshot; `learned` without options takes it if it is learned. Other learned
    processes start random, as a function of `seed`; learn=True: to be trained. Raises ValueError for what is unknown.
    """
    options = parse_options(options)
    names = [known for known, cls in processes.REGISTRY.items() if processes.is_linear(cls)]
    if name not in names and (Path(name).exists() or str(name).endswith(".safetensors")):
        process = persistence.load_snapshot(name).process
        if options or not processes.is_linear(process):
            why = "takes no --process-options" if options else "holds no process: give one of " + ", ".join(names)
            raise ValueError(f"--process={name}: a snapshot {why}")
        return process
    if name not in names:
        raise ValueError(f"--process={name} {one_of(name, names)}, or a snapshot that holds a process")
    if name == "learned":
        if not options and isinstance(trained, processes.Learned):
            return trained
        if not learn:
            warnings.warn("--process=learned: nothing is learned yet, its matrices are random", stacklevel=2)
    try:
        if name == "cld" and {"m_inv", "gamma", "beta0", "beta1"} & set(options):
            with torch.device("cpu"):
                return processes.CLD.published(**options)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            process = processes.get(name, **options)
        return process.requires_grad_(learn) if isinstance(process, torch.nn.Module) else process
    except (ValueError, TypeError) as error:
        maker = processes.CLD.published if {"m_inv", "beta0"} & set(options) else processes.REGISTRY[name]
        known = ", ".join(inspect.signature(maker).parameters) or "none"
        raise ValueError(f"--process={name} --process-options: {error} (options: {known})") from None


def named(process: processes.Process) -> dict:
    """{"name": as on the command line, and its options}."""
    name = next((name for name, cls in processes.REGISTRY.items() if cls is type(process)), type(process).__name__)
    return {"name": name, **getattr(process, "init_kwargs", {})}


def require_gaussian(kernel: object, process: processes.Process) -> None:
    """Raises ValueError where a network trained with other noise is asked for a linear process."""
    if (law := processes.noise_law(kernel)) != "Gaussian":
        raise ValueError(
            f"--process={named(process)['name']} needs a network trained with Gaussian noise; this one knows noise of "
            f"{law}, which no linear process makes: leave --process and --solver out"
        )
