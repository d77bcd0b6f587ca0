// The levels of each channel on a grid, and the range from which they are computed.
#pragma once

#include "../kernels.h"
#include "../operators.h"
#include "loops.h"

namespace noisyq::cpu {

// The absmax, for symmetric grids.
template <class T>
struct AbsmaxReduction {
  using Key = Magnitude<T>;
  static constexpr int kKeys = 1;

  static void rows(const T* x, int64_t rows, int64_t channels, int64_t inner, Key* keys) {
    absmax_rows(x, rows, channels, inner, keys);
  }
  static Range range(const Key* keys, int64_t, int64_t c) {
    return {0.0f, absmax_of(T{}, keys[c])};
  }
};

// min(x, 0) and max(x, 0), for the others.
template <class T>
struct ExtremesReduction {
  using Key = SignedBits<T>;
  static constexpr int kKeys = 2;

  static void rows(const T* x, int64_t rows, int64_t channels, int64_t inner, Key* keys) {
    extremes_rows(x, rows, channels, inner, keys, keys + channels);
  }
  static Range range(const Key* keys, int64_t channels, int64_t c) {
    return extremes_of(T{}, keys[c], keys[channels + c]);
  }
};

// One scale for each channel: signed, full and, from max(x, 0), unsigned.
template <bool kOfAbsmax>
struct Scales {
  template <class T>
  using Reduction = std::conditional_t<kOfAbsmax, AbsmaxReduction<T>, ExtremesReduction<T>>;

  float* scale;
  float divisor;
  float low;
  float high;

  void set(int64_t c, Range range) const { scale[c] = scale_of(range.high, divisor); }
  NOISYQ_INLINE Levels at(int64_t c) const { return {scale[c], low, high, 0}; }
};

// A scale and a zero point for each channel, the latter as a float.
struct ScalesAndZeros {
  template <class T>
  using Reduction = ExtremesReduction<T>;

  float* scale;
  float* zero;
  float divisor;

  void set(int64_t c, Range range) const {
    scale[c] = affine_scale(range.low, range.high, divisor);
    zero[c] = zero_point(range.low, scale[c]);
  }
  NOISYQ_INLINE Levels at(int64_t c) const {
    return {scale[c], -zero[c], divisor - zero[c], static_cast<int>(zero[c])};
  }
};

// Calls body with an object that stores the levels of channels in `scale` and, for an affine grid,
// `zero`.
template <class Body>
void with_grid(Grid grid, float* scale, float* zero, const Body& body) {
  const Codes codes = codes_on(grid);
  switch (grid.kind) {
    case GridKind::is_signed:
    case GridKind::is_full:
      return body(Scales<true>{scale, codes.divisor, codes.low, codes.high});
    case GridKind::is_unsigned:
      return body(Scales<false>{scale, codes.divisor, codes.low, codes.high});
    case GridKind::is_affine:
      return body(ScalesAndZeros{scale, zero, codes.divisor});
  }
}

}  // namespace noisyq::cpu
