"""Checkpoints of CLD and MDM: files of their layout become joint networks, whose score is that of the digests' formulas."""

import argparse
import json
import math
import os

import numpy as np
import pytest
import scipy.linalg
import torch
from small_runs import one_line, run

import convert_snapshot
from torch_utils.persistence import load_snapshot

torch_nn = torch.nn


def chain(inputs, outputs, hidden=16, count=4, code=0):
    """count + 1 linear layers with random weights; code: further inputs of all but the first."""
    generator = torch.Generator().manual_seed(inputs + 7 * code)
    widths = [inputs] + [hidden + code] * count
    layers = [torch_nn.Linear(a, hidden if i < count else outputs) for i, a in enumerate(widths)]
    for p in torch_nn.ModuleList(layers).parameters():
        p.data = torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5
    return torch_nn.ModuleList(layers)


def mlp(layers, u, t):
    h = torch.cat([u.float(), t.float()[:, None]], dim=1)
    for layer in layers[:-1]:
        h = torch_nn.functional.silu(layer(h))
    return layers[-1](h).double()


def resnet(layers, u, t):
    code = t.float().log()[:, None]
    h = torch_nn.functional.silu(layers[0](torch.cat([u.float(), code], dim=1)))
    for layer in layers[1:-1]:
        h = torch_nn.functional.silu(h + layer(torch.cat([h, code], dim=1)))
    return layers[-1](torch.cat([h, code], dim=1)).double()


def cld_file(path, layers, averaged=None, **more):
    """What CLD saves: optimizer, model with DDP's prefix, ema (decay, count, list of tensors), step."""
    model = {f"module.main.{name}": p.detach() for name, p in layers.named_parameters()}
    ema = {"decay": 0.999, "num_updates": 7, "shadow_params": [p.detach() for p in (averaged or layers).parameters()]}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    torch.save({"optimizer": optimizer, "model": model, "ema": ema, "step": 20000} | more, path)
    return path


def mdm_file(path, layers, matrices, settings=None):
    state = {f"score.net.{name}": p.detach() for name, p in layers.named_parameters()}
    state |= {f"sde.{name}": torch.as_tensor(value, dtype=torch.float32) for name, value in matrices.items()}
    content = {"epoch": 3, "global_step": 9, "pytorch-lightning_version": "1.9.0", "state_dict": state, "loops": {}}
    content |= {"optimizer_states": [], "lr_schedulers": [], "callbacks": {"ModelCheckpoint": {"best_model_path": "x"}}}
    torch.save(content | ({"hyper_parameters": settings} if settings is not None else {}), path)
    return path


U = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).double()
T = torch.tensor([0.02, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)


def score_of(snapshot, u, t):
    """[N, V d] as CLD and MDM lay out their states."""
    V = snapshot.net.variables
    with torch.no_grad():
        return snapshot.net.score(u.reshape(len(u), V, -1, 1, 1), t).flatten(1)


@pytest.mark.parametrize("net, code", [(mlp, 0), (resnet, 1)])
@pytest.mark.parametrize(
    "settings", [{}, dict(mixed_score=True, beta0=0.1, beta1=6.9, m_inv=1, gamma=1, numerical_eps=1e-9)]
)
def test_cld_s_networks_of_points(tmp_path, net, code, settings):
    """The score of v is -l_t net (- v / S_vv where mixed), cld.md §3.2 and §4.1; the averaged weights are taken."""
    layers = chain(5, 2, code=code)
    path = cld_file(tmp_path / "checkpoint_800000.pth", chain(5, 2, hidden=16, code=code).half().float(), layers)
    if settings:
        text = "".join(f"{name} = {value}\n" for name, value in settings.items())
        path.with_suffix(".txt").write_text(f"# theirs\n{text}workdir = x\n")
        snapshot = load_snapshot(path)
    else:
        with pytest.warns(UserWarning, match="toy configuration"):
            snapshot = load_snapshot(path)
    own = dict(m_inv=4, gamma=0.04, beta0=4, beta1=0, numerical_eps=1e-6, mixed_score=False) | settings
    Gamma, M = 2 / own["m_inv"] ** 0.5, 1 / own["m_inv"]
    B, g, start, eps = own["beta0"] * T + own["beta1"] * T**2 / 2, 1 / Gamma, own["gamma"] * M, own["numerical_eps"]
    e, b = torch.exp(-4 * g * B), g * B
    xx = e * (torch.expm1(4 * b) - 4 * b - 8 * b**2 + 16 * g**2 * b**2 * start) + eps
    xv = e * (4 * g * b * start + 4 * g * B**2 - 8 * g * b**2 * start)
    vv = e * (Gamma**2 / 4 * torch.expm1(4 * b) + Gamma * B + start * (1 - 4 * b + 4 * b**2) - 2 * B**2) + eps
    ell = (xx / (xx * vv - xv**2)).sqrt()[:, None]
    with torch.no_grad():
        wanted = -ell * net(layers, U, T) - (U[:, 2:] / vv[:, None] if own["mixed_score"] else 0)
    torch.testing.assert_close(score_of(snapshot, U, T)[:, 2:], wanted, rtol=1e-5, atol=1e-5)
    assert snapshot.options["m_inv"] == own["m_inv"] and snapshot.header["source"]["layout"] == "CLD"
    found = run(convert_snapshot.main, f"--net={path}", "--part=net", f"--dest={tmp_path / 'own.safetensors'}")
    assert json.loads(found.stdout)["types"] == ["float32"]
    raw = score_of(load_snapshot(tmp_path / "own.safetensors"), U, T)[:, 2:]
    assert float((raw - wanted).abs().max()) > 1e-6  # not the average


def test_cld_s_vpsde_sees_the_data_alone(tmp_path):
    layers = chain(3, 2)
    path = cld_file(tmp_path / "c.pth", layers)
    path.with_suffix(".txt").write_text("sde = vpsde\nbeta0 = 0.1\nbeta1 = 19.9\n")
    with torch.no_grad():
        B = 0.1 * T + 19.9 * T**2 / 2
        wanted = -mlp(layers, U[:, :2], T) / (-torch.expm1(-B)).sqrt()[:, None]
    torch.testing.assert_close(score_of(load_snapshot(path), U[:, :2], T), wanted, rtol=1e-5, atol=1e-5)


RAW = {"q": [[0.0, 0.7], [-0.2, 0.1]], "d": [0.3, -0.4]}
CLD = {"Q": [[0.0, -1.0], [1.0, 0.0]], "D": [[0.0, 0.0], [0.0, 2.0]]}


@pytest.mark.parametrize("matrices", [RAW, CLD])
@pytest.mark.parametrize("form", ["noise_pred", "score_pred"])
def test_mdm_s_networks_of_points(tmp_path, matrices, form):
    """score = -L^-T eps_hat with the covariance by Van Loan's matrix fraction (mdm.md §4, §5, §7)."""
    layers = chain(5, 4)
    settings = dict(score_parameterization=form, beta_0=0.1, beta_1=10.0, init_aux_var=0.02)
    path = mdm_file(tmp_path / "last.ckpt", layers, matrices, argparse.Namespace(**settings, data_dir="x"))
    if matrices is RAW:
        q = np.array(RAW["q"], dtype=np.float32).astype(float)
        Q = q - q.T
        D = np.diag(np.log1p(np.exp(np.array(RAW["d"], dtype=np.float32).astype(float))) + 1e-3)
    else:
        Q, D = np.array(CLD["Q"]), np.array(CLD["D"])
    snapshot = load_snapshot(path)
    t = T[:4]
    with torch.no_grad():
        out = mlp(layers, U[:4], t).reshape(4, 2, 2)
    wanted = []
    for B, raw in zip((0.1 * t + 9.9 * t**2 / 2).tolist(), out, strict=True):
        A = -(Q + D)
        E = scipy.linalg.expm(B * np.block([[A, 2 * D], [np.zeros((2, 2)), -A.T]]))
        C = E @ np.vstack([np.diag([0, 0.02]), np.eye(2)])
        cov = C[:2] @ np.linalg.inv(C[2:])
        L = np.linalg.cholesky((cov + cov.T) / 2)
        wanted.append(torch.from_numpy(-np.linalg.inv(L).T @ raw.numpy()) if form == "noise_pred" else raw)
    found = score_of(snapshot, U[:4], t).reshape(4, 2, 2)
    first = snapshot.process.first_noised()  # of the others the score follows from the posterior mean, see JointPrecond
    torch.testing.assert_close(found[:, first:], torch.stack(wanted)[:, first:], rtol=2e-5, atol=2e-5)


def test_mdm_without_settings_or_matrices(tmp_path):
    with pytest.warns(UserWarning, match="shipped settings"):
        snapshot = load_snapshot(mdm_file(tmp_path / "x.ckpt", chain(3, 2), {}))
    assert type(snapshot.process).__name__ == "VP" and snapshot.process.beta_range == (0.1, 10.0)


class Bomb:
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return os.mkdir, (str(self.flag),)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_refused(tmp_path):
    """In one line that names the file; nothing in a file is executed."""
    flag, path = tmp_path / "executed", tmp_path / "x.pth"

    def refused(made, says):
        one_line(convert_snapshot.main, f"--net={made}", says=says)
        assert not flag.exists()

    good = chain(5, 2)
    for name, more, says in [
        ("code", {"step": Bomb(flag)}, "refuses"), ("no model", {"model": None}, "neither a CLD checkpoint"),
        ("a model of other things", {"model": {"a": 1}}, "other things than tensors"),
        ("no average", {"ema": {}}, "average"), ("an average of another", {"ema": {"p": [torch.zeros(3)]}}, "average"),
    ]:  # fmt: skip
        assert name and refused(cld_file(path, good, **more), says) is None
    conv = torch_nn.ModuleList([torch_nn.Conv2d(6, 8, 3), torch_nn.Conv2d(8, 8, 3), torch_nn.Conv2d(8, 3, 3)])
    refused(cld_file(path, conv), "holds a network of 1,243 numbers that is no chain")
    refused(cld_file(path, chain(7, 2)), "from 6 to 2 numbers")
    refused(cld_file(path, torch_nn.ModuleList([*chain(5, 2)[:2], torch_nn.Linear(9, 2)])), "do not fit")
    path.with_suffix(".txt").write_text("m_inv = many")
    refused(cld_file(path, good), "m_inv = 'many'")
    last = tmp_path / "x.ckpt"
    refused(
        mdm_file(last, chain(5, 4), {"a": [[1.0, 2.0], [3.0, 4.0]], "b": [[1.0, 0.0], [0.0, 1.0]]}), "neither Q and D"
    )
    refused(mdm_file(last, chain(5, 4), CLD, {"score_parameterization": "x", "beta_0": 1.0}), "score_parameterization")
    refused(mdm_file(last, chain(5, 4), CLD, Bomb(flag)), "refuses")
    last.write_bytes(last.read_bytes()[:500])
    refused(last, "x.ckpt")
    assert math.isfinite(
        float(load_snapshot(cld_file(tmp_path / "y.pth", good)).net(torch.zeros(1, 2, 1, 1), 0.5).sum())
    )
