"""From a TrainingConfig to a Run: the parts of a training run, each built once. Choices by name: training/choices.py."""

import functools
import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib import cli
from dnnlib.util import logged, reason, remove_leftovers, write_json
from torch_utils import checkpoint, persistence, precision
from torch_utils import distributed as dist
from torch_utils.random import hash_seed
from training import encoders, fit, losses, presets, processes, selection
from training.choices import ARCHS, EMAS, ENCODERS, LOSSES, OPTIMIZERS, SCHEDULES, augment_pipe, choose, given
from training.config import TrainingConfig, check_same_run, differences, has_own_levels
from training.dataset import Dataset, ImageFolderDataset
from training.feed import Feed
from training.networks_edm2 import compile_network
from training.processes.options import make_process
from training.training_loop import Periods, TrainingFailed, TrainingLoop

__all__ = ["ARCHS", "EMAS", "ENCODERS", "LOSSES", "OPTIMIZERS", "SCHEDULES", "Run", "build", "train", "train_command"]


@dataclass
class Run:
    """The parts of a run. `build` makes them from a TrainingConfig; experiments of their own kind fill them in directly."""

    objective: losses.Objective  # on its device
    feed: Any  # training.feed.Feed, or anything with its contract
    encoder: Any  # training.encoders.Encoder
    selector: Any  # .candidates(batch), .minibatches(objective, candidates), .state_dict(), .load_state_dict()
    optimizer: torch.optim.Optimizer  # its param groups carry `lr_scale`
    ema: Any  # .update(cur_nimg, batch), .get(), .state_dict(), .load_state_dict(); or None
    learning_rate: Any  # cur_nimg -> lr
    periods: Periods
    batch_size: int  # images trained on per step, over all processes
    batch_gpu: int | None = None  # largest micro-batch per process; None: no limit
    seed: int = 0  # of everything random
    loss_scaling: float = 1.0  # factor on the loss before backward (fp16); never divided out, as in EDM2
    grad_clip: float | None = None  # global norm; None: no clipping
    header: dict = field(default_factory=dict)  # plain data for the snapshots' headers
    snapshot_dtype: torch.dtype | None = None  # storage type of parameters in snapshots; None: as they are
    config: TrainingConfig | None = None  # where the parts came from
    held_out: Dataset | None = None  # for the validation loss
    identity: dict = field(default_factory=dict)  # plain data: what a resumed run must share with this one

    def check(self, outdir: str | Path, resume: str | None = None) -> None:
        """Raises ValueError for what would fail later: parts that snapshots cannot describe, another run in `outdir`, an
        unreadable checkpoint `resume`.
        """
        self.objective.description(), persistence.describe(self.encoder)
        if self.config is not None:
            check_same_run(outdir, self.identity)
        if resume is not None:  # whether its tensors fit shows when they are loaded
            changed = differences(checkpoint.load(resume, mmap=True).get("options") or self.identity, self.identity)
            if changed:
                raise ValueError(f"--resume={resume}: does not fit, its options are others ({'; '.join(changed)})")

    def start(self, outdir: str | Path, hooks: dict | None = None, resume: str | None = None) -> TrainingLoop:
        """Train in the folder `outdir` (see `loop`); returns the finished loop. Raises TrainingFailed if it breaks down."""
        loop = self.loop(outdir, hooks, resume)
        loop.run()
        return loop

    def loop(self, outdir: str | Path, hooks: dict | None = None, resume: str | None = None) -> TrainingLoop:
        """The loop that trains in the folder `outdir`, ready to run.

        hooks: on_status, on_snapshot, stop_requested (see TrainingLoop). resume: a checkpoint to continue from; None takes
        the newest sound one in `outdir`, if any. Raises ValueError for one that does not fit.
        """
        outdir, first = Path(outdir), dist.get_rank() == 0
        if resume is None:
            resume = dist.broadcast_object(str(checkpoint.newest_sound(outdir) or "") if first else None)
        if first:
            outdir.mkdir(parents=True, exist_ok=True)
            remove_leftovers(outdir)
            if self.config is not None:
                write_json(outdir / "training_options.json", self.config.to_dict())
                net = self.objective.net
                interface = {name: getattr(net, name) for name in ("img_resolution", "img_channels", "label_dim")}
                print(f"Network: {sum(p.numel() for p in net.parameters()):,} parameters, {interface}", flush=True)
        dist.barrier()
        loop = TrainingLoop(self, outdir, **(hooks or {}))
        if resume:
            dist.print0(f"Resuming from {resume}")
            loop.load(resume)
        dist.broadcast_([*self.objective.parameters(), *self.objective.buffers()])
        return loop


