"""Reading a pickle of plain values and numpy arrays, from a file that nobody vouches for.

A pickle is a program. Python's unpickler runs it on real objects, whose methods it calls: with a
dtype that was given flags of the file's choice, that alone can corrupt memory. Here the opcodes
that such values need run on built-in types and on stand-ins of our own, and an array is made only
of what has been checked. Anything else is refused, as is what would take much more memory than the
file.
"""

import codecs
import io
import math
import pickletools
from enum import Enum
from typing import Any, Literal

import numpy as np

_MOST_VALUES = 1_000_000
"""Of opcodes, and of values in the result. A file of CIFAR-10 has up to 60,000."""
_DEEPEST = 16
_MOST_AXES = 32
_LONGEST_KEY = 1000
_OPCODES = {opcode.code.encode("latin1"): opcode for opcode in pickletools.opcodes}
_SIZES = {
    kind + str(size): size
    for kind, sizes in {"b": (1,), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (2, 4, 8)}.items()
    for size in sizes
}
"""Bytes of an element, by how a pickle names its dtype."""


class _Named(Enum):
    """What a pickle may name. numpy 2 renamed the modules."""

    ENCODE = "_codecs.encode"
    NDARRAY = "numpy.ndarray"
    DTYPE = "numpy.dtype"
    RECONSTRUCT = "numpy._core.multiarray._reconstruct"
    FROM_BUFFER = "numpy._core.numeric._frombuffer"


class _Dtype:
    """Stands for a dtype."""

    def __init__(self, code: str | bytes) -> None:
        self.code = _text(code)
        if self.code not in _SIZES:
            raise ValueError(f"got the dtype {self.code[:80]!r}, takes {', '.join(_SIZES)}")
        self.size = _SIZES[self.code]
        self.order = "|" if self.size == 1 else "="

    def build(self, state: tuple) -> None:
        """Of the state only the byte order may differ from one dtype to another."""
        order = _text(state[1])
        orders = ("|",) if self.size == 1 else ("<", ">")
        if order not in orders or state != (3, state[1], None, None, None, -1, -1, 0):
            raise ValueError(f"the dtype {self.code} has a state that numpy does not write")
        self.order = order


class _Array:
    """Stands for an array, which is `value` once it has its content."""

    def __init__(self) -> None:
        self.value: np.ndarray | None = None

    def build(self, state: tuple) -> None:
        match state:
            case 1, tuple() as shape, _Dtype() as dtype, int() as fortran, bytes() as data:
                self.fill(data, dtype, shape, "F" if fortran else "C")
            case _:
                raise ValueError("an array has a state that numpy does not write")

    def fill(
        self, data: bytes | bytearray, dtype: _Dtype, shape: tuple, order: Literal["C", "F"]
    ) -> None:
        lengths = len(shape) <= _MOST_AXES and all(type(n) is int and n >= 0 for n in shape)
        if self.value is not None or not lengths:
            raise ValueError("an array has a state that numpy does not write")
        if math.prod(shape) * dtype.size != len(data):
            raise ValueError(
                f"got {len(data)} bytes for an array {dtype.code} of shape {list(shape)}"
            )
        # A view: many arrays of the same bytes take no more memory than one.
        self.value = np.ndarray(shape, np.dtype(dtype.order + dtype.code), data, order=order)


