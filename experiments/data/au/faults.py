"""What is wrong with a copy of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

_SHOWN = 3


@dataclass(frozen=True)
class Fault:
    kind: str
    file: str
    """Relative to the data set's directory."""
    line: int | None
    what: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.what}"


class Faults:
    """Collects the faults of the data set in `root`."""

    def __init__(self, root: Path, found: list[Fault] | None = None) -> None:
        self.root = root
        self.found = found or []

    def add(self, kind: str, path: Path, what: str, line: int | None = None) -> None:
        self.found.append(Fault(kind, path.relative_to(self.root).as_posix(), line, what))

    def text(self) -> str:
        """All of them, one a line."""
        return "".join(f"{fault.kind}: {fault}\n" for fault in self.found)

    def summary(self) -> str:
        """How many there are of each kind, and the first few."""
        lines = []
        for kind, same in groupby(sorted(self.found, key=_kind), key=_kind):
            faults = list(same)
            lines.append(f"{kind}: {len(faults):,}")
            lines += [f"    {fault}" for fault in faults[:_SHOWN]]
            lines += ["    ..."] * (len(faults) > _SHOWN)
        return "\n".join(lines)

    def first(self) -> str:
        """How many there are and the first few, in one line."""
        shown = [str(fault) for fault in self.found[:_SHOWN]] + ["..."]
        return f"{len(self.found):,} faults: " + "; ".join(shown[: len(self.found)])


def _kind(fault: Fault) -> str:
    return fault.kind
