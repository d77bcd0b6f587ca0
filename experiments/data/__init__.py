"""Data sets, by the name that `--dataset` takes."""

from collections.abc import Callable
from pathlib import Path

from experiments.data import cifar10, digits
from experiments.data.dataset import Dataset

__all__ = ["DATASETS", "Dataset", "load"]

DATASETS: dict[str, Callable[[Path | None, bool], Dataset]] = {
    "digits": digits.load,
    "cifar10": cifar10.load,
}


def load(name: str, data_dir: Path | None = None, download: bool = False) -> Dataset:
    """Reads the data set `name` from `data_dir`, after fetching it if it is missing and may be."""
    return DATASETS[name](data_dir, download)
