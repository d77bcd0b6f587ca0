"""The quantizers of AQD (Chen et al. 2020, arXiv 2007.06919)."""

from typing import ClassVar

import torch
from torch import Tensor

from noisyq_fast import rules
from noisyq_fast.grid import ODD, UNSIGNED
from noisyq_fast.quantizers.learned import LearnedQuantizer, quotient


class AQD(LearnedQuantizer):
    """Learns where values are clipped. Inputs are rounded to ``n = 2^b - 1`` steps from 0 to a;
    weights to ``2^b`` levels from -a to a, for each output channel: ``y = a (2 r / n - 1)`` with
    ``r = rint(n (clip(w / a, -1, 1) + 1) / 2)``. These have no 0, so that weights that are pruned
    are not 0. An input with values below 0 is rounded like weights.

    The levels a begin at the largest ``|x|``; the authors' code takes its running mean over the
    first steps.

    Args:
        bits: width of the codes, 2..8.
        axis: of weights; a level for each of its indices, the output channels; ``None``: one.
        signed: as for `LearnedQuantizer`.

    Attributes:
        clip: the parameter a.

    Example:
        >>> import torch, noisyq_fast
        >>> quantizer = noisyq_fast.AQD(bits=2, axis=None, signed=True)
        >>> quantizer(torch.tensor([3.0, 0.4, -1.7])).detach()
        tensor([ 3.,  1., -1.])
    """

    KIND: ClassVar[int] = 6

    def __init__(self, bits: int = 4, axis: int | None = 0, *, signed: bool | None = None) -> None:
        super().__init__(bits, axis, signed=signed)

    @property
    def rule(self) -> str:
        return rules.AQD_ODD if self.is_signed else rules.AQD

    @property
    def code_ends(self) -> tuple[int, int]:
        n = (1 << self.bits) - 1
        return -n if self.is_signed else 0, n

    def initial(self, x: Tensor) -> tuple[Tensor]:
        return (self.largest(x.abs()),)

    def within(self, low: Tensor, high: Tensor) -> tuple[Tensor]:
        return (high,)

    @property
    def grid_of_codes(self) -> str:
        return ODD if self.is_signed else UNSIGNED

    def scale_of(self, weight: Tensor) -> Tensor:
        """What the codes of a weight are multiplied by."""
        self.prepare(weight)
        return self.code_scale()

    def code_scale(self) -> Tensor:
        clip = self.clip.detach().float()
        return quotient(clip, float(self.code_ends[1])).clamp(min=torch.finfo(torch.float32).tiny)
