"""Runs the command lines of docs/commands.md for real, small, in this process.

`small(words, world)` turns a command line into one that ends in a second: what it reads is replaced by something tiny of the
same kind (READS), counts are cut (CUT), and a few options are added (ADDED). A new row needs no change here, unless it reads
a kind of file that is not there yet: then add it to World, and a line to READS.
"""

import io
import json
import os
import re
import shlex
import subprocess
import tarfile
import tempfile
import zipfile
from functools import cached_property
from pathlib import Path

import foreign_files as theirs
import numpy as np
import PIL.Image
from conftest import convert_digits
from fuzz_child import _cifar
from small_runs import ROOT, run, small_command
from test_dataset_archives import example, record
from test_foreign_joint import chain, cld_file, mdm_file

import calculate_metrics
import generate_images
import train_edm2
from training import presets

# How rows begin that are checked by their own parser only, and why.
NOT_RUN = {
    "bash bash_files/quickstart.sh --list": "makes .venv; its experiment runs in test_quickstart.py",
    "bash bash_files/pfgmpp/fid.sh": "needs the weights of Inception; runs with others in test_scripts.py",
    "python calculate_metrics.py detector --of=swin_l": "needs the weights of Swin-L; see test_published_classifiers.py",
    "python calculate_metrics.py calc --images=out/x --ref=dataset-refs/tiny-swin.npz": "as above",
}

# --- a tiny world: everything is made when it is asked for ------------------------------------------------------------


def png(value=0, side=8):
    buffer = io.BytesIO()
    pixels = np.random.RandomState(value).randint(0, 256, [side, side, 3]).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


