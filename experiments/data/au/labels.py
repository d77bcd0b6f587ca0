"""Labels of frames, out of the text of a table."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from experiments.data.au.faults import Faults

MALFORMED = "malformed labels"
BAD = "bad label"
REPEATED = "repeated frame"


def au_column(au: int) -> str:
    """Where an index has the labels of an AU."""
    return f"AU{au}"


def checked(
    texts: pl.DataFrame, accepted: Sequence[int], path: Path, faults: Faults
) -> pl.DataFrame:
    """`line`, `frame` Int64 and labels Int8, out of the same columns as text.

    A line whose frame is no number or whose labels are not all `accepted` is a fault and left out.
    So are all lines of a frame that has several, as nothing says which of them is right.
    """
    names = texts.columns[2:]
    numbers = texts.with_columns(pl.exclude("line").cast(pl.Int64, strict=False))

    counted = numbers["frame"].is_not_null()
    for line, frame in texts.filter(~counted).select("line", "frame").iter_rows():
        faults.add(MALFORMED, path, f"got the frame {frame!r}, takes a number", line)
    texts, numbers = texts.filter(counted), numbers.filter(counted)

    good = numbers.select(pl.col(names).is_in(accepted).fill_null(False))
    every = good.select(pl.all_horizontal(names)).to_series()
    for row, fits in zip(
        texts.filter(~every).iter_rows(named=True), good.filter(~every).iter_rows(), strict=True
    ):
        wrong = [f"{name} {row[name]!r}" for name, fit in zip(names, fits, strict=True) if not fit]
        faults.add(BAD, path, f"got {', '.join(wrong)}, takes {_listed(accepted)}", row["line"])

    first = pl.col("line").min().over("frame")
    again = numbers.filter(pl.col("line") > first).select("line", "frame")
    for line, frame in again.iter_rows():
        faults.add(REPEATED, path, f"frame {frame} is in another line too", line)

    kept = numbers.filter(every & ~numbers["frame"].is_duplicated())
    return kept.cast(dict.fromkeys(names, pl.Int8))


def _listed(accepted: Sequence[int]) -> str:
    *most, last = accepted
    return f"{', '.join(map(str, most))} or {last}"
