// exp, ln and tanh from sums, products and quotients that are each rounded once: the same bits as
// noisyq_fast/backends/reference/elementary.py.
#pragma once

#include "dtypes.h"

namespace noisyq {

// 1.5 * 2^23: float32 numbers of this size are integers, so adding it rounds, half to even.
constexpr float kRounder = 12582912.0f;
// ln 2 in two parts; the first times a small integer is exact.
constexpr float kLn2High = 0.693359375f;
constexpr float kLn2Low = -2.12194440e-4f;

// e^x = power * (1 + rest), where power is a power of 2.
struct ExpParts {
  float power;
  float rest;
};

NOISYQ_INLINE ExpParts exp_parts(float x) {
  const float shifted = x * 1.44269504f + kRounder;
  const float k = shifted - kRounder;
  const float r = (x - k * kLn2High) - k * kLn2Low;
  const float series =
      ((((r * 1.98412698e-4f + 1.38888889e-3f) * r + 8.33333333e-3f) * r + 4.16666667e-2f) * r +
       1.66666667e-1f) *
          r +
      0.5f;
  const float rest = r * r * series + r;
  return {bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u), rest};
}

NOISYQ_INLINE float exp_of(float x) {
  const float raised = x < -87.0f ? -87.0f : x;
  const ExpParts e = exp_parts(raised > 88.0f ? 88.0f : raised);
  return e.power * e.rest + e.power;
}

// (e^2|x| - 1) / (e^2|x| + 1); from 10 on it is 1.
NOISYQ_INLINE float tanh_of(float x) {
  const float size = fabsf(x);
  const ExpParts e = exp_parts(2.0f * (size > 10.0f ? 10.0f : size));
  const float expm1 = e.power * e.rest + (e.power - 1.0f);
  const float t = expm1 / (expm1 + 2.0f);
  return x < 0.0f ? -t : t;
}

// ln x for normal numbers above 0; NaN stays NaN.
NOISYQ_INLINE float log_of(float x) {
  const int32_t bits = bit_cast<int32_t>(x);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;
  const float f =
      bit_cast<float>(bits - static_cast<int32_t>(static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  const float s = f / (f + 2.0f);
  const float z = s * s;
  const float series = z * (z * (z * (z * 0.22222222f + 0.28571429f) + 0.4f) + 0.66666667f);
  const float e = static_cast<float>(exponent);
  const float ln = e * kLn2High + (e * kLn2Low + (s * series + 2.0f * s));
  return x == x ? ln : x;
}

}  // namespace noisyq
