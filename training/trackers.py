"""Statistics and sample grids of a run for a tracker, besides its run folder; its package is imported when asked for."""

import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import PIL.Image

from dnnlib.util import reason

if TYPE_CHECKING:
    from training.setup import Run
    from training.training_loop import TrainingLoop

PROJECT = "multi-source-diffusion"


class TensorBoard:
    """Event files in `<run>/tensorboard`, for `tensorboard --logdir`; what a resumed run does again replaces what was there."""

    package = "tensorboard"

    def __init__(self, run_dir: Path, options: dict, nimg: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=nimg or None)
        self.writer.add_text("options", f"```json\n{json.dumps(options, indent=2)}\n```", nimg)

    def scalars(self, values: dict[str, float], nimg: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, nimg)
        self.writer.flush()

    def picture(self, image: PIL.Image.Image, nimg: int) -> None:
        import numpy as np

        self.writer.add_image("samples", np.asarray(image), nimg, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases, files in `<run>/wandb`; WANDB_MODE=offline sends nothing, WANDB_PROJECT names the project."""

    package = "wandb"

    def __init__(self, run_dir: Path, options: dict, nimg: int) -> None:
        import wandb

        last = run_dir / "wandb" / "latest-run"
        known = last.resolve().name.rpartition("-")[2] if nimg and last.exists() else None
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        more = {"id": known, "resume": "allow"} if known else {}
        self.run = wandb.init(
            project=project, name=run_dir.name, dir=str(run_dir), config=options, reinit="create_new", **more
        )
        self.make = wandb.Image

    def scalars(self, values: dict[str, float], nimg: int) -> None:
        self.run.log(values, step=nimg)

    def picture(self, image: PIL.Image.Image, nimg: int) -> None:
        self.run.log({"samples": self.make(image)}, step=nimg)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of Trackio, on this machine (TRACKIO_DIR), for `trackio show`."""

    package = "trackio"

    def __init__(self, run_dir: Path, options: dict, nimg: int) -> None:
        import trackio

        self.run = trackio.init(PROJECT, name=run_dir.name, config=options, resume="allow" if nimg else "never")
        self.make = trackio.Image

    def scalars(self, values: dict[str, float], nimg: int) -> None:
        self.run.log(values, step=nimg)

    def picture(self, image: PIL.Image.Image, nimg: int) -> None:
        import numpy as np

        self.run.log({"samples": self.make(np.asarray(image))}, step=nimg)

    def close(self) -> None:
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def tracker_hooks(run: "Run") -> dict[str, Callable]:
    """Hooks of --log: every number of a status line and every new sample grid goes to the tracker. ValueError without it."""
    name, sink, sent = run.config.log, None, set()
    kind = TRACKERS[name]
    if importlib.util.find_spec(kind.package) is None:
        raise ValueError(f"--log={name} needs the package {kind.package}: pip install {kind.package}")

    def opened(loop):
        nonlocal sink
        if sink is None:
            try:
                sink = kind(loop.run_dir, run.config.to_dict(), loop.state.cur_nimg)
            except Exception as err:  # whatever such a package raises: no key, no network, another version
                raise ValueError(f"--log={name}: {reason(err)}") from err
            sent.update(p for p in grids(loop) if int(re.sub(r"\D", "", p.stem)) < loop.kimg)  # of before a resume
        return sink

    def grids(loop):
        return sorted(loop.run_dir.glob("samples-*.png"))

    def pictures(loop):
        for path in grids(loop):
            if path not in sent:
                sent.add(path)
                with PIL.Image.open(path) as image:
                    sink.picture(image.convert("RGB"), loop.state.cur_nimg)

    def on_stats(loop: "TrainingLoop", fields: dict | None) -> None:
        nonlocal sink
        if fields is not None:
            numbers = {name: float(v) for name, v in fields.items() if isinstance(v, (int, float))}
            opened(loop).scalars(numbers, loop.state.cur_nimg)
            pictures(loop)
        elif sink is not None:
            pictures(loop)
            sink.close()
            sink = None

    def on_snapshot(loop: "TrainingLoop") -> None:
        if not loop.feed.rank:
            opened(loop)
            pictures(loop)

    return {"on_stats": on_stats, "on_snapshot": on_snapshot}