# --- the parts --------------------------------------------------------------------------------------------------------


def open_dataset(config: TrainingConfig) -> ImageFolderDataset:
    """The training data. Raises ValueError where --cond asks for labels that are not there."""
    dataset = ImageFolderDataset(
        config.data, use_labels=config.cond, xflip=config.xflip, max_size=config.max_images, random_seed=config.seed
    )
    if config.cond and not dataset.has_labels:
        raise ValueError(f"--data={config.data} has no labels: give --cond=False, or a data set with dataset.json")
    return dataset


def choose_encoder(dataset: Dataset, name: str | None = None) -> encoders.Encoder:
    """The encoder of a data set: by name, or by its channels, except that float arrays other than VAE latents stay."""
    image, _ = dataset[0]
    if name is not None:
        make = choose(ENCODERS, "encoder", name)
        if image.dtype != np.uint8:
            raise ValueError(f"--encoder={name} is for pixels, and the data are {image.dtype} arrays: leave it out")
        return make()
    if image.dtype == np.float32 and dataset.num_channels != 8:
        return encoders.IdentityEncoder()
    return encoders.for_channels(dataset.num_channels)


def interface_of(dataset: Dataset, encoder: encoders.Encoder) -> dict[str, int]:
    """{img_resolution, img_channels, label_dim} as the network sees them. Raises ValueError for images that are not square."""
    image, label = dataset[0]
    _ = dataset.resolution  # fail now
    latent = encoder.encode_latents(torch.as_tensor(image)[None])
    return dict(img_resolution=latent.shape[-1], img_channels=latent.shape[1], label_dim=len(label))


def of_sources(dataset: Dataset, sources: list[int] | None, name: str) -> Dataset:
    """The images of `dataset`, called `name`, that belong to these sources; all of it where one side has no classes."""
    if sources is None or dataset.sources is None or set(dataset.sources) <= set(sources):
        return dataset
    chosen = np.flatnonzero(np.isin(dataset.raw_labels, sources))
    if not len(chosen):
        raise ValueError(f"{name} holds no image of the sources {','.join(map(str, sources))} that are trained on")
    return dataset.subset(chosen)


VECTOR_NUMBERS = 2**16  # of label vectors in the header of a snapshot
SIZES = ("channels", "channel_mult", "num_blocks", "attn_resolutions", "channels_per_head", "net_options")


def build_network(config: TrainingConfig, interface: dict[str, int], device: torch.device) -> torch.nn.Module:
    """The network with weights that depend on the seed alone."""
    torch.manual_seed(hash_seed(config.seed, 0))
    try:
        net = choose(ARCHS, "arch", config.arch)(config, interface).to(device)
    except (TypeError, ZeroDivisionError, OverflowError, RuntimeError) as err:
        if isinstance(err, torch.OutOfMemoryError):
            raise
        sizes = given(**{name: getattr(config, name) for name in SIZES})
        raise ValueError(
            f"--arch={config.arch} cannot be built with {sizes} for images of {interface} ({reason(err)}): give other sizes"
        ) from err
    if hasattr(net, "bind"):
        net.bind(build_process(config))
    return net.train().requires_grad_(True)


