"""Inception-v3 in the variant of the FID: the TensorFlow graph `inception-2015-12-05` with the names of its public PyTorch
files, which differs from ImageNet's Inception-v3 in its pools, its 1008 classes and its input.
"""

from __future__ import annotations

import numpy as np
import torch

from metrics.detectors import weights
from metrics.detectors.base import Detector
from metrics.detectors.resize import tf1_bilinear
from torch_utils.devices import send

SIDE = 299  # pixels of the input
WIDTH = 2048  # features
CLASSES = 1008
_RELEASES = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"
_FILE = "inception-2015-12-05-6726825d.pth"
WEIGHTS = weights.Weights(
    "fid",
    "Inception-v3 of the FID",
    (f"weights-{_FILE}", f"pt_{_FILE}"),
    url=f"{_RELEASES}/weights-{_FILE}",
    licence="Apache-2.0",
    size=95_628_359,
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)

# A row per layer or block, a column per branch; branches are joined on the channels. A unit is `name:out:kernel`, with /2
# for stride 2 and v for no padding; `avg` leaves the padding out of its mean. The last units of a fork (a|b) see the same.
_STEM = """Conv2d_1a_3x3:32:3/2 Conv2d_2a_3x3:32:3v Conv2d_2b_3x3:64:3 max/2
Conv2d_3b_1x1:80:1 Conv2d_4a_3x3:192:3v max/2"""
_A = """branch1x1:64:1
branch5x5_1:48:1 branch5x5_2:64:5
branch3x3dbl_1:64:1 branch3x3dbl_2:96:3 branch3x3dbl_3:96:3
avg branch_pool:{0}:1"""
_B = """branch3x3:384:3/2
branch3x3dbl_1:64:1 branch3x3dbl_2:96:3 branch3x3dbl_3:96:3/2
max/2"""
_C = """branch1x1:192:1
branch7x7_1:{0}:1 branch7x7_2:{0}:1x7 branch7x7_3:192:7x1
branch7x7dbl_1:{0}:1 branch7x7dbl_2:{0}:7x1 branch7x7dbl_3:{0}:1x7 branch7x7dbl_4:{0}:7x1 branch7x7dbl_5:192:1x7
avg branch_pool:192:1"""
_D = """branch3x3_1:192:1 branch3x3_2:320:3/2
branch7x7x3_1:192:1 branch7x7x3_2:192:1x7 branch7x7x3_3:192:7x1 branch7x7x3_4:192:3/2
max/2"""
_E = """branch1x1:320:1
branch3x3_1:384:1 branch3x3_2a:384:1x3|branch3x3_2b:384:3x1
branch3x3dbl_1:448:1 branch3x3dbl_2:384:3 branch3x3dbl_3a:384:1x3|branch3x3dbl_3b:384:3x1
{0} branch_pool:192:1"""
_BLOCKS = dict(
    Mixed_5b=_A.format(32), Mixed_5c=_A.format(64), Mixed_5d=_A.format(64),
    Mixed_6a=_B, Mixed_6b=_C.format(128), Mixed_6c=_C.format(160), Mixed_6d=_C.format(160), Mixed_6e=_C.format(192),
    Mixed_7a=_D, Mixed_7b=_E.format("avg"), Mixed_7c=_E.format("max"),
)  # fmt: skip
_POOLS = {
    "avg": lambda: torch.nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
    "max": lambda: torch.nn.MaxPool2d(3, stride=1, padding=1),
    "max/2": lambda: torch.nn.MaxPool2d(3, stride=2),
}


