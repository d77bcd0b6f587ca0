"""How to train where nothing is said: what suits a data set and its network."""

import dataclasses
from dataclasses import dataclass

from experiments.data.au import AU_DATASETS


@dataclass(frozen=True)
class Recipe:
    """Defaults of a run."""

    epochs: int
    batch_size: int
    lr: float
    schedule: str
    noise: float
    weight_decay: float = 0.0
    """Decoupled, of every method that has none of its own; falls with the learning rate."""
    validation: float = 0.0
    selects_epoch: bool = False
    """The best epoch on held-out samples is kept, whatever the method."""
    threads: int | None = None
    """None stands for PyTorch's choice."""


_CLASSIFICATION = Recipe(epochs=200, batch_size=128, lr=1e-3, schedule="steps", noise=0.4)
# Tallec et al. 2023, arXiv 2303.11803, section 4.2, for InceptionV3.
_ACTION_UNITS = Recipe(
    epochs=10,
    batch_size=64,
    lr=1e-4,
    schedule="exponential",
    noise=1.0,
    weight_decay=1e-4,
    validation=0.2,
    selects_epoch=True,
)


def recipe(dataset: str, encoder: str | None) -> Recipe:
    """The recipe of a data set and, of faces, the encoder."""
    if dataset not in AU_DATASETS:
        # The digits are too small to gain much from threads, and busy cores cost a lot.
        return dataclasses.replace(_CLASSIFICATION, threads=1 if dataset == "digits" else None)
    if encoder == "small":  # starts from nothing
        return dataclasses.replace(_ACTION_UNITS, epochs=20, lr=1e-3, schedule="cosine")
    return _ACTION_UNITS