class World:
    """Properties are paths; the text of each makes it at its first use."""

    def __init__(self, folder, vae):
        self.folder, self.vae, self._trained = Path(folder), vae, {}

    @cached_property
    def images(self):
        return convert_digits(self.folder / "d.zip", "0-9", 4)

    @cached_property
    def held_out(self):
        return convert_digits(self.folder / "v.zip", "0-9", 4, **{"subset-seed": 1})

    @cached_property
    def latents(self):
        import dataset_tool

        dest = self.folder / "latents.zip"
        run(dataset_tool.main, "encode", f"--source={self.colour}", f"--dest={dest}", f"--model-url={self.vae}")
        return dest

    @cached_property
    def colour(self):
        for k in range(6):
            write(self.folder / "colour" / str(k % 3) / f"{k}.png", png(k, 16))
        return self.folder / "colour"

    @cached_property
    def run(self):
        run(train_edm2.main, *small_command(self.images, self.folder / "run", "--duration=1Ki", "--batch=256"))
        return self.folder / "run"

    @cached_property
    def selecting(self):
        train = small_command(self.images, self.folder / "selecting", "--select=random")
        run(train_edm2.main, *train)
        return self.folder / "selecting"

    @cached_property
    def averages(self):
        train = small_command(self.images, self.folder / "averages", "--duration=2Ki", "--batch=256")
        run(train_edm2.main, *train, "--ema-std=0.05,0.10")
        return self.folder / "averages"

    def trained(self, preset):
        """A snapshot of a run with a preset, for others of the same preset to begin from or to be compared with."""
        if preset not in self._trained:
            self._trained[preset] = self.folder / f"run-{preset}"
            train = [*ADDED["train_edm2.py", ""], f"--data={self.images}", f"--preset={preset}"]
            run(train_edm2.main, *train, f"--outdir={self._trained[preset]}")
        return max(self._trained[preset].glob("network-snapshot-*"))

    def pfgmpp_of(self, D):
        """A snapshot of so many augmented dimensions."""
        net, args, kwargs = theirs.edm_net("edm")
        content = theirs.pfgmpp_content(net, net, args, kwargs, float(D), D != "inf")
        return theirs.dump(content, self.folder / f"D{D}.pkl")

    @cached_property
    def cld(self):
        return cld_file(self.folder / "checkpoint_800000.pth", chain(5, 2))

    @cached_property
    def mdm(self):
        return mdm_file(self.folder / "last.ckpt", chain(5, 4), {"q": [[0.0, 1.0], [0.0, 0.0]], "d": [0.1, 0.2]})

    @cached_property
    def edm2(self):
        net, kwargs = theirs.edm2_net(img_channels=1, label_dim=10)
        return theirs.dump(theirs.edm2_content(net, kwargs), self.folder / "network-snapshot-0002097-0.050.pkl")

    @cached_property
    def pfgmpp(self):
        net, args, kwargs = theirs.edm_net("edm")
        return theirs.save(theirs.pfgmpp_content(net, net, args, kwargs, 128), self.folder / "training-state-000001.pt")

    @cached_property
    def pfgmpp_pkl(self):
        net, args, kwargs = theirs.edm_net("edm")
        content = theirs.pfgmpp_content(net, net, args, kwargs, 128)
        return theirs.dump(content, self.folder / "training-state-000002.pkl")

    @cached_property
    def adm(self):
        net, args, kwargs = theirs.edm_net(
            "edm", "DhariwalUNet", model_channels=128, channel_mult=[1], attn_resolutions=[]
        )
        return theirs.dump(theirs.edm_content(net, args, kwargs), self.folder / "adm.pkl")

    @cached_property
    def published(self):
        """Every file that the generation presets name."""
        folder = self.folder / "published"
        folder.mkdir()
        first = theirs.dump(theirs.edm2_content(*theirs.edm2_net()), folder / "first.pkl")
        for row in presets.GENERATION_PRESETS.values():
            for name in {row["net"], row["gnet"]} - {None}:
                if not (folder / f"{name}.pkl").exists():
                    os.link(first, folder / f"{name}.pkl")
        return folder

    @cached_property
    def samples(self):
        options = [f"--net={self.run}", "--seeds=0-9", "--class=balanced", "--steps=1", "--device=cpu"]
        run(generate_images.main, *options, f"--outdir={self.folder / 'samples'}")
        return self.folder / "samples"

    @cached_property
    def detector(self):
        dest = self.folder / "detector.safetensors"
        run(
            calculate_metrics.cmdline,
            "detector",
            f"--data={self.images}",
            f"--dest={dest}",
            "--epochs=1",
            "--device=cpu",
        )
        return dest

    @cached_property
    def reference(self):
        dest, metrics = self.folder / "ref.npz", f"--metrics=pixel,classifier:{self.detector}"
        run(calculate_metrics.cmdline, "ref", f"--data={self.held_out}", f"--dest={dest}", metrics, "--device=cpu")
        return dest

    @cached_property
    def scores(self):
        """Of two arms, ten sources, two seeds and checkpoints, in the shape of a score file."""
        folder = self.folder / "scores"
        folder.mkdir()
        for arm in ("multi", "single"):
            for seed in range(2):
                values = {str(k): {"fd": 1.0 + k + seed + (arm == "single"), "count": 4} for k in range(3)}
                tags = {"arm": arm, "seed": str(seed), "checkpoint": f"{arm}{seed}"}
                metrics = {"pixel": {"overall": {"fd": 2.0 + seed}, "mean": {"fd": 2.0}, "sources": values}}
                (folder / f"{arm}-{seed}.json").write_text(json.dumps({"tags": tags, "metrics": metrics}))
        return folder

    @cached_property
    def swept(self):
        """Of one arm, two seeds, four lengths of the average."""
        folder = self.folder / "swept"
        folder.mkdir()
        for seed in range(2):
            for ema in (0.05, 0.1, 0.15, 0.2):
                metrics = {"denoising": {"loss": (ema - 0.1) ** 2 + seed, "num": 4}}
                content = {"tags": {"seed": str(seed), "ema": str(ema)}, "metrics": metrics}
                (folder / f"{seed}-{ema}.json").write_text(json.dumps(content))
        return folder

    @cached_property
    def toy(self):
        from simulations import run_toy

        train = ["train", "--dataset=diamond", "--process=cld", "--steps=2", "--batch=32", "--channels=8"]
        run(run_toy.main, *train, f"--outdir={self.folder / 'toy'}")
        return self.folder / "toy"

    @cached_property
    def tree(self):
        from simulations import run_tree

        train = ["train", "--dim=8", "--layers=1", "--total-iter=2", "--batch-size=64", "--no-test"]
        run(run_tree.main, *train, f"--outdir={self.folder / 'tree'}")
        return self.folder / "tree"

    @cached_property
    def tree_snapshot(self):
        return next(self.tree.glob("learner-*.safetensors"))

    @cached_property
    def tree_pkl(self):
        return theirs.dump(theirs.toy_content(num_layers=1, hidden_dim=8)[1], self.folder / "iter4096.pkl")

    @cached_property
    def tree_published(self):
        for name in ("clsA-layers04-dim64/iter4096.pkl", "clsA-layers04-dim32/iter0512.pkl"):
            write(self.folder / "tree-published" / name, self.tree_pkl.read_bytes())
        return self.folder / "tree-published"

    @cached_property
    def gaussian(self):
        from simulations import run_gaussian

        options = ["--tag=all", "--seeds=1,2", "--K-values=1,2", "--n-values=9,40", "--sim-values=0,0.4", "--D=2"]
        run(run_gaussian.main, *options, f"--results-dir={self.folder / 'gaussian'}")
        return self.folder / "gaussian"

    @cached_property
    def imagenet(self):
        """1000 class folders would take long; the 200 first ones are enough for ids below 200."""
        for k in range(200):
            write(self.folder / "imagenet" / f"n{k:08d}" / "a.png", png(k))
        return self.folder / "imagenet"

    @cached_property
    def dogs(self):
        """The class folders of a level of the multi-source experiments."""
        from training.dataset.imagenet import LEVELS

        for k, (_, wnid, _) in enumerate(LEVELS["sim3"]):
            for i in range(3):
                write(self.folder / "dogs" / wnid / f"{i}.png", png(10 * k + i, 40))
        return self.folder / "dogs"

    @cached_property
    def tiny_imagenet(self):
        path, names = self.folder / "tiny-imagenet-200.zip", [f"n{k:08d}" for k in range(200)]
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("tiny-imagenet-200/wnids.txt", "\n".join(names))
            for name in names:
                archive.writestr(f"tiny-imagenet-200/train/{name}/images/{name}_0.png", png())
            archive.writestr("tiny-imagenet-200/val/images/val_0.png", png())
            archive.writestr("tiny-imagenet-200/val/val_annotations.txt", f"val_0.png\t{names[0]}\t0\t0\t8\t8\n")
        return path

    @cached_property
    def afhq(self):
        for part in ("train", "test"):
            for animal in ("cat", "dog", "wild"):
                write(self.folder / "afhqv2" / part / animal / "a.png", png())
        return self.folder / "afhqv2"

    @cached_property
    def ffhq(self):
        for k in range(2):
            write(self.folder / "images1024x1024" / f"{k:02d}000" / f"{k:02d}000.png", png(k))
        return self.folder / "images1024x1024"

    @cached_property
    def cifar(self):
        path = self.folder / "cifar-10-python.tar.gz"
        with tarfile.open(fileobj=io.BytesIO(_cifar())) as plain, tarfile.open(path, "w:gz") as packed:
            for member in plain:
                packed.addfile(member, plain.extractfile(member))
        return path

    @cached_property
    def celeba(self):
        pixels = np.arange(48, dtype=np.uint8)
        rows = [record(example(data=pixels.tobytes(), shape=[3, 4, 4])) for _ in range(2)]
        write(self.folder / "celeba-tfr" / "train" / "a.tfrecords", b"".join(rows))
        return self.folder / "celeba-tfr" / "train"


