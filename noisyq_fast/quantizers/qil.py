"""Quantization interval learning (Jung et al. 2018, arXiv 1808.05779)."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from noisyq_fast import rules
from noisyq_fast.grid import check_bits
from noisyq_fast.operators import checks
from noisyq_fast.quantizers.absmax import AbsMax
from noisyq_fast.quantizers.learned import LEAST, WEIGHT, LearnedQuantizer, quotient
from noisyq_fast.quantizers.moving_absmax import MovingAbsMax
from noisyq_fast.quantizers.quantizer import Quantizer


class QIL(LearnedQuantizer):
    """Learns an interval from c - d to c + d: values below it become 0, values above it 1, and
    values inside are mapped to 0 to 1. For weights this applies to the magnitude, with an exponent
    g, and the sign is kept.

    The outputs are not scaled back: weights lie in -1 to 1 and inputs in 0 to 1 whatever their size
    was, so a batch norm has to follow. The first and the last layers of a model use `AbsMax` and
    `MovingAbsMax` instead, because no batch norm follows the last; in the paper they are float
    (unverified).

    Initially c = d = max|x| / 2, so that nothing is pruned or clipped, and g = 1, as in popular
    implementations; the initial values of the paper are unverified. Pruned weights have no
    gradient: they return only when the interval moves.

    Args:
        bits: width of the codes, 2..8.
        exponent: whether g is learned; ``None``: with 2 bits only, as in the paper (unverified).
            If it is not learned, it is 1.

    Attributes:
        center, distance, exponent: the parameters c, d and, for weights, g.

    Example:
        >>> import torch, noisyq_fast
        >>> quantizer = noisyq_fast.QIL(bits=2)
        >>> quantizer(torch.tensor([0.0, 1.2, 3.0])).detach()
        tensor([0.0000, 0.3333, 1.0000])
    """

    KIND: ClassVar[int] = 7

    center: nn.Parameter
    distance: nn.Parameter
    exponent: nn.Parameter

    def __init__(self, bits: int = 4, *, exponent: bool | None = None) -> None:
        if exponent is not None:
            checks.boolean("exponent", exponent)
        self.learns_exponent = exponent
        super().__init__(bits)

    @property
    def rule(self) -> str:
        return rules.QIL_ODD if self.role == WEIGHT else rules.QIL

    @property
    def code_ends(self) -> tuple[int, int]:
        if self.role == WEIGHT:
            return 1 - (1 << self.bits - 1), (1 << self.bits - 1) - 1
        return 0, (1 << self.bits) - 1

    def initial(self, x: Tensor) -> tuple[Tensor, ...]:
        return self._of_largest(self.largest(x.abs()))

    def within(self, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        return self._of_largest(high)

    def _of_largest(self, largest: Tensor) -> tuple[Tensor, ...]:
        half = 0.5 * largest.clamp(min=LEAST)
        return (half, half, torch.ones_like(half))[: len(self.learned())]

    def constrain(self) -> None:
        """Enforces d > 0, c >= d (so that 0 stays 0), and g > 0."""
        self.distance.data.clamp_(min=LEAST)
        self.center.data.copy_(torch.maximum(self.center, self.distance))
        if self.role == WEIGHT:
            self.exponent.data.clamp_(min=0.05)

    def _allocate(self, shape: list[int]) -> None:
        super()._allocate(shape)
        self._set_learning()

    def at_end(self, bits: int, place: str) -> Quantizer:
        return AbsMax(bits) if place == "weight" else MovingAbsMax(bits)

    def set_bits(self, bits: int | None) -> None:
        """Changes the bits and keeps the interval; ``None`` is float."""
        if bits is not None:
            check_bits(bits)
            self.bits = bits
            self._set_learning()
        self.enabled = bits is not None

    def _set_learning(self) -> None:
        if self.role == WEIGHT:
            learns = self.bits == 2 if self.learns_exponent is None else self.learns_exponent
            self.exponent.requires_grad_(learns)

    def code_scale(self) -> Tensor:
        return quotient(torch.ones_like(self.center), float(self.code_ends[1]))

    def extra_repr(self) -> str:
        exponent = "" if self.learns_exponent is None else f", exponent={self.learns_exponent}"
        return f"{super().extra_repr()}{exponent}"
