"""Label noise, by the name that `--noise-kind` takes.

For one seed, each kind's noise at a higher rate adds to its noise at a lower one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.data.dataset import Dataset


@dataclass(frozen=True, eq=False)
class NoisyLabels:
    """Labels with known noise."""

    true: Tensor
    given: Tensor
    redrawn: Tensor
    """Indices whose label the noise has set, in ascending order."""

    @property
    def flipped(self) -> Tensor:
        """Where the given label is wrong; a re-drawn label can be right by chance."""
        return self.given != self.true

    def of(self, samples: Tensor) -> NoisyLabels:
        """The labels of these samples only, in their order."""
        is_redrawn = torch.zeros_like(self.true, dtype=torch.bool)
        is_redrawn[self.redrawn] = True
        return NoisyLabels(
            self.true[samples], self.given[samples], is_redrawn[samples].nonzero().flatten()
        )


NoiseKind = Callable[[Dataset, float, int], NoisyLabels]
"""Takes a data set, a rate from 0 to 1 and a seed."""


def symmetric(dataset: Dataset, rate: float, seed: int) -> NoisyLabels:
    """Re-draws exactly `round(rate * N)` labels uniformly over all `C` classes.

    The true class can come up again, so the expected share of wrong labels is
    `rate * (1 - 1 / C)`. Source: Tallec et al. 2023, arXiv 2303.11803.
    """
    generator = torch.Generator().manual_seed(seed)
    redrawn = _choose(_all(dataset), rate, generator)
    labels = torch.randint(len(dataset.class_names), (len(redrawn),), generator=generator)
    return _replaced(dataset.train_labels, redrawn, labels)


def symmetric_exclusive(dataset: Dataset, rate: float, seed: int) -> NoisyLabels:
    """Makes exactly `round(rate * N)` labels wrong, uniformly over the other `C - 1` classes.

    The share of wrong labels is `rate`. Source: "symmetry flipping" of Han et al. 2018,
    Co-teaching, arXiv 1804.06872, which draws the number of them as well.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = len(dataset.class_names)
    redrawn = _choose(_all(dataset), rate, generator)
    steps = torch.randint(1, classes, (len(redrawn),), generator=generator)
    labels = (dataset.train_labels[redrawn] + steps) % classes
    return _replaced(dataset.train_labels, redrawn, labels)


def pair(dataset: Dataset, rate: float, seed: int) -> NoisyLabels:
    """Moves exactly `round(rate * N)` labels `i` to the next class, `(i + 1) mod C`.

    The share of wrong labels is `rate`. Source: "pair flipping" of Han et al. 2018,
    Co-teaching, arXiv 1804.06872.
    """
    generator = torch.Generator().manual_seed(seed)
    redrawn = _choose(_all(dataset), rate, generator)
    labels = (dataset.train_labels[redrawn] + 1) % len(dataset.class_names)
    return _replaced(dataset.train_labels, redrawn, labels)


def asymmetric(dataset: Dataset, rate: float, seed: int) -> NoisyLabels:
    """Takes exactly `round(rate * n)` of a class's `n` labels to the class it looks like.

    Only the classes in `dataset.asymmetric_flips` change, so the share of wrong labels is `rate`
    times theirs of all labels: half of `rate` for CIFAR-10. Source: Patrini et al. 2017, "Making
    Deep Neural Networks Robust to Label Noise: a Loss Correction Approach", arXiv 1609.03683.
    """
    flips = dataset.asymmetric_flips
    if not flips:
        raise ValueError(
            f"asymmetric noise: got {dataset.name}, takes a data set with asymmetric_flips"
        )
    generator = torch.Generator().manual_seed(seed)
    true = dataset.train_labels
    chosen = {
        source: _choose((true == source).nonzero().flatten(), rate, generator)
        for source in sorted(flips)
    }
    labels = [torch.full_like(indices, flips[source]) for source, indices in chosen.items()]
    return _replaced(true, torch.cat(list(chosen.values())), torch.cat(labels))


