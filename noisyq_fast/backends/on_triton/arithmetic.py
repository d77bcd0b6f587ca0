"""The arithmetic of one value in Triton, with the functions of ``csrc/quantize.h``.

Kernels that use it are launched with ``enable_fp_fusion=False``: a fused multiply-add rounds once
where the specification rounds twice.
"""

import triton
import triton.language as tl

from noisyq_fast import grid
from noisyq_fast.backends.reference import masks

SIGNED = tl.constexpr(grid.SIGNED)
FULL = tl.constexpr(grid.FULL)
UNSIGNED = tl.constexpr(grid.UNSIGNED)
AFFINE = tl.constexpr(grid.AFFINE)
NEGATIVE = tl.constexpr(masks.NEGATIVE)
FLT_MIN = tl.constexpr(2.0**-126)
INFINITY = tl.constexpr(float("inf"))
# 1.5 * 2^23: float32 numbers of this size are integers, so adding it rounds, half to even.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def to_float(x):
    # bfloat16 is converted by its bits, here and below: Triton's interpreter truncates.
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def from_float(x, dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # A GPU's NaN has all mantissa bits set, which the addition would carry into the sign.
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def high_key(x, KIND: tl.constexpr):
    """An integer key for each value; the maximum key gives the range of a group, or its high end
    (`ends_of`). Keys order like the values, with NaN above inf."""
    key = to_float(x).to(tl.int32, bitcast=True)
    if KIND == UNSIGNED:
        # Negative values do not count, but -inf and a negative NaN make the range NaN.
        key = tl.where(key.to(tl.uint32, bitcast=True) >= 0xFF800000, 0x7FC00000, key)
    elif KIND != AFFINE:
        key &= 0x7FFFFFFF
    return key


@triton.jit
def low_key(x):
    """The key of -x, for the low end of an affine grid."""
    return to_float(x).to(tl.int32, bitcast=True) ^ -0x80000000


@triton.jit
def ends_of(low_keys, high_keys, KIND: tl.constexpr):
    """The low and the high end of the range with these largest keys. For grids that are not affine
    the high end is the range. It is NaN if the low end is not finite."""
    high = tl.maximum(high_keys, 0).to(tl.float32, bitcast=True)
    low = high
    if KIND == AFFINE:
        low = -tl.maximum(low_keys, 0).to(tl.float32, bitcast=True)
        high = tl.where(low > -INFINITY, high, float("nan"))
    return low, high


@triton.jit
def rounded_of(quotient):
    """Rounds half to even. Values too large for this method are clamped anyway; NaN stays NaN."""
    return (quotient + ROUNDER) - ROUNDER


@triton.jit
def scale_of(range_, divisor):
    scale = tl.div_rn(range_, divisor)
    return tl.where(scale < FLT_MIN, FLT_MIN, scale)


@triton.jit
def levels_of(low, high, qmax, KIND: tl.constexpr):
    """The scale of a range, and the code of 0, as a float."""
    if KIND == AFFINE:
        low = tl.where(low > 0.0, 0.0, low)
        scale = scale_of(tl.where(high < 0.0, 0.0, high) - low, 2 * qmax + 1)
        zero = rounded_of(tl.div_rn(-low, scale))
        zero = tl.where(zero == zero, zero, 0.0)
    else:
        if KIND == UNSIGNED:
            scale = scale_of(high, 2 * qmax + 1)
        elif KIND == FULL:
            scale = scale_of(high, qmax + 0.5)
        else:
            scale = scale_of(high, qmax)
        zero = tl.zeros_like(scale)
    return scale, zero


@triton.jit
def code_ends(zero, qmax, KIND: tl.constexpr):
    """The smallest and the largest code minus the zero point."""
    if KIND == AFFINE:
        low, high = -zero, 2 * qmax + 1 - zero
    elif KIND == UNSIGNED:
        low, high = 0.0, 2 * qmax + 1
    elif KIND == FULL:
        low, high = -qmax - 1, qmax
    else:
        low, high = -qmax, qmax
    return low, high


@triton.jit
def quantized(rounded, scale, zero, qmax, KIND: tl.constexpr, dtype: tl.constexpr):
    """The value, or the code if the dtype is one of codes."""
    low, high = code_ends(zero, qmax, KIND)
    steps = tl.clamp(rounded, low, high, propagate_nan=tl.PropagateNan.ALL)
    if (dtype == tl.int8) or (dtype == tl.uint8):
        return tl.where(steps == steps, steps + zero, 0.0).to(tl.int32).to(dtype)
    return from_float(steps * scale, dtype)


@triton.jit
def is_masked(x, rounded, zero, qmax, KIND: tl.constexpr, MASKED: tl.constexpr):
    """Whether an element has no gradient."""
    if MASKED == NEGATIVE:
        masked = x < 0.0
    else:
        low, high = code_ends(zero, qmax, KIND)
        masked = (rounded < low) | (rounded > high)
        if KIND == UNSIGNED:
            masked |= x < 0.0
    return masked


@triton.jit
def averaged(average, batch, averaging_constant):
    moved = average + averaging_constant * (batch - average)
    return tl.where(average == average, moved, batch)


@triton.jit
def is_observation(width):
    return width < INFINITY
