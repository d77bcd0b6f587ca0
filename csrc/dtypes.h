// Storage types. Values are computed in float and rounded once, half to even, on the way out.
// The conversions are written with integers and without branches, so that they vectorise.
#pragma once

#include <cstring>

#include "kernels.h"
#include "quantize.h"

namespace noisyq {

template <class To, class From>
NOISYQ_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// The bits without the sign. As integers they order like magnitudes, with NaN above inf, so an
// integer maximum is an absmax that keeps NaN, and is the same in any order of reduction.
NOISYQ_INLINE uint32_t magnitude(float x) { return bit_cast<uint32_t>(x) & 0x7fffffffu; }
NOISYQ_INLINE uint16_t magnitude(BFloat16 x) { return x.bits & 0x7fffu; }
NOISYQ_INLINE uint16_t magnitude(Float16 x) { return x.bits & 0x7fffu; }

template <class T>
using Magnitude = decltype(magnitude(T{}));

NOISYQ_INLINE float to_float(float x) { return x; }

NOISYQ_INLINE float to_float(BFloat16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

NOISYQ_INLINE float to_float(Float16 x) {
#ifdef __CUDA_ARCH__
  float converted;
  asm("cvt.f32.f16 %0, %1;" : "=f"(converted) : "h"(x.bits));
  return converted;
#endif
  // Shifted into place, the exponent is 112 too small. A subnormal is shifted one exponent higher
  // and loses the implicit 2^-14 that this gave it.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t shifted = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t normal = shifted + 0x38000000u;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(shifted + 0x38800000u) - 0x1p-14f);
  const uint32_t finite = shifted < 0x00800000u ? subnormal : normal;
  return bit_cast<float>(sign | (shifted >= 0x0f800000u ? shifted | 0x7f800000u : finite));
}

template <class T>
T from_float(float x);

template <>
NOISYQ_INLINE float from_float<float>(float x) {
  return x;
}

template <>
NOISYQ_INLINE BFloat16 from_float<BFloat16>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  BFloat16 converted;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(converted.bits) : "f"(x));
  return converted;
#endif
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x == x ? rounded : 0x7fc0u)};
}

template <>
NOISYQ_INLINE Float16 from_float<Float16>(float x) {
#ifdef __CUDA_ARCH__
  Float16 converted;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(converted.bits) : "f"(x));
  return converted;
#endif
  const uint32_t bits = magnitude(x);
  // Normal results: move the exponent by 112 and round the 13 bits that fall off.
  const uint32_t normal = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 puts the last bit kept, 2^-24, at the end of the mantissa.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(bits) + 0.5f) - 0x3f000000u;
  const uint32_t finite = bits < 0x38800000u ? subnormal : normal;
  // From 65520 on the nearest Float16 is infinite.
  const uint32_t infinite = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t sign = (bit_cast<uint32_t>(x) >> 16) & 0x8000u;
  return {static_cast<uint16_t>(sign | (bits >= 0x477ff000u ? infinite : finite))};
}

// The float whose magnitude was reduced.
NOISYQ_INLINE float absmax_of(float, uint32_t bits) { return bit_cast<float>(bits); }
NOISYQ_INLINE float absmax_of(BFloat16, uint16_t bits) { return to_float(BFloat16{bits}); }
NOISYQ_INLINE float absmax_of(Float16, uint16_t bits) { return to_float(Float16{bits}); }

// The bits of x, and those of -x, as integers. These order positive values like the values, and are
// negative for negative ones. So their maxima with 0 are max(x, 0) and -min(x, 0), and in one of
// them NaN is above inf.
NOISYQ_INLINE int32_t rising(float x) { return bit_cast<int32_t>(x); }
NOISYQ_INLINE int16_t rising(BFloat16 x) { return static_cast<int16_t>(x.bits); }
NOISYQ_INLINE int16_t rising(Float16 x) { return static_cast<int16_t>(x.bits); }
NOISYQ_INLINE int32_t falling(float x) { return bit_cast<int32_t>(x) ^ INT32_MIN; }
NOISYQ_INLINE int16_t falling(BFloat16 x) { return static_cast<int16_t>(x.bits ^ 0x8000u); }
NOISYQ_INLINE int16_t falling(Float16 x) { return static_cast<int16_t>(x.bits ^ 0x8000u); }

template <class T>
using SignedBits = decltype(rising(T{}));

// The range with these two maxima. If its low end is not finite, its high end is NaN.
template <class T>
NOISYQ_INLINE Range extremes_of(T type, SignedBits<T> falling, SignedBits<T> rising) {
  const float low = -absmax_of(type, static_cast<Magnitude<T>>(falling));
  const float high = absmax_of(type, static_cast<Magnitude<T>>(rising));
  return {low, low >= -FLT_MAX ? high : NAN};
}

// What `body(T{})` returns for the storage type that `dtype` names.
template <class Body>
auto with_type(DType dtype, const Body& body) {
  if (dtype == DType::bfloat16) return body(BFloat16{});
  if (dtype == DType::float16) return body(Float16{});
  return body(float{});
}

}  // namespace noisyq
