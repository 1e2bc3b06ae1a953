"""Pickles read as data: what NumPy writes comes back by every protocol; everything else is refused in one line."""

import collections
import pickle

import numpy as np
import pytest
from small_runs import assert_quick

from torch_utils import pickles

ARRAYS = {
    "matrix": np.arange(6.0).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "turned": np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
    "strided": np.arange(24).reshape(2, 3, 4)[:, ::2],
    "empty": np.zeros((0, 3)),
    "no axes": np.array(3.5),
    "big endian": np.arange(5, dtype=">i4"),
    "bool": np.array([True, False]),
    "complex": np.ones(3, dtype="c8"),
    "scalar": np.float64(2.5),
    "bytes": np.arange(4, dtype=np.uint8),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_come_back(name, protocol):
    array = ARRAYS[name]
    content = {"a": array, b"b": [array, (1, None, "x", b"y", 2.5, True)], "o": collections.OrderedDict(x=array)}
    read = pickles.load(pickle.dumps(content, protocol=protocol))
    assert list(read) == ["a", b"b", "o"] and read[b"b"][1] == content[b"b"][1]
    for found in (read["a"], read[b"b"][0], read["o"]["x"]):
        assert type(found) is type(array) and found.dtype == array.dtype and found.shape == array.shape
        assert np.array_equal(found, array) and (name == "scalar" or found.flags.writeable)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    "value",
    [
        np.array([1, "x"], dtype=object),
        np.array(["text"]),
        np.array(["2020"], dtype="M8[D]"),
        np.zeros(2, dtype=[("a", "f8")]),
        np.zeros(2).view(np.recarray),
        np.dtype("f8"),
        np.ndarray,
        {1, 2},
        print,
        pickle.PickleBuffer,
    ],
    ids=repr,
)
def test_everything_else_is_refused(value, protocol):
    with pytest.raises(ValueError) as error:
        pickles.load(pickle.dumps({"x": value}, protocol=protocol))
    assert "\n" not in str(error.value)


def crafted(name=b"f8", flags=0, length=8, size=1):
    """An array opcode by opcode: type name, flags of the type, bytes of data, elements."""
    dtype = b"cnumpy\ndtype\n(S'%s'\nI0\nI1\ntR(I3\nS'<'\nNNNI8\nI1\nI%d\ntb" % (name, flags)
    start = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    return start + b"(I1\n(I%d\nt" % size + dtype + b"I00\nS'" + b"A" * length + b"'\ntb."


def test_flags_of_a_type_have_no_effect():
    """63 says that the eight bytes are a pointer to an object: NumPy's own reader would follow it."""
    array = pickles.load(crafted(flags=63))
    assert array.dtype == np.float64 and array.tobytes() == b"A" * 8


@pytest.mark.parametrize(
    "data",
    [
        crafted(b"O8", 63),
        crafted(b"V8", 63),
        crafted(length=7),
        crafted(size=2**61),  # times 8 is 2^64, no bytes at all
        crafted(size=-1),
        crafted()[:-20],
        b"cnumpy\ndtype\n(S'f8'\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(tR.",  # an array without content
        b"cnumpy\nndarray\n(N(dS'value'\nI3\nstb.",  # state for a class of the reader itself
        b"(lp0\ng0\na.",  # a list that holds itself
        b"",
        b"no pickle",
    ],
)
def test_crafted_and_damaged(data):
    with pytest.raises(ValueError) as error:
        pickles.load(data)
    assert "\n" not in str(error.value) and str(error.value)


def deep_key():
    """A dict whose key is a tuple in a tuple in a tuple ...: hashing it would overflow the stack of the interpreter."""
    return b"\x80\x02}K\x01" + b"\x85" * 200_000 + b"K\x01s."


def shared(levels, width):
    """A list of lists that is small in memory and without end to who walks through it."""
    data = b"]K\x01aq\x00"
    for level in range(levels):
        data += b"](" + (b"h%c" % level) * width + b"eq%c" % (level + 1)
    return data + b"."


HOSTILE = {
    "deep key": deep_key(),
    "deep list": b"]" * 200_000 + b"a" * 199_999 + b".",
    "deep tuple": b"K\x01" + b"\x85" * 200_000 + b".",
    "shared lists": shared(30, 20),
    "place in the memo": b"Nr\xff\xff\xff\xff0.",
    "array of many": b"cnumpy\nndarray\n)R(K\x01(I1000000000\ntcnumpy\ndtype\n(X\x02\x00\x00\x00u1tRI00\nC\x00tb.",
    "integer of a megabyte": b"\x8b" + (10**6).to_bytes(4, "little") + b"\x7f" * 10**6 + b".",
    "text integer": b"I" + b"9" * 10**6 + b"\n.",
    "text long": b"L" + b"9" * 10**6 + b"L\n.",
    "float as integer key": b"}G" + b"\x00" * 8 + b"K\x01s.",
    "list as key": b"}]K\x01s.",
    "state of a list": b"]}b.",
    "state of a dict": b"}(X\x03\x00\x00\x00aaaK\x01db.",
    "persistent id": b"Pa\n.",
    "persistent object": b"K\x01Q.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "extension": b"\x82\x01.",
    "old instance": b"(icollections\nOrderedDict\n.",
    "dtype with a comma": b"cnumpy\ndtype\n(X\x05\x00\x00\x00f8,f8tR.",
    "dtype of a class": b"cnumpy\ndtype\n(cnumpy\ndtype\ntR.",
    "set": b"\x8f.",
    "frozenset": b"(\x91.",
    "endless string": b"\x8e" + b"\xff" * 8 + b"x.",
    "nothing to take": b"a.",
    "no mark": b"t.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_end_at_once(name):
    def load():
        with pytest.raises(ValueError) as error:
            pickles.load(HOSTILE[name])
        return str(error.value)

    assert "\n" not in assert_quick(load)


def test_bytes_are_not_copied_without_end():
    """A string of 64 kB from which thousands of arrays are made."""
    text = b"X" + (2**16).to_bytes(4, "little") + b"a" * 2**16 + b"q\x00"
    make = b"c_codecs\nencode\n(h\x00tR"
    assert pickles.load(b"(" + text + make * 2 + b"l.")[1:] == [b"a" * 2**16] * 2
    with pytest.raises(ValueError, match="more than it holds"):
        pickles.load(b"(" + text + make * 5000 + b"l.")
