"""Annotators who disagree about action units that are barely there."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from experiments.data.faces.action_units import AUS
from experiments.data.faces.expressions import THRESHOLD

_SPREADS = {
    1: 0.20,
    2: 0.20,
    4: 0.25,
    6: 0.20,
    7: 0.30,
    10: 0.25,
    12: 0.15,
    14: 0.40,
    15: 0.30,
    17: 0.30,
    23: 0.40,
    24: 0.30,
}
"""Our choice: the subtle AUs 14 and 23 are the hardest to agree on, the smile the easiest."""
SPREADS = torch.tensor([_SPREADS[au] for au in AUS])
"""Standard deviation of the annotators' thresholds, in intensity, `[12]`."""

_ANNOTATOR, _SEQUENCE, _FRAME = 0.3, 0.4, 0.3
"""Shares of its variance: an annotator's habit, a misjudged sequence, a hasty frame."""


def annotate(
    intensity: Tensor,
    annotator: Tensor,
    sequence: Tensor,
    disagreement: float,
    generator: torch.Generator,
) -> Tensor:
    """Labels 0 or 1 as annotators give them, int8 `[N, 12]`, from `intensity` `[N, 12]`.

    Each compares with a threshold `1/2 + disagreement * spread * noise` of their own. Frame `n` is
    coded by `annotator[n]`, and noise is shared within `sequence[n]`. 0 gives the truth.
    """

    def normal(count: int) -> Tensor:
        return torch.randn(count, len(AUS), generator=generator)

    noise = (
        math.sqrt(_ANNOTATOR) * normal(int(annotator.max()) + 1)[annotator]
        + math.sqrt(_SEQUENCE) * normal(int(sequence.max()) + 1)[sequence]
        + math.sqrt(_FRAME) * normal(len(intensity))
    )
    return (intensity > THRESHOLD + disagreement * SPREADS * noise).to(torch.int8)
