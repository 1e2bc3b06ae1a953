"""Snapshots that want to do something when they are opened: refused in one line, before anything happens."""

import copy
import encodings.cp437  # noqa: F401 (zipfile's names; imported before anything is watched)
import io
import os
import pickle
import random
import resource
import time
import zipfile

import foreign_files as theirs
import numpy as np
import pytest
import torch
from test_foreign import Audit, load

from torch_utils.persistence import load_snapshot


class Evil:
    """Calls what its name says when it is unpickled."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], tuple(self.call[1:])


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """(content, path) of a small EDM2 snapshot, read once, so that what torch imports at first use is there."""
    net, kwargs = theirs.edm2_net()
    content = theirs.edm2_content(net, kwargs)
    path = theirs.dump(content, tmp_path_factory.mktemp("honest") / "x-0000001-0.050.pkl", 2)
    load(path)
    return content, path


def refused(path, says=""):
    """One line, at once, without a trace; the line is returned."""
    before, size = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError) as error:
        Audit.watched(path, lambda: load_snapshot(path))
    text = str(error.value)
    assert "\n" not in text and str(path) in text and says in text and len(text) < 600, text
    assert time.perf_counter() - before < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - size < 300 * 1024
    return text


def at(place, content, thing):
    """A copy of the content with a thing put somewhere."""
    content = copy.copy(content)
    ema = content["ema"]
    content["ema"] = changed = theirs.Persistent("Precond", dict(ema.meta["state"]))
    state = changed.meta["state"]
    if place in ("module_src", "class_name", "version", "type"):
        changed.meta[place] = thing
    elif place in ("_parameters", "_buffers", "_modules"):
        state[place] = {**state[place], "more": thing}
    elif place == "argument":
        state["_init_kwargs"] = {**state["_init_kwargs"], "model_channels": thing}
    elif place == "attribute":
        state["hook"] = thing
    elif place == "state":
        changed.meta["state"] = thing
    else:
        content[place] = thing
    return content


PLACES = (
    "module_src",
    "attribute",
    "state",
    "_parameters",
    "_modules",
    "argument",
    "dataset_kwargs",
    "encoder",
    "ema",
    "unknown",
)
CALLS = {
    "os.system": (os.system, "touch executed"),
    "eval": (eval, "1/0"),
    "exec": (exec, "raise SystemExit"),
    "open": (open, "executed", "w"),
    "import": (__import__, "antigravity"),
    "getattr": (getattr, "text", "upper"),
    "loads": (pickle.loads, b"N."),
    "torch.hub": (torch.hub.load, "a/b", "c"),
    "torch.load": (torch.load, "executed"),
    "numpy.load": (np.load, "executed"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("call", CALLS)
def test_calls_anywhere_in_the_wrapper(honest, tmp_path, monkeypatch, call, place):
    monkeypatch.chdir(tmp_path)
    path = theirs.dump(at(place, honest[0], Evil(*CALLS[call])), tmp_path / "x.pkl", 2 + len(place) % 4)
    refused(path, "refuses to load")
    assert os.listdir(tmp_path) == ["x.pkl"]


GLOBALS = [
    b"os\nsystem",
    b"builtins\neval",
    b"torch.hub\nload",
    b"torch.jit\nload",
    b"functools\npartial",
    b"posix\nsystem",
]
HONEST = [
    b"dnnlib.util\nEasyDict",
    b"torch_utils.persistence\n_reconstruct_persistent_obj",
    b"torch._utils\n_rebuild_parameter",
    b"torch._utils\n_rebuild_tensor_v2",
    b"torch.storage\n_load_from_bytes",
    b"collections\nOrderedDict",
    b"torch.nn.modules.container\nModuleDict",
    b"_codecs\nencode",
]


@pytest.mark.parametrize("evil", GLOBALS)
@pytest.mark.parametrize("name", HONEST)
def test_mutated_names(honest, tmp_path, name, evil):
    data = honest[1].read_bytes()
    assert b"c" + name + b"\n" in data
    path = tmp_path / "x.pkl"
    path.write_bytes(data.replace(b"c" + name + b"\n", b"c" + evil + b"\n"))
    refused(path, evil.decode().replace("\n", "."))


@pytest.mark.parametrize("length", [0, 1, 100, 5000, -1])
def test_cut_files(honest, tmp_path, length):
    (tmp_path / "x.pkl").write_bytes(honest[1].read_bytes()[:length])
    refused(tmp_path / "x.pkl")


@pytest.mark.parametrize("seed", range(40))
def test_random_mutations(honest, tmp_path, seed):
    """Bytes changed, taken out, doubled: another network or one line, never anything else."""
    draw, data = random.Random(seed), bytearray(honest[1].read_bytes())
    for _ in range(draw.choice([1, 1, 3, 30])):
        i = draw.randrange(len(data))
        how = draw.randrange(3)
        data[i : i + (how == 1)] = [b"", bytes([draw.randrange(256)]), bytes(data[i : i + draw.randrange(50)])][how]
    path = tmp_path / "x.pkl"
    path.write_bytes(data)
    try:
        Audit.watched(path, lambda: load_snapshot(path))
    except ValueError as err:
        assert "\n" not in str(err)


def storage(count=4, data=b"\0" * 16, kind="FloatStorage", key="k"):
    """A storage as torch nests it in a pickle, part by part."""
    parts = [0x1950A86A20F9469CFC6C, 1001, dict(protocol_version=1001, little_endian=True, type_sizes={})]
    head = b"".join(pickle.dumps(part, 2) for part in parts)
    reference = b"(X\x07\0\0\0storageq\0ctorch\n%s\nX\x01\0\0\0%sX\x03\0\0\0cpuJ%sNtQ." % (
        kind.encode(), key.encode(), count.to_bytes(4, "little", signed=True)
    )  # fmt: skip
    return head + b"\x80\x02" + reference + pickle.dumps([key], 2) + count.to_bytes(8, "little", signed=True) + data


class Raw:
    """A tensor with any storage, offset, size and stride."""

    def __init__(self, data=None, offset=0, size=(4,), stride=(1,)):
        self.data, self.rest = storage() if data is None else data, (offset, size, stride, False, {})

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (Bytes(self.data), *self.rest)


class Bytes(Raw):
    def __init__(self, data):
        self.data = data

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.data,)


TENSORS = {
    "10^9 elements": Raw(storage(10**9)),
    "fewer bytes": Raw(storage(5)),
    "negative count": Raw(storage(-1)),
    "a view beyond": Raw(size=(5,)),
    "an offset beyond": Raw(offset=1),
    "negative offset": Raw(offset=-1),
    "negative stride": Raw(stride=(-1,)),
    "endless view": Raw(size=(10**9,), stride=(0,)),
    "huge stride": Raw(size=(2,), stride=(2**62,)),
    "many axes": Raw(size=(1,) * 10_000, stride=(1,) * 10_000),
    "axes that do not match": Raw(size=(2, 2)),
    "not a storage": Raw(pickle.dumps([1, 2, 3])),
    "storage in storage": Raw(storage() + b"", size=(4,), stride=("x",)),
    "unknown kind": Raw(storage(kind="QUInt8Storage")),
    "a call in the storage": Raw(pickle.dumps(Evil(os.system, "touch executed"))),
    "a called type": Evil(torch.FloatStorage, 4),
    "an array of objects": np.array([{}, None], dtype=object),
    "an array": np.zeros(3),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(honest, tmp_path, name):
    views = ("a view beyond", "an offset beyond", "endless view", "huge stride")
    says = "in a storage of 4 numbers" if name in views else ""
    refused(theirs.dump(at("_parameters", honest[0], TENSORS[name]), tmp_path / "x.pkl"), says)


def ends_in_itself():
    made = torch.nn.ModuleDict()
    made._modules["again"] = made
    return made


def doubling(levels=40):
    made = torch.nn.ModuleDict()
    for _ in range(levels):
        made, inner = torch.nn.ModuleDict(), made
        made._modules |= {"a": inner, "b": inner}
    return made


OBJECTS = {
    "another version": ("version", 7),
    "version as text": ("version", "6"),
    "another type": ("type", "module"),
    "unknown class": ("class_name", "Backdoor"),
    "class of another system": ("class_name", "UNet"),
    "no class": ("class_name", None),
    "no state": ("state", None),
    "state of another kind": ("state", [1]),
    "wider than memory": ("argument", 2**31),
    "wide": ("argument", 2**14),
    "negative width": ("argument", -1),
    "width as text": ("argument", "8" * 10**6),
    "nested argument": ("argument", [[[8]]]),
    "tensor as argument": ("argument", torch.zeros(3)),
    "unknown part": ("_modules", theirs.Persistent("Backdoor", {})),
    "part of another kind": ("_modules", 5),
    "parts without end": ("_modules", ends_in_itself()),
    "parts that double": ("_modules", doubling()),
    "encoder that is none": ("encoder", {"class_name": "StandardRGBEncoder"}),
    "encoder of another system": ("encoder", theirs.Persistent("Backdoor", {})),
    "network of numbers": ("ema", {"w": torch.zeros(2)}),
    "no network": ("ema", None),
    "deep data": ("dataset_kwargs", [[[]]]),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_objects(honest, tmp_path, name):
    refused(theirs.dump(at(OBJECTS[name][0], honest[0], OBJECTS[name][1]), tmp_path / "x.pkl"))


STREAMS = {
    "deep recursion": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep tuples": b"\x80\x02N" + b"\x85" * 100_000 + b".",
    "memo bomb": b"\x80\x02Nr\xff\xff\xff\xff.",
    "doubling lists": b"\x80\x02]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(40)) + b".",
    "an instance of protocol 0": b"(ios\nsystem\n.",
    "extension registry": b"\x80\x02\x82\x01.",
    "persistent id as text": b"Pstorage\n.",
    "persistent id of a module": b"\x80\x02(X\x06\x00\x00\x00modulecos\nsystem\nNNtQ.",
    "unknown persistent id": b"\x80\x02K\x01Q.",
    "a long integer": b"\x80\x02\x8b" + (10**6).to_bytes(4, "little") + b"\x7f" * 10**6 + b".",
    "dotted name": b"\x80\x04\x8c\x05torch\x94\x8c\x08hub.load\x94\x93.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "state for a class": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.",
    "dtype's state": b"cnumpy\ndtype\n(S'f8'\nI0\nI1\ntR(I3\nS'<'\nNNNI8\nI1\nI63\ntb(I3\nS'|'\n(lNNI8\nI1\nI63\ntb.",
    "type of objects": b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR.",
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
def test_streams(honest, tmp_path, name):
    (tmp_path / "x.pkl").write_bytes(STREAMS[name])
    refused(tmp_path / "x.pkl")


def archive(path, compression=zipfile.ZIP_STORED, rename=None, drop=None, change=None):
    """A PFGM++ training state whose zip archive was tampered with."""
    net, args, kwargs = theirs.edm_net("edm")
    data = io.BytesIO()
    theirs.save(theirs.pfgmpp_content(net, net, args, kwargs), data)
    with zipfile.ZipFile(data) as old, zipfile.ZipFile(path, "w", compression) as new:
        for info in old.infolist():
            name = info.filename.partition("/")[2]
            if name != drop:
                content = old.read(info)
                content = (change or (lambda name, content: content))(name, content)
                new.writestr((rename or (lambda name: f"archive/{name}"))(name), content)
    return path


ARCHIVES = {
    "compressed": dict(compression=zipfile.ZIP_DEFLATED),
    "without its pickle": dict(drop="data.pkl"),
    "without a storage": dict(drop="data/0"),
    "a short storage": dict(change=lambda name, data: data[:-4] if name == "data/1" else data),
    "big-endian": dict(change=lambda name, data: b"big" if name == "byteorder" else data),
    "a call": dict(change=lambda name, data: b"cos\nsystem\n(S'true'\ntR." if name == "data.pkl" else data),
    "names outside": dict(rename=lambda name: f"../../{name}"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives(honest, tmp_path, name):
    refused(archive(tmp_path / "training-state-000001.pt", **ARCHIVES[name]))
    assert len(os.listdir(tmp_path)) == 1


def test_an_archive_that_is_only_copied_is_read(tmp_path):
    assert load_snapshot(archive(tmp_path / "training-state-000001.pt")).process.D == 128


@pytest.mark.parametrize("D", [0, -3, "x", float("nan"), [1]])
def test_dimensions_of_pfgmpp(tmp_path, D):
    net, args, kwargs = theirs.edm_net("edm")
    refused(theirs.dump(theirs.pfgmpp_content(net, net, args, kwargs, D), tmp_path / "x.pkl"))


def test_files_without_a_description_are_explained(tmp_path):
    torch.save({"state": {}, "net": {"w": torch.zeros(3)}, "ema": {"emas": []}}, tmp_path / "training-state-0000001.pt")
    refused(tmp_path / "training-state-0000001.pt", "network-snapshot")
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2"}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "Lightning")