# What a value stands for: (script, option, value) as patterns, the first that fits; {} is the name of an item of World.
NETS = r"net|gnet|init|reference|process|guide|guide-path|ema-path|net-path"
READS = [
    (r"simulations/run_toy", NETS, r"r|\w+/.*", "toy"),
    (r"simulations/run_tree\.py", "models", r".*", "tree_published"),
    (r"simulations/run_tree\.py", NETS, r".*\.pkl", "tree_pkl"),
    (r"simulations/run_tree\.py", NETS, r".*\.safetensors", "tree_snapshot"),
    (r"simulations/run_tree\.py", NETS, r".+", "tree"),
    (r"simulations/plot_run\.py", "", r".*tree.*", "tree"),
    (r"simulations/plot_run\.py", "", r".+", "selecting"),
    (r"simulations/run_robustness\.py", "net", r".*", "run"),
    (r".*", NETS, r".*training-state.*\.pkl", "pfgmpp_pkl"),
    (r".*", NETS, r".*adm\.pkl", "adm"),
    (r".*", NETS, r".*\.pkl", "edm2"),
    (r".*", NETS, r".*\.pt", "pfgmpp"),
    (r".*", NETS, r".*\.pth", "cld"),
    (r".*", NETS, r".*\.ckpt", "mdm"),
    (r".*", NETS, r"(NAME|SNAPSHOT|r|\S*/\S+|\S*\.safetensors|first-run)", "run"),
    (r".*", "ref|eval-ref", r".*", "reference"),
    (r".*", "images", r".*", "samples"),
    (r".*", "indir", r".*", "averages"),
    (r".*", "scores", r".*ema.*", "swept"),
    (r".*", "scores", r".*", "scores"),
    (r".*", "source", r".*cifar.*", "cifar"),
    (r".*", "source", r".*tiny-imagenet.*", "tiny_imagenet"),
    (r".*", "source", r".*celeba.*", "celeba"),
    (r".*", "source", r".*(imagenet).*", "imagenet"),
    (r".*", "source", r".*afhq.*", "afhq"),
    (r".*", "source", r".*images1024.*", "ffhq"),
    (r".*", "source", r".*", "colour"),
    (r".*", "data", r".*latent.*", "latents"),
    (r".*", "val-data", r".*", "held_out"),
    (r".*", "data", r"v\.zip", "held_out"),
    (r".*", "data", r".*", "images"),
]
PLACED = {"net", "metrics"}  # options whose values may begin with LABEL= or KIND:

