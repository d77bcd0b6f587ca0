"""How strongly each action unit is contracted in each frame."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.data.faces.action_units import DRAWN_AUS, LOADINGS, RATES
from experiments.data.faces.sequences import drift

THRESHOLD = 0.5
"""An action unit occurs where its intensity is above."""
_STEEPNESS = 4.0
_SUBJECT, _MOTION = 0.1, 0.6


def intensities(subjects: int, sequences: int, frames: int, generator: torch.Generator) -> Tensor:
    """Intensity 0..1 of each of `DRAWN_AUS`, `[subjects, sequences, frames, 13]`.

    A Gaussian copula: the activation `z = L e + sqrt(1 - |L|^2) s` of latent events `e` and an own
    part `s` is standard normal, and `sigmoid(4 (z - q))` is above 1/2 with probability `rate` for
    its quantile `q = icdf(1 - rate)`.
    """

    def moving(channels: int) -> Tensor:
        return drift(subjects, sequences, frames, channels, generator, _SUBJECT, _MOTION)

    own = (1 - LOADINGS.square().sum(1)).sqrt()
    events, parts = moving(LOADINGS.shape[1]), moving(len(DRAWN_AUS))
    activation = events @ LOADINGS.T + own * parts
    return (_STEEPNESS * (activation - torch.special.ndtri(1 - RATES))).sigmoid()
