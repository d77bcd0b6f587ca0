// The absmax of each channel, over all blocks of a launch that walks over groups.
#pragma once

#include "groups.cuh"

namespace noisyq::cuda {

// Up to this many channels, a block collects them on chip.
constexpr int64_t kKeptChannels = 12 * 1024 - 64;

inline __host__ __device__ bool maxima_fit_on_chip(Layout layout) {
  return layout.channels <= kKeptChannels;
}

inline size_t shared_bytes_of_maxima(Layout layout) {
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
  __device__ __forceinline__ void observe(const Group<T, kWide>& group,
                                          ChannelWalk<kChannels> at) {
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

// Whether the block is the last that gets here. It sees what all others did.
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

// By the last block: moves the ranges, where there are any, and leaves `progress` as it was.
template <class T>
__device__ __forceinline__ void end_batch(Layout layout, float* running_absmax,
                                          float averaging_constant, uint32_t* progress) {
  for (int64_t c = threadIdx.x; c <= layout.channels; c += kThreads) {
    if (c < layout.channels && running_absmax != nullptr) {
      running_absmax[c] =
          averaged(running_absmax[c], batch_absmax<T>(progress, c), averaging_constant);
    }
    progress[c] = 0;
  }
}

}  // namespace noisyq::cuda
