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

  explicit __device__ GroupShare(Layout layout)
      : elements(layout.outer * layout.channels * layout.inner) {
    const int64_t groups = (elements + kGroup - 1) / kGroup;
    begin = groups * blockIdx.x / gridDim.x;
    end = groups * (blockIdx.x + 1) / gridDim.x;
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

  // On to the next element; whether its channel is another.
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

// Quantizes a group in place, `range_of` each channel; the bits tell what was clipped.
template <class T, bool kWide, Channels kChannels, class RangeOf>
__device__ __forceinline__ uint8_t quantize_group(Group<T, kWide>& group,
                                                  ChannelWalk<kChannels> at, Layout layout,
                                                  float qmax, const RangeOf& range_of) {
  float scale = scale_of(range_of(at.channel), qmax);
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (i > 0 && at.advance(layout)) scale = scale_of(range_of(at.channel), qmax);
    const float rounded = rounded_of(to_float(group.values[i]), scale);
    bits |= static_cast<uint32_t>(is_clipped(rounded, -qmax, qmax)) << i;
    group.values[i] = from_float<T>(clamp_to(rounded, -qmax, qmax) * scale);
  }
  return static_cast<uint8_t>(bits);
}

inline bool whole_groups(const void* x, const void* y, Layout layout) {
  return layout.outer * layout.channels * layout.inner % kGroup == 0 &&
         aligned(x, kWidestAccess) && aligned(y, kWidestAccess);
}

template <auto kValue>
using Constant = std::integral_constant<decltype(kValue), kValue>;

// What body(wide, channels) returns, of two compile-time constants that name the kernel's variant.
template <class Body>
Status with_groups(const void* x, const void* y, Layout layout, const Body& body) {
  const auto with_channels = [&](auto wide) -> Status {
    if (layout.channels == 1) return body(wide, Constant<Channels::one>{});
    if (layout.inner % kGroup == 0) return body(wide, Constant<Channels::one_for_each_group>{});
    return body(wide, Constant<Channels::any>{});
  };
  return whole_groups(x, y, layout) ? with_channels(Constant<true>{})
                                    : with_channels(Constant<false>{});
}

}  // namespace noisyq::cuda
