"""Checkpoints of CLD (.pth) and MDM (Lightning's .ckpt) as networks of the whole state.

They hold tensors and no description. A chain of linear layers says itself what it is: CLD's and MDM's networks of points are
read. What the tensors of their U-Nets are called, and in which order they lie, is not documented: these are refused, not
guessed. Settings come from CLD's own configuration file beside the checkpoint (the same name, .txt), and from MDM's
hyper_parameters where the file has them; otherwise they are those that both ship, which a warning says.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch

from dnnlib.reading import require_file
from torch_utils.torch_pickles import Object, Tensor

SUFFIXES = (".pth", ".ckpt")
_CLD = dict(
    sde="cld", m_inv=4.0, gamma=0.04, beta0=4.0, beta1=0.0, numerical_eps=1e-6, mixed_score=False, cld_objective="hsm"
)
_MDM = dict(
    stationary_x_var=1.0, stationary_aux_var=1.0, init_aux_var=0.01, beta_0=0.1, beta_1=10.0, beta_fn_type="inhom",
    score_parameterization="noise_pred", hybrid_transition_kernel=True,
)  # fmt: skip
MOST_CONFIG = 2**16


def read(content: object, path: str | Path, part: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """(header, tensors) of what torch_pickles.load found in `path`. part: "ema" or "net", of CLD. Raises ValueError."""
    if not isinstance(content, dict):
        raise ValueError("holds no checkpoint")
    if "pytorch-lightning_version" in content:
        return _mdm(content)
    if isinstance(content.get("model"), dict) and "ema" in content:
        return _cld(content, path, part)
    held = ", ".join(sorted(str(name)[:30] for name in content)[:8])
    raise ValueError(f"holds neither a CLD checkpoint (model, ema, optimizer, step) nor one of Lightning, but {held}")


def _chain(tensors):
    """(kwargs of JointPrecond's network, inputs without time, outputs, tensors by our names) of a chain of linear layers."""
    names = dict.fromkeys(n.rpartition(".")[0] for n in tensors)
    layers = [(tensors.get(f"{n}.weight"), tensors.get(f"{n}.bias")) for n in names]
    complete = all(w is not None and b is not None and len(w.shape) == 2 and b.shape == w.shape[:1] for w, b in layers)
    if not complete or len(tensors) != 2 * len(layers) or len(layers) < 3:
        count = sum(t.numel() for t in tensors.values())
        raise ValueError(
            f"holds a network of {count:,} numbers that is no chain of linear layers: of its U-Nets the tensors are not "
            "documented, so only networks of points are read; sample an EDM or EDM2 network through the process instead: "
            "--process=cld (or malda)"
        )
    hidden, inputs = layers[0][0].shape
    outputs = layers[-1][0].shape[0]
    wide = {w.shape[1] - hidden for w, _ in layers[1:]}
    if len(wide) != 1 or wide - {0, 1} or any(w.shape[0] != hidden for w, _ in layers[:-1]):
        raise ValueError("linear layers that do not fit each other")
    if wide == {0}:
        places, kind = [f"layers.{2 * i}" for i in range(len(layers))], dict(model_type="JointMLP", time_code="t")
        kind["num_layers"] = len(layers) - 1
    else:
        places = ["first", *(f"inner.{i}" for i in range(len(layers) - 2)), "last"]
        kind = dict(model_type="JointResNet", time_code="log-t", num_layers=len(layers) - 2)
    found = {}
    for place, (weight, bias) in zip(places, layers, strict=True):
        found |= {f"model.{place}.weight": weight, f"model.{place}.bias": bias}
    return kind | {"hidden_dim": hidden}, inputs - 1, outputs, found


def _values(tensors):
    """{name: tensor} of a state dict."""
    if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) and type(k) is str for k, v in tensors.items()):
        raise ValueError("a state dict of other things than tensors")
    return {name: tensor.value() for name, tensor in tensors.items()}


def _header(net, process, options, layout):
    encoder = {"class": "IdentityEncoder", "kwargs": {}}
    net = {"class": "JointPrecond", "kwargs": net}
    return dict(
        net=net, encoder=encoder, process=process, nimg=None, ema="ema", options=options, dataset={}, source=layout
    )