def start_from(net: torch.nn.Module, path: str, own: fit.Side, classes: str | None = None) -> None:
    """Copy the weights of the snapshot --init=`path`. own: of `net`. Raises ValueError where they do not fit.

    classes: where its sources are others, what becomes of the label embedding: "new" keeps the first weights of `net`,
    "names" takes those of the sources with the same class names.
    """
    donor = persistence.load_snapshot(path)
    side, state = fit.of_snapshot("--init", donor), donor.net.state_dict()
    if classes is not None:
        state |= _other_classes(net, state, side, own, classes)
        side = replace(side, label_dim=None, class_names=None)
    try:
        fit.check(side, own), fit.check(own, side)
        net.load_state_dict(state)
    except RuntimeError as err:
        raise ValueError(f"--init={path} does not fit the network ({reason(err)})") from err
    except ValueError as err:
        labels = any(fact in str(err) for fact in ("label_dim", "class_names"))
        raise ValueError(f"{err}{', or give --init-classes=new (or names)' if labels else ''}") from err


def _other_classes(net, state, side, own, classes):
    """{name: [C, K]}: label embeddings of `net`, with the columns of known class names from `state` if asked for."""
    known = {}
    if classes == "names":
        known = {name: k for k, name in enumerate(side.class_names or [])}
        if not known.keys() & {*(own.class_names or [])}:
            raise ValueError(f"--init-classes=names: {side.name} and {own.name} share no class_names; give new")
    found = {}
    for name, p in net.named_parameters():
        if "label" in name and p.ndim == 2 and p.shape[1] == net.label_dim:
            found[name] = p.detach().clone()
            for k, source in enumerate(own.class_names or []):
                if source in known and name in state:
                    found[name][:, k] = state[name][:, known[source]]
    return found


def build_process(config: TrainingConfig) -> Any:
    """The noise of a run: a kernel or process of training/processes."""
    if config.process == "pfgmpp":
        return processes.get("pfgmpp", **given(D=config.aug_dim))
    if not (has_own_levels(config.process) or config.process_options):
        return processes.get(config.process)
    process = make_process(config.process, config.process_options, seed=config.seed, learn=True)
    if isinstance(process, torch.nn.Module) and config.loss not in ("process", "joint"):
        raise ValueError(f"--process={config.process} is learned by --loss=process, not --loss={config.loss}")
    return process


def build_loss(config: TrainingConfig, references: Any) -> losses.Loss:
    """The loss of a run. references: callable (n, generator) -> (images, labels), clean and encoded, for stable targets."""
    kernel = build_process(config)
    if not hasattr(kernel, "unit_noise"):
        raise ValueError(
            f"--process={config.process} has no training noise of its own: train with edm and sample with it"
        )
    augment = augment_pipe(config) if config.augment else None
    uncertainty = config.uncertainty
    if uncertainty is None and processes.aug_dim(kernel) <= 2:
        uncertainty = False  # the head would chase a mean that does not exist

    def augmented(n, generator):  # as the training images are, each on its own
        images, labels = references(n, generator)
        return (augment(images, generator)[0] if augment else images), labels

    stable = losses.StableTargets(augmented, config.stf_refs, processes.aug_dim(kernel)) if config.stf else None
    parts = given(kernel=kernel, augment=augment, uncertainty=uncertainty, stable_targets=stable)
    common = dict(sigma_data=config.sigma_data, label_dropout=config.label_dropout, **parts)
    if config.parameterization == "joint-denoiser":
        common["variables"] = kernel.V
    return choose(LOSSES, "loss", config.loss)(config, common, references)


def _references(feed, encoder):
    """Random clean examples of the data set, by generator: what losses with reference images are built with."""

    def references(n, generator):
        index = torch.randint(len(feed.dataset), [n], generator=generator, device=generator.device)
        images, labels = feed.examples(index)
        return encoder.encode_latents(images, generator), labels if labels.shape[1] else None

    return references


def build_selector(
    config: TrainingConfig, device: torch.device, ema: Any = None, own: fit.Side | None = None
) -> selection.IdentitySelector:
    """IdentitySelector, or a LossSelector around the function named by --select. ema: for --reference=ema. own: of the
    network, for the reference to fit.
    """
    if config.select == "none":
        return selection.IdentitySelector()
    function = choose(selection.FUNCTIONS, "select", config.select)
    reference = None
    if config.reference == "ema":
        if ema is None:
            raise ValueError("--reference=ema needs an average of the weights: not with --ema=none")
        reference = ema.get()[0][0].net
    elif config.reference is not None:
        snapshot = persistence.load_snapshot(config.reference, device)
        if own is not None:
            fit.check(own, fit.of_snapshot("--reference", snapshot))
        reference = snapshot.net
    stretch = dict(when=config.select_when, select_from=config.select_from, **given(select_until=config.select_until))
    scores = dict(score_scale=config.score_scale, cheap=config.select_cheap, options=config.select_options)
    how = dict(filter_ratio=config.filter_ratio, scope=config.select_scope, **stretch, **scores)
    return selection.LossSelector(function, reference=reference, **how)


