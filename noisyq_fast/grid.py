"""The grids: which integers are codes, and how a range becomes a scale.

With ``b`` bits, ``qmax = 2^(b-1) - 1``, ``n = 2^b - 1``, and ``low = min(x, 0)``,
``high = max(x, 0)`` over a group::

    grid      range            scale s             codes                      clips
    signed    max |x|          range / qmax        -qmax .. qmax              nothing
    full      max |x|          range / (n / 2)     -2^(b-1) .. 2^(b-1) - 1    the upper half step
    unsigned  high             high / n            0 .. n                     values below 0
    affine    low, high        (high - low) / n    0 .. n                     up to half a step
    odd       max |x|          range / n           -n, -n + 2 .. n            nothing

    z    = rint(-low / s) on affine, else 0        the zero point: the code of the value 0
    code = clamp(rint(x / s) + z, code_min, code_max)
    code = clamp(2 rint((x / s + n) / 2) - n, code_min, code_max)     on odd
    y    = (code - z) * s

Every division, sum, difference and product is rounded once, in float32, and s is at least the
smallest normal float32. ``rint`` rounds half to even.

*signed* is the grid of arXiv 2303.11803. Almost half of its codes are for values below 0, which the
output of a ReLU does not have: that uses 8 of the 15 codes at 4 bits, and 2 of 3 at 2 bits. On
*unsigned* it has all 16 and 4; b unsigned bits give the same values as b + 1 signed bits. *affine*
fits its codes to both ends of the range, such as that of a GELU. *odd* has no 0, but as many values
above it as below, for weights (Chen et al. 2021, AQD, arXiv 2007.06919); its 8-bit codes would not
fit into int8. Only the reference backend computes it.

A NaN or an infinity makes its group NaN on every grid, -inf on *unsigned* too. On *affine* so does
a range whose ``high - low`` overflows float32. A group of zeros stays zeros, except on *odd*, where
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
    """The integer codes of a quantizer, which times a scale are its values.

    Args:
        bits: width of the codes, 2..8; 2..7 on the odd grid.
        kind: ``"signed"``, ``"full"``, ``"unsigned"``, ``"affine"`` or ``"odd"``: see the table
            above.

    Raises:
        TypeError: ``bits`` is not an int.
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
        check_bits(self.bits, self.kind)

    @property
    def qmax(self) -> int:
        """2^(bits-1) - 1, from which the other limits follow."""
        return (1 << self.bits - 1) - 1

    @property
    def code_min(self) -> int:
        return {SIGNED: -self.qmax, FULL: -self.qmax - 1, ODD: -self.code_max}.get(self.kind, 0)

    @property
    def code_max(self) -> int:
        return self.qmax if self.kind in (SIGNED, FULL) else 2 * self.qmax + 1

    @property
    def code_step(self) -> int:
        """The distance between neighbouring codes."""
        return 2 if self.kind == ODD else 1

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8 if self.is_unsigned else torch.int8

    @property
    def divisor(self) -> float:
        """The range divided by this is the scale."""
        return {SIGNED: self.qmax, FULL: self.qmax + 0.5}.get(self.kind, 2 * self.qmax + 1)

    @property
    def is_affine(self) -> bool:
        """Whether there is a zero point and the range has two ends, low and high."""
        return self.kind == AFFINE

    @property
    def is_unsigned(self) -> bool:
        """Whether no code is negative."""
        return self.kind in (UNSIGNED, AFFINE)

    def __str__(self) -> str:
        return f"{self.bits} bits" if self.kind == SIGNED else f"{self.bits} bits, {self.kind}"


grid = cache(Grid)
"""`Grid`, cached."""


def check_kind(kind: object, name: str = "grid") -> None:
    if kind not in KINDS:
        raise ValueError(f"{name}: got {kind!r}, takes one of {', '.join(KINDS)}")


def check_bits(bits: object, kind: str = SIGNED, name: str = "bits") -> None:
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise TypeError(f"{name}: got {bits!r} ({type(bits).__name__}), takes an int")
    most = most_bits(kind)
    if not 2 <= bits <= most:
        which = " of an odd grid, whose codes are int8" if kind == ODD else ""
        raise ValueError(f"{name}: got {bits}, takes 2..{most}{which}")


def most_bits(kind: str) -> int:
    """The largest width whose codes fit into a byte."""
    return 7 if kind == ODD else 8


LARGEST_STEPS = {
    (g.bits, g.kind): max(-g.code_min, g.code_max)
    for kind in KINDS
    for g in (Grid(bits, kind) for bits in range(2, most_bits(kind) + 1))
}
"""An upper bound of ``|code - zero_point|``, by bits and kind."""
