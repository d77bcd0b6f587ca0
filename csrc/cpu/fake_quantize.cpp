#include "drivers.h"

namespace noisyq::cpu {

void fake_quantize(DType dtype, const void* x, void* y, Layout layout, int qmax,
                   MovingAverage average, int threads) {
  const bool has_elements = layout.outer > 0;
  const auto observed = [&](int64_t c, float absmax) {
    if (has_elements) observe(average, c, absmax);
  };
  std::vector<float> scale(layout.channels);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    map_with_absmax<FakeQuantize<T>>(static_cast<const T*>(x), static_cast<T*>(y), layout,
                                     scale.data(), qmax, observed, threads);
  });
}

void fake_quantize_fixed_range(DType dtype, const void* x, const float* absmax, void* y,
                               uint8_t* clipped, Layout layout, int qmax, int threads) {
  std::vector<float> scale(layout.channels);
  for (int64_t c = 0; c < layout.channels; ++c) scale[c] = scale_of(absmax[c], qmax);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* in = static_cast<const T*>(x);
    if (clipped != nullptr) map<Clipped<T>>(in, clipped, layout, scale.data(), qmax, threads);
    map<FakeQuantize<T>>(in, static_cast<T*>(y), layout, scale.data(), qmax, threads);
  });
}

}  // namespace noisyq::cpu