def build(config: TrainingConfig, device: torch.device | str = "cpu") -> Run:
    """All parts of the run that `config` describes, data opened once; nothing is written. Raises ValueError."""
    device = torch.device(device)
    dataset = open_dataset(config)
    config.data_content = dataset.fingerprint()
    encoder = choose_encoder(dataset, config.encoder)
    encoders.use_vae(encoder, config.vae)
    interface = interface_of(dataset, encoder)
    torch.backends.cudnn.benchmark = config.bench
    precision.use(config.precision, device)
    ranks = dict(rank=dist.get_rank(), world_size=dist.get_world_size())
    feed = Feed(dataset, config.seed, config.block, device, **ranks, workers=config.workers)
    net = build_network(config, interface, device)
    loss = build_loss(config, _references(feed, encoder)).to(device)
    own = fit.Side(f"--data={config.data}", **interface, encoder=encoder, sigma_data=getattr(net, "sigma_data", None))
    own = replace(own, class_names=dataset.class_names, noise=processes.noise_law(getattr(loss, "kernel", None)))
    held_out = ImageFolderDataset(config.val_data, use_labels=config.cond) if config.val_data else None
    if held_out is not None:
        fit.check_data(f"--val-data={config.val_data}", held_out, own)
        held_out = of_sources(held_out, dataset.sources, f"--val-data={config.val_data}")
    if config.init is not None:
        start_from(net, config.init, own, config.init_classes)
    if hasattr(net, "bind"):  # to the one that is trained along
        net.bind(loss.process)
    objective = losses.Objective(net, loss)
    ema = choose(EMAS, "ema", config.ema)(config, objective)
    optimizer = choose(OPTIMIZERS, "optimizer", config.optimizer)(config, objective.param_groups())
    selector = build_selector(config, device, ema, own)
    if config.parameterization == "joint" and config.select != "none" and config.reference not in (None, "ema"):
        _require_same_state(f"--reference={config.reference}", selector.scorer.reference, net)
    schedule = choose(SCHEDULES, "lr-schedule", config.lr_schedule)
    if config.compile:
        compile_network(net)  # after the averages, which are copies
    _warn_no_effect(config, interface)
    about = dict(
        path=str(config.data), num_images=len(dataset), label_dim=dataset.label_dim, class_names=dataset.class_names
    )
    if dataset.has_labels and not dataset.has_onehot_labels:
        about["label_vectors"] = some_vectors(dataset.raw_labels)
    return Run(
        objective=objective,
        feed=feed,
        encoder=encoder,
        selector=selector,
        optimizer=optimizer,
        ema=ema,
        learning_rate=functools.partial(_learning_rate, schedule, config, selector),
        periods=Periods(**{f.name: getattr(config, f.name) for f in fields(Periods)}),
        batch_gpu=config.batch_gpu or None,
        **{name: getattr(config, name) for name in ("batch_size", "seed", "loss_scaling", "grad_clip")},
        header=dict(options=config.to_dict(), dataset=about, sources=dataset.sources, git_commit=git_commit()),
        snapshot_dtype=torch.float16 if config.snapshot_fp16 else None,
        config=config,
        held_out=held_out,
        identity=config.fixed(),
    )


