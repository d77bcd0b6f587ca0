// Several channels that are interleaved in memory (channels_last activations, odd sizes), dynamic
// absmax: a launch that reduces and one that maps, both in memory order, so that accesses are wide.
#include "groups.cuh"

namespace noisyq::cuda {
namespace {

// Up to this many channels, a block collects them on chip.
constexpr int64_t kKeptChannels = 12 * 1024 - 64;

__host__ __device__ bool maxima_fit_on_chip(Layout layout) {
  return layout.channels <= kKeptChannels;
}

size_t shared_bytes_of_maxima(Layout layout) {
  return maxima_fit_on_chip(layout) ? layout.channels * sizeof(uint32_t) : 0;
}

// `progress` is the absmax of each channel, and then how many blocks are done: channels + 1 values,
// all 0 before a batch and after it.
struct Maxima {
  Layout layout;
  uint32_t* progress;
  uint32_t* largest;  // of this block

  __device__ Maxima(Layout layout, uint32_t* progress) : layout(layout), progress(progress) {
    largest = maxima_fit_on_chip(layout) ? reinterpret_cast<uint32_t*>(shared_memory()) : progress;
    if (!maxima_fit_on_chip(layout)) return;
    for (int64_t c = threadIdx.x; c < layout.channels; c += kThreads) largest[c] = 0;
    __syncthreads();
  }

  template <class T, bool kWide, Channels kChannels>
  __device__ __forceinline__ void observe(const Group<T, kWide>& group, ChannelWalk<kChannels> at) {
    uint32_t value = 0;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int64_t channel = at.channel;
      if (i > 0 && at.advance(layout)) {
        observe(channel, value);
        value = 0;
      }
      value = max(value, static_cast<uint32_t>(magnitude(group.values[i])));
    }
    observe(at.channel, value);
  }

  // Written only where a value is larger than what another thread has found, which soon is rare.
  __device__ __forceinline__ void observe(int64_t channel, uint32_t value) {
    if (value > largest[channel]) atomicMax(largest + channel, value);
  }

  // After the last observation of the block.
  __device__ void send() {
    if (!maxima_fit_on_chip(layout)) return;
    __syncthreads();
    for (int64_t c = threadIdx.x; c < layout.channels; c += kThreads) {
      if (largest[c] > 0) atomicMax(progress + c, largest[c]);
    }
  }
};

// Whether the block is the last to get here; it then sees the writes of all others.
__device__ __forceinline__ bool is_last_block(uint32_t* done) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(done, 1u) == gridDim.x - 1;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

template <class T>
__device__ __forceinline__ float batch_absmax(const uint32_t* progress, int64_t channel) {
  return absmax_from<T>(__ldcg(progress + channel));
}

// By the last block: moves the averages, and leaves `progress` as it was.
template <class T>
__device__ __forceinline__ void end_batch(Layout layout, MovingAverage average,
                                          uint32_t* progress) {
#pragma unroll 1  // or the division of the average spills registers on sm_100
  for (int64_t c = threadIdx.x; c <= layout.channels; c += kThreads) {
    if (c < layout.channels) observe(average, c, batch_absmax<T>(progress, c));
    progress[c] = 0;
  }
}

template <class T, bool kWide, Channels kChannels>
__global__ void __launch_bounds__(kThreads)
    absmax_kernel(const T* x, Layout layout, uint32_t* progress) {
  Maxima maxima(layout, progress);
  const GroupShare share(layout);
  for (int64_t g = share.begin + threadIdx.x; g < share.end; g += kThreads) {
    const int64_t first = g * kGroup;
    maxima.observe(Group<T, kWide>(x + first, share.size_of(g)),
                   ChannelWalk<kChannels>(layout, first));
  }
  maxima.send();
}

template <class T, bool kWide, Channels kChannels>
__global__ void __launch_bounds__(kThreads) map_kernel(const T* x, T* y, Layout layout, float qmax,
                                                       MovingAverage average, uint32_t* progress) {
  const GroupShare share(layout);
  // Backwards: what was reduced last is still in the cache.
  for (int64_t g = share.end - 1 - threadIdx.x; g >= share.begin; g -= kThreads) {
    const int64_t first = g * kGroup;
    Group<T, kWide> group(x + first, share.size_of(g));
    const auto levels_of = [&](int64_t channel) {
      return symmetric(scale_of(batch_absmax<T>(progress, channel), qmax), qmax);
    };
    quantize_group(group, ChannelWalk<kChannels>(layout, first), layout, levels_of, MarkClipped{});
    group.store_to(y + first, share.size_of(g));
  }
  if (is_last_block(progress + layout.channels)) {
    end_batch<T>(layout, average, progress);
  }
}

}  // namespace

Status fake_quantize_mixed(DType dtype, const void* x, void* y, Layout layout, Splits blocks,
                           int qmax, MovingAverage average, uint32_t* progress, Stream stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* in = static_cast<const T*>(x);
    return with_mixed_groups(x, y, layout, [&](auto wide, auto channels) -> Status {
      const LaunchGrid reduction{blocks.of_reduction, kThreads, shared_bytes_of_maxima(layout)};
      if (const Status status =
              launch(absmax_kernel<T, wide, channels>, reduction, stream, in, layout, progress)) {
        return status;
      }
      return launch(map_kernel<T, wide, channels>, {blocks.of_map, kThreads}, stream, in,
                    static_cast<T*>(y), layout, qmax, average, progress);
    });
  });
}

}  // namespace noisyq::cuda
