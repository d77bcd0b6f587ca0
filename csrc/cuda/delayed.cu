// Delayed scales: quantizes with the ranges of the batches before, while the absmax of this batch is
// reduced in the same pass. One read, one write, one launch. Here values do clip.
#include "groups.cuh"

namespace noisyq::cuda {
namespace {

// Up to this many channels, a block collects their absmax on chip.
constexpr int64_t kKeptChannels = 12 * 1024 - 64;

// `largest` holds the absmax of each channel so far. It is only written where a value is larger
// than what another thread has found, which soon is rare.
template <class T, bool kWide, Channels kChannels>
__device__ __forceinline__ void observe(const Group<T, kWide>& group, ChannelWalk<kChannels> at,
                                        Layout layout, uint32_t* largest) {
  const auto send = [&](int64_t channel, uint32_t value) {
    if (value > largest[channel]) atomicMax(largest + channel, value);
  };
  uint32_t value = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const int64_t channel = at.channel;
    if (i > 0 && at.advance(layout)) {
      send(channel, value);
      value = 0;
    }
    value = max(value, static_cast<uint32_t>(magnitude(group.values[i])));
  }
  send(at.channel, value);
}

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

// `y` must not be `x`. `progress` is the absmax of each channel, and then how many blocks are done: all 0 before and
// after. Unless told that four blocks on a multiprocessor will do, the compiler spills registers.
template <class T, bool kWide, Channels kChannels>
__global__ void __launch_bounds__(kThreads, 4)
    delayed_kernel(const T* x, T* y, uint8_t* clipped, Layout layout, float qmax,
                   float* __restrict__ running_absmax, float averaging_constant,
                   uint32_t* progress) {
  const bool keep = layout.channels <= kKeptChannels;
  uint32_t* largest = keep ? reinterpret_cast<uint32_t*>(shared_memory()) : progress;
  if (keep) {
    for (int64_t c = threadIdx.x; c < layout.channels; c += kThreads) largest[c] = 0;
    __syncthreads();
  }
  const GroupShare share(layout, blockIdx.x, gridDim.x);
  for (int64_t g = share.begin + threadIdx.x; g < share.end; g += kThreads) {
    const int64_t first = g * kGroup;
    const ChannelWalk<kChannels> at(layout, first);
    Group<T, kWide> group(x + first, share.size_of(g));
    observe(group, at, layout, largest);
    const uint8_t bits = quantize_group(group, at, layout, qmax, [&](int64_t channel) {
      return running_absmax[channel];
    });
    if (clipped != nullptr) clipped[g] = bits;
    group.store_to(y + g * kGroup, share.size_of(g));
  }
  if (keep) {
    __syncthreads();
    for (int64_t c = threadIdx.x; c < layout.channels; c += kThreads) {
      if (largest[c] > 0) atomicMax(progress + c, largest[c]);
    }
  }

  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(progress + layout.channels, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();

  const auto absmax = [&](int64_t channel) { return absmax_from<T>(__ldcg(progress + channel)); };
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
        return isnan(range) ? absmax(channel) : range;
      });
      group.store_to(y + first, all.size_of(g));
      if (clipped != nullptr) clipped[g] = bits;
    }
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c <= layout.channels; c += kThreads) {
    if (c < layout.channels) {
      running_absmax[c] = averaged(running_absmax[c], absmax(c), averaging_constant);
    }
    progress[c] = 0;
  }
}

}  // namespace

Status fake_quantize_delayed(DType dtype, const void* x, void* y, uint8_t* clipped, Layout layout,
                             int blocks, int qmax, float* running_absmax,
                             float averaging_constant, uint32_t* progress, Stream stream) {
  const size_t kept = layout.channels <= kKeptChannels ? layout.channels * sizeof(uint32_t) : 0;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return with_groups(x, y, layout, [&](auto wide, auto channels) {
      return launch(delayed_kernel<T, wide, channels>, {blocks, kThreads, kept}, stream,
                    static_cast<const T*>(x), static_cast<T*>(y), clipped, layout, qmax,
                    running_absmax, averaging_constant, progress);
    });
  });
}

}  // namespace noisyq::cuda
