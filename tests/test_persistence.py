"""Snapshots: what is written comes back; nothing but listed classes is built, and nothing in a file is executed."""

import importlib
import io
import json
import math
import os
import pickle
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from small_runs import assert_quick

from torch_utils import persistence
from torch_utils.persistence import load_snapshot, persistent, read_header, save_snapshot
from training import processes
from training.encoders import StandardRGBEncoder


def write(path, header, tensors=None):
    """A safetensors file with any header, not made by save_snapshot."""
    data = safetensors.torch.save(tensors or {"net.w": torch.zeros(1)}, metadata={"header": json.dumps(header)})
    path.write_bytes(data)
    return path


@pytest.fixture
def snapshot(tmp_path, tiny_net):
    path = tmp_path / "network-snapshot-0000001-0.100.safetensors"
    net = tiny_net(3, sigma_data=0.6)
    save_snapshot(path, net, encoder=StandardRGBEncoder(), nimg=1024, options={"lr": 0.5}, ema="0.100")
    return path, net


def test_round_trip(snapshot):
    path, net = snapshot
    loaded = load_snapshot(path)
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 2.0]), torch.eye(3)[:2]
    assert torch.equal(loaded.net(x, sigma, labels), net(x, sigma, labels))
    assert not loaded.net.training and not any(p.requires_grad for p in loaded.net.parameters())
    assert loaded.net.sigma_data == 0.6 and isinstance(loaded.encoder, StandardRGBEncoder)
    assert loaded.options == {"lr": 0.5} and loaded.header["nimg"] == 1024 and loaded.header["version"] == 2
    assert list(loaded.net.state_dict()) == list(net.state_dict())


def test_half_precision_storage(snapshot, tmp_path):
    net = snapshot[1]
    path = tmp_path / "half.safetensors"
    save_snapshot(path, net, dtype=torch.float16)
    assert path.stat().st_size < snapshot[0].stat().st_size * 0.7
    loaded = load_snapshot(path).net
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    for (name, a), b in zip(net.state_dict().items(), loaded.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6, msg=name)
    assert torch.equal(net.logvar_fourier.freqs, loaded.logvar_fourier.freqs)  # buffers keep their precision


def test_the_process_travels_with_its_parameters(snapshot, tmp_path):
    net = snapshot[1]
    path = tmp_path / "kernel.safetensors"
    save_snapshot(path, net, process=processes.get("pfgmpp", D=77))
    assert load_snapshot(path).process.D == 77
    learned = processes.get("learned", V=2)
    with torch.no_grad():
        for p in learned.parameters():
            p.add_(0.1)
    save_snapshot(path, net, process=learned)
    loaded = load_snapshot(path).process
    assert torch.equal(loaded.Q, learned.Q) and not loaded.Q.requires_grad


@pytest.mark.parametrize(
    ("old", "cls", "kwargs"),
    [
        ({"name": "edm", "sigma_max": 60.0}, "EDM", {"sigma_max": 60.0}),
        ({"name": "pfgmpp", "D": "inf"}, "PFGMpp", {"D": "inf"}),
        ({"name": "cld", "M": 0.25, "beta": [4.0, 4.0], "init_aux_var": 0.01}, "CLD", None),
        (
            {"name": "learned", "V": 2, "full": False, "M": 1.0, "beta": [0.1, 10.0], "init_aux_var": 0.01},
            "Learned",
            None,
        ),
        (
            {"name": "linear", "Q": [[0.0]], "D": [[0.5]], "S": [1.0], "beta": [0.1, 10.0], "init_aux_var": 0.01},
            None,
            None,
        ),
        (None, None, None),
    ],
)
def test_headers_of_version_1(snapshot, tmp_path, old, cls, kwargs):
    path, net = snapshot
    cls = cls or (old and "LinearProcess")
    kwargs = kwargs or {name: value for name, value in (old or {}).items() if name != "name"}
    header = {
        **read_header(path),
        "version": 1,
        "process": old,
        "encoder": {"class": "LogitEncoder", "kwargs": {"alpha": 0.1}},
    }
    tensors = {f"net.{name}": value.contiguous() for name, value in net.state_dict().items()}
    if cls == "Learned":
        tensors.update({"process.q": torch.eye(2), "process.d": torch.ones(2)})
    loaded = load_snapshot(write(tmp_path / "old.safetensors", header, tensors))
    assert loaded.encoder.alpha == 0.1
    assert loaded.header["process"] == (old and {"class": cls, "kwargs": kwargs})
    assert persistence.describe(loaded.process) == (old and {"class": cls, "kwargs": kwargs})
    if cls == "Learned":
        assert torch.equal(loaded.process.q, torch.eye(2))


