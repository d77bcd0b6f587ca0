"""The learning rate over a run, by the name that `--schedule` takes."""

import math
from collections.abc import Callable, Sequence

# The recipe of Keras's CIFAR-10 ResNet: after this many percent of the epochs, this factor.
_STEPS = ((90, 0.0005), (80, 0.001), (60, 0.01), (40, 0.1))


def steps(epoch: int, epochs: int) -> float:
    """Falls after 40, 60, 80 and 90 % of the epochs."""
    for percent, factor in _STEPS:
        if 100 * epoch >= percent * epochs:
            return factor
    return 1.0


def cosine(epoch: int, epochs: int) -> float:
    """`(1 + cos(pi epoch / epochs)) / 2` (Loshchilov & Hutter 2016, arXiv 1608.03983)."""
    return (1 + math.cos(math.pi * epoch / epochs)) / 2


def exponential(epoch: int, epochs: int) -> float:
    """Falls by 1 % an epoch."""
    return 0.99**epoch


def constant(epoch: int, epochs: int) -> float:
    """Stays as it is."""
    return 1.0


SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "steps": steps,
    "cosine": cosine,
    "exponential": exponential,
    "constant": constant,
}
"""The factor of the first learning rate in `epoch`, counted from 0, out of `epochs`."""


def phases(epochs: int, shares: Sequence[float]) -> list[int]:
    """The first epoch of each phase of a run; each has its share of the epochs, and at least one.

    Example:
        >>> phases(200, [30, 100, 70])
        [0, 30, 130]
        >>> phases(4, [30, 100, 70])
        [0, 1, 3]
    """
    starts: list[int] = []
    for number in range(len(shares)):
        start = round(epochs * sum(shares[:number]) / sum(shares))
        first = starts[-1] + 1 if starts else 0
        starts.append(min(max(start, first), epochs - len(shares) + number))
    return starts