# Counts, cut where a row gives them: option -> function of its text.
at_most = lambda most: lambda text: str(min(int(text), most)) if text.isdigit() else text
fixed = lambda value: lambda text: value
CUT = {
    "seeds": fixed("0-1"),
    "num": fixed("8"),
    "num-images": fixed("8"),
    "eval-num": fixed("8"),
    "min-kimg": fixed("0"),
    "blocks": fixed("2"),
    "per-source": fixed("1"),
    "resolution": fixed("8x8"),
    "class": at_most(9),
    "steps": at_most(2),
    "samples": at_most(2),
    "rtol": fixed("0.1"),
    "atol": fixed("0.1"),
    "batch-gpu": fixed("16"),
    "stf-refs": fixed("64"),
    "channels": lambda text: text if int(text) <= 32 else "8",
    "cbase": fixed("8"),
    "num-blocks": fixed("1"),
    "nblock": fixed("1"),
    "hutch-probes": fixed("1"),
    "samplings": fixed("0"),
    "dim": fixed("8"),
    "layers": fixed("1"),
    "total-iter": fixed("3"),
    "n-samples": fixed("32"),
    "n": fixed("2"),
    "jobs": fixed("1"),
    "duration": fixed("64"),
    "batch": fixed("32"),
    "batch-size": fixed("256"),
    "snapshot-iter": fixed("2"),
    "chunks": fixed("2"),
    "sources": lambda text: ",".join(str(int(s) % 200) for s in text.split(",")),
    "index": at_most(0),
}
# Added to every row of a script, before its own options: (script, sub-command).
ADDED = {
    ("train_edm2.py", ""): [
        *("--duration=64", "--batch=32", "--channels=8", "--num-blocks=1", "--channels-per-head=8", "--rampup=0.01"),
        *("--workers=0", "--grid=False", "--device=cpu"),
    ],
    ("generate_images.py", ""): ["--steps=2", "--seeds=0-1", "--device=cpu"],
    ("calculate_metrics.py", "gen"): ["--num=8", "--steps=2", "--device=cpu"],
    ("calculate_metrics.py", "calc"): ["--device=cpu"],
    ("calculate_metrics.py", "ref"): ["--device=cpu"],
    ("calculate_metrics.py", "loss"): ["--num=8", "--device=cpu"],
    ("calculate_metrics.py", "likelihood"): ["--num=2", "--samples=1", "--device=cpu", "--rtol=0.1", "--atol=0.1"],
    ("calculate_metrics.py", "detector"): ["--epochs=1", "--device=cpu"],
    ("simulations/run_gaussian.py", ""): ["--seeds=1", "--D=2", "--test-size=10", "--K-values=1,2", "--n-values=9,40"],
    ("simulations/run_toy.py", "train"): ["--steps=2", "--batch=32", "--channels=8"],
    ("simulations/run_toy.py", "plot"): ["--steps=2", "--num=32"],
    ("simulations/run_tree.py", "train"): ["--dim=8", "--layers=1", "--total-iter=3", "--batch-size=256", "--no-test"],
    ("simulations/run_tree.py", "test"): ["--n-samples=32"],
    ("simulations/run_tree_sweep.py", ""): [
        *("--arms=baseline,random", "--seeds=0", "--reference-iter=2", "--reference-batch=64", "--total-iter=4"),
    ],
    ("simulations/run_robustness.py", ""): ["--alpha=0,0.1", "--bits=5", "--num-steps=2"],
}


