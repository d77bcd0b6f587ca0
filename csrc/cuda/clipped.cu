// Quantization with given ranges, in memory order, with one bit per element that says whether it
// was clipped; and the gradient that these bits mask.
#include "groups.cuh"

namespace noisyq::cuda {
namespace {

template <class T, bool kWide, Channels kChannels>
__global__ void __launch_bounds__(kThreads)
    clipped_kernel(const T* x, const float* __restrict__ absmax, T* y, uint8_t* clipped,
                   Layout layout, float qmax) {
  const GroupShare share(layout);
  for (int64_t g = share.begin + threadIdx.x; g < share.end; g += kThreads) {
    const int64_t first = g * kGroup;
    Group<T, kWide> group(x + first, share.size_of(g));
    ChannelWalk<kChannels> at(layout, first);
    const auto levels_of = [&](int64_t channel) {
      return symmetric(scale_of(absmax[channel], qmax), qmax);
    };
    const uint8_t bits = quantize_group(group, at, layout, levels_of, MarkClipped{});
    group.store_to(y + first, share.size_of(g));
    if (clipped != nullptr) clipped[g] = bits;
  }
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads)
    zero_clipped_kernel(const T* grad, T* out, const uint8_t* clipped, Layout layout) {
  const GroupShare share(layout);
  for (int64_t g = share.begin + threadIdx.x; g < share.end; g += kThreads) {
    const int64_t first = g * kGroup;
    Group<T, kWide> group(grad + first, share.size_of(g));
    const uint32_t bits = clipped[g];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (bits >> i & 1u) group.values[i] = T{};
    }
    group.store_to(out + first, share.size_of(g));
  }
}

}  // namespace

Status fake_quantize_fixed_range_clipped(DType dtype, const void* x, const float* absmax, void* y,
                                         uint8_t* clipped, Layout layout, int blocks, int qmax,
                                         Stream stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return with_groups(x, y, layout, [&](auto wide, auto channels) {
      return launch(clipped_kernel<T, wide, channels>, {blocks, kThreads}, stream,
                    static_cast<const T*>(x), absmax, static_cast<T*>(y), clipped, layout, qmax);
    });
  });
}

Status zero_clipped(DType dtype, const void* grad, void* out, const uint8_t* clipped,
                    int64_t elements, int blocks, Stream stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const Layout run{1, 1, elements};
    return with_width(grad, out, run, [&](auto wide) {
      return launch(zero_clipped_kernel<T, wide>, {blocks, kThreads}, stream,
                    static_cast<const T*>(grad), static_cast<T*>(out), clipped, run);
    });
  });
}

}  // namespace noisyq::cuda
