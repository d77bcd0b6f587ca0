#include <atomic>

#include "drivers.h"

namespace noisyq::cpu {

namespace {

template <class T, class Channels>
void write_mask(const T* x, Mask mask, Layout layout, GridKind kind, Channels levels, int threads) {
  if (mask.masked == Masked::negative) {
    map_to_bits<Negative<T>>(x, mask.bits, layout, levels, threads);
  } else if (kind == GridKind::is_unsigned) {
    map_to_bits<Outside<T>>(x, mask.bits, layout, levels, threads);
  } else {
    map_to_bits<Clipped<T>>(x, mask.bits, layout, levels, threads);
  }
}

template <class Word>
void zero_masked_in_parallel(const void* grad, void* out, const uint8_t* bits, int64_t elements,
                             int threads) {
  parallel(useful_threads(elements, threads), [&](Member member) {
    const int64_t bytes = (elements + 7) / 8;
    const int64_t begin = 8 * member.begin(bytes);
    const int64_t end = std::min(elements, 8 * member.end(bytes));
    zero_masked(static_cast<const Word*>(grad) + begin, static_cast<Word*>(out) + begin,
                bits + begin / 8, end - begin);
  });
}

// out = Op(x) with the range of each channel of x, with which `average` is updated.
template <class Op, class T, class Out>
void map_observed(const T* x, Out* out, Mask mask, float* scale, float* zero, Layout layout,
                  Grid grid, MovingAverage average, int threads) {
  const bool has_elements = layout.outer > 0;
  // With its own range no value is above an unsigned grid; after a ReLU, none is below it either.
  std::atomic<bool> may_mask = grid.kind != GridKind::is_unsigned;
  const auto observed = [&](int64_t c, Range range) {
    if (!has_elements) return;
    if (range.low != 0.0f) may_mask = true;  // true for NaN too
    if (grid.kind == GridKind::is_affine) {
      observe(average, c, layout.channels, range);
    } else {
      observe(average, c, range.high);
    }
  };
  with_grid(grid, scale, zero, [&](auto levels) {
    map_with_own_range<Op>(x, out, layout, levels, observed, threads);
    if (mask.masked == Masked::none) return;
    if (may_mask) {
      write_mask(x, mask, layout, grid.kind, levels, threads);
    } else {
      memset(mask.bits, 0, (layout.outer * layout.channels * layout.inner + 7) / 8);
    }
  });
}

// out = Op(x) with a given range.
template <class Op, class T, class Out>
void map_within(const T* x, const float* range, Out* out, Mask mask, float* scale, float* zero,
                Layout layout, Grid grid, int threads) {
  const float* high = grid.kind == GridKind::is_affine ? range + layout.channels : range;
  with_grid(grid, scale, zero, [&](auto levels) {
    for (int64_t c = 0; c < layout.channels; ++c) levels.set(c, {range[c], high[c]});
    if (mask.masked != Masked::none) write_mask(x, mask, layout, grid.kind, levels, threads);
    map<Op>(x, out, layout, levels, threads);
  });
}

}  // namespace

void fake_quantize(DType dtype, const void* x, void* y, Mask mask, Layout layout, Grid grid,
                   MovingAverage average, int threads) {
  std::vector<float> scale(layout.channels), zero(layout.channels);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    map_observed<FakeQuantize<T>>(static_cast<const T*>(x), static_cast<T*>(y), mask, scale.data(),
                                  zero.data(), layout, grid, average, threads);
  });
}

void fake_quantize_fixed_range(DType dtype, const void* x, const float* range, void* y, Mask mask,
                               Layout layout, Grid grid, int threads) {
  std::vector<float> scale(layout.channels), zero(layout.channels);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    map_within<FakeQuantize<T>>(static_cast<const T*>(x), range, static_cast<T*>(y), mask,
                                scale.data(), zero.data(), layout, grid, threads);
  });
}

// Codes are written as bytes: an int8 and a uint8 with the same value have the same bits.

void quantize(DType dtype, const void* x, void* codes, Mask mask, float* scale, uint8_t* zero,
              Layout layout, Grid grid, MovingAverage average, int threads) {
  std::vector<float> zeros(layout.channels);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    map_observed<Code<T>>(static_cast<const T*>(x), static_cast<uint8_t*>(codes), mask, scale,
                          zeros.data(), layout, grid, average, threads);
  });
  if (zero != nullptr) std::copy(zeros.begin(), zeros.end(), zero);
}

void quantize_fixed_range(DType dtype, const void* x, const float* range, void* codes, Mask mask,
                          float* scale, uint8_t* zero, Layout layout, Grid grid, int threads) {
  std::vector<float> zeros(layout.channels);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    map_within<Code<T>>(static_cast<const T*>(x), range, static_cast<uint8_t*>(codes), mask, scale,
                        zeros.data(), layout, grid, threads);
  });
  if (zero != nullptr) std::copy(zeros.begin(), zeros.end(), zero);
}

void zero_clipped(DType dtype, const void* grad, void* out, const uint8_t* clipped,
                  int64_t elements, int threads) {
  if (dtype == DType::float32) {
    zero_masked_in_parallel<uint32_t>(grad, out, clipped, elements, threads);
  } else {
    zero_masked_in_parallel<uint16_t>(grad, out, clipped, elements, threads);
  }
}

void dequantize(const void* codes, bool are_signed, const float* scale, const uint8_t* zero,
                float* y, Layout layout, int threads) {
  // Neither is written to.
  float* scales = const_cast<float*>(scale);
  if (are_signed) {
    map<Value>(static_cast<const int8_t*>(codes), y, layout, Scales<true>{scales, 0, 0, 0},
               threads);
  } else {
    std::vector<float> zeros(layout.channels);
    if (zero != nullptr) std::copy(zero, zero + layout.channels, zeros.begin());
    map<Value>(static_cast<const uint8_t*>(codes), y, layout,
               ScalesAndZeros{scales, zeros.data(), 0}, threads);
  }
}

}  // namespace noisyq::cpu
