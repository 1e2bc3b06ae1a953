"""DINOv2 (Oquab et al. 2023) without registers: ViT-L/14 for FD-DINOv2 as EDM2 computes it, any of its plain sizes besides."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch.nn.functional import gelu, interpolate, scaled_dot_product_attention

from metrics.detectors import weights
from metrics.detectors.base import Detector
from metrics.detectors.resize import bicubic, normalise
from torch_utils.devices import send

SIDE = 224  # pixels of the input
HEAD = 64  # channels per head, in every published size
OFFSET = 0.1  # of the scale of position tables: the published code's, without which features are others
WEIGHTS = weights.Weights(
    "fd_dinov2",
    "DINOv2 ViT-L/14",
    ("dinov2_vitl14_pretrain.pth",),
    url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    licence="Apache-2.0",
    size=1_217_586_395,
    sha256="d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
)
# Names of transformers' files -> those of the published one; query, key and value are joined afterwards.
_OF_TRANSFORMERS = [
    (r"^(dinov2\.)?embeddings\.(cls_token|mask_token)$", r"\2"),
    (r"^(dinov2\.)?embeddings\.position_embeddings$", "pos_embed"),
    (r"^(dinov2\.)?embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(dinov2\.)?encoder\.layer\.", "blocks."),
    (r"\.attention\.(attention\.)?(query|key|value|[qkv]_proj)\.", r".attn.\2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"^(dinov2\.)?layernorm\.", "norm."),
]


class _Scale(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = torch.nn.Parameter(torch.ones(width))


class DinoV2(torch.nn.Module):
    """Normalised images [N, 3, H, W], sides multiples of `patch` -> class tokens [N, embed]; names of the published file.

    grid: patches per side of the training images.
    """

    def __init__(self, embed: int = 1024, depth: int = 24, heads: int = 16, patch: int = 14, grid: int = 37):
        super().__init__()
        self.heads = heads
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, embed))
        self.mask_token = torch.nn.Parameter(torch.zeros(1, embed))
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, 1 + grid**2, embed))
        linear, parts = torch.nn.Linear, torch.nn.ModuleDict
        norm = lambda: torch.nn.LayerNorm(embed, eps=1e-6)
        self.patch_embed = parts({"proj": torch.nn.Conv2d(3, embed, patch, stride=patch)})
        self.blocks = torch.nn.ModuleList(
            parts(
                {
                    "norm1": norm(),
                    "attn": parts({"qkv": linear(embed, 3 * embed), "proj": linear(embed, embed)}),
                    "ls1": _Scale(embed),
                    "norm2": norm(),
                    "mlp": parts({"fc1": linear(embed, 4 * embed), "fc2": linear(4 * embed, embed)}),
                    "ls2": _Scale(embed),
                }
            )
            for _ in range(depth)
        )
        self.norm = norm()

    def positions(self, rows: int, columns: int) -> torch.Tensor:
        """The position table for rows x columns patches, [1, 1 + rows columns, embed].

        By a scale factor and not by a size, as published: the grid is read at steps of 37 / (n + 0.1).
        """
        first, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        grid = math.isqrt(patches.shape[1])
        if (rows, columns) == (grid, grid):
            return self.pos_embed
        table = patches.reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
        factor = tuple((n + OFFSET) / grid for n in (rows, columns))
        table = interpolate(table, scale_factor=factor, mode="bicubic", recompute_scale_factor=False)
        return torch.cat([first, table.flatten(2).mT], dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed.proj(x)  # [N, embed, rows, columns]
        positions = self.positions(*x.shape[2:])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).mT], dim=1) + positions
        for block in self.blocks:
            q, k, v = block.attn.qkv(block.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            seen = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + block.ls1.gamma * block.attn.proj(seen)
            x = x + block.ls2.gamma * block.mlp.fc2(gelu(block.mlp.fc1(block.norm2(x))))
        return self.norm(x[:, 0])


def published_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state under the published names, of a file of transformers too."""
    if "embeddings.cls_token" not in state and "dinov2.embeddings.cls_token" not in state:
        return dict(state)
    state = weights.renamed(state, _OF_TRANSFORMERS)
    for name in [name for name in state if re.search(r"\.attn\.(query|q_proj)\.", name)]:
        own = [("query", "key", "value"), ("q_proj", "k_proj", "v_proj")]["q_proj" in name]
        thirds = [state.pop(name.replace(own[0], part), None) for part in own]
        if all(third is not None for third in thirds):
            state[name.replace(own[0], "qkv")] = torch.cat(thirds)
    return state


class Dino(Detector):
    """The class token of DINOv2 at 224 px: 1024 features of the ViT-L/14 that FD-DINOv2 is made of."""

    name, channels, resize = "fd_dinov2", 3, f"bicubic with antialias to {SIDE} px, not rounded"

    def __init__(self, file: weights.WeightFile):
        """Raises ValueError where the file holds no DINOv2 without registers."""
        state = published_names(weights.read(file.path))
        if "register_tokens" in state:
            raise ValueError(f"{file.path}: the variant with registers; '{self.name}' is made of {WEIGHTS.names[0]}")
        shape = {name: list(tensor.shape) for name, tensor in state.items()}
        table, proj = shape.get("pos_embed", []), shape.get("patch_embed.proj.weight", [])
        if len(table) != 3 or len(proj) != 4 or table[2] % HEAD:
            raise ValueError(f"{file.path}: lacks 'pos_embed' or 'patch_embed.proj.weight' of DINOv2: another network")
        self.width = table[2]
        depth = len({name.split(".")[1] for name in shape if name.startswith("blocks.")})
        with torch.device("meta"):
            net = DinoV2(self.width, depth, self.width // HEAD, proj[3], math.isqrt(table[1] - 1))
        self.net = weights.fill(net, state, file.path)
        self.file, self.sha256 = file, file.sha256

    @property
    def identity(self) -> str:
        return self.file.identity(self.name)

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, H, W] -> [n, 3, 224, 224], normalised as ImageNet is; sides and proportions do not matter."""
        return normalise(bicubic(send(images, self.device).float(), SIDE))
