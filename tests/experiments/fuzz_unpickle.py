"""Reads mutated pickles, and ends with a traceback or a crash if one is not read or refused.

The test reads a few thousand. More: `python tests/experiments/fuzz_unpickle.py 100000`.
"""

import pickle
import pickletools
import random
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path[:0] = [str(path) for path in Path(__file__).parents[1:3]]

from experiments.data import unpickle

CODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]


def seeds():
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    content = {
        b"data": array,
        "labels": [0, 1, -1, 2**40, 0.5, None, True, "text", b"\xff\n"],
        "arrays": (array.T, array.astype(">i4"), np.array(1.5), array),
    }
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield pickle.dumps(content, protocol)
        yield pickle.dumps(content, protocol).replace(b"numpy._core", b"numpy.core")


def mutated(blob, chance, others):
    blob = bytearray(blob)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at, end = sorted(chance.randrange(len(blob) + 1) for _ in range(2))
        end = min(end, at + chance.choice((1, 2, 8, 64)))
        match chance.randrange(6):
            case 0:
                blob[at:end] = bytes(chance.choice((0, 1, 127, 128, 255)) for _ in range(end - at))
            case 1:
                blob[at : at + 1] = chance.randbytes(1)
            case 2:
                blob[at : at + chance.randrange(2)] = chance.choice(CODES)
            case 3:
                del blob[at:end]
            case 4:
                blob[at:at] = blob[end : end + chance.choice((1, 8, 64))]
            case 5:
                other = chance.choice(others)
                start = chance.randrange(len(other))
                blob[at:at] = other[start : start + chance.choice((1, 8, 64))]
    return bytes(blob)


def fuzz(count):
    """How many of `count` mutated pickles were read."""
    chance = random.Random(0)
    originals = list(seeds())
    read = 0
    for number in range(count):
        blob = mutated(originals[number % len(originals)], chance, originals)
        try:
            value = unpickle.loads(blob, "some_file")
        except ValueError as error:
            if not str(error).startswith("some_file: not a readable pickle: "):
                raise AssertionError(blob) from error
        else:
            repr(value)
            pickle.dumps(value)  # looks at every byte of the arrays
            read += 1
    return read


if __name__ == "__main__":
    print(fuzz(int(sys.argv[1])))
