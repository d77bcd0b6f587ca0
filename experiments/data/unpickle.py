"""Reading a pickle of plain containers and numpy arrays without running what it names."""

import io
import pickle
from typing import Any

import numpy as np


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes into protocols 0 to 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"_codecs.encode: got {encoding!r}, takes 'latin1'")
    return text.encode("latin1")


# numpy 2 renamed the modules, so both spellings stand for the functions of the numpy at hand.
_RECONSTRUCT = np.zeros(1).__reduce__()[0]
_FROM_BUFFER = np.zeros(1).__reduce_ex__(5)[0]
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.numeric", "_frombuffer"): _FROM_BUFFER,
    ("numpy._core.numeric", "_frombuffer"): _FROM_BUFFER,
    ("_codecs", "encode"): _encode,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which plain arrays do not need"
            ) from None


def loads(blob: bytes, source: str) -> Any:
    """Unpickles `blob`; strings of Python 2 become bytes. Any failure is a ValueError that names
    `source`."""
    try:
        return _ArrayUnpickler(io.BytesIO(blob), encoding="bytes").load()
    except Exception as error:  # a malformed pickle can raise almost anything
        raise ValueError(f"{source}: not a readable pickle: {error}") from error