def test_a_learned_process_without_its_tensors_is_damaged(snapshot, tmp_path):
    path, net = snapshot
    save_snapshot(path, net, process=processes.get("learned"))
    tensors = {f"net.{name}": value.contiguous() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match="x.safetensors: does not fit class Learned"):
        load_snapshot(write(tmp_path / "x.safetensors", read_header(path), tensors))


def test_the_address_book_is_right_and_complete():
    for name, module in persistence.CLASSES.items():
        cls = getattr(importlib.import_module(module), name)
        assert cls.__name__ == name and persistence._REGISTRY[name] is cls
    root = Path(__file__).parents[1]
    for room in ("training", "metrics", "torch_utils", "simulations"):
        for path in (root / room).rglob("*.py"):
            for name in re.findall(r"^@persistent\nclass (\w+)", path.read_text(encoding="utf-8"), re.M):
                assert name in persistence.CLASSES, f"{path}: {name}"


def test_classes_of_the_caller(snapshot, tmp_path, monkeypatch):
    """A process and an encoder of one's own, in a program that defines them and in one that does not."""

    @persistent
    class OwnProcess(processes.EDM):
        def __init__(self, start=3.0):
            super().__init__(sigma_max=start)

    @persistent
    class OwnEncoder(StandardRGBEncoder):
        pass

    save_snapshot(tmp_path / "own.safetensors", snapshot[1], process=OwnProcess(start=5), encoder=OwnEncoder())
    own = {"OwnProcess": OwnProcess, "OwnEncoder": OwnEncoder}
    for classes in (None, own):
        loaded = load_snapshot(tmp_path / "own.safetensors", classes=classes)
        assert type(loaded.process) is OwnProcess and loaded.process.T == 5 and type(loaded.encoder) is OwnEncoder
        for name in own:
            monkeypatch.delitem(persistence._REGISTRY, name, raising=False)
    with pytest.raises(ValueError, match="own.safetensors: class 'OwnEncoder' is not on the allow-list"):
        load_snapshot(tmp_path / "own.safetensors")


def test_run_folder_means_its_newest_snapshot(snapshot, tmp_path):
    path, net = snapshot
    save_snapshot(tmp_path / "network-snapshot-0000002-0.100.safetensors", net, nimg=2048)
    assert read_header(tmp_path)["nimg"] == 2048
    save_snapshot(tmp_path / "network-snapshot-0000002-0.050.safetensors", net)
    with pytest.raises(ValueError, match="several averages at 2 kimg"):
        load_snapshot(tmp_path)
    with pytest.raises(ValueError, match="no network-snapshot"):
        load_snapshot(tmp_path.parent)


@persistent
class Mine(torch.nn.Module):
    def __init__(self, width, *, depth=2, **more):
        super().__init__()
        self.w, self.more = torch.nn.Parameter(torch.full([int(width)], float(depth))), more


def test_constructor_arguments_are_recorded():
    assert Mine(3, depth=5, extra=1).init_kwargs == {"width": 3, "depth": 5, "extra": 1}  # defaults may change one day
    mine = Mine(width=torch.tensor(2), scale=math.inf, shape=(1, 2))
    spec = {"class": "Mine", "kwargs": {"width": 2, "depth": 2, "scale": "inf", "shape": [1, 2]}}
    assert persistence.describe(mine) == spec and json.dumps(spec, allow_nan=False)
    again = persistence.build(spec)
    assert type(again) is Mine and again.more == {"scale": math.inf, "shape": [1, 2]}
    with pytest.raises(TypeError, match="a function is no plain data"):
        Mine(2, function=lambda x: x)


def test_subclasses_record_their_own_arguments():
    @persistent
    class Derived(Mine):
        def __init__(self, scale):
            super().__init__(width=scale, depth=1)

    assert Derived(4).init_kwargs == {"scale": 4}


