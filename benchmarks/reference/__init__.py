"""EDM2 as published, for comparison: network, training step and sampler written from the functional description of the
reference (magnitude-preserving primitives, U-Net, preconditioning, loss, loop, Heun with guidance), operation by operation.

Shares no code with `training`; parameters have the reference's names, so weights go over by load_state_dict.
"""

import copy
import math

import numpy as np
import torch
from torch.nn.functional import conv2d, conv_transpose2d, silu

EPS, SILU = 1e-4, 0.596


def normalize(x, dim=None):
    """x / (eps + RMS over dim), the norm in float32."""
    dim = list(range(1, x.ndim)) if dim is None else dim
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    return x / (EPS + norm * math.sqrt(norm.numel() / x.numel())).to(x.dtype)


def mp_sum(a, b, t):
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a, b, t):
    c = math.sqrt((a.shape[1] + b.shape[1]) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (c * (1 - t) / math.sqrt(a.shape[1])), b * (c * t / math.sqrt(b.shape[1]))], dim=1)


class Fourier(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, x):
        return (x.float().outer(self.freqs) + self.phases).cos() * math.sqrt(2)


class Conv(torch.nn.Module):
    """Forced weight normalisation: in place while training, and once more inside the graph."""

    def __init__(self, cin, cout, *kernel):
        super().__init__()
        self.out_channels = cout
        self.weight = torch.nn.Parameter(torch.randn(cout, cin, *kernel))

    def forward(self, x, gain=1):
        w = self.weight.float()
        if self.training:
            with torch.no_grad():
                self.weight.copy_(normalize(w))
        w = (normalize(w) * (gain / math.sqrt(w[0].numel()))).to(x.dtype)
        return x @ w.t() if w.ndim == 2 else conv2d(x, w, padding=w.shape[-1] // 2)


class Block(torch.nn.Module):
    def __init__(self, cin, cout, emb, flavor, mode="keep", attention=False, channels_per_head=64):
        super().__init__()
        self.out_channels, self.flavor, self.mode = cout, flavor, mode
        self.heads = cout // channels_per_head if attention else 0
        self.emb_gain = torch.nn.Parameter(torch.zeros([]))
        self.conv_res0 = Conv(cout if flavor == "enc" else cin, cout, 3, 3)
        self.emb_linear = Conv(emb, cout)
        self.conv_res1 = Conv(cout, cout, 3, 3)
        self.conv_skip = Conv(cin, cout, 1, 1) if cin != cout else None
        self.attn_qkv = Conv(cout, 3 * cout, 1, 1) if self.heads else None
        self.attn_proj = Conv(cout, cout, 1, 1) if self.heads else None
        self.kernels = {}  # of resampling, by device and type: made once, as the reference does

    def resample(self, x):
        if self.mode == "keep":
            return x
        key = x.device, x.dtype
        if key not in self.kernels:
            self.kernels[key] = torch.full([1, 1, 2, 2], 0.25, device=x.device, dtype=x.dtype)
        kernel, channels = self.kernels[key].tile([x.shape[1], 1, 1, 1]), x.shape[1]
        if self.mode == "down":
            return conv2d(x, kernel, groups=channels, stride=2)
        return conv_transpose2d(x, kernel * 4, groups=channels, stride=2)

    def forward(self, x, emb):
        x = self.resample(x)
        if self.flavor == "enc":
            x = normalize(x if self.conv_skip is None else self.conv_skip(x), dim=1)
        y = self.conv_res0(silu(x) / SILU)
        c = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = silu(y * c[:, :, None, None].to(y.dtype)) / SILU
        y = self.conv_res1(y)
        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, 0.3)
        if self.heads:
            y = self.attn_qkv(x).reshape(len(x), self.heads, -1, 3, x.shape[2] * x.shape[3])
            q, k, v = normalize(y, dim=2).unbind(3)
            weights = torch.einsum("nhcq,nhck->nhqk", q, k / math.sqrt(q.shape[2])).softmax(dim=3)
            x = mp_sum(x, self.attn_proj(torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(x.shape)), 0.3)
        return x.clip(-256, 256)


class UNet(torch.nn.Module):
    def __init__(self, resolution, channels, label_dim, width, mult, blocks, attn_resolutions, channels_per_head):
        super().__init__()
        widths, head = [width * m for m in mult], {"channels_per_head": channels_per_head}
        emb, cout = max(widths), channels + 1
        self.out_gain = torch.nn.Parameter(torch.zeros([]))
        self.emb_fourier, self.emb_noise = Fourier(widths[0]), Conv(widths[0], emb)
        self.emb_label = Conv(label_dim, emb) if label_dim else None
        self.enc, self.dec = torch.nn.ModuleDict(), torch.nn.ModuleDict()
        for level, w in enumerate(widths):
            res = resolution >> level
            if level:
                self.enc[f"{res}x{res}_down"] = Block(cout, cout, emb, "enc", "down")
            else:
                self.enc[f"{res}x{res}_conv"] = Conv(cout, w, 3, 3)
                cout = w
            for i in range(blocks):
                self.enc[f"{res}x{res}_block{i}"] = Block(
                    cout, w, emb, "enc", attention=res in attn_resolutions, **head
                )
                cout = w
        skips = [block.out_channels for block in self.enc.values()]
        for level, w in reversed([*enumerate(widths)]):
            res = resolution >> level
            if level == len(widths) - 1:
                self.dec[f"{res}x{res}_in0"] = Block(cout, cout, emb, "dec", attention=True, **head)
                self.dec[f"{res}x{res}_in1"] = Block(cout, cout, emb, "dec")
            else:
                self.dec[f"{res}x{res}_up"] = Block(cout, cout, emb, "dec", "up")
            for i in range(blocks + 1):
                attend = res in attn_resolutions
                self.dec[f"{res}x{res}_block{i}"] = Block(cout + skips.pop(), w, emb, "dec", attention=attend, **head)
                cout = w
        self.out_conv = Conv(cout, channels, 3, 3)

    def forward(self, x, noise_labels, labels):
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None:
            emb = mp_sum(emb, self.emb_label(labels * math.sqrt(labels.shape[1])), 0.5)
        emb = silu(emb) / SILU
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips = []
        for name, block in self.enc.items():
            x = block(x) if "conv" in name else block(x, emb)
            skips.append(x)
        for name, block in self.dec.items():
            x = block(mp_cat(x, skips.pop(), 0.5) if "block" in name else x, emb)
        return self.out_conv(x, gain=self.out_gain)


