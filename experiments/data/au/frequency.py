"""Weights of action units by how often they occur."""

import torch
from torch import Tensor

from experiments.data.au.frames import UNKNOWN


def frequency_weights(given: Tensor) -> Tensor:
    """`w_t = T (1 / f_t) / sum_u (1 / f_u)`, float32 `[T]`, of labels int8 `[N, T]`.

    `f_t` is the share of positives among the known labels of AU `t`. Where there is none it is
    that of one half positive, so that the weight stays finite.
    """
    known = (given != UNKNOWN).sum(0).clamp(min=1)
    positive = (given == 1).sum(0).double().clamp(min=0.5)
    inverse = known / positive
    return (len(inverse) * inverse / inverse.sum()).to(torch.float32)