def test_classes_off_the_list_are_refused(tmp_path):
    class Plain(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.init_kwargs = {"width": width}
            self.w = torch.nn.Parameter(torch.zeros(width))

    path = tmp_path / "a.safetensors"
    save_snapshot(path, Plain(2))
    with pytest.raises(ValueError, match="'Plain' is not on the allow-list.*Precond"):
        load_snapshot(path)
    assert type(load_snapshot(path, classes={"Plain": Plain}).net) is Plain  # the caller's own list
    for name in ("os.system", "Popen", "builtins.eval", "torch.nn.Linear", "__class__"):
        header = {"format": persistence.FORMAT, "version": 1, "net": {"class": name, "kwargs": {}}}
        with pytest.raises(ValueError, match="allow-list"):
            load_snapshot(write(tmp_path / "b.safetensors", header))


def test_unrecorded_modules_cannot_be_stored(tmp_path):
    with pytest.raises(ValueError, match="Linear cannot be stored"):
        save_snapshot(tmp_path / "a.safetensors", torch.nn.Linear(1, 1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["start", "header", "middle", "end", "empty", "random"])
def test_damaged_files_are_named(snapshot, where, tmp_path):
    path = snapshot[0]
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    cut = {"start": 5, "header": 8 + length // 2, "middle": len(data) // 2, "end": len(data) - 1, "empty": 0}
    path.write_bytes(os.urandom(300) if where == "random" else data[: cut[where]])
    with pytest.raises(ValueError, match="network-snapshot-0000001") as error:
        load_snapshot(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": "another"}, "not a snapshot of this project"),
        ({"version": 99}, "version 99 is newer"),
        ({"net": {"class": "Precond", "kwargs": {"img_resolution": 8}}}, "does not fit class Precond"),
        ({"net": {"class": "Precond", "kwargs": {"nonsense": 1}}}, "does not fit class Precond"),
        ({"net": {"class": "Precond", "kwargs": []}}, "snapshot"),
        ({"net": {}}, "snapshot"),
        ({"net": None}, "snapshot"),
        ({"encoder": {"class": "os.system", "kwargs": {}}}, "os.system"),
        ({"process": {"name": "no such"}}, "no such"),
        ({"version": "one"}, "version"),
        ({"encoder": ""}, "not a snapshot"),
        ({"process": []}, "not a snapshot"),
    ],
)
def test_wrong_headers_are_one_clear_error(snapshot, change, message, tmp_path):
    path, net = snapshot
    tensors = {f"net.{name}": value.contiguous() for name, value in net.state_dict().items()}
    header = {**read_header(path), **change}
    with pytest.raises(ValueError, match=message):
        load_snapshot(write(tmp_path / "changed.safetensors", header, tensors))


@pytest.mark.parametrize("content", [b"null", b"[]", b'"text"', b"{}", b"{not json"])
def test_metadata_of_other_kinds(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors.torch.save({"w": torch.zeros(1)}, metadata={"header": content.decode()}))
    with pytest.raises(ValueError, match="not a snapshot"):
        load_snapshot(path)


def test_tensors_that_do_not_fit(snapshot, tmp_path):
    path, net = snapshot
    state = {f"net.{name}": value.contiguous() for name, value in net.state_dict().items()}
    missing = {k: v for k, v in state.items() if k != "net.unet.out_gain"}
    wrong = {**state, "net.unet.out_conv.weight": torch.zeros(5)}
    for tensors in (missing, wrong):
        with pytest.raises(ValueError, match="does not fit class Precond"):
            load_snapshot(write(tmp_path / "x.safetensors", read_header(path), tensors))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["bomb.pkl", "bomb.safetensors", "bomb.pt"])
def test_nothing_in_a_file_is_executed(tmp_path, name):
    flag, path = tmp_path / "executed", tmp_path / name
    buffer = io.BytesIO()
    if name.endswith(".pt"):
        torch.save({"ema": Bomb(str(flag))}, buffer)
    else:
        pickle.dump({"ema": Bomb(str(flag))}, buffer)
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="bomb"):
        load_snapshot(path)
    assert not flag.exists()


def test_checkpoints_execute_nothing_either(tmp_path):
    from torch_utils import checkpoint

    flag, path = tmp_path / "executed", tmp_path / "training-state-0000001.pt"
    torch.save({"state": Bomb(str(flag))}, path)
    with pytest.raises(ValueError, match="training-state-0000001.pt: not a readable checkpoint"):
        checkpoint.load(path)
    assert not flag.exists()


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.safetensors: no such snapshot"):
        load_snapshot(tmp_path / "nowhere.safetensors")


def test_a_failed_write_leaves_the_old_file(snapshot, monkeypatch):
    path, net = snapshot
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_snapshot(path, net)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


# --- hostile headers --------------------------------------------------------------------------------------------------

UNBUILT = {
    "wide": dict(model_channels=10**9),
    "wider than an address": dict(model_channels=2**62),
    "many blocks": dict(num_blocks=10**9),
    "many labels": dict(label_dim=10**9),
    "many channels": dict(img_channels=10**9),
    "large images": dict(img_resolution=2**40),
    "an infinite number": dict(sigma_data="inf"),
    "no number": dict(sigma_data="0.5"),
    "negative": dict(sigma_data=-1),
    "beyond float32": dict(concat_balance=1e308),
    "word for a number": dict(concat_balance="x"),
    "list for a number": dict(label_balance=[0.5]),
    "strange word": {"x meta x": 1, "model_channels": 10**9},
    "fraction of a head": dict(channels_per_head=8.0),
    "deep": dict(dropout=[[[[[[[0]]]]]]]),
}


def refused(path):
    """What the loader says of a file, at once."""

    def load():
        with pytest.raises(ValueError, match="x.safetensors: ") as error:
            load_snapshot(path)
        return str(error.value)

    return assert_quick(load)


