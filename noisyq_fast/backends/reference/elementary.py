"""exp, ln and tanh of float32 tensors from sums, products and quotients that are each rounded once,
so that other backends can compute the same bits (in C++: ``csrc/elementary.h``).

Their error is a few units in the last place.
"""

import torch
from torch import Tensor

# 1.5 * 2^23: float32 numbers of this size are integers, so adding it rounds, half to even.
_ROUNDER = 12582912.0
_LOG2_E = 1.44269504
# ln 2 in two parts; the first times a small integer is exact.
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_ONE = 0x3F800000
_SQRT_HALF = 0x3F3504F3


def exp(x: Tensor) -> Tensor:
    power, rest = _exp_parts(x.clamp(-87.0, 88.0))
    return power * rest + power


def tanh(x: Tensor) -> Tensor:
    # (e^2|x| - 1) / (e^2|x| + 1); from 10 on it is 1.
    power, rest = _exp_parts(2.0 * x.abs().clamp(max=10.0))
    expm1 = power * rest + (power - 1.0)
    t = expm1 / (expm1 + 2.0)
    return torch.where(x < 0, -t, t)


def log(x: Tensor) -> Tensor:
    """ln x for normal numbers above 0; NaN stays NaN."""
    bits = x.contiguous().view(torch.int32)
    exponent = (bits - _SQRT_HALF) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    s = f / (f + 2.0)
    z = s * s
    series = z * (z * (z * (z * 0.22222222 + 0.28571429) + 0.4) + 0.66666667)
    e = exponent.float()
    ln = e * _LN2_HIGH + (e * _LN2_LOW + (s * series + 2.0 * s))
    return torch.where(x == x, ln, x)


def _exp_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """``power`` and ``rest`` with e^x = power * (1 + rest) and power a power of 2."""
    shifted = x * _LOG2_E + _ROUNDER
    k = shifted - _ROUNDER
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    series = (
        (((r * 1.98412698e-4 + 1.38888889e-3) * r + 8.33333333e-3) * r + 4.16666667e-2) * r
        + 1.66666667e-1
    ) * r + 0.5
    rest = r * r * series + r
    power = ((shifted.contiguous().view(torch.int32) << 23) + _ONE).view(torch.float32)
    return power, rest
