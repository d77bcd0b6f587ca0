// The two inner loops of every operator: an absmax per channel, and a map with a scale per channel.
// Both walk `rows` of [channels, inner] contiguous elements.
#pragma once

#include "../dtypes.h"

// Compiled once for each vector width and chosen when the library is loaded: wheels stay portable
// and nothing needs -march=native.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define NOISYQ_EACH_VECTOR_WIDTH \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define NOISYQ_EACH_VECTOR_WIDTH
#endif

namespace noisyq::cpu {

// absmax[c] = max(absmax[c], magnitude of channel c).
template <class T>
NOISYQ_EACH_VECTOR_WIDTH void absmax_rows(const T* x, int64_t rows, int64_t channels,
                                          int64_t inner, Magnitude<T>* absmax) {
  if (channels == 1) {
    inner *= rows;
    rows = 1;
  }
  if (inner == 1) {
    for (int64_t row = 0; row < rows; ++row, x += channels) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        absmax[c] = magnitude(x[c]) > absmax[c] ? magnitude(x[c]) : absmax[c];
      }
    }
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < channels; ++c, x += inner) {
      Magnitude<T> largest = absmax[c];
#pragma omp simd reduction(max : largest)
      for (int64_t i = 0; i < inner; ++i) {
        largest = magnitude(x[i]) > largest ? magnitude(x[i]) : largest;
      }
      absmax[c] = largest;
    }
  }
}

// y = Op::apply(x, scale of the channel, qmax). `y` may be `x`.
template <class Op, class In, class Out>
NOISYQ_EACH_VECTOR_WIDTH void map_rows(const In* x, Out* y, int64_t rows, int64_t channels,
                                       int64_t inner, const float* scale, float qmax) {
  if (channels == 1) {
    inner *= rows;
    rows = 1;
  }
  if (inner == 1) {
    for (int64_t row = 0; row < rows; ++row, x += channels, y += channels) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) y[c] = Op::apply(x[c], scale[c], qmax);
    }
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < channels; ++c, x += inner, y += inner) {
      const float s = scale[c];
#pragma omp simd
      for (int64_t i = 0; i < inner; ++i) y[i] = Op::apply(x[i], s, qmax);
    }
  }
}

}  // namespace noisyq::cpu