@pytest.mark.parametrize("name", UNBUILT)
def test_nothing_is_allocated_for_a_header(snapshot, tmp_path, name):
    path, net = snapshot
    header = read_header(path)
    header["net"]["kwargs"].update(UNBUILT[name])
    tensors = {f"net.{name}": value.contiguous() for name, value in net.state_dict().items()}
    assert "\n" not in refused(write(tmp_path / "x.safetensors", header, tensors))


@pytest.mark.parametrize(
    "part, spec",
    [
        ("net", {"class": "iDDPMPrecond", "kwargs": {"img_resolution": 8, "img_channels": 1, "M": 10**9}}),
        ("net", {"class": "ConvNet", "kwargs": {"image_shape": [1, 8, 8], "num_classes": 3}}),
        ("net", {"class": "EDM", "kwargs": {}}),
        ("net", {"class": "Learned", "kwargs": {}}),
        ("net", {"class": "ToyModel", "kwargs": {"num_layers": 10**9}}),
        ("encoder", {"class": "Precond", "kwargs": {"img_resolution": 8, "img_channels": 1, "label_dim": 0}}),
        ("encoder", {"class": "EDM", "kwargs": {}}),
        ("encoder", {"class": "StabilityVAEEncoder", "kwargs": {"raw_mean": [1] * 5}}),
        ("encoder", {"class": "StabilityVAEEncoder", "kwargs": {"batch_size": 0}}),
        ("encoder", {"class": "StabilityVAEEncoder", "kwargs": {"vae_name": ["x"]}}),
        ("process", {"class": "StandardRGBEncoder", "kwargs": {}}),
        ("process", {"class": "MALDA", "kwargs": {"V": 10**6}}),
        ("process", {"class": "Learned", "kwargs": {"V": 10**9}}),
        ("process", {"class": "LinearProcess", "kwargs": {"Q": [[0] * 65] * 65, "D": [[0] * 65] * 65}}),
        ("options", []),
        ("dataset", "x"),
        ("nimg", "many"),
        ("nimg", 2**63),
        ("version", True),
        ("net", {"class": ["Precond"], "kwargs": {}}),
        ("extra", json.loads("[" * 99 + "]" * 99)),
    ],
    ids=str,
)  # fmt: skip
def test_every_part_of_a_header_is_checked(snapshot, tmp_path, part, spec):
    path, net = snapshot
    tensors = {f"net.{name}": value.contiguous() for name, value in net.state_dict().items()}
    assert "\n" not in refused(write(tmp_path / "x.safetensors", {**read_header(path), part: spec}, tensors))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308])
def test_weights_that_are_no_numbers_are_named(snapshot, tmp_path, value):
    path, net = snapshot
    state = {f"net.{name}": v.contiguous().clone() for name, v in net.state_dict().items()}
    state["net.unet.out_conv.weight"] = state["net.unet.out_conv.weight"].double()  # holds 1e308, the network cannot
    state["net.unet.out_conv.weight"][0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"x.safetensors: tensor unet.out_conv.weight holds NaN or infinity"):
        load_snapshot(write(tmp_path / "x.safetensors", read_header(path), state))


def test_all_networks_keep_to_the_memory_of_their_file():
    """Each class of the address book that is a network."""
    made = {
        "Precond": dict(
            img_resolution=8, img_channels=1, label_dim=3, model_channels=8, channels_per_head=8, clip_act=None
        ),
        "ToyModel": {},
        "MLPDenoiser": dict(label_dim=3, logvar_channels=4),
        "ConvNet": dict(image_shape=[1, 8, 8], num_classes=3),
    }
    small = dict(img_resolution=8, img_channels=1, label_dim=3, model_channels=32, num_blocks=1, channel_mult=[1, 2])
    made["JointPrecond"] = {**small, "model_type": "SongUNet", "variables": 3}
    made |= {f"{kind}Precond": {**small, "model_type": "SongUNet"} for kind in ("EDM", "VP", "VE", "iDDPM")}
    for name, kwargs in made.items():
        net = persistence.build({"class": name, "kwargs": kwargs})
        state = net.state_dict()
        again = persistence.build({"class": name, "kwargs": kwargs}, state=state)
        assert all(torch.equal(a, b) for a, b in zip(state.values(), again.state_dict().values(), strict=True))
        first = next(iter(state))
        for wrong in (
            {**state, "x": state[first]},
            {k: v for k, v in state.items() if k != first},
            {**state, first: torch.zeros(7, 7)},
        ):
            with pytest.raises(ValueError, match=f"does not fit class {name} .*tensor"):
                persistence.build({"class": name, "kwargs": kwargs}, state=wrong)
    modules = {name for name in persistence.CLASSES if issubclass(persistence._find_class(name, {}), torch.nn.Module)}
    assert modules == {*made, "Learned"}
