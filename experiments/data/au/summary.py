"""A few lines about the frames of a data set."""

import polars as pl

from experiments.data.au.frames import UNKNOWN
from experiments.data.au.labels import au_column
from experiments.data.au.release import Release


def summary(release: Release, frames: pl.DataFrame) -> str:
    """How much there is of what, from an index."""
    sequences = frames.select("subject", "sequence").n_unique()
    parts = [frames["subject"].is_in(part).sum() for part in release.parts]
    aligned = frames["side"].is_not_null().sum()
    given = frames.select(au_column(au) for au in release.aus)
    rows = {
        "AU": release.aus,
        "positive": given.select((pl.all() == 1).sum()).row(0),
        "unknown": given.select((pl.all() == UNKNOWN).sum()).row(0),
    }
    return "\n".join(
        [
            f"{release.name}: {frames['subject'].n_unique()} subjects, {sequences} sequences, "
            f"{len(frames):,} frames ({' + '.join(f'{count:,}' for count in parts)} in the parts), "
            f"{aligned:,} of them with landmarks",
            *(f"{name:8}" + "".join(f"{n:8,}" for n in row) for name, row in rows.items()),
        ]
    )
