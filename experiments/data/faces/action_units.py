"""The facial action units (AUs) of the study: how often each occurs, and together with which.

The occurrence rates are approximately those of BP4D's labelled frames (Zhang et al. 2014,
doi:10.1016/j.imavis.2014.06.002), whose subjects smile and talk a lot; that of AU 25 is our choice.
So are the loadings: a rough picture of which AUs occur together, fitted to nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

AUS = (1, 2, 4, 6, 7, 10, 12, 14, 15, 17, 23, 24)
"""The labelled AUs, in the order of the label columns: those of BP4D."""
DRAWN_AUS = (*AUS, 25)
"""AU 25 (lips part) is drawn but has no label: it changes the mouth as talking does."""

NAMES = {
    1: "inner brow raiser",
    2: "outer brow raiser",
    4: "brow lowerer",
    6: "cheek raiser",
    7: "lid tightener",
    10: "upper lip raiser",
    12: "lip corner puller",
    14: "dimpler",
    15: "lip corner depressor",
    17: "chin raiser",
    23: "lip tightener",
    24: "lip pressor",
    25: "lips part",
}
_RATES = {
    1: 0.21,
    2: 0.17,
    4: 0.20,
    6: 0.46,
    7: 0.55,
    10: 0.59,
    12: 0.56,
    14: 0.47,
    15: 0.17,
    17: 0.34,
    23: 0.17,
    24: 0.15,
    25: 0.35,
}
_EVENTS = {
    "smile": {6: 0.90, 7: 0.65, 10: 0.75, 12: 0.90, 14: 0.30, 24: -0.30, 25: 0.40},
    "surprise": {1: 0.85, 2: 0.90, 25: 0.20},
    "frown": {4: 0.75, 7: 0.40},
    "doubt": {14: 0.30, 15: 0.65, 17: 0.80, 23: 0.50, 24: 0.55, 25: -0.40},
    "strain": {23: 0.45, 24: 0.45},
}
"""How strongly each latent event moves each AU; an AU's own share makes its variance 1."""

RATES = torch.tensor([_RATES[au] for au in DRAWN_AUS])
"""Share of the frames in which each drawn AU occurs, `[13]`."""
LOADINGS = torch.tensor([[event.get(au, 0.0) for event in _EVENTS.values()] for au in DRAWN_AUS])
"""Loadings of the drawn AUs on the latent events, `[13, 5]`."""


def correlation() -> Tensor:
    """Correlation of the AUs' latent activations, `[13, 13]`: `L L'` with ones as its diagonal."""
    return (LOADINGS @ LOADINGS.T).fill_diagonal_(1.0)