class _Machine:
    """Runs a pickle. On the stack are values of exactly the types None, bool, int, float, str,
    bytes, bytearray, tuple, list, dict, `_Named`, `_Dtype` and `_Array`."""

    def __init__(self, blob: bytes) -> None:
        self.file = io.BytesIO(blob)
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.left_to_encode = len(blob)
        self.left = _MOST_VALUES

    def run(self) -> Any:
        for _ in range(_MOST_VALUES):
            opcode = _OPCODES.get(self.file.read(1))
            if opcode is None:
                raise ValueError("it has an unknown opcode, or ends too early")
            if opcode.name == "STOP":
                return self._plain(self.stack.pop(), _DEEPEST)
            if opcode.name == "STRING":  # of Python 2, which its reader takes for ASCII
                text = pickletools.read_stringnl(self.file, decode=False)
                self.stack.append(codecs.escape_decode(text)[0])
            else:
                self._do(opcode.name, opcode.arg.reader(self.file) if opcode.arg else None)
        raise ValueError(f"it has more than {_MOST_VALUES:,} opcodes")

    def _do(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4":
                if not -(2**63) <= argument < 2**64:
                    raise ValueError("it has an integer of more than 64 bits")
                stack.append(argument)
            case "BINSTRING" | "SHORT_BINSTRING":
                stack.append(argument.encode("latin1"))
            case (
                ("FLOAT" | "BINFLOAT")
                | ("UNICODE" | "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8")
                | ("SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8" | "BYTEARRAY8")
            ):
                stack.append(argument)
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                if not 0 <= argument < _MOST_VALUES:
                    raise ValueError(f"got {argument} as the place of a value")
                self.memo[argument] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "MARK":
                self.marks.append(len(stack))
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                stack.append(tuple(self._marked()))
            case "LIST":
                stack.append(self._marked())
            case "DICT":
                items = self._marked()
                stack.append({})
                self._set(stack[-1], items)
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "APPEND" | "APPENDS":
                values = [stack.pop()] if name == "APPEND" else self._marked()
                if type(stack[-1]) is not list:
                    raise ValueError("it appends to what is no list")
                stack[-1].extend(values)
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else self._marked()
                self._set(stack[-1], items)
            case "GLOBAL":
                stack.append(_named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                named = stack.pop()
                stack.append(_named(stack.pop(), named))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(self._called(stack.pop(), arguments))
            case "BUILD":
                state = stack.pop()
                if not isinstance(stack[-1], _Dtype | _Array) or type(state) is not tuple:
                    raise ValueError("it gives a state to what is no array")
                stack[-1].build(state)
            case "PROTO" | "FRAME":
                pass
            case _:
                raise ValueError(f"it has the opcode {name}, which plain values do not need")

    def _marked(self) -> list[Any]:
        """Takes off the stack what is above the last mark."""
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    @staticmethod
    def _set(target: Any, items: list[Any]) -> None:
        if type(target) is not dict:
            raise ValueError("it sets items of what is no dict")
        if len(items) % 2:
            raise ValueError("it has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Not a tuple: the hash of one that is nested deep overflows C's stack.
            if type(key) not in (str, bytes) or len(key) > _LONGEST_KEY:
                raise ValueError(f"it has a key that is no text of up to {_LONGEST_KEY} characters")
            target[key] = value

    def _called(self, function: Any, arguments: Any) -> Any:
        array = _Array()
        match function, arguments:
            case _Named.ENCODE, (str() as text, str() as encoding):
                # How Python 3 writes bytes into protocols 0 to 2.
                if encoding != "latin1":
                    raise ValueError(f"_codecs.encode: got {encoding[:80]!r}, takes 'latin1'")
                self.left_to_encode -= len(text)
                if self.left_to_encode < 0:
                    raise ValueError("its bytes take more memory than itself")
                return text.encode("latin1")
            case _Named.DTYPE, (str() | bytes() as code, 0, 1):
                return _Dtype(code)
            case _Named.RECONSTRUCT, (_Named.NDARRAY, (0,), b"b" | "b"):
                return array
            case _Named.FROM_BUFFER, (
                bytes() | bytearray() as data,
                _Dtype() as dtype,
                tuple() as shape,
                "C" | "F" | "K" as order,
                *axes,
            ):
                array.fill(data, dtype, shape, "F" if order == "F" else "C")
                if order == "K" and array.value is not None:
                    array.value = array.value.transpose(tuple(*axes))
                return array
            case _Named(), _:
                raise ValueError(f"it calls {function.value} with other arguments than numpy does")
            case _:
                raise ValueError("it calls what is no function")

    def _plain(self, value: Any, depth: int) -> Any:
        """The value with its arrays; lists that are shared become several."""
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"it holds more than {_MOST_VALUES:,} values")
        if depth == 0:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
        match value:
            case list() | tuple():
                return type(value)([self._plain(item, depth - 1) for item in value])
            case dict():
                return {key: self._plain(item, depth - 1) for key, item in value.items()}
            case _Array(value=np.ndarray()):
                return value.value
            case _Array() | _Dtype() | _Named():
                raise ValueError("it holds a dtype, a function or an array without content")
        return value


def _named(module: Any, name: Any) -> _Named:
    if type(module) is not str or type(name) is not str:
        raise ValueError("it names a function by what is no text")
    full = f"{module}.{name}"
    try:
        return _Named(full.replace("numpy.core.", "numpy._core."))
    except ValueError:
        raise ValueError(f"it names {full[:80]!r}, which plain arrays do not need") from None


def _text(short: Any) -> str:
    """Text, which is bytes where Python 2 has written it."""
    if type(short) is bytes:
        return short[:8].decode("latin1")
    return short if type(short) is str else ""


def loads(blob: bytes, source: str) -> Any:
    """What a pickle holds: None, numbers, text, bytes, lists, tuples and dicts of text or bytes,
    and arrays of numbers, which can be read-only. Strings of Python 2 become bytes.

    Any failure is a ValueError that names `source`.
    """
    try:
        return _Machine(blob).run()
    except ValueError as error:
        what = str(error)[:200]
    except Exception:  # such as a stack that is empty
        what = "its opcodes do not fit together"
    raise ValueError(f"{source}: not a readable pickle: {what if blob else 'it is empty'}")
