"""The U-Net of DDPM (Ho et al. 2020) as MDM trains it, by diffusers' UNet2DModel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class HoUNet(torch.nn.Module):
    """forward(x [N, in_channels, R, R], noise_labels [N], class_labels [N, label_dim] or None) -> [N, out_channels, R, R].

    MDM §13: 35,746,307 parameters for CIFAR-10, 1,539,329 for MNIST (32 channels, channel_mult 1, 2, 2). The embedding is
    sines and cosines of the raw noise label. Labels, which MDM has not, are added to it.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,  # 0: unconditional
        model_channels: int = 128,  # a multiple of 32
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        num_blocks: int = 2,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.0,
    ):
        """Raises ValueError for model_channels that groups of 32 do not divide."""
        from diffusers import UNet2DModel

        super().__init__()
        if model_channels % 32:
            raise ValueError(
                f"--channels={model_channels}: HoUNet normalises groups of 32 channels, give a multiple of 32"
            )
        levels = range(len(channel_mult))
        kinds = ["Attn" if (img_resolution >> level) in attn_resolutions else "" for level in levels]
        self.unet = UNet2DModel(
            sample_size=img_resolution,
            in_channels=in_channels,
            out_channels=out_channels,
            block_out_channels=[model_channels * mult for mult in channel_mult],
            layers_per_block=num_blocks,
            down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
            up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
            attention_head_dim=None,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-6,
            dropout=dropout,
            class_embed_type="identity" if label_dim else None,
        )
        self.map_label = torch.nn.Linear(label_dim, 4 * model_channels, bias=False) if label_dim else None
        for name, layer in self.named_modules():  # variance scaling, fan-average; 1e-10 where a branch ends
            if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
                last = name.endswith(("conv2", "to_out.0", "unet.conv_out"))
                torch.nn.init.xavier_uniform_(layer.weight, gain=1e-5 if last else 1)
                if layer.bias is not None:
                    torch.nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None = None) -> Tensor:
        given = None if self.map_label is None else self.map_label(class_labels)
        return self.unet(x, noise_labels.expand(len(x)), class_labels=given).sample
