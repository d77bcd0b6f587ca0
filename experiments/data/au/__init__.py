"""Faces labelled with facial action units (AUs), by the name that `--dataset` takes."""

from __future__ import annotations

import functools
from pathlib import Path

from experiments.data.au import synthetic
from experiments.data.au.frames import UNKNOWN, Frames

__all__ = ["AU_DATASETS", "SYNTHETIC", "UNKNOWN", "Frames", "draw", "load"]

SYNTHETIC = "synthetic-au"
AU_DATASETS = (SYNTHETIC, "bp4d", "disfa")


@functools.lru_cache(maxsize=2)
def load(
    name: str, data_dir: Path | None, image_size: int, strict: bool, cache_dir: Path | None
) -> Frames:
    """Reads the data set `name`, once in a process that prepares many runs."""
    from experiments.data.au import bp4d, disfa  # take a while to import

    return {"bp4d": bp4d, "disfa": disfa}[name].load(data_dir, image_size, strict, cache_dir)


draw = functools.lru_cache(maxsize=2)(synthetic.draw)
