// Channels that are not contiguous, or a single one (activations): a launch that reduces, and one
// that maps. The partial maxima need no initial value and no atomics, so concurrent streams
// and replayed graphs cannot disturb each other.
#include "walk.cuh"

namespace noisyq::cuda {
namespace {

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    absmax_kernel(const T* x, Layout layout, int splits, uint32_t* partial) {
  const Share<N> share(layout, splits);
  const auto* packs = reinterpret_cast<const Pack<T, N>*>(x);
  uint32_t largest = 0;
  share.forwards(packs, [&] {
    return [&](int64_t, const Pack<T, N>& pack) { largest = absmax_of_pack(pack, largest); };
  });
  largest = block_max(largest);
  if (threadIdx.x == 0) partial[blockIdx.x] = largest;
}

template <class Op, class T, class Out, int N>
__global__ void __launch_bounds__(kThreads)
    map_kernel(const T* x, Out* y, Layout layout, Splits splits, const uint32_t* partial,
               float qmax, MovingAverage average, float* scale_out) {
  const Share<N> share(layout, splits.of_map);
  const auto* packs = reinterpret_cast<const Pack<T, N>*>(x);
  auto* out = reinterpret_cast<Pack<Out, N>*>(y);
  share.backwards(packs, [&] {
    uint32_t largest = 0;
    for (int i = threadIdx.x; i < splits.of_reduction; i += kThreads) {
      largest = max(largest, partial[share.channel * splits.of_reduction + i]);
    }
    const float absmax = absmax_from<T>(block_max(largest));
    const float scale = scale_of(absmax, qmax);
    if (share.split == 0 && threadIdx.x == 0) {
      if (scale_out != nullptr) scale_out[share.channel] = scale;
      observe(average, share.channel, absmax);
    }
    return [=](int64_t at, const Pack<T, N>& pack) {
      store(out + at, map_pack<Op, Out>(pack, symmetric(scale, qmax)));
    };
  });
}

template <class Op, class T, class Out, int N>
Status quantize_packs(const T* x, Out* y, Layout layout, Splits splits, uint32_t* partial, int qmax,
                      MovingAverage average, float* scale, Stream stream) {
  const LaunchGrid reduction{layout.channels * splits.of_reduction, kThreads};
  if (const Status status =
          launch(absmax_kernel<T, N>, reduction, stream, x, layout, splits.of_reduction, partial)) {
    return status;
  }
  const LaunchGrid map{layout.channels * splits.of_map, kThreads};
  return launch(map_kernel<Op, T, Out, N>, map, stream, x, y, layout, splits, partial, qmax,
                average, scale);
}

template <class Op, class T, class Out>
Status quantize_spread_as(const void* x, void* y, Layout layout, Splits splits, uint32_t* partial,
                          int qmax, MovingAverage average, float* scale, Stream stream) {
  layout = as_run(layout);
  const auto quantize = fits_packs<T, Out>(layout, x, y)
                            ? quantize_packs<Op, T, Out, kPerAccess<T, Out>>
                            : quantize_packs<Op, T, Out, 1>;
  return quantize(static_cast<const T*>(x), static_cast<Out*>(y), layout, splits, partial, qmax,
                  average, scale, stream);
}

}  // namespace

Status fake_quantize_spread(DType dtype, const void* x, void* y, Layout layout, Splits splits,
                            uint32_t* partial, int qmax, MovingAverage average, Stream stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return quantize_spread_as<FakeQuantize<T>, T, T>(x, y, layout, splits, partial, qmax, average,
                                                     nullptr, stream);
  });
}

Status quantize_spread(DType dtype, const void* x, int8_t* codes, float* scale, Layout layout,
                       Splits splits, uint32_t* partial, int qmax, Stream stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return quantize_spread_as<Code<T>, T, int8_t>(x, codes, layout, splits, partial, qmax, {},
                                                  scale, stream);
  });
}

}  // namespace noisyq::cuda
