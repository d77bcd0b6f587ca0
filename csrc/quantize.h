// The arithmetic of the quantizer, one value at a time. This file is the only place where it is
// written in C++, for the host and for CUDA; `noisyq_fast/backends/reference.py` says the same in
// PyTorch, and every backend equals it to the last bit.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define NOISYQ_INLINE __host__ __device__ __forceinline__
#else
#define NOISYQ_INLINE inline __attribute__((always_inline))
#endif

namespace noisyq {

// s = absmax / qmax, never below the smallest normal number, so that x / s cannot overflow
// for a subnormal absmax. A NaN stays NaN: it compares false.
NOISYQ_INLINE float scale_of(float absmax, float qmax) {
  const float scale = absmax / qmax;
  return scale < FLT_MIN ? FLT_MIN : scale;
}

// rint(x / s), half to even, before it is clamped. A NaN stays NaN.
NOISYQ_INLINE float rounded_of(float x, float scale) {
#ifdef __CUDA_ARCH__
  // A division is most of what a GPU computes here. For |x / s| <= 256, x times a 1 / s that may be
  // an ulp off is less than 2^-12 away from it, also where 1 / s is subnormal. So both round alike,
  // unless that is close to a tie. What is larger is clamped either way; NaN, and inf - inf, compare
  // false.
  float reciprocal;
  asm("rcp.approx.f32 %0, %1;" : "=f"(reciprocal) : "f"(scale));
  const float nearly = x * reciprocal;
  const float rounded = rintf(nearly);
  if (fabsf(nearly - rounded) < 0.5f - 0x1p-12f) return rounded;
#endif
  return rintf(x / scale);
}

NOISYQ_INLINE float clamp_to(float rounded, float qmax) {
  const float low = rounded < -qmax ? -qmax : rounded;
  return low > qmax ? qmax : low;
}

// The straight-through estimator with clipping passes no gradient here.
NOISYQ_INLINE bool is_clipped(float rounded, float qmax) { return fabsf(rounded) > qmax; }

// y = code * s. An infinite scale gives 0 * inf = NaN: a group that holds an inf is NaN throughout.
NOISYQ_INLINE float fake_quantize(float x, float scale, float qmax) {
  return clamp_to(rounded_of(x, scale), qmax) * scale;
}

// The integer code; a NaN has code 0 (its scale is not finite, which keeps it visible).
NOISYQ_INLINE int8_t code_of(float x, float scale, float qmax) {
  const float rounded = rounded_of(x, scale);
  return rounded == rounded ? static_cast<int8_t>(clamp_to(rounded, qmax)) : int8_t{0};
}

// One step of a moving average. NaN means "nothing seen yet": the first absmax sets it.
NOISYQ_INLINE float averaged(float average, float absmax, float averaging_constant) {
  return average == average ? average + averaging_constant * (absmax - average) : absmax;
}

// Otherwise the batch leaves the average as it was.
NOISYQ_INLINE bool is_observation(float absmax) { return absmax <= FLT_MAX; }

}  // namespace noisyq
