// A walk over a tensor's memory in groups of eight elements, whose clipped bits make a byte. A
// group may hold elements of several channels.
#pragma once

#include <type_traits>

#include "walk.cuh"

namespace noisyq::cuda {

constexpr int kGroup = 8;

// Eight elements from `first` on, of which `count` exist; where kWide, all do and lie aligned.
template <class T, bool kWide>
struct Group {
  T values[kGroup];

  __device__ __forceinline__ Group(const T* first, int count) {
    if constexpr (kWide) {
      constexpr int N = kPerAccess<T, T>;
#pragma unroll
      for (int i = 0; i < kGroup; i += N) {
        const auto pack = load(reinterpret_cast<const Pack<T, N>*>(first + i));
#pragma unroll
        for (int j = 0; j < N; ++j) values[i + j] = pack.values[j];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) values[i] = i < count ? first[i] : T{};
    }
  }

  __device__ __forceinline__ void store_to(T* first, int count) const {
    if constexpr (kWide) {
      constexpr int N = kPerAccess<T, T>;
#pragma unroll
      for (int i = 0; i < kGroup; i += N) {
        Pack<T, N> pack;
#pragma unroll
        for (int j = 0; j < N; ++j) pack.values[j] = values[i + j];
        store(reinterpret_cast<Pack<T, N>*>(first + i), pack);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (i < count) first[i] = values[i];
      }
    }
  }
};

// The groups of one block.
struct GroupShare {
  int64_t begin;
  int64_t end;
  int64_t elements;

  explicit __device__ GroupShare(Layout layout, unsigned share = blockIdx.x)
      : elements(layout.outer * layout.channels * layout.inner) {
    const int64_t groups = (elements + kGroup - 1) / kGroup;
    begin = groups * share / gridDim.x;
    end = groups * (share + 1) / gridDim.x;
  }

  __device__ __forceinline__ int size_of(int64_t group) const {
    const int64_t left = elements - group * kGroup;
    return left < kGroup ? static_cast<int>(left) : kGroup;
  }
};

// How channels lie over groups: all elements have one, all elements of a group have the same, or
// each may have another.
enum class Channels { one, one_for_each_group, any };

// The channel of an element, from the first of a group on.
template <Channels kChannels>
struct ChannelWalk {
  int64_t channel = 0;
  int64_t within = 0;  // of `inner` elements

  __device__ __forceinline__ ChannelWalk(Layout layout, int64_t element) {
    if constexpr (kChannels != Channels::one) {
      channel = element / layout.inner % layout.channels;
      if constexpr (kChannels == Channels::any) within = element % layout.inner;
    }
  }

  // Moves on to the next element; returns whether its channel differs.
  __device__ __forceinline__ bool advance(Layout layout) {
    if constexpr (kChannels == Channels::any) {
      if (++within < layout.inner) return false;
      within = 0;
      if (++channel == layout.channels) channel = 0;
      return true;
    }
    return false;
  }
};

// Quantizes a group in place, with levels_of(channel); the bits are marked(x, rounded, levels).
template <class T, bool kWide, Channels kChannels, class LevelsOf, class Marked>
__device__ __forceinline__ uint8_t quantize_group(Group<T, kWide>& group, ChannelWalk<kChannels> at,
                                                  Layout layout, const LevelsOf& levels_of,
                                                  const Marked& marked) {
  Levels levels = levels_of(at.channel);
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (i > 0 && at.advance(layout)) levels = levels_of(at.channel);
    const float x = to_float(group.values[i]);
    const float rounded = rounded_of(x, levels.scale);
    bits |= static_cast<uint32_t>(marked(x, rounded, levels)) << i;
    group.values[i] = from_float<T>(clamp_to(rounded, levels.low, levels.high) * levels.scale);
  }
  return static_cast<uint8_t>(bits);
}

struct MarkClipped {
  __device__ bool operator()(float, float rounded, Levels levels) const {
    return is_clipped(rounded, levels.low, levels.high);
  }
};

inline bool whole_groups(const void* x, const void* y, Layout layout) {
  return layout.outer * layout.channels * layout.inner % kGroup == 0 && aligned(x, kWidestAccess) &&
         aligned(y, kWidestAccess);
}

template <auto kValue>
using Constant = std::integral_constant<decltype(kValue), kValue>;

// What body(wide) returns, of a compile-time constant that names the kernel's variant.
template <class Body>
Status with_width(const void* x, const void* y, Layout layout, const Body& body) {
  return whole_groups(x, y, layout) ? body(Constant<true>{}) : body(Constant<false>{});
}

// The same of body(wide, channels), of a tensor with several channels.
template <class Body>
Status with_mixed_groups(const void* x, const void* y, Layout layout, const Body& body) {
  return with_width(x, y, layout, [&](auto wide) {
    return layout.inner % kGroup == 0 ? body(wide, Constant<Channels::one_for_each_group>{})
                                      : body(wide, Constant<Channels::any>{});
  });
}

// The same of any tensor.
template <class Body>
Status with_groups(const void* x, const void* y, Layout layout, const Body& body) {
  if (layout.channels > 1) return with_mixed_groups(x, y, layout, body);
  return with_width(x, y, layout, [&](auto wide) { return body(wide, Constant<Channels::one>{}); });
}

}  // namespace noisyq::cuda
