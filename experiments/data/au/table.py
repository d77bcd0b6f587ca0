"""Tables of comma-separated text, whose lines can be named in a complaint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from experiments.data.au.faults import Faults


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
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            faults.add(kind, path, f"not a readable text: {error}")
            return None
        lines = pl.DataFrame({"text": text.splitlines()}, schema={"text": pl.String})
        rows = (
            lines.with_row_index("line", offset=1)
            .filter(pl.col("text").str.strip_chars() != "")
            .select("line", cells=pl.col("text").str.split(","))
        )
        if header is None and len(rows):
            header, rows = rows["cells"][0].str.strip_chars(), rows[1:]
        if not len(rows):
            faults.add(kind, path, "empty")
            return None
        fits = pl.col("cells").list.len() == len(header)
        for line, cells in rows.filter(~fits).iter_rows():
            faults.add(kind, path, f"got {len(cells)} cells, takes {len(header)}", line)
        rows = rows.filter(fits)
        return cls(path, tuple(header), rows) if len(rows) else None

    def select(self, positions: Mapping[str, int]) -> pl.DataFrame:
        """`line` and the texts at `positions`, each under its name."""
        cells = pl.col("cells").list
        columns = {name: cells.get(n).str.strip_chars() for name, n in positions.items()}
        return self.rows.select("line", **columns)
