// Several channels that lie mixed in memory (channels_last activations, odd sizes), dynamic absmax:
// a launch that reduces and one that maps, both of which walk over the memory as it lies, so that
// accesses are wide.
#include "maxima.cuh"

namespace noisyq::cuda {
namespace {

template <class T, bool kWide, Channels kChannels>
__global__ void __launch_bounds__(kThreads)
    absmax_kernel(const T* x, Layout layout, uint32_t* progress) {
  Maxima maxima(layout, progress);
  const GroupShare share(layout, blockIdx.x, gridDim.x);
  for (int64_t g = share.begin + threadIdx.x; g < share.end; g += kThreads) {
    const int64_t first = g * kGroup;
    maxima.observe(Group<T, kWide>(x + first, share.size_of(g)),
                   ChannelWalk<kChannels>(layout, first));
  }
  maxima.send();
}

template <class T, bool kWide, Channels kChannels>
__global__ void __launch_bounds__(kThreads)
    map_kernel(const T* x, T* y, Layout layout, float qmax, float* running_absmax,
               float averaging_constant, uint32_t* progress) {
  const GroupShare share(layout, blockIdx.x, gridDim.x);
  // Backwards: what was reduced last is still in the cache.
  for (int64_t g = share.end - 1 - threadIdx.x; g >= share.begin; g -= kThreads) {
    const int64_t first = g * kGroup;
    Group<T, kWide> group(x + first, share.size_of(g));
    quantize_group(group, ChannelWalk<kChannels>(layout, first), layout, qmax,
                   [&](int64_t channel) { return batch_absmax<T>(progress, channel); });
    group.store_to(y + first, share.size_of(g));
  }
  if (is_last_block(progress + layout.channels)) {
    end_batch<T>(layout, running_absmax, averaging_constant, progress);
  }
}

}  // namespace

Status fake_quantize_mixed(DType dtype, const void* x, void* y, Layout layout, int blocks,
                           int qmax, float* running_absmax, float averaging_constant,
                           uint32_t* progress, Stream stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* in = static_cast<const T*>(x);
    return with_groups(x, y, layout, [&](auto wide, auto channels) -> Status {
      const Grid reduction{blocks, kThreads, shared_bytes_of_maxima(layout)};
      if (const Status status = launch(absmax_kernel<T, wide, channels>, reduction, stream, in,
                                       layout, progress)) {
        return status;
      }
      return launch(map_kernel<T, wide, channels>, {blocks, kThreads}, stream, in,
                    static_cast<T*>(y), layout, qmax, running_absmax, averaging_constant,
                    progress);
    });
  });
}

}  // namespace noisyq::cuda
