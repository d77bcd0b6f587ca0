#include "drivers.h"

namespace noisyq::cpu {

void quantize(DType dtype, const void* x, void* codes, float* scale, uint8_t* zero, Layout layout,
              Grid grid, int threads) {
  std::vector<float> zeros(layout.channels);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    with_grid(grid, scale, zeros.data(), [&](auto levels) {
      // As bytes: an int8 and a uint8 of the same whole number have the same bits.
      map_with_own_range<Code<T>>(static_cast<const T*>(x), static_cast<uint8_t*>(codes), layout,
                                  levels, [](int64_t, Range) {}, threads);
    });
  });
  if (zero != nullptr) std::copy(zeros.begin(), zeros.end(), zero);
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
