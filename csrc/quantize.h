// The arithmetic of the quantizer, one value at a time: the only C++ implementation, for the host
// and for CUDA. `noisyq_fast/backends/reference/levels.py` is the same in PyTorch, and every
// backend equals it to the last bit.
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

// The rounding of a group: y = clamp(rint(x / scale), low, high) * scale, and the
// code is clamp(...) + zero. `noisyq_fast/grid.py` has a table of the grids.
struct Levels {
  float scale;
  float low;
  float high;
  int zero;
};

// min(x, 0) and max(x, 0) of a group; on signed and full grids only the absmax, as `high`.
struct Range {
  float low;
  float high;
};

// The number of steps of a range, and the smallest and largest code.
struct Codes {
  float divisor;
  float low;
  float high;
};

NOISYQ_INLINE Levels symmetric(float scale, float qmax) { return {scale, -qmax, qmax, 0}; }

// s = range / divisor, never below the smallest normal number, so that x / s cannot overflow
// for a subnormal range. A NaN stays NaN: it compares false. The range is an absmax, and the
// divisor qmax, unless the grid is another.
NOISYQ_INLINE float scale_of(float range, float divisor) {
  const float scale = range / divisor;
  return scale < FLT_MIN ? FLT_MIN : scale;
}

// The range of an affine grid always contains 0. A NaN stays NaN.
NOISYQ_INLINE float affine_scale(float low, float high, float divisor) {
  return scale_of((high < 0.0f ? 0.0f : high) - (low > 0.0f ? 0.0f : low), divisor);
}

// z = rint(-low / s), which has the value 0; 0 where there is no scale.
NOISYQ_INLINE float zero_point(float low, float scale) {
  const float zero = rintf(-(low > 0.0f ? 0.0f : low) / scale);
  return zero == zero ? zero : 0.0f;
}

// rint(x / s), half to even, before it is clamped. A NaN stays NaN.
NOISYQ_INLINE float rounded_of(float x, float scale) {
#ifdef __CUDA_ARCH__
  // A division is most of what a GPU computes here. For |x / s| <= 256, x times a 1 / s that may be
  // an ulp off is less than 2^-12 away from it, also where 1 / s is subnormal. So both round alike,
  // unless that is close to a tie. What is larger rounds to 256 or more either way, which every
  // grid clamps: its ends, less the zero point, lie within -255 .. 255, as zero_point() lies in 0
  // .. 255. NaN, and inf - inf, compare false.
  float reciprocal;
  asm("rcp.approx.f32 %0, %1;" : "=f"(reciprocal) : "f"(scale));
  const float nearly = x * reciprocal;
  const float rounded = rintf(nearly);
  if (fabsf(nearly - rounded) < 0.5f - 0x1p-12f) return rounded;
#endif
  return rintf(x / scale);
}

// The levels of a range on any grid. If low = 0, the zero point is 0 and the scale that of `high`.
NOISYQ_INLINE Levels levels_of(Range range, Codes codes) {
  const float scale = affine_scale(range.low, range.high, codes.divisor);
  const float zero = zero_point(range.low, scale);
  return {scale, codes.low - zero, codes.high - zero, static_cast<int>(zero)};
}

NOISYQ_INLINE float clamp_to(float rounded, float low, float high) {
  const float raised = rounded < low ? low : rounded;
  return raised > high ? high : raised;
}

// The straight-through estimator with clipping passes no gradient here.
NOISYQ_INLINE bool is_clipped(float rounded, float low, float high) {
  return (rounded < low) | (rounded > high);
}

// y = code * s. An infinite scale gives 0 * inf = NaN: a group that holds an inf is NaN throughout.
NOISYQ_INLINE float fake_quantize(float x, Levels levels) {
  return clamp_to(rounded_of(x, levels.scale), levels.low, levels.high) * levels.scale;
}

// The integer code; a NaN has code 0 (its scale is not finite, which keeps it visible).
NOISYQ_INLINE int code_of(float x, Levels levels) {
  const float rounded = rounded_of(x, levels.scale);
  const float code = clamp_to(rounded, levels.low, levels.high);
  return rounded == rounded ? static_cast<int>(code) + levels.zero : 0;
}

// One step of a moving average. NaN means "no data yet": the first batch sets it.
NOISYQ_INLINE float averaged(float average, float batch, float averaging_constant) {
  return average == average ? average + averaging_constant * (batch - average) : batch;
}

// Otherwise the batch does not change the average. `width` is the absmax, or high - low.
NOISYQ_INLINE bool is_observation(float width) { return width <= FLT_MAX; }

}  // namespace noisyq