def replaced(script, option, value, world):
    """A value of an option (or an argument, option "") with what it reads replaced by something of the world."""
    head, rest = "", value
    if option in PLACED and (match := re.match(r"(\w+[=:])(.*)", value)):
        head, rest = match.groups()
        option = "detector" if option == "metrics" else option
    for pattern, options, values, item in [*READS, (r".*", "detector", r".+\.safetensors", "detector")]:
        if re.match(pattern, script) and re.fullmatch(options, option) and re.fullmatch(values, rest):
            path = getattr(world, item)
            pattern = "/*.json" if options == "scores" else "/*.safetensors" if "*" in rest and item == "run" else ""
            return f"{head}{path}{pattern}"
    return value


def is_output(command, option):
    """Whether a parameter names what is written: those that pass the door, and dataset_tool's."""
    name = {f"--{option}"}
    found = [p for p in command.params if name & set(p.opts)]
    return bool(found) and (
        getattr(found[0], "writes", None) is not None or option in ("dest", "outdir", "out", "save")
    )


def leaf_of(command, words):
    """(the sub-command, its words) of a command line."""
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    return command, words


def small(script, command, words, world):
    """(words, outputs that must exist afterwards) of a command line that ends in a second."""
    leaf, rest = leaf_of(command, words)
    made, written, rest = list(words[: len(words) - len(rest)]), [], list(rest)
    sub = made[0] if made else ""
    made += ADDED.get((script, sub), [])
    flags = {"--help"} | {
        name for p in leaf.params if getattr(p, "is_flag", False) for name in (*p.opts, *p.secondary_opts)
    }
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            made.append(str(ROOT / word) if word.startswith("experiments/") else replaced(script, "", word, world))
            continue
        name, equals, value = word.partition("=")
        if name in ("--dry-run", "-n") and script == "simulations/run_robustness.py":
            continue  # the grid itself is small enough
        if not equals and name not in flags:
            value = rest.pop(0)
        if not equals and name in flags:
            made.append(word)
            continue
        option = name.lstrip("-")
        if is_output(leaf, option):
            value = value.replace("NAME", "new")
            written.append(value)
        else:
            value = CUT.get(option.replace("_", "-"), lambda text: text)(replaced(script, option, value, world))
        made.append(f"{name}={value}" if name.startswith("--") else f"{name}{value}")
    if (
        script == "run_experiment.py" and "experiments/imagenet.yaml" in words
    ):  # two classes, what is done is kept in the world
        made = [re.sub(r"10c", "2c", re.sub(r"=10$", "=2", word)) for word in made if word != "--dry-run"]
        places = {name: world.folder / "cells" / name for name in ("data", "refs", "runs", "samples", "out")}
        tiny = {
            "source": world.dogs,
            "vae": world.vae,
            "metrics": "pixel",
            "launch": "",
            "ns": 2,
            "images": 3,
            **places,
        }
        made += ["--budget=smoke", "--jobs=1", *(f"--set={name}={value}" for name, value in tiny.items())]
    given = dict(word[2:].partition("=")[::2] for word in made if word.startswith("--"))
    if script == "generate_images.py" and "aug-dim" in given:
        made.append(f"--net={world.pfgmpp_of(given['aug-dim'])}")
    if script == "train_edm2.py" and "preset" in given:
        made += [f"--{name}={world.trained(given['preset'])}" for name in ("init", "reference") if name in given]
        if "resume" in given:  # what the same command wrote before
            rest = [word for word in made if not word.startswith(("--resume=", "--outdir="))]
            run(command, *rest, "--outdir=before")
            made.append(f"--resume={next(Path('before').glob('training-state-*.pt'))}")
    if script == "generate_images.py" and any(w.startswith("--preset=") for w in made):
        made.append(f"--models={world.published}")
    if (script, sub) == ("dataset_tool.py", "encode"):
        made.append(f"--model-url={world.vae}")
    if "latents.zip" in " ".join(made):
        made.append(f"--vae={world.vae}")
    if script.startswith("simulations/plot_gaussian"):
        made += [f"--results-dir={world.gaussian}", "--figures-dir=figures", "--dpi=50"]
        written.append("figures")
    for option, place in (("outdir", "run-here"), ("figure", "figure"), ("results-dir", "results")):
        known = [p for p in leaf.params if f"--{option}" == next((o for o in p.opts if o[:2] == "--"), None)]
        names = "|".join(known[0].opts) if known else ""
        shown = script.startswith("simulations/") and known and known[0].default is not None
        if shown and not any(re.match(rf"({names})=", w) for w in made):  # not into the repository
            made.append(f"--{option}={place}")
            written.append(place)
    return made, written


def exists(path):
    """Whether an output is there: a file, a folder with something in it, or what begins like that."""
    path = Path(path)
    if path.is_dir():
        return any(not p.name.startswith(".") for p in path.iterdir())
    return path.is_file() or any(path.parent.glob(f"{path.name}*"))


def run_row(script, command, words, world):
    """Run one command line small, where we are; its outputs must be there afterwards."""
    words, written = small(script, command, words, world)
    done = run(command, *words)
    if not {"--help", "--list", "--dry-run"} & set(words):
        for path in written:
            assert exists(path), f"{script} {' '.join(words)}: no {path}"
    return done


def printed_by(words):
    """The command lines that a bash script prints with --dry-run."""
    with tempfile.TemporaryDirectory() as folder:  # of those that end with the command itself
        (Path(folder) / "python").write_text("#!/bin/sh\n")
        (Path(folder) / "python").chmod(0o755)
        environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
        command = ["bash", *words[1:], "--dry-run"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [
        m[1] for line in done.stdout.splitlines() if (m := re.match(r"\+ (?:\w+=\S+ )*((?:python|torchrun) .*)", line))
    ]
    assert lines, done.stdout
    return [shlex.split(line) for line in lines]
