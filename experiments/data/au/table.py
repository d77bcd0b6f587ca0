"""Tables of comma-separated text, whose lines can be named in a complaint.

A file has at most 64 MiB, 20,000 lines and 10,000 cells a line. OpenFace's landmarks of the longest
video have 26 MB, 4,845 lines and 714 cells a line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from experiments.data.au.faults import Faults
from experiments.storage.files import read_bytes

_LARGEST = 64 << 20
_MOST_LINES = 20_000
_MOST_CELLS = 10_000


@dataclass(frozen=True)
class Table:
    path: Path
    header: tuple[str, ...]
    rows: pl.DataFrame
    """`line`, counted from 1, and `cells`, a list of as many texts as the header has."""

    @classmethod
    def read(
        cls, path: Path, kind: str, faults: Faults, header: Sequence[str] | None = None
    ) -> Table | None:
        """Reads a file that begins with its header, or that has none and gets `header`.

        Blank lines do not count. A line of another length is a fault of `kind` and left out; a
        file without any good line is one too and gives None.
        """
        try:
            texts = _lines(path)
        except (OSError, ValueError) as error:
            faults.add(kind, path, f"not a readable text: {error}")
            return None
        lines = pl.DataFrame({"text": texts}, schema={"text": pl.String})
        rows = (
            lines.with_row_index("line", offset=1)
            .filter(pl.col("text").str.strip_chars() != "")
            .select("line", cells=pl.col("text").str.split(","))
        )
        if header is None and len(rows):
            header, rows = rows["cells"][0].str.strip_chars(), rows[1:]
        if header is None or not len(rows):
            faults.add(kind, path, "empty")
            return None
        width = len(header)
        fits = pl.col("cells").list.len() == width
        for line, cells in rows.filter(~fits).iter_rows():
            faults.add(kind, path, f"got {len(cells)} cells, takes {width}", line)
        rows = rows.filter(fits)
        return cls(path, tuple(header), rows) if len(rows) else None

    def select(self, positions: Mapping[str, int]) -> pl.DataFrame:
        """`line` and the texts at `positions`, each under its name."""
        cells = pl.col("cells").list
        columns = {name: cells.get(n).str.strip_chars() for name, n in positions.items()}
        return self.rows.select("line", **columns)


def _lines(path: Path) -> list[str]:
    lines = read_bytes(path, _LARGEST).decode("utf-8-sig").splitlines()
    if len(lines) > _MOST_LINES:
        raise ValueError(f"got {len(lines):,} lines, takes at most {_MOST_LINES:,}")
    cells = max((line.count(",") + 1 for line in lines), default=0)
    if cells > _MOST_CELLS:
        raise ValueError(f"got a line of {cells:,} cells, takes at most {_MOST_CELLS:,}")
    return lines