def some_vectors(labels: np.ndarray) -> list[list[float]]:
    """Label vectors [N, K] of the training images, a random thousand where there are more: what sampling draws from."""
    most = max(1, min(1000, VECTOR_NUMBERS // labels.shape[1]))
    return labels[np.random.RandomState(0).permutation(len(labels))[:most]].tolist()


def git_commit() -> str | None:
    """The commit of this checkout, or None."""
    try:
        out = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
        return out.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def _require_same_state(name, reference, net):
    """Raises ValueError unless the loss of a network of the whole state can be computed of `reference`, too."""
    facts = [
        (getattr(n, "variables", 1), getattr(n, "first", 0), n.process.V) if hasattr(n, "noise") else None
        for n in (net, reference)
    ]
    if facts[0] != facts[1] or reference.parameterization == "denoiser":
        raise ValueError(
            f"{name} does not predict what --parameterization=joint is compared by, the noise of the same variables: give a "
            "network that was trained with the same --process, --parameterization and --predict"
        )


def _learning_rate(schedule, config, selector, cur_nimg):
    more = {"selection": selector.progress()} if "selection" in inspect.signature(schedule).parameters else {}
    return schedule(cur_nimg, config.batch_size, config.lr, config.decay, config.rampup, **more)


def _warn_no_effect(config, interface):
    """Options that are given but do nothing deserve a word."""
    if config.select == "none" and config.reference is not None:
        warnings.warn("--reference has no effect without --select", stacklevel=3)
    if config.precond != "edm" and config.arch == "edm2":
        warnings.warn(f"--precond={config.precond} has no effect: --arch=edm2 has its own", stacklevel=3)
    if config.loss == "joint" and config.uncertainty:
        warnings.warn("--uncertainty has no effect: networks of the whole state have no uncertainty head", stacklevel=3)
    if config.loss == "joint" and config.objective == "elbo" and config.weighting and config.switch_at is None:
        warnings.warn(f"--weighting={config.weighting} has no effect: the bound has its own", stacklevel=3)
    if misfit := presets.misfit(config.preset, interface):
        warnings.warn(misfit, stacklevel=3)
    if config.label_dropout and not config.cond:
        warnings.warn("--label-dropout has no effect without labels", stacklevel=3)


# --- whole runs -------------------------------------------------------------------------------------------------------


def train(
    config: TrainingConfig,
    outdir: str | Path,
    device: torch.device | str = "cpu",
    resume: str | None = None,
    hooks: dict | None = None,
) -> TrainingLoop:
    """Build, check and start (or resume) the run that `config` describes in the folder `outdir`; see Run.start.

    Raises ValueError for bad input before anything is written.
    """
    run = build(config, device)
    run.check(outdir, resume)
    return run.start(outdir, hooks, resume)


def train_command(
    config: TrainingConfig,
    outdir: str | Path,
    resume: str | None = None,
    device: str | None = None,
    further: Callable[[Run], dict] | None = None,
    profile: bool = False,
) -> int:
    """Train with the standard hooks and log.txt; returns the exit code of train_edm2.py.

    further: Run -> more hooks, called before anything is written; of two of one name the standard one comes first.
    profile: with a StepProfile.
    """
    from training.hooks import joined, standard_hooks
    from training.profiling import StepProfile

    device = dist.init(device)
    first = dist.get_rank() == 0
    try:
        run = build(config, device)
        run.check(outdir, resume)
        more = {} if further is None else further(run)
        if first:
            Path(outdir).mkdir(parents=True, exist_ok=True)
        watching = StepProfile(run, outdir) if profile and first else nullcontext()
        with logged(Path(outdir) / "log.txt") if first else nullcontext(), watching:
            return _watched(run, outdir, resume, joined(standard_hooks(run), more))
    finally:
        dist.shutdown()


def _watched(run, outdir, resume, hooks):
    """Exit code of a training; what went wrong is one line."""
    try:
        loop = run.start(outdir, hooks, resume)
    except TrainingFailed as err:
        print(f"Error: {err}", file=sys.stderr, flush=True)
        return 1
    except RuntimeError as err:
        if not dist.is_lost_peer(err):
            raise
        print(f"Error: {dist.LOST_PEER}: run the same command again to resume", file=sys.stderr, flush=True)
        return 1
    dist.print0("Stopped by a signal; run the same command again to go on." if loop.interrupted else "Done.")
    return cli.INTERRUPTED if loop.interrupted else 0
