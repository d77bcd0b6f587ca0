// Maps with a scale that is known before the launch.
#include "known.cuh"

namespace noisyq::cuda {
namespace {

struct FromAbsmax {
  const float* absmax;
  float qmax;

  __device__ Levels operator()(int64_t channel) const {
    return symmetric(scale_of(absmax[channel], qmax), qmax);
  }
};

// Values need no ends of the codes.
struct FromScale {
  const float* scale;

  __device__ Levels operator()(int64_t channel) const { return {scale[channel], 0, 0, 0}; }
};

struct FromScaleAndZero {
  const float* scale;
  const uint8_t* zero;  // or null

  __device__ Levels operator()(int64_t channel) const {
    return {scale[channel], 0, 0, zero == nullptr ? 0 : zero[channel]};
  }
};

}  // namespace

Status fake_quantize_fixed_range(DType dtype, const void* x, const float* absmax, void* y,
                                 Layout layout, int splits, int qmax, Stream stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return map_known<FakeQuantize<T>>(static_cast<const T*>(x), static_cast<T*>(y), layout, splits,
                                      FromAbsmax{absmax, static_cast<float>(qmax)}, stream);
  });
}

Status dequantize(const void* codes, bool are_signed, const float* scale, const uint8_t* zero,
                  float* y, Layout layout, int splits, Stream stream) {
  if (are_signed) {
    return map_known<Value>(static_cast<const int8_t*>(codes), y, layout, splits, FromScale{scale},
                            stream);
  }
  return map_known<Value>(static_cast<const uint8_t*>(codes), y, layout, splits,
                          FromScaleAndZero{scale, zero}, stream);
}

}  // namespace noisyq::cuda