class Unit(torch.nn.Module):
    """Convolution without bias, batch norm of the running statistics, ReLU."""

    def __init__(self, channels: int, spec: str):
        super().__init__()
        _, out, kernel = spec.split(":")
        sides = [int(side) for side in kernel.rstrip("v").partition("/")[0].split("x")]
        sides, same = sides * (3 - len(sides)), kernel[-2:] != "/2" and kernel[-1] != "v"
        shape = dict(stride=2 if kernel[-2:] == "/2" else 1, padding=[side // 2 * same for side in sides])
        self.conv = torch.nn.Conv2d(channels, int(out), sides, bias=False, **shape)
        self.bn = torch.nn.BatchNorm2d(int(out), eps=1e-3)

    def fold(self) -> None:
        """Make the norm part of the convolution: the same numbers but for rounding, faster."""
        self.conv, self.bn = torch.nn.utils.fusion.fuse_conv_bn_eval(self.conv, self.bn), torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.relu(self.bn(self.conv(x)), inplace=True)


class Block(torch.nn.Module):
    """Branches side by side, each a chain; `channels` of the output."""

    def __init__(self, channels: int, rows: str):
        super().__init__()
        self.branches, self.channels = [], 0
        for row in rows.split("\n"):
            width, steps = [channels], [step.split("|") for step in row.split()]
            for step in steps:
                for spec in step:
                    unit = _POOLS[spec]() if spec in _POOLS else Unit(width[0], spec)
                    self.add_module(spec.split(":")[0], unit)
                width = [width[0] if spec in _POOLS else int(spec.split(":")[1]) for spec in step]
            self.branches.append([[spec.split(":")[0] for spec in step] for step in steps])
            self.channels += sum(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ends = []
        for branch in self.branches:
            y = [x]
            for step in branch:
                y = [self._modules[name](y[0]) for name in step]
            ends += y
        return torch.cat(ends, dim=1)


class InceptionV3(torch.nn.Module):
    """Images [N, 3, 299, 299] in [-1, 1) -> features [N, 2048]; the parameters have the names of the public files."""

    def __init__(self):
        super().__init__()
        channels, self.chain = 3, []
        for spec in _STEM.split():
            self.chain.append(_POOLS[spec]() if spec in _POOLS else Unit(channels, spec))
            if spec not in _POOLS:
                self.add_module(spec.split(":")[0], self.chain[-1])
                channels = self.chain[-1].conv.out_channels
        for name, rows in _BLOCKS.items():
            self.chain.append(Block(channels, rows))
            self.add_module(name, self.chain[-1])
            channels = self.chain[-1].channels
        self.fc = torch.nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.chain:
            x = part(x)
        return x.mean(dim=(2, 3))


class Inception(Detector):
    """The 2048 features of the FID (and of KID, precision and recall), and the logits of the Inception Score."""

    name, width, channels, resize = "fid", WIDTH, 3, f"TensorFlow 1 bilinear to {SIDE} px"

    def __init__(self, file: weights.WeightFile):
        """Raises ValueError where the file holds another network."""
        state = weights.read(file.path)
        if any(name.startswith("AuxLogits.") for name in state):
            raise ValueError(f"{file.path}: torchvision's network of ImageNet, not {WEIGHTS.network}: give {WEIGHTS}")
        with torch.device("meta"):
            net = InceptionV3()
        self.net = weights.fill(net, state, file.path)
        for unit in self.net.modules():
            if isinstance(unit, Unit):
                unit.fold()
        self.net.to(memory_format=torch.channels_last)  # a third faster on a CPU
        self.file, self.sha256 = file, file.sha256

    @property
    def identity(self) -> str:
        return self.file.identity(self.name)

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, H, W] -> [n, 3, 299, 299] in [-1, 1)."""
        return (tf1_bilinear(send(images, self.device).float(), SIDE) - 128) / 128

    @torch.no_grad()
    def logits(self, features: torch.Tensor | np.ndarray, bias: bool = False) -> torch.Tensor:
        """Features [N, 2048] -> logits [N, 1008], on the CPU; the Inception Score is made of those without the bias."""
        f = torch.as_tensor(features).to(self.device, torch.float32)
        return torch.nn.functional.linear(f, self.net.fc.weight, self.net.fc.bias if bias else None).cpu()
