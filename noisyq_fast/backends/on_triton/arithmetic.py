"""The arithmetic of one value in Triton, function by function that of ``csrc/quantize.h``.

Kernels that use it are launched with ``enable_fp_fusion=False``: a fused multiply-add rounds once
where the specification rounds twice.
"""

import triton
import triton.language as tl

FLT_MIN = tl.constexpr(2.0**-126)
INFINITY = tl.constexpr(float("inf"))
# 1.5 * 2^23: float32 numbers of this size are integers, so adding it rounds, half to even.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def to_float(x):
    # bfloat16 by its bits, here and below: Triton's interpreter truncates in its own conversions.
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
def magnitude(x):
    """The bits without the sign: they order like absolute values, and NaN is above inf."""
    return to_float(x).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(absmax, qmax):
    scale = tl.div_rn(absmax, qmax)
    return tl.where(scale < FLT_MIN, FLT_MIN, scale)


@triton.jit
def _code(quotient, qmax):
    """Clamps before it rounds, which is the same for an integer qmax. A NaN stays NaN."""
    clamped = tl.clamp(quotient, -qmax, qmax, propagate_nan=tl.PropagateNan.ALL)
    return (clamped + ROUNDER) - ROUNDER


@triton.jit
def quantized(quotient, scale, qmax, dtype: tl.constexpr):
    code = _code(quotient, qmax)
    if dtype == tl.int8:
        return tl.where(code == code, code, 0.0).to(tl.int8)
    return from_float(code * scale, dtype)


@triton.jit
def is_clipped(quotient, qmax):
    """From halfway to qmax + 1 on: qmax is odd, so that the half rounds up to even."""
    return tl.abs(quotient) >= qmax + 0.5


@triton.jit
def averaged(average, absmax, averaging_constant):
    moved = average + averaging_constant * (absmax - average)
    return tl.where(average == average, moved, absmax)


@triton.jit
def is_observation(absmax):
    return absmax < INFINITY
