import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import fuzz_unpickle
import numpy as np
import pytest

from experiments.data import unpickle

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


@pytest.mark.parametrize("code", ["b1", "i1", "i2", "i8", "u1", "u4", "f2", "f8", ">i4", ">f8"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_of_every_kind_layout_and_protocol(code, protocol):
    array = np.arange(24).astype(code).reshape(2, 3, 4)
    arrays = [array, array.T, array.transpose(0, 2, 1), array[:, ::2]]
    value = unpickle.loads(pickle.dumps({"labels": [arrays, np.array(3, code)]}, protocol), "file")
    read, scalar = value["labels"]
    for got, expected in zip((*read, scalar), (*arrays, np.array(3, code)), strict=True):
        assert type(got) is np.ndarray
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values_of_every_protocol(protocol):
    shared = [1, (2, "three")]
    value = {
        "numbers": [0, 255, 256, 65536, -1, 2**40, -(2**63), 2**64 - 1, 0.5, float("inf")],
        "others": (None, True, False, "", "\u00e9\u4e00", b"\x00\n\xff", (), [], {}, (1,)),
        b"shared": [shared, shared],
    }
    assert unpickle.loads(pickle.dumps(value, protocol), "file") == value


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes alike as Python 2's `str` of protocol 0."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        value = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(b"S" + repr(value)[1:].encode() + b"\n")

    def save_global(self, value, name=None):
        module = value.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{value.__name__}\n".encode())

    dispatch[bytes] = dispatch[str] = save_string
    dispatch[type] = save_global


def test_text_of_python_2_is_bytes(tmp_path):
    array = np.arange(256, dtype=np.uint8).reshape(2, 128)
    with (tmp_path / "batch").open("wb") as file:
        Python2Pickler(file, protocol=0).dump({"data": array, "labels": ["it's\n", 3]})
    value = unpickle.loads((tmp_path / "batch").read_bytes(), "file")
    assert value.keys() == {b"data", b"labels"}
    assert value[b"labels"] == [b"it's\n", 3]
    np.testing.assert_array_equal(value[b"data"], array)


# What is refused. Opcodes: ( begins what t, l, d, e and u take together; c names, R calls, b gives
# a state, s sets an item, a appends, p and g store and fetch, . ends.

DTYPE = b"cnumpy\ndtype\n(VO8\nI00\nI01\ntR"
U1 = b"cnumpy\ndtype\n(Vu1\nI00\nI01\ntR"
FROM_BUFFER = b"cnumpy.core.numeric\n_frombuffer\n"
EMPTY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntVb\ntR"
EIGHT = b"\x96" + (8).to_bytes(8, "little") + b"\xef\xbe\xad\xde\xef\xbe\xad\xde"
CLEARED = b"(I3\nV|\nNNNI-1\nI-1\nI0\ntb"
EXPLOIT = FROM_BUFFER + b"(" + EIGHT + DTYPE + CLEARED + b"(I1\ntVC\ntRI0\nNs"
"""Sets an item of an array of objects, whose old one is at an address of the file's choice."""

FILLED = b"(I1\n(I1\nt" + U1 + b"I00\nC\x01xtb"


def state_of_u1(*values):
    """A dtype u1 with a state other than numpy's."""
    return U1 + b"(" + b"".join(values) + b"tb"


def array_of(shape, data=EIGHT, dtype=U1, order=b"VC\n"):
    return FROM_BUFFER + b"(" + data + dtype + b"(" + shape + b"t" + order + b"tR."


HOSTILE = {
    "exploit": EXPLOIT + b".",
    "exploit as label": b"(lp0\n" + EXPLOIT + b"a.",
    "dtype of objects": DTYPE + b".",
    "dtype of text": b"cnumpy\ndtype\n(VU1000000000\nI00\nI01\ntR.",
    "dtype of fields": b"cnumpy\ndtype\n((lp0\n(Va\nVO\ntaI00\nI01\ntR.",
    "dtype with flags": state_of_u1(b"I3\nV|\nNNNI-1\nI-1\nI63\n"),
    "dtype with a size": state_of_u1(b"I3\nV|\nNNNI800000\nI-1\nI0\n"),
    "dtype with fields": state_of_u1(b"I3\nV|\nN(Va\nt(dI-1\nI-1\nI0\n"),
    "dtype with a base": state_of_u1(b"I3\nV|\n(" + U1 + b"(I9\nttNNI-1\nI-1\nI0\n"),
    "dtype with metadata": state_of_u1(b"I4\nV|\nNNNI-1\nI-1\nI0\n(d"),
    "dtype of an odd order": state_of_u1(b"I3\nV>\nNNNI-1\nI-1\nI0\n"),
    "dtype with a short state": state_of_u1(b"I3\n"),
    "dtype with a dict": U1 + b"(db.",
    "array without content": EMPTY + b".",
    "array of fewer bytes": array_of(b"I9\n"),
    "array of more bytes": array_of(b"I7\n"),
    "array of a negative length": array_of(b"I-1\nI-8\n"),
    "array of a length that overflows": array_of(b"L4611686018427387905L\nI8\n"),
    "array of a huge empty shape": array_of(b"I0\n" * 33, b"\x96" + bytes(8)),
    "array of a float shape": array_of(b"F8\n"),
    "array of a list as shape": FROM_BUFFER + b"(" + EIGHT + U1 + b"(lI8\naVC\ntR.",
    "array of no dtype": array_of(b"I8\n", dtype=b"cnumpy\ndtype\n"),
    "array of text": array_of(b"I8\n", data=b"Vabcdefgh\n"),
    "array filled twice": EMPTY + FILLED + FILLED + b".",
    "array with a dict": EMPTY + b"(Va\nI1\ndb.",
    "array of objects as a list": EMPTY + b"(I1\n(I1\nt" + DTYPE + b"I00\n(lI1\natb.",
    "item of an array": array_of(b"I8\n")[:-1] + b"I0\nI1\ns.",
    "items of an array": array_of(b"I8\n")[:-1] + b"(I0\nI1\nu.",
    "appending to an array": array_of(b"I8\n")[:-1] + b"I1\na.",
    "item of a list": b"(lI1\naI0\nI2\ns.",
    "state of a list": b"(l(Va\nI1\ndb.",
    "state of a function": b"c_codecs\nencode\n(Va\nI1\ndb.",
    "function as a value": b"c_codecs\nencode\n.",
    "method of a dtype": b"\x80\x04\x8c\x05numpy\x8c\x12dtype.newbyteorder\x93.",
    "function named by a list": b"\x80\x04]\x8c\x05dtype\x93.",
    "ndarray called": b"cnumpy\nndarray\n(I8\ntR.",
    "something else called": b"(lp0\n(tR.",
    "new object": b"\x80\x02cnumpy\nndarray\n(I8\nt\x81.",
    "instance": b"(I8\ninumpy\nndarray\n.",
    "object": b"(cnumpy\nndarray\nI8\no.",
    "extension": b"\x82\x01.",
    "persistent": b"Pname\n.",
    "binary persistent": b"Vname\nQ.",
    "buffer": b"\x97.",
    "set": b"\x8f.",
    "number as key": b"(dI1\nI1\ns.",
    "long key": b"(dV" + b"x" * 1001 + b"\nI1\ns.",
    "key without value": b"(Va\nI1\nVb\nd.",
    "long integer": b"\x8b" + (9).to_bytes(4, "little") + b"\x01" * 9 + b".",
    "place in the memo": b"Nr\xff\xff\xff\xff.",
    "place that is negative": b"Np-1\n.",
    "fetching nothing": b"g7\n.",
    "nothing": b".",
    "unknown opcode": b"\xff",
    "no end": b"N",
    "bytes that are not there": b"\x96" + (1 << 40).to_bytes(8, "little") + b"x.",
    "frame that is not there": b"\x80\x04\x95" + b"\xff" * 8,
    "list in itself": b"(lp0\ng0\na.",
    "deep list": b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep tuple": b")" + b"\x85" * 500_000 + b".",
    "deep tuple as key": b"}p0\n)" + b"\x85" * 500_000 + b"Ns.",
    "list of lists of lists": b"(lp0\n" + (b"(" + b"g0\n" * 8 + b"lp0\n") * 12 + b".",
    "too many opcodes": b"(" + b"N" * 1_000_000 + b"l.",
    "bytes encoded again and again": (
        b"(V" + b"x" * 1_000_000 + b"\np0\n" + b"c_codecs\nencode\n(g0\nVlatin1\ntR" * 4_000 + b"l."
    ),
}
READ_ALL = """
import pickle, sys
from experiments.data import unpickle

for name, blob in pickle.load(sys.stdin.buffer).items():
    try:
        unpickle.loads(blob, "some_file")
    except ValueError as error:
        print(name, error, sep=": ", flush=True)
# Not ru_maxrss, which begins with what the parent had.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.fixture(scope="module")
def refusals():
    """What is said of each hostile pickle, by a process of its own, which may crash; and, last, how
    much memory it took, in KB."""
    command = [sys.executable, "-c", READ_ALL]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, input=pickle.dumps(HOSTILE), stdout=subprocess.PIPE, timeout=100
    )
    return done.stdout.decode().splitlines()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickle_is_refused(refusals, name):
    assert any(
        line.startswith(f"{name}: some_file: not a readable pickle: ") and len(line) < 400
        for line in refusals
    )


def test_hostile_pickles_take_little_memory(refusals):
    assert int(refusals[-1]) < 1_500_000


def test_hostile_batch_of_cifar10_is_named(cifar10_folder, tmp_path):
    for path in cifar10_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    first = tmp_path / "data_batch_1"
    first.unlink()
    first.write_bytes(HOSTILE["exploit as label"])
    command = [sys.executable, "experiments/run.py", "--dataset", "cifar10", "--data-dir", tmp_path]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .*data_batch_1: not a readable pickle: .*\n", done.stderr)


def test_one_array_of_many_names_is_read_once():
    array = np.zeros(1000, np.uint8)
    first, second = unpickle.loads(pickle.dumps([array, array]), "file")
    assert first is second


def test_mutated_pickles_are_read_or_refused():
    """More of them: see fuzz_unpickle.py. In a process of its own, which may crash."""
    command = [sys.executable, fuzz_unpickle.__file__, "3000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < 3000
