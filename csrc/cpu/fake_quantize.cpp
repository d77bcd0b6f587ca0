#include <atomic>

#include "drivers.h"

namespace noisyq::cpu {

namespace {

template <class T, class Channels>
void write_mask(const T* x, Mask mask, Layout layout, GridKind kind, Channels levels,
                int threads) {
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

}  // namespace

void fake_quantize(DType dtype, const void* x, void* y, Mask mask, Layout layout, Grid grid,
                   MovingAverage average, int threads) {
  const bool has_elements = layout.outer > 0;
  // With its own range nothing is above an unsigned grid, and mostly, after a ReLU, nothing below.
  std::atomic<bool> may_mask = grid.kind != GridKind::is_unsigned;
  const auto observed = [&](int64_t c, Range range) {
    if (!has_elements) return;
    if (range.low != 0.0f) may_mask = true;  // of a NaN too
    if (grid.kind == GridKind::is_affine) {
      observe(average, c, layout.channels, range);
    } else {
      observe(average, c, range.high);
    }
  };
  std::vector<float> scale(layout.channels), zero(layout.channels);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* in = static_cast<const T*>(x);
    with_grid(grid, scale.data(), zero.data(), [&](auto levels) {
      map_with_own_range<FakeQuantize<T>>(in, static_cast<T*>(y), layout, levels, observed,
                                          threads);
      if (mask.masked == Masked::none) return;
      if (may_mask) {
        write_mask(in, mask, layout, grid.kind, levels, threads);
      } else {
        memset(mask.bits, 0, (layout.outer * layout.channels * layout.inner + 7) / 8);
      }
    });
  });
}

void fake_quantize_fixed_range(DType dtype, const void* x, const float* range, void* y, Mask mask,
                               Layout layout, Grid grid, int threads) {
  const float* high = grid.kind == GridKind::is_affine ? range + layout.channels : range;
  std::vector<float> scale(layout.channels), zero(layout.channels);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* in = static_cast<const T*>(x);
    with_grid(grid, scale.data(), zero.data(), [&](auto levels) {
      for (int64_t c = 0; c < layout.channels; ++c) levels.set(c, {range[c], high[c]});
      if (mask.masked != Masked::none) {
        write_mask(in, mask, layout, grid.kind, levels, threads);
      }
      map<FakeQuantize<T>>(in, static_cast<T*>(y), layout, levels, threads);
    });
  });
}

void zero_clipped(DType dtype, const void* grad, void* out, const uint8_t* clipped,
                  int64_t elements, int threads) {
  if (dtype == DType::float32) {
    zero_masked_in_parallel<uint32_t>(grad, out, clipped, elements, threads);
  } else {
    zero_masked_in_parallel<uint16_t>(grad, out, clipped, elements, threads);
  }
}

}  // namespace noisyq::cpu