_INSTANCE_SPREAD = 0.1


def instance(dataset: Dataset, rate: float, seed: int) -> NoisyLabels:
    """Flips each label at a rate of its own, to a class that its image makes likely.

    An image `x` of class `y` keeps its label with probability `1 - q`, and else gets the wrong
    class `j` with probability `softmax(x W_y)_j`, taken over the classes other than `y`:

        q ~ Normal(rate, 0.1^2) truncated to [0, 1],   W_y ~ Normal(0, 1) of shape [S, C]

    Source: Xia et al. 2020, "Part-dependent Label Noise", arXiv 2006.07836, algorithm 2. It
    leaves the scaling of `x` open. Here it is the `S` values of an image less their mean, divided
    by their norm, so that the scores `x W_y` are standard normal. Plain values in [0, 1] are so
    long that the softmax would give nearly all weight to one class, and it would hang on the
    brightness.

    The expected share of wrong labels is the mean of `q`: 0.205 for a rate of 0.2, `rate` from
    0.3 to 0.7, and no more than 0.92. For a rate near 0 it would be 0.08, but 0 itself stands for
    no noise.
    """
    # No draw depends on the rate, and q grows with it.
    generator = torch.Generator().manual_seed(seed)
    true, classes = dataset.train_labels, len(dataset.class_names)
    rank, luck, choice = torch.rand(3, len(true), dtype=torch.float64, generator=generator)
    flipped = luck < _truncated_normal(rank, rate, _INSTANCE_SPREAD)
    if rate == 0:
        flipped = torch.zeros_like(flipped)
    pixels = dataset.train_images[0].numel()
    given = true.clone()
    for source in range(classes):
        projection = torch.randn(pixels, classes, dtype=torch.float64, generator=generator)
        # A thousand at a time, as float64 images take eight times the memory.
        for indices in (flipped & (true == source)).nonzero().flatten().split(1000):
            images = dataset.train_images[indices].flatten(1).double()
            scores = F.normalize(images - images.mean(1, keepdim=True)) @ projection
            scores[:, source] = -torch.inf
            given[indices] = _sample(scores.softmax(1), choice[indices])
    return NoisyLabels(true=true, given=given, redrawn=flipped.nonzero().flatten())


NOISE_KINDS: dict[str, NoiseKind] = {
    "symmetric": symmetric,
    "symmetric_exclusive": symmetric_exclusive,
    "asymmetric": asymmetric,
    "pair": pair,
    "instance": instance,
}


def _all(dataset: Dataset) -> Tensor:
    return torch.arange(len(dataset.train_labels))


def _choose(indices: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """`round(rate * len(indices))` of them at random, those of a lower rate first."""
    order = torch.randperm(len(indices), generator=generator)
    return indices[order[: round(rate * len(indices))]]


def _replaced(true: Tensor, redrawn: Tensor, labels: Tensor) -> NoisyLabels:
    given = true.clone()
    given[redrawn] = labels
    return NoisyLabels(true=true, given=given, redrawn=redrawn.sort().values)


def _truncated_normal(rank: Tensor, mean: float, std: float) -> Tensor:
    """The quantiles at `rank` of `Normal(mean, std^2)` truncated to [0, 1]."""
    bounds = (torch.tensor([0.0, 1.0], dtype=torch.float64) - mean) / std
    low, high = torch.special.ndtr(bounds)
    # Far out in a tail, rounding could leave the interval.
    return (mean + std * torch.special.ndtri(torch.lerp(low, high, rank))).clamp(0, 1)


def _sample(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """One class a row: the first whose cumulative probability exceeds that row's `uniform`."""
    cumulative = probabilities.cumsum(1)
    cumulative = cumulative / cumulative[:, -1:]  # so that the last exceeds every number below 1
    return (cumulative <= uniform[:, None]).sum(1)