def _cld(content, path, part):
    model = {name.removeprefix("module."): value for name, value in _values(content["model"]).items()}
    if part == "ema":
        state = content["ema"] if isinstance(content["ema"], dict) else {}
        lists = [v for v in state.values() if isinstance(v, list) and v and all(isinstance(t, Tensor) for t in v)]
        averaged = [t.value() for t in lists[0]] if len(lists) == 1 else []
        if [t.shape for t in averaged] == [t.shape for t in model.values()]:
            model = dict(zip(model, averaged, strict=True))
        elif _chain(model):  # of U-Nets something else is wrong, too
            raise ValueError("an average that is not one of its network")
    kind, inputs, outputs, tensors = _chain(model)
    own, said = _settings(path)
    vp, V = own["sde"] == "vpsde", 1 if own["sde"] == "vpsde" else 2
    if (inputs, outputs) != (2 * V, 2):
        raise ValueError(f"a network from {inputs} to {outputs} numbers: --sde {own['sde']} has {2 * V} and 2 (points)")
    if vp:
        process = {"class": "VP", "kwargs": {"beta": [own["beta0"], own["beta0"] + own["beta1"]]}}
    else:
        M = 1 / own["m_inv"]
        beta = [own["beta0"], own["beta0"] + own["beta1"]]
        process = {"class": "CLD", "kwargs": {"M": M, "beta": beta, "init_aux_var": own["gamma"] * M}}
    net = dict(
        img_resolution=1, img_channels=2, sigma_data=0.72, variables=V, first=V - 1,
        parameterization="mixed" if own["mixed_score"] else "noise", hybrid=vp or own["cld_objective"] == "hsm",
        cov_eps=0.0 if vp else own["numerical_eps"], **kind,
    )  # fmt: skip
    layout = {"file": Path(path).name, "layout": "CLD", "part": part}
    if not said:
        warnings.warn(f"{path} does not say how it was trained: taken for CLD's toy configuration", stacklevel=4)
    return _header(net, process, own, layout), tensors


def _settings(path):
    """(settings, whether the configuration file of CLD lies beside `path`)."""
    file = Path(path).with_suffix(".txt")
    if not file.is_file():
        return dict(_CLD), False
    own = dict(_CLD)
    for line in require_file(file, MOST_CONFIG).read_text(encoding="utf-8").splitlines():
        name, value = (re.split(r"\s*[=:]\s*|\s+", line.split("#")[0].strip(), maxsplit=1) + ["true"])[:2]
        name = name.lstrip("-")
        if name not in own:
            continue
        kind = type(_CLD[name])
        try:
            own[name] = value.strip().lower() == "true" if kind is bool else kind(value.strip())
        except ValueError:
            raise ValueError(f"{file.name}: {name} = {value!r:.40} is no number") from None
    if own["sde"] not in ("cld", "vpsde") or own["cld_objective"] not in ("hsm", "dsm") or not own["m_inv"] > 0:
        raise ValueError(f"{file.name}: sde, cld_objective or m_inv is none that CLD has")
    return own, True


def _mdm(content):
    own = content.get("hyper_parameters")
    own = own.state if isinstance(own, Object) else own
    own = own.get("config", own) if isinstance(own, dict) else {}
    own = own.state if isinstance(own, Object) else own
    said = {k: v for k, v in (own or {}).items() if k in _MDM and isinstance(v, (bool, int, float, str))}
    if not said:
        warnings.warn("the checkpoint does not say how it was trained: taken for MDM's shipped settings", stacklevel=4)
    own = _MDM | said
    tensors = _values(content.get("state_dict"))
    stems = {n.rpartition(".")[0] for n in tensors if n.endswith(".weight")} & {
        n.rpartition(".")[0] for n in tensors if n.endswith(".bias")
    }
    net = {n: t for n, t in tensors.items() if n.rpartition(".")[0] in stems}
    kind, inputs, outputs, found = _chain(net)
    Q, D = _matrices([t.double() for n, t in tensors.items() if n not in net])
    V = len(Q)
    if inputs != outputs or inputs % V:
        raise ValueError(f"a network from {inputs} to {outputs} numbers for {V} variables")
    first, last = float(own["beta_0"]), float(own["beta_0"] if own["beta_fn_type"] == "hom" else own["beta_1"])
    S = [float(own["stationary_x_var"])] + [float(own["stationary_aux_var"])] * (V - 1)
    process = {"class": "VP", "kwargs": {"beta": [first, last]}}
    if V > 1:
        matrices = {"Q": Q.tolist(), "D": D.tolist(), "S": S, "beta": [first, last]}
        process = {"class": "LinearProcess", "kwargs": matrices | {"init_aux_var": float(own["init_aux_var"])}}
    forms = {"noise_pred": "noise", "score_pred": "score"}
    if own["score_parameterization"] not in forms:
        raise ValueError(f"score_parameterization {own['score_parameterization']!r:.40}: known: {', '.join(forms)}")
    net = dict(
        img_resolution=1, img_channels=inputs // V, sigma_data=1.0, variables=V, first=0,
        parameterization=forms[own["score_parameterization"]], hybrid=bool(own["hybrid_transition_kernel"]), **kind,
    )  # fmt: skip
    return _header(net, process, own, {"layout": "MDM"}), found


def _matrices(others):
    """(Q, D) of the tensors that belong to no layer: both fixed, or what the learned ones are made of (MDM §4)."""
    shapes = sorted(tuple(t.shape) for t in others)
    if not shapes:
        return torch.zeros(1, 1).double(), torch.full([1, 1], 0.5).double()
    V = max(shape[-1] for shape in shapes if shape) if any(shapes) else 0
    if shapes == [(V,), (V, V)]:
        d, q = sorted(others, key=lambda t: t.ndim)
        return q - q.mT, torch.diag(torch.nn.functional.softplus(d) + 1e-3)
    if shapes == [(V, V), (V, V)]:
        for Q, D in (others, others[::-1]):
            if torch.equal(Q, -Q.mT) and torch.equal(D, D.mT):
                return Q, D
    raise ValueError(
        "tensors beside the network that are neither Q and D nor, with a diagonal D, those they are made of"
    )
