// The elements of one channel of a tensor seen as [outer, channels, inner], cut into `splits` even
// shares, one for each block. Blocks are numbered share by share within a channel.
#pragma once

#include "device.cuh"

namespace noisyq::cuda {

constexpr int kThreads = 256;

template <int N>
struct Share {
  int64_t channel;
  int split;
  int64_t begin;  // in packs of N within the channel
  int64_t end;
  int64_t channels;
  int64_t inner;  // in packs of N

  __device__ Share(Layout layout, int splits)
      : channel(blockIdx.x / splits),
        split(blockIdx.x % splits),
        channels(layout.channels),
        inner(layout.inner / N) {
    const int64_t packs = layout.outer * inner;
    begin = packs * split / splits;
    end = packs * (split + 1) / splits;
  }

  // Where pack `i` of the channel lies in memory.
  __device__ __forceinline__ int64_t at(int64_t i) const {
    return channels == 1 ? i : (i / inner * channels + channel) * inner + i % inner;
  }
};

// A single channel is one run: [1, 1, elements] lets it be loaded in packs.
inline Layout as_run(Layout layout) {
  return layout.channels == 1 ? Layout{1, 1, layout.outer * layout.inner} : layout;
}

template <class T, class Out>
bool fits_packs(Layout layout, const void* x, const void* y) {
  constexpr int N = kPerAccess<T, Out>;
  return layout.inner % N == 0 && aligned(x, sizeof(Pack<T, N>)) &&
         aligned(y, sizeof(Pack<Out, N>));
}

}  // namespace noisyq::cuda
