"""Networks written for diffusers: the library loads them and computes the same; what it does not have is said."""

import json

import diffusers
import foreign_files as theirs
import pytest
import torch
from small_runs import one_line, run

import convert_snapshot
from torch_utils.persistence import save_snapshot
from training.networks_edm import EDMPrecond, iDDPMPrecond
from training.networks_toy import ToyModel

ADM = dict(model_channels=128, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], dropout=0.1)


def made(tmp_path, cls=EDMPrecond, label_dim=5, **more):
    """(network with random weights, its folder)."""
    net = cls(8, 3, label_dim, **{**ADM, **more})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():  # all of them: what starts at zero hides the rest
            p.copy_(torch.randn(p.shape, generator=generator) * (1.5 / max(p[0].numel(), 8) ** 0.5))
    save_snapshot(tmp_path / "net.safetensors", net.eval())
    found = run(
        convert_snapshot.main, f"--net={tmp_path / 'net.safetensors'}", "--folder", f"--dest={tmp_path / 'adm'}"
    )
    return net, tmp_path / "adm", json.loads(found.stdout)


def loaded(folder):
    unet, info = diffusers.UNet2DModel.from_pretrained(folder, output_loading_info=True, low_cpu_mem_usage=False)
    assert not any(info.values()), info  # nothing missing, nothing left over
    return unet.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "label_dim, more", [(5, dict(augment_dim=9)), (0, dict(attn_resolutions=[8, 4], num_blocks=2))]
)
def test_diffusers_computes_the_same_denoiser(tmp_path, label_dim, more):
    """Through diffusers' own preconditioning (EDMEulerScheduler), which shares no code with ours."""
    net, folder, found = made(tmp_path, label_dim=label_dim, sigma_data=0.6, **more)
    assert found["files"] == ["config.json", "diffusion_pytorch_model.safetensors", "scheduler_config.json"]
    unet, scheduler = loaded(folder), diffusers.EDMEulerScheduler.from_pretrained(folder)
    x, labels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 4])
    for sigma in torch.tensor([0.05, 1.0, 20.0]):
        y = x * sigma
        inside = scheduler.precondition_inputs(y, sigma)
        time = scheduler.precondition_noise(sigma)
        out = unet(inside, time, class_labels=labels if label_dim else None).sample
        onehot = torch.eye(label_dim)[labels] if label_dim else None
        ours = net(y, sigma, onehot)
        torch.testing.assert_close(scheduler.precondition_outputs(y, out, sigma), ours, rtol=1e-4, atol=1e-4)
        assert out.std() > 0.05 and (out[0] - out[1]).std() > 0.02


@torch.no_grad()
def test_other_preconditionings_have_no_scheduler(tmp_path):
    net, folder, found = made(tmp_path, iDDPMPrecond)
    assert found["files"] == ["config.json", "diffusion_pytorch_model.safetensors"]
    x, labels, time = torch.randn(1, 3, 8, 8), torch.tensor([2]), torch.tensor([17.0])
    out = net.model(x, time, torch.eye(5)[labels])
    torch.testing.assert_close(loaded(folder)(x, time, class_labels=labels).sample, out, rtol=1e-4, atol=1e-4)


def test_what_diffusers_does_not_have_is_said(tmp_path):
    nets = {
        "no EDM2 network": theirs.edm2_net()[0],
        "no DDPM++": theirs.edm_net("edm")[0],
        "no network like ToyModel": ToyModel(num_layers=1, hidden_dim=8),
        "no ADM of widths": theirs.edm_net("edm", "DhariwalUNet")[0],
    }
    for says, net in nets.items():
        save_snapshot(tmp_path / "net.safetensors", net)
        command = [f"--net={tmp_path / 'net.safetensors'}", "--folder", f"--dest={tmp_path / 'out'}"]
        one_line(convert_snapshot.main, *command, says=[says, "--state-dict"])
        assert not list((tmp_path / "out").glob("[!.]*"))
