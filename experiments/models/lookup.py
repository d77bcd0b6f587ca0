"""Convolutions by lookups in a dictionary (LCNN, Bagherinezhad et al. 2016, arXiv 1611.06473)."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Thresholded(nn.Module):
    """``P`` without its small entries: those with ``|p| <= threshold``, which stay 0 for ever.

    Entries go in training. What has gone is remembered, so that neither the momentum of the
    optimizer nor a decay that moves the entry below brings it back.
    """

    kept: Tensor

    def __init__(self, shape: torch.Size, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.register_buffer("kept", torch.ones(shape, dtype=torch.bool))

    def forward(self, p: Tensor) -> Tensor:
        kept = self.kept
        if self.training:
            kept = kept & (p.detach().abs() > self.threshold)
            self.kept.copy_(kept)
        return p * kept


class LookupConv2d(nn.Sequential):
    """A convolution whose filters combine the vectors of a dictionary::

        W[o, i, y, x] = sum_d P[o, d, y, x] D[d, i]

    computed as a 1x1 convolution with D, which has the padding, and one with P. P is sparse
    (`Thresholded`): an entry that is kept is a lookup.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, bias: as for `torch.nn.Conv2d`.
        vectors: how many the dictionary has.
        sparsity: the share of P that is 0 at the start: ``threshold = sparsity / sqrt(fan_in)`` of
            P, whose entries are drawn evenly between ``1 / sqrt(fan_in)`` below and above 0.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        bias: bool = True,
        *,
        vectors: int,
        sparsity: float = 0.01,
    ) -> None:
        super().__init__()
        self.dictionary = nn.Conv2d(in_channels, vectors, 1, padding=padding, bias=False)
        self.combination = nn.Conv2d(vectors, out_channels, kernel_size, stride, bias=bias)
        p = self.combination.weight
        thresholded = Thresholded(p.shape, sparsity / math.sqrt(p[0].numel()))
        parametrize.register_parametrization(self.combination, "weight", thresholded)

    @property
    def _parametrization(self) -> Any:
        parametrizations: Any = self.combination.parametrizations
        return parametrizations.weight

    @property
    def thresholded(self) -> Thresholded:
        return self._parametrization[0]

    @property
    def entries(self) -> nn.Parameter:
        """P as it is trained, with the entries that have gone."""
        return self._parametrization.original

    def lookups(self) -> int:
        """How many entries of P are kept, by all filters together."""
        return int(self.thresholded.kept.sum())

    def threshold_penalty(self) -> Tensor:
        """``threshold * sum |p|`` over the entries kept, whose gradient draws them to 0."""
        kept = self.thresholded(self.entries)
        return self.thresholded.threshold * kept.abs().sum()
