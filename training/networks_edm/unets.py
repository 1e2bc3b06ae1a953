"""U-Nets of the EDM era: DDPM++ and NCSN++ (Song et al. 2021) and ADM (Dhariwal & Nichol 2021).

As in Karras et al. 2022 (EDM), arXiv 2206.00364, Appendix F.3. Their state_dicts interchange with the released EDM and
PFGM++ checkpoints.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from training.networks_edm.layers import (
    BlockStyle,
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Linear,
    PositionalEmbedding,
    UNetBlock,
    require,
)


def _require_resolution(img_resolution, channel_mult):
    step = 2 ** (len(channel_mult) - 1)
    if img_resolution < step or img_resolution % step:
        raise ValueError(
            f"img_resolution={img_resolution} is not a multiple of {step}, which the {len(channel_mult)} levels of "
            f"channel_mult={list(channel_mult)} need; pad the images or give fewer levels (--cres)"
        )


class _UNet(torch.nn.Module):
    """What the two U-Nets share: blocks of one style, and a decoder that takes up what the encoder left."""

    def __init__(self, label_dropout, style):
        super().__init__()
        self.label_dropout = label_dropout
        self.style = style

    def _drop(self, class_labels, x):
        """In training, labels with rows of zeros at the rate of the label dropout."""
        if not (self.training and self.label_dropout):
            return class_labels
        keep = torch.rand([x.shape[0], 1], device=x.device) >= self.label_dropout
        return class_labels * keep.to(class_labels.dtype)

    def _build(self, img_resolution, in_channels, first, widths, num_blocks, attn_resolutions, attend_all):
        """Encoder and decoder. first: width of the first convolution. attend_all: whether each decoder block of an attention
        resolution attends, or the last one only."""
        style, cout = self.style, first
        self.enc, self.dec = torch.nn.ModuleDict(), torch.nn.ModuleDict()
        for level, width in enumerate(widths):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(in_channels, first, kernel=3, **style.init)
            else:
                self.enc[f"{res}x{res}_down"] = UNetBlock(cout, cout, style, down=True)
                self._add_encoder_aux(res, cout)
            for i in range(num_blocks):
                self.enc[f"{res}x{res}_block{i}"] = UNetBlock(cout, width, style, attention=res in attn_resolutions)
                cout = width
        skips = [layer.out_channels for name, layer in self.enc.items() if "aux" not in name]

        for level, width in reversed(list(enumerate(widths))):
            res = img_resolution >> level
            if level == len(widths) - 1:
                self.dec[f"{res}x{res}_in0"] = UNetBlock(cout, cout, style, attention=True)
                self.dec[f"{res}x{res}_in1"] = UNetBlock(cout, cout, style)
            else:
                self.dec[f"{res}x{res}_up"] = UNetBlock(cout, cout, style, up=True)
            for i in range(num_blocks + 1):
                attention = res in attn_resolutions and (attend_all or i == num_blocks)
                self.dec[f"{res}x{res}_block{i}"] = UNetBlock(cout + skips.pop(), width, style, attention=attention)
                cout = width
            self._add_decoder_aux(res, cout, deepest=level == len(widths) - 1, last=level == 0)

    def _add_encoder_aux(self, res, channels):
        """What follows the first block of a level."""

    def _add_decoder_aux(self, res, channels, deepest, last):
        """What follows the last block of a level."""

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        emb = self._embed(x, noise_labels, class_labels, augment_labels)  # [N or 1, emb_channels]
        skips = []
        aux = x
        for name, layer in self.enc.items():
            if "aux_down" in name:
                aux = layer(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + layer(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + layer(aux)) / math.sqrt(2)
            else:
                x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)

        out = None
        for name, layer in self.dec.items():
            if "aux_up" in name:
                out = layer(out)
            elif "aux_norm" in name:
                normed = layer(x)
            elif "aux_conv" in name:
                image = layer(F.silu(normed))
                out = image if out is None else image + out
            else:
                if x.shape[1] != layer.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = layer(x, emb)
        return self.out_conv(F.silu(self.out_norm(x))) if out is None else out


class SongUNet(_UNet):
    """DDPM++ (default) and NCSN++ (embedding_type="fourier", encoder_type="residual", channel_mult_noise=2,
    resample_filter=[1, 3, 3, 1]) of Song et al. 2021.

    forward(x [N, in_channels, R, R], noise_labels [N or 1], class_labels [N or 1, label_dim] or None,
    augment_labels [N, augment_dim] or None) -> [N, out_channels, R, R]. Raises ValueError for unknown types and for a
    resolution that its levels do not divide.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,  # 0: unconditional
        augment_dim: int = 0,  # 0: no augmentation labels
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0,  # probability of a zeroed label row in training
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ):
        require("embedding_type", embedding_type, ("positional", "fourier"))
        require("encoder_type", encoder_type, ("standard", "skip", "residual"))
        require("decoder_type", decoder_type, ("standard", "skip"))
        _require_resolution(img_resolution, channel_mult)
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        init = {"init_mode": "xavier_uniform"}
        init_zero = {**init, "init_weight": 1e-5}
        style = BlockStyle(
            emb_channels,
            num_heads=1,
            dropout=dropout,
            skip_scale=math.sqrt(0.5),
            eps=1e-6,
            resample_filter=resample_filter,
            resample_proj=True,
            adaptive_scale=False,
            init=init,
            init_zero=init_zero,
            init_attn={**init, "init_weight": math.sqrt(0.2)},
        )
        super().__init__(label_dropout, style)

        if embedding_type == "positional":
            self.map_noise = PositionalEmbedding(noise_channels, endpoint=True)
        else:
            self.map_noise = FourierEmbedding(noise_channels)
        self.map_label = Linear(label_dim, noise_channels, **init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, **init) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, **init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **init)

        self.encoder_type, self.decoder_type = encoder_type, decoder_type
        self.aux_channels, self.out_channels = in_channels, out_channels
        widths = [model_channels * mult for mult in channel_mult]
        self._build(img_resolution, in_channels, model_channels, widths, num_blocks, attn_resolutions, attend_all=False)

    def _add_encoder_aux(self, res, channels):
        down, init = {"down": True, "resample_filter": self.style.resample_filter}, self.style.init
        if self.encoder_type == "skip":
            self.enc[f"{res}x{res}_aux_down"] = Conv2d(self.aux_channels, self.aux_channels, kernel=0, **down)
            self.enc[f"{res}x{res}_aux_skip"] = Conv2d(self.aux_channels, channels, kernel=1, **init)
        if self.encoder_type == "residual":
            aux = Conv2d(self.aux_channels, channels, kernel=3, fused_resample=True, **down, **init)
            self.enc[f"{res}x{res}_aux_residual"] = aux
            self.aux_channels = channels

    def _add_decoder_aux(self, res, channels, deepest, last):
        if self.decoder_type == "skip" and not deepest:
            up = {"up": True, "resample_filter": self.style.resample_filter}
            self.dec[f"{res}x{res}_aux_up"] = Conv2d(self.out_channels, self.out_channels, kernel=0, **up)
        if self.decoder_type == "skip" or last:
            self.dec[f"{res}x{res}_aux_norm"] = GroupNorm(channels, eps=1e-6)
            self.dec[f"{res}x{res}_aux_conv"] = Conv2d(channels, self.out_channels, kernel=3, **self.style.init_zero)

    def _embed(self, x, noise_labels, class_labels, augment_labels):
        emb = self.map_noise(noise_labels)
        emb = emb.reshape(emb.shape[0], 2, -1).flip(1).reshape(emb.shape)  # sines first
        if self.map_label is not None:
            emb = emb + self.map_label(self._drop(class_labels, x) * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = F.silu(self.map_layer0(emb))
        return F.silu(self.map_layer1(emb))


class DhariwalUNet(_UNet):
    """ADM of Dhariwal & Nichol 2021, as EDM trained it; arguments and forward as SongUNet.

    With fewer than 64 channels at an attention resolution there is no attention there (zero heads), as released.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,  # 0: unconditional
        augment_dim: int = 0,  # 0: no augmentation labels
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0,  # probability of a zeroed label row in training
    ):
        _require_resolution(img_resolution, channel_mult)
        emb_channels = model_channels * channel_mult_emb
        third = math.sqrt(1 / 3)
        init = {"init_mode": "kaiming_uniform", "init_weight": third, "init_bias": third}
        init_zero = {"init_mode": "kaiming_uniform", "init_weight": 0, "init_bias": 0}
        style = BlockStyle(emb_channels, dropout=dropout, init=init, init_zero=init_zero)
        super().__init__(label_dropout, style)

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False, **init_zero) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, **init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **init)
        self.map_label = None
        if label_dim:
            label_init = {"init_mode": "kaiming_normal", "init_weight": math.sqrt(label_dim)}
            self.map_label = Linear(label_dim, emb_channels, bias=False, **label_init)

        widths = [model_channels * mult for mult in channel_mult]
        self._build(img_resolution, in_channels, widths[0], widths, num_blocks, attn_resolutions, attend_all=True)
        self.out_norm = GroupNorm(widths[0])
        self.out_conv = Conv2d(widths[0], out_channels, kernel=3, **init_zero)

    def _embed(self, x, noise_labels, class_labels, augment_labels):
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(self._drop(class_labels, x))
        return F.silu(emb)
