// The inner loops of every operator: the range of each channel, and a map with levels for each
// channel. All walk `rows` of [channels, inner] contiguous elements.
#pragma once

#include <algorithm>

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
NOISYQ_EACH_VECTOR_WIDTH void absmax_rows(const T* x, int64_t rows, int64_t channels, int64_t inner,
                                          Magnitude<T>* absmax) {
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

// low[c] = max(low[c], -x of channel c) and high[c] = max(high[c], x of channel c), as integers.
template <class T>
NOISYQ_EACH_VECTOR_WIDTH void extremes_rows(const T* x, int64_t rows, int64_t channels,
                                            int64_t inner, SignedBits<T>* low,
                                            SignedBits<T>* high) {
  if (channels == 1) {
    inner *= rows;
    rows = 1;
  }
  if (inner == 1) {
    for (int64_t row = 0; row < rows; ++row, x += channels) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        low[c] = falling(x[c]) > low[c] ? falling(x[c]) : low[c];
        high[c] = rising(x[c]) > high[c] ? rising(x[c]) : high[c];
      }
    }
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < channels; ++c, x += inner) {
      SignedBits<T> lowest = low[c], highest = high[c];
#pragma omp simd reduction(max : lowest, highest)
      for (int64_t i = 0; i < inner; ++i) {
        lowest = falling(x[i]) > lowest ? falling(x[i]) : lowest;
        highest = rising(x[i]) > highest ? rising(x[i]) : highest;
      }
      low[c] = lowest;
      high[c] = highest;
    }
  }
}

// y = Op::apply(x, levels of the channel). `y` may be `x`. The first channel is `first`.
template <class Op, class In, class Out, class Channels>
NOISYQ_EACH_VECTOR_WIDTH void map_rows(const In* x, Out* y, int64_t rows, int64_t channels,
                                       int64_t inner, Channels levels, int64_t first) {
  if (channels == 1) {
    inner *= rows;
    rows = 1;
  }
  if (inner == 1) {
    for (int64_t row = 0; row < rows; ++row, x += channels, y += channels) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) y[c] = Op::apply(x[c], levels.at(first + c));
    }
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < channels; ++c, x += inner, y += inner) {
      const Levels of_channel = levels.at(first + c);
#pragma omp simd
      for (int64_t i = 0; i < inner; ++i) y[i] = Op::apply(x[i], of_channel);
    }
  }
}

// out = grad, but 0 where the bit of the element is set.
template <class Word>
NOISYQ_EACH_VECTOR_WIDTH void zero_masked(const Word* grad, Word* out, const uint8_t* bits,
                                          int64_t count) {
  // A bit minus 1 is a word of ones, or 0: without branches.
  const int64_t whole = count / 8;
  for (int64_t b = 0; b < whole; ++b) {
    const uint32_t eight = bits[b];
#pragma omp simd
    for (int i = 0; i < 8; ++i) {
      out[8 * b + i] = static_cast<Word>(grad[8 * b + i] & ((eight >> i & 1u) - 1u));
    }
  }
  for (int64_t i = 8 * whole; i < count; ++i) {
    out[i] = static_cast<Word>(grad[i] & ((bits[i / 8] >> i % 8 & 1u) - 1u));
  }
}

// Packs `count` bytes, each 0 or 1, into bits, the first of eight into the lowest.
inline void pack_bits(const uint8_t* bytes, uint8_t* bits, int64_t count) {
  const auto packed = [](uint64_t eight) {
    return static_cast<uint8_t>(eight * 0x0102040810204080u >> 56);
  };
  const int64_t whole = count / 8;
  for (int64_t b = 0; b < whole; ++b) {
    uint64_t eight;
    memcpy(&eight, bytes + 8 * b, 8);
    bits[b] = packed(eight);
  }
  if (count % 8 != 0) {
    uint64_t rest = 0;
    memcpy(&rest, bytes + 8 * whole, count % 8);
    bits[whole] = packed(rest);
  }
}

}  // namespace noisyq::cpu
