"""Files of runs, which anything may have been done to since: size, form, types and ranges are
checked, and a ValueError names the file, what it has and what it takes."""

from __future__ import annotations

import json
import os
import reprlib
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from experiments.reporting import packed
from experiments.storage.files import without_waiting

_LARGEST = {"metrics.jsonl": 2**26}
_LARGEST_OTHER = 2**20
_LONGEST_NAME = 200
_LONGEST_TEXT = 4096
_LARGEST_FLOAT32 = 3.4028234663852886e38


@dataclass(frozen=True)
class Number:
    """Which numbers a field takes."""

    low: float
    high: float
    takes: str
    whole: bool = False
    nullable: bool = False

    @property
    def or_null(self) -> Number:
        return replace(self, takes=f"{self.takes} or null", nullable=True)

    def accepts(self, value: Any) -> bool:
        if value is None:
            return self.nullable
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        return self.low <= value <= self.high  # false for NaN


SHARE = Number(0, 1, "a number from 0 to 1")
DIFFERENCE = Number(-1, 1, "a number from -1 to 1")
POSITIVE = Number(0, _LARGEST_FLOAT32, "a finite number from 0")
FINITE = Number(-_LARGEST_FLOAT32, _LARGEST_FLOAT32, "a finite number")
COUNT = Number(0, 2**63 - 1, "a whole number from 0", whole=True)
SIZE = Number(1, 2**63 - 1, "a whole number from 1", whole=True)


@dataclass(frozen=True)
class Fields:
    """What stands in a JSON object, and where that stands."""

    place: str
    content: dict[str, Any]

    @classmethod
    def of_file(cls, path: packed.Folder) -> Fields:
        return cls.parsed(_bytes(path), str(path))

    @classmethod
    def of_lines(cls, path: packed.Folder) -> Iterator[Fields]:
        """One object a line."""
        for number, line in enumerate(_bytes(path).splitlines(), 1):
            yield cls.parsed(line, f"{path}, line {number}")

    @classmethod
    def parsed(cls, text: bytes, place: str) -> Fields:
        try:
            content = json.loads(text.decode(), object_pairs_hook=_without_doubles)
            # Half of a surrogate pair can be written in JSON, but never in a report.
            json.dumps(content, ensure_ascii=False).encode()
        except ValueError as error:
            raise ValueError(f"{place}: malformed: {error}") from error
        except RecursionError as error:
            raise ValueError(f"{place}: malformed: nested too deeply") from error
        if not isinstance(content, dict):
            raise ValueError(f"{place}: malformed: got {shown(content)}, takes an object")
        return cls(place, content)

    def value(self, name: str) -> Any:
        if name not in self.content:
            raise ValueError(f"{self.place}: lacks {name}")
        return self.content[name]

    def number(self, name: str, kind: Number) -> Any:
        value = self.value(name)
        self.require(name, kind.accepts(value), kind.takes)
        return value if value is None or kind.whole else float(value) + 0.0  # never -0.0

    def text(self, name: str) -> str:
        """A name."""
        value = self.value(name)
        takes = f"printable text of 1 to {_LONGEST_NAME} characters"
        self.require(name, value != "" and _is_text(value, _LONGEST_NAME), takes)
        return value

    def object(self, name: str) -> Fields:
        value = self.value(name)
        self.require(name, isinstance(value, dict), "an object")
        return Fields(f"{self.place}, {name}", value)

    def require(self, name: str, accepted: bool, takes: str) -> None:
        """Refuses the value of a field unless it is accepted."""
        if not accepted:
            got = shown(self.content[name])
            raise ValueError(f"{self.place}: got {got} as {name}, takes {takes}")


def is_plain(value: Any) -> bool:
    """Whether a value is one that an option can have: a number, true, false, null or text."""
    is_word = value is None or isinstance(value, bool)
    return is_word or FINITE.accepts(value) or _is_text(value, _LONGEST_TEXT)


def _is_text(value: Any, longest: int) -> bool:
    return isinstance(value, str) and len(value) <= longest and value.isprintable()


def exists(path: packed.Folder) -> bool:
    """Also as a link to nothing."""
    return path.exists() if isinstance(path, zipfile.Path) else os.path.lexists(path)


def _bytes(path: packed.Folder) -> bytes:
    """The content of a regular file, or of one in a packed file."""
    limit = _LARGEST.get(path.name, _LARGEST_OTHER)
    try:
        if isinstance(path, zipfile.Path):
            content = packed.read(path, limit + 1)
        else:
            with open(path, "rb", opener=without_waiting) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise ValueError(f"{path}: is not a regular file")
                content = file.read(limit + 1)
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent}: {path.name} is missing") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > limit:
        raise ValueError(f"{path}: got more than {limit:,} bytes")
    return content


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"got {shown(name)} twice")
        content[name] = value
    return content


def shown(value: Any) -> str:
    """A value in a message, shortened."""
    return reprlib.repr(value)
