"""Label noise, by the name that `--noise-kind` takes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class NoisyLabels:
    """Labels with known noise."""

    true: Tensor
    given: Tensor
    redrawn: Tensor
    """Indices whose label was drawn anew, in ascending order."""

    @property
    def flipped(self) -> Tensor:
        """Where the given label is wrong; a re-drawn label can be right by chance."""
        return self.given != self.true


def symmetric(labels: Tensor, rate: float, num_classes: int, seed: int) -> NoisyLabels:
    """Re-draws exactly `round(rate * N)` labels uniformly over all classes.

    The true class can come up again, so the expected share of wrong labels is
    `rate * (1 - 1 / num_classes)`. For one seed, a higher rate adds to the noise of a lower one.
    """
    generator = torch.Generator().manual_seed(seed)
    count = round(rate * len(labels))
    redrawn = torch.randperm(len(labels), generator=generator)[:count]
    given = labels.clone()
    given[redrawn] = torch.randint(num_classes, (count,), generator=generator)
    return NoisyLabels(true=labels, given=given, redrawn=redrawn.sort().values)


NOISE_KINDS: dict[str, Callable[[Tensor, float, int, int], NoisyLabels]] = {"symmetric": symmetric}
