"""What a run would take, and whether it would start: everything that it refuses is refused here, nothing is written."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import psutil
import torch

from dnnlib.experiment import Step, to_do
from training import cost, presets, setup
from training.config import TrainingConfig, make_config
from training.disk import Writes

GB = 1e9


def _place(path):
    """The nearest folder around a path that is there."""
    return next(folder for folder in (Path(path).absolute(), *Path(path).absolute().parents) if folder.is_dir())


def _on_disk(folder):
    """Bytes of the files in a folder, which a resumed run has written already."""
    return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file()) if os.path.isdir(folder) else 0


def _whole_memory(device, processes):
    """Bytes that a process may use on the device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return psutil.virtual_memory().total / processes


def _plan(config, interface, seconds, device, processes):
    """cost.plan of one of `processes` processes."""
    most = max(1, config.batch_size // processes)
    own = dataclasses.replace(config, batch_gpu=min(config.batch_gpu or most, most))
    return cost.plan(own, interface, seconds, device=device)


def _times(plan, processes=1):
    """Hours in words, by device."""
    rows = plan["devices"]
    named = {"H100": "one H100", "here": "this machine"}
    found = [f"{text} {cost.duration(rows[name]['hours'])}" for name, text in named.items() if name in rows]
    if processes > 1:
        found.append(f"{processes} H100 {cost.duration(rows['H100']['hours'] / processes)}")
    return ", ".join(found)


def of_training(
    config: TrainingConfig,
    outdir: str,
    resume: str | None = None,
    device: str | None = None,
    further: Callable[[setup.Run], dict] | None = None,
    seconds: float = 2.0,
) -> str:
    """The plan of a training run, in lines; said before anything is refused for its size.

    Opens the data, builds every part of the run (where its state fits into the memory of this machine), and looks at memory
    and disk. further: as of setup.train_command. seconds: of measurement on this machine. Raises ValueError as the run would.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device={device}: there is no GPU here")
    dataset = setup.open_dataset(config)
    encoder = setup.choose_encoder(dataset, config.encoder)
    interface = setup.interface_of(dataset, encoder)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    plan = _plan(config, interface, seconds, device, processes)
    memory, disk, files = (plan[name] for name in ("memory_gb", "disk_gb", "files"))
    own, (free, kept) = (
        _whole_memory(device, processes) / GB,
        (shutil.disk_usage(_place(outdir)).free / GB, _on_disk(outdir) / GB),
    )
    kind = "latents" if interface["img_channels"] != dataset.num_channels else "pixels"
    size = "x".join(str(interface[name]) for name in ("img_resolution", "img_resolution", "img_channels"))
    sources = f"{len(dataset.sources)} of {dataset.label_dim} sources" if dataset.sources else "no labels"
    if misfit := presets.misfit(config.preset, interface):
        click.echo(f"Warning: {misfit}", err=True)
    text = (
        f"Estimate: {plan['parameters']:,} parameters, {plan['gflops']['step_per_image']:.4g} GFLOP per trained image\n"
        f"  data: {len(dataset):,} images, {size} {kind}, {sources}\n"
        f"  training: {plan['steps']:,} steps of {config.batch_size:,} images, {plan['images']:,} in all\n"
        f"  memory of a process: {memory['step']:.3g} GB of {own:.3g} on {device}, {memory['per_image']:.3g} per image of a "
        f"micro-batch\n"
        f"  disk: {disk['all']:.3g} GB of {free:.3g} free, {files['snapshots']} snapshots, {files['checkpoints']} checkpoints\n"
        f"  time: {_times(plan, processes)} ({plan['devices']['H100']['basis']})"
    )
    click.echo(text, err=True)
    if disk["all"] > free + kept:
        raise ValueError(
            f"--outdir={outdir}: the run writes {disk['all']:.3g} GB, {free:.3g} GB are free there: lower --keep, raise "
            f"--snapshot and --checkpoint, or give another place"
        )
    rest = own - memory["state"]
    if memory["step"] > own:
        fits = int(rest / memory["per_image"]) if rest > memory["per_image"] else 0
        remedy = (
            f"give --batch-gpu={2 ** int(math.log2(fits))}" if fits else "take a smaller network, or more processes"
        )
        raise ValueError(f"a step needs {memory['step']:.3g} GB of memory, {device} has {own:.3g} GB: {remedy}")
    run = setup.build(config, device)
    run.check(outdir, resume)
    if further is not None:
        further(run)
    return text


def leaf(command: click.Command, words: Sequence[str]) -> tuple[click.Command, list[str]]:
    """The sub-command that a command line names, and its words. Raises ValueError."""
    words = list(words)
    while hasattr(command, "commands"):
        if not words or words[0] not in command.commands:
            raise ValueError(f"no such command: {' '.join(words[:1])}; known: {', '.join(command.commands)}")
        command, words = command.commands[words[0]], words[1:]
    return command, words


def _checked(step, command, checks, ready):
    """(name of the command, the options of a step, checked as far as its inputs are there, what a dry run of its own said)."""
    said = io.StringIO()
    found, words = leaf(command, step.command[1:])
    with contextlib.ExitStack() as held:
        ctx = found.make_context(step.script, list(words))
        held.enter_context(ctx)
        for own in ctx.obj if ctx.params.get("each") else [ctx]:
            own.params["dry_run"] = True
            found.check_outputs(own, held)
    for check in checks:
        check(found.name, ctx.params)
    if ready and step.script != TRAIN and any(param.name == "dry_run" for param in found.params):
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
            found.main([*words, "--dry-run"], prog_name=step.script, standalone_mode=False)
    models = [dict(own.params) for own in ctx.obj] if ctx.params.get("each") else [ctx.params]
    return found.name if found is not command else step.script, models, said.getvalue()


TRAIN = "train_edm2.py"


def _training(models, step, ready, seconds, plans):
    """(outdir, configuration, plan) of every model that a training step trains; data that are not made yet are of the shape
    that the preset is for. plans: those made before, by what they depend on.
    """
    found = []
    for params in models:
        names = {f.name for f in dataclasses.fields(TrainingConfig)}
        given = {name: value for name, value in params.items() if name in names and value is not None}
        if params.get("chunks") is not None:
            given["select_options"] = {"num_chunks": params["chunks"]}
        config = make_config(given.pop("preset", None), **given)
        interface = cost.shape_of(config) if ready else presets.interface(config.preset)
        own = ("data", "val_data", "reference", "init", "seed")
        key = repr((sorted((k, v) for k, v in config.to_dict().items() if k not in own), interface, step.processes(1)))
        if key not in plans:
            plans[key] = _plan(config, interface, seconds, "cpu", step.processes(1))
        found.append((params["outdir"], config, plans[key]))
    return found


def of_experiment(
    out: str | Path,
    steps: Sequence[Step],
    scripts: Mapping[str, click.Command],
    seconds: float = 5.0,
    checks: Mapping[str, Callable[[dict[str, Any]], None]] | None = None,
) -> str:
    """What the steps that are not done would take, in lines; nothing is run.

    Every command line is parsed, its outputs are checked, and its inputs where no earlier step makes them. A step whose inputs
    are there is dry-run itself. checks: {script: function of its options that raises ValueError}. Raises ValueError that
    names the step.
    """
    todo, plans, disks, writes = to_do(out, steps), {}, {}, Writes()
    waiting = {step.name for step in todo}
    entries, trained, others = {}, [], {}
    for step in todo:
        ready = not any(other.name in waiting for other in step.needs)
        if step.script not in scripts:
            raise ValueError(f"step {step.name} runs {step.script}; known scripts: {', '.join(scripts)}")
        try:
            own = [check for name, check in (checks or {}).items() if name == step.script]
            name, models, said = _checked(step, scripts[step.script], own, ready)
            found = _training(models, step, ready, seconds, plans) if step.script == TRAIN else []
        except (ValueError, OSError, click.ClickException) as err:
            raise ValueError(
                f"step {step.name}: {err.format_message() if hasattr(err, 'format_message') else err}"
            ) from err
        entry = entries.setdefault(step.stage, dict(name=step.name, count=0, models=[], sizes=[]))
        entry["count"] += 1
        entry["models"] += found
        trained += found
        for outdir, config, plan in found:
            writes.trains(outdir, config.data, plan["interface"])
        kind, sizes = writes.of(name, models[0], said)
        entry["sizes"] += [sum(sizes.values())] if sizes else []
        others.setdefault(kind, {}).update(sizes)
    lines = [f"{len(todo)} of {len(steps)} steps to do, in {out}"]
    for entry in entries.values():
        line = f"  {entry['count']:5d} x {entry['name']}"
        for _, config, plan in entry["models"][:1]:
            line += (
                f": {config.preset}, {plan['steps']:,} steps, {plan['images']:,} images, {plan['memory_gb']['step']:.3g} GB of "
                f"memory, {_times(plan)}, {plan['disk_gb']['all']:.3g} GB on disk each"
            )
        if entry["sizes"]:
            line += f": {entry['sizes'][0] / GB:.3g} GB on disk each"
        lines.append(line)
    if trained:
        hours = lambda name: sum(plan["devices"][name]["hours"] for *_, plan in trained if name in plan["devices"])
        here = f", this machine {cost.duration(hours('here'))}" if hours("here") else ""
        images, total = (sum(number(plan) for *_, plan in trained) for number in (_images, _disk))
        lines.append(
            f"Training in all: {images:,} images, one H100 {cost.duration(hours('H100'))}{here}, {total:.3g} GB on disk"
        )
    besides = {kind: sum(sizes.values()) / GB for kind, sizes in others.items() if sizes}
    if besides:
        more = ", ".join(f"{kind} {size:.3g} GB" for kind, size in besides.items())
        everything = sum(besides.values()) + sum(_disk(plan) for *_, plan in trained)
        lines.append(f"On disk besides: {more}; {everything:.3g} GB in all")
    needs = [(outdir, _disk(plan) - _on_disk(outdir) / GB) for outdir, _, plan in trained]
    needs += [(path, size / GB) for sizes in others.values() for path, size in sizes.items()]
    for path, needed in needs:
        place = _place(path)
        disk = disks.setdefault(os.stat(place).st_dev, [place, path, 0.0])
        disk[2] += needed
    for place, path, needed in disks.values():
        if needed > (free := shutil.disk_usage(place).free / GB):
            click.echo("\n".join(lines), err=True)
            raise ValueError(f"the steps write {needed:.3g} GB, such as {path}, and {free:.3g} GB are free in {place}")
    return "\n".join(lines)


def _images(plan):
    return plan["images"]


def _disk(plan):
    return plan["disk_gb"]["all"]
