// A walk over the elements of one channel of a tensor seen as [outer, channels, inner], which
// `splits` blocks share. Blocks are numbered share by share within a channel.
#pragma once

#include "device.cuh"

namespace noisyq::cuda {

constexpr int kThreads = 256;

template <int N>
struct Share {
  int64_t channel;
  int split;
  int splits;
  int64_t channels;
  int64_t inner;  // in packs of N
  int64_t packs;  // of the channel

  __device__ Share(Layout layout, int splits)
      : channel(blockIdx.x / splits),
        split(blockIdx.x % splits),
        splits(splits),
        channels(layout.channels),
        inner(layout.inner / N),
        packs(layout.outer * inner) {}

  // What make_take() returns is called with (at, pack) for each pack, which lies `at` in memory.
  // All blocks together go through the channel from its start to its end.
  template <class P, class MakeTake>
  __device__ __forceinline__ void forwards(const P* memory, const MakeTake& make_take) const {
    constexpr int64_t kTile = kThreads * kInFlight;
    walk(memory, split * kTile, packs, splits * kTile, make_take);
  }

  // The same from its end: what a launch before has read last is still in the cache. Blocks start
  // in the order of their numbers.
  template <class P, class MakeTake>
  __device__ __forceinline__ void backwards(const P* memory, const MakeTake& make_take) const {
    const int64_t share = splits - 1 - split;
    walk(memory, packs * share / splits, packs * (share + 1) / splits, kThreads * kInFlight,
         make_take);
  }

 private:
  template <class P, class MakeTake>
  __device__ __forceinline__ void walk(const P* memory, int64_t begin, int64_t end, int64_t stride,
                                       const MakeTake& make_take) const {
    const auto at = [&](int64_t i) {
      return channels == 1 ? i : (i / inner * channels + channel) * inner + i % inner;
    };
    for_each_pack(memory, kThreads, begin, end, stride, at, [&] {
      const auto take = make_take();
      return [=](int64_t i, const P& pack) { take(at(i), pack); };
    });
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