class Denoiser(torch.nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; ln(sigma) / 4), and the log-variance head; float32."""

    def __init__(self, img_resolution, img_channels, label_dim, model_channels=192, channel_mult=(1, 2, 3, 4),
                 num_blocks=3, attn_resolutions=(16, 8), channels_per_head=64, sigma_data=0.5):  # fmt: skip
        super().__init__()
        self.label_dim, self.sigma_data = label_dim, sigma_data
        sizes = model_channels, channel_mult, num_blocks, attn_resolutions, channels_per_head
        self.unet = UNet(img_resolution, img_channels, label_dim, *sizes)
        self.logvar_fourier, self.logvar_linear = Fourier(128), Conv(128, 1)

    def forward(self, x, sigma, labels=None, return_logvar=False):
        sigma, s = sigma.float().reshape(-1, 1, 1, 1), self.sigma_data
        if self.label_dim:
            labels = (torch.zeros([1, self.label_dim], device=x.device) if labels is None else labels).float()
        c_skip, c_in = s**2 / (sigma**2 + s**2), 1 / (s**2 + sigma**2).sqrt()
        c_noise = sigma.flatten().log() / 4
        denoised = c_skip * x + sigma * s / (sigma**2 + s**2).sqrt() * self.unet(c_in * x, c_noise, labels)
        if return_logvar:
            return denoised, self.logvar_linear(self.logvar_fourier(c_noise)).reshape(-1, 1, 1, 1)
        return denoised


class Trainer:
    """EDM2's training iteration: reseeding, loss, gradients made finite, Adam, two power-function averages."""

    def __init__(self, net, images, labels, batch, stds=(0.05, 0.10), micro=None):
        self.net, self.images, self.labels = net.train().requires_grad_(True), images, labels
        self.batch, self.micro, self.nimg = batch, micro or batch, 0
        self.optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, betas=(0.9, 0.99))
        self.averages = [copy.deepcopy(net).eval().requires_grad_(False) for _ in stds]
        cubic = [np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real.max() for std in stds]
        self.exponents = [gamma + 1 for gamma in cubic]
        self.sums = torch.zeros(3, dtype=torch.float64, device=images.device)  # of the reported loss

    def loss(self, images, labels):
        sigma = (torch.randn([len(images), 1, 1, 1], device=images.device) - 0.4).exp()  # P_mean -0.4, P_std 1
        weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
        noise = torch.randn_like(images) * sigma
        denoised, logvar = self.net(images + noise, sigma, labels, return_logvar=True)
        return weight / logvar.exp() * (denoised - images) ** 2 + logvar

    def step(self):
        torch.manual_seed(hash((0, 0, self.nimg)) % (1 << 31))
        self.optimizer.zero_grad(set_to_none=True)
        for start in range(0, self.batch, self.micro):
            index = (self.nimg + start + torch.arange(self.micro, device=self.images.device)) % len(self.images)
            loss = self.loss(self.images[index], None if self.labels is None else self.labels[index])
            flat = loss.detach().double().flatten()
            self.sums += torch.stack([torch.ones_like(flat).sum(), flat.sum(), flat.square().sum()])
            loss.sum().mul(1 / self.batch).backward()
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4
        for p in self.net.parameters():
            if p.grad is not None:
                torch.nan_to_num(p.grad, nan=0, posinf=0, neginf=0, out=p.grad)
        self.optimizer.step()
        self.nimg += self.batch
        with torch.no_grad():
            for exponent, average in zip(self.exponents, self.averages, strict=True):
                beta = (1 - self.batch / self.nimg) ** exponent
                for p, q in zip(self.net.parameters(), average.parameters(), strict=True):
                    q.lerp_(p, 1 - beta)


@torch.no_grad()
def heun(net, noise, labels=None, gnet=None, guidance=1.0, num_steps=32, sigma_min=0.002, sigma_max=80.0, rho=7):
    """EDM2's sampler without churn, in float32; a guide is evaluated after the network."""

    def denoise(x, t):
        d = net(x, t, labels)
        return d if guidance == 1 else gnet(x, t, labels).lerp(d, guidance)

    index = torch.arange(num_steps, dtype=torch.float32, device=noise.device)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    t_steps = torch.cat([(high + index / (num_steps - 1) * (low - high)) ** rho, torch.zeros(1, device=noise.device)])
    x = noise * t_steps[0]
    for i, (t, t_next) in enumerate(zip(t_steps[:-1], t_steps[1:], strict=True)):
        d = (x - denoise(x, t)) / t
        ahead = x + (t_next - t) * d
        if i < num_steps - 1:
            ahead = x + (t_next - t) * (d + (ahead - denoise(ahead, t_next)) / t_next) / 2
        x = ahead
    return x


class Unlabelled(torch.nn.Module):
    """The same network with the zero label: the guide of classifier-free guidance."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, sigma, labels=None):
        return self.net(x, sigma, None)
