#include "drivers.h"

namespace noisyq::cpu {

void quantize(DType dtype, const void* x, int8_t* codes, float* scale, Layout layout, int qmax,
              int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    map_with_absmax<Code<T>>(static_cast<const T*>(x), codes, layout, scale, qmax,
                             [](int64_t, float) {}, threads);
  });
}

void dequantize(const int8_t* codes, const float* scale, float* y, Layout layout, int threads) {
  map<Value>(codes, y, layout, scale, 0.0f, threads);
}

}  // namespace noisyq::cpu
