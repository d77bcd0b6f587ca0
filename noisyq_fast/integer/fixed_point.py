"""Factors as integers: a multiplier and a right shift.

A factor f, one for each channel, becomes a multiplier M of up to 31 bits and a shift n::

    M = rint(f 2^n)        2^30 <= |M| < 2^31, n <= 62        so |M 2^-n - f| <= 2^-31 |f|
    B = rint(t 2^n)
    y = saturate(floor((v M + B + 2^(n-1)) / 2^n))

where v is an integer of up to 32 bits, t a term in units of y, and saturate clamps to int32. That
is ``v f + t`` rounded once, half up. A term so large that B would not fit into 62 bits makes n
smaller. Products and sums are int64, and nothing overflows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 2**31 - 1
_BITS = 31
_MOST_SHIFT = 62


@dataclass(frozen=True)
class FixedPoint:
    """``v f + t`` in integer arithmetic.

    Attributes:
        multiplier, shift, term: int64, in the shape of the factor: M, n and B.
    """

    multiplier: Tensor
    shift: Tensor
    term: Tensor

    @classmethod
    def of(cls, factor: Tensor, term: Tensor | None = None) -> FixedPoint:
        """From a factor and a term, float64. A ValueError names the one that is out of range."""
        term = torch.zeros_like(factor) if term is None else term
        if not bool((factor.isfinite() & term.isfinite()).all()):
            raise ValueError("got a factor or a term that is not finite")
        shift = (_BITS - _exponents(factor)).clamp(max=_MOST_SHIFT)
        shift = torch.where(factor == 0, 1, shift)
        shift = torch.minimum(shift, 61 - _exponents(term))
        if bool((shift < 1).any()):
            largest = max(float(factor.abs().max()), float(term.abs().max()))
            raise ValueError(f"got the factor or term {largest:.3g}, takes less than 2^30")
        multiplier, terms = (torch.ldexp(x, shift).round().long() for x in (factor, term))
        # A factor just below a power of two is rounded up to it.
        shift = torch.where(multiplier.abs() > LARGEST, shift - 1, shift)
        multiplier, terms = (torch.ldexp(x, shift).round().long() for x in (factor, term))
        return cls(multiplier, shift, terms)

    def along(self, axis: int, dimensions: int) -> FixedPoint:
        """Reshaped to broadcast along an axis of a tensor."""
        shape = [-1 if d == axis % dimensions else 1 for d in range(dimensions)]
        return FixedPoint(*(x.reshape(shape) for x in vars(self).values()))

    def __call__(self, v: Tensor) -> Tensor:
        half = torch.ones_like(self.shift) << (self.shift - 1)
        return saturated((v * self.multiplier + (self.term + half)) >> self.shift)


def saturated(v: Tensor) -> Tensor:
    return v.clamp(-LARGEST, LARGEST)


def _exponents(x: Tensor) -> Tensor:
    """The e with ``2^(e-1) <= |x| < 2^e``; a small one for 0."""
    return torch.where(x == 0, -_MOST_SHIFT, torch.frexp(x).exponent.long())
