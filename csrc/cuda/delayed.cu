// Delayed scales: quantizes with the ranges of the batches before, while the absmax of this batch
// is reduced in the same pass. One read, one write, one launch. Here values do clip.
#include "maxima.cuh"

namespace noisyq::cuda {
namespace {

// Whether the channels of a group have ranges from before.
template <Channels kChannels>
__device__ __forceinline__ bool seen(ChannelWalk<kChannels> at, Layout layout,
                                     const float* running_absmax) {
  bool all = !isnan(running_absmax[at.channel]);
#pragma unroll
  for (int i = 1; i < kGroup; ++i) {
    if (at.advance(layout)) all = all && !isnan(running_absmax[at.channel]);
  }
  return all;
}

// `y` must not be `x`. Unless told that four blocks on a multiprocessor will do, the compiler
// spills registers.
template <class T, bool kWide, Channels kChannels>
__global__ void __launch_bounds__(kThreads, 4)
    delayed_kernel(const T* x, T* y, uint8_t* clipped, Layout layout, float qmax,
                   float* __restrict__ running_absmax, float averaging_constant,
                   uint32_t* progress) {
  Maxima maxima(layout, progress);
  const GroupShare share(layout, blockIdx.x, gridDim.x);
  for (int64_t g = share.begin + threadIdx.x; g < share.end; g += kThreads) {
    const int64_t first = g * kGroup;
    const ChannelWalk<kChannels> at(layout, first);
    Group<T, kWide> group(x + first, share.size_of(g));
    maxima.observe(group, at);
    const uint8_t bits = quantize_group(group, at, layout, qmax, [&](int64_t channel) {
      return running_absmax[channel];
    });
    group.store_to(y + first, share.size_of(g));
    if (clipped != nullptr) clipped[g] = bits;
  }
  maxima.send();
  if (!is_last_block(progress + layout.channels)) return;

  uint32_t unseen = 0;
  for (int64_t c = threadIdx.x; c < layout.channels; c += kThreads) {
    unseen |= isnan(running_absmax[c]) ? 1u : 0u;
  }
  // The first batch has no range before it, and is NaN so far: the last block quantizes it by its
  // own absmax.
  if (block_max(unseen) != 0) {
    const GroupShare all(layout, 0, 1);
    for (int64_t g = threadIdx.x; g < all.end; g += kThreads) {
      const int64_t first = g * kGroup;
      const ChannelWalk<kChannels> at(layout, first);
      if (seen(at, layout, running_absmax)) continue;
      Group<T, kWide> group(x + first, all.size_of(g));
      const uint8_t bits = quantize_group(group, at, layout, qmax, [&](int64_t channel) {
        const float range = running_absmax[channel];
        return isnan(range) ? batch_absmax<T>(progress, channel) : range;
      });
      group.store_to(y + first, all.size_of(g));
      if (clipped != nullptr) clipped[g] = bits;
    }
  }
  __syncthreads();
  end_batch<T>(layout, running_absmax, averaging_constant, progress);
}

}  // namespace

Status fake_quantize_delayed(DType dtype, const void* x, void* y, uint8_t* clipped, Layout layout,
                             int blocks, int qmax, float* running_absmax,
                             float averaging_constant, uint32_t* progress, Stream stream) {
  const Grid grid{blocks, kThreads, shared_bytes_of_maxima(layout)};
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return with_groups(x, y, layout, [&](auto wide, auto channels) {
      return launch(delayed_kernel<T, wide, channels>, grid, stream, static_cast<const T*>(x),
                    static_cast<T*>(y), clipped, layout, qmax, running_absmax, averaging_constant,
                    progress);
    });
  });
}

}  // namespace noisyq::cuda
