// Maps with a scale that is known before the launch.
#include "walk.cuh"

namespace noisyq::cuda {
namespace {

// The scale of a range, or the scale itself.
struct FromAbsmax {
  static __device__ float scale(float absmax, float qmax) { return scale_of(absmax, qmax); }
};
struct FromScale {
  static __device__ float scale(float scale, float) { return scale; }
};

template <class Op, class From, class T, class Out, int N>
__global__ void __launch_bounds__(kThreads)
    known_kernel(const T* x, Out* y, Layout layout, int splits, const float* known, float qmax) {
  const Share<N> share(layout, splits);
  const auto* packs = reinterpret_cast<const Pack<T, N>*>(x);
  auto* out = reinterpret_cast<Pack<Out, N>*>(y);
  share.backwards(packs, [&] {
    const float scale = From::scale(known[share.channel], qmax);
    return [=](int64_t at, const Pack<T, N>& pack) {
      store(out + at, map_pack<Op, Out>(pack, scale, qmax));
    };
  });
}

template <class Op, class From, class T, class Out>
Status map_known(const T* x, Out* y, Layout layout, int splits, const float* known, int qmax,
                 Stream stream) {
  layout = as_run(layout);
  const auto kernel = fits_packs<T, Out>(layout, x, y)
                          ? known_kernel<Op, From, T, Out, kPerAccess<T, Out>>
                          : known_kernel<Op, From, T, Out, 1>;
  return launch(kernel, {layout.channels * splits, kThreads}, stream, x, y, layout, splits, known,
                qmax);
}

}  // namespace

Status fake_quantize_fixed_range(DType dtype, const void* x, const float* absmax, void* y,
                                 Layout layout, int splits, int qmax, Stream stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return map_known<FakeQuantize<T>, FromAbsmax>(static_cast<const T*>(x), static_cast<T*>(y),
                                                  layout, splits, absmax, qmax, stream);
  });
}

Status dequantize(const int8_t* codes, const float* scale, float* y, Layout layout, int splits,
                  Stream stream) {
  return map_known<Value, FromScale>(codes, y, layout, splits, scale, 0, stream);
}

}  // namespace noisyq::cuda
