"""The grids: which whole numbers are codes, and how a range becomes a scale.

With ``b`` bits, ``qmax = 2^(b-1) - 1``, ``n = 2^b - 1``, and ``low = min(x, 0)``,
``high = max(x, 0)`` over a group::

    grid      range            scale s             codes                      clips
    signed    max |x|          range / qmax        -qmax .. qmax              nothing
    full      max |x|          range / (n / 2)     -2^(b-1) .. 2^(b-1) - 1    the upper half step
    unsigned  high             high / n            0 .. n                     what is below 0
    affine    low, high        (high - low) / n    0 .. n                     up to half a step
    odd       max |x|          range / n           -n, -n + 2 .. n            nothing

    z    = rint(-low / s) of affine, else 0        the code of the value 0
    code = clamp(rint(x / s) + z, code_min, code_max)
    code = clamp(2 rint((x / s + n) / 2) - n, code_min, code_max)     of odd
    y    = (code - z) * s

Every division, sum, difference and product is rounded once, in float32, and s is at least the
smallest normal float32. ``rint`` rounds half to even.

*signed* is that of arXiv 2303.11803. Half of its codes are for values below 0, of which the output
of a ReLU has none: that has 8 of the 15 codes at 4 bits, and two values at 2 bits. *unsigned* gives
it 16 and 4: there b bits are to the bit the numbers of b + 1 signed bits. *affine* spends its codes
on the range that there is, such as that of a GELU. *odd* has no 0, but as many values above it as
below, for weights (Chen et al. 2021, AQD, arXiv 2007.06919); of 8 bits its codes would not fit
into int8. It is computed by the reference alone.

A NaN or an infinity makes its group NaN on every grid, -inf on *unsigned* too. On *affine* so does
a range whose ``high - low`` overflows float32. A group of zeros stays zeros, but for *odd*, where
it becomes the smallest normal float32.
"""

from dataclasses import dataclass
from functools import cache

import torch

SIGNED = "signed"
FULL = "full"
UNSIGNED = "unsigned"
AFFINE = "affine"
ODD = "odd"
KINDS = (SIGNED, FULL, UNSIGNED, AFFINE, ODD)


@dataclass(frozen=True)
class Grid:
    """The values that ``bits`` bits can tell apart, in steps of a scale.

    Args:
        bits: width of the codes, 2..8.
        kind: ``"signed"``, ``"full"``, ``"unsigned"``, ``"affine"`` or ``"odd"``: see the table
            above.

    Raises:
        ValueError: bits out of range, or an unknown kind.

    Example:
        >>> import noisyq_fast
        >>> [(g.code_min, g.code_max) for g in (noisyq_fast.Grid(4), noisyq_fast.Grid(4, "full"))]
        [(-7, 7), (-8, 7)]
        >>> noisyq_fast.Grid(4, "affine")
        Grid(bits=4, kind='affine')
    """

    bits: int
    kind: str = SIGNED

    def __post_init__(self) -> None:
        check_kind(self.kind)
        most = 7 if self.kind == ODD else 8
        if not 2 <= self.bits <= most:
            which = " of an odd grid, whose codes are int8" if self.kind == ODD else ""
            raise ValueError(f"bits: got {self.bits}, takes 2..{most}{which}")

    @property
    def qmax(self) -> int:
        """2^(bits-1) - 1, from which all else follows."""
        return (1 << self.bits - 1) - 1

    @property
    def code_min(self) -> int:
        return {SIGNED: -self.qmax, FULL: -self.qmax - 1, ODD: -self.code_max}.get(self.kind, 0)

    @property
    def code_max(self) -> int:
        return self.qmax if self.kind in (SIGNED, FULL) else 2 * self.qmax + 1

    @property
    def code_step(self) -> int:
        """From one code to the next."""
        return 2 if self.kind == ODD else 1

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8 if self.is_unsigned else torch.int8

    @property
    def divisor(self) -> float:
        """How many steps the range has."""
        return {SIGNED: self.qmax, FULL: self.qmax + 0.5}.get(self.kind, 2 * self.qmax + 1)

    @property
    def is_affine(self) -> bool:
        """Whether there is a zero point, and a range has two ends."""
        return self.kind == AFFINE

    @property
    def is_unsigned(self) -> bool:
        """Whether no code is negative."""
        return self.kind in (UNSIGNED, AFFINE)

    def __str__(self) -> str:
        return f"{self.bits} bits" if self.kind == SIGNED else f"{self.bits} bits, {self.kind}"


grid = cache(Grid)
"""`Grid`, made once."""


def check_kind(kind: object, name: str = "grid") -> None:
    if kind not in KINDS:
        raise ValueError(f"{name}: got {kind!r}, takes one of {', '.join(KINDS)}")
