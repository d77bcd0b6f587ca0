// The grid as a kernel argument, for kernels that handle every grid with the arithmetic of the
// affine one, of which the others are special cases. The signed grid has kernels of its own.
#pragma once

#include "groups.cuh"

namespace noisyq::cuda {

// Two integer maxima, as in extremes_of(): a maximum of both is the absmax.
template <class T>
struct Extremes {
  uint32_t low = 0;
  uint32_t high = 0;

  template <int N>
  __device__ __forceinline__ void take(const Pack<T, N>& pack) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      low = max(static_cast<int32_t>(low), static_cast<int32_t>(falling(pack.values[i])));
      high = max(static_cast<int32_t>(high), static_cast<int32_t>(rising(pack.values[i])));
    }
  }

  __device__ __forceinline__ Extremes over_block() const {
    return {block_max(low), block_max(high)};
  }
};

struct AnyGrid {
  GridKind kind;
  Codes codes;

  explicit AnyGrid(Grid grid) : kind(grid.kind), codes(codes_on(grid)) {}

  __host__ __device__ bool is_affine() const { return kind == GridKind::is_affine; }

  template <class T>
  __device__ __forceinline__ Range range_of(Extremes<T> found) const {
    if (kind == GridKind::is_signed || kind == GridKind::is_full) {
      return {0.0f, absmax_from<T>(max(found.low, found.high))};
    }
    const Range range = extremes_of(T{}, static_cast<SignedBits<T>>(found.low),
                                    static_cast<SignedBits<T>>(found.high));
    return {is_affine() ? range.low : 0.0f, range.high};
  }

  __device__ __forceinline__ Levels levels_of(Range range) const {
    return noisyq::levels_of(range, codes);
  }
};

// The range of each channel in memory: all high ends; on an affine grid all low ends before these.
struct Ranges {
  AnyGrid grid;
  float* range;
  int64_t channels;

  __device__ __forceinline__ void set(int64_t channel, Range value) const {
    if (grid.is_affine()) range[channel] = value.low;
    range[high(channel)] = value.high;
  }

  __device__ __forceinline__ Levels operator()(int64_t channel) const {
    return grid.levels_of({grid.is_affine() ? range[channel] : 0.0f, range[high(channel)]});
  }

 private:
  __device__ __forceinline__ int64_t high(int64_t channel) const {
    return grid.is_affine() ? channels + channel : channel;
  }
};

// Which elements are marked, in `bits`; none if that is null.
struct Marks {
  uint8_t* bits;
  bool negative;
  bool clipped;

  Marks(Mask mask, Grid grid)
      : bits(mask.masked == Masked::none ? nullptr : mask.bits),
        negative(mask.masked == Masked::negative || grid.kind == GridKind::is_unsigned),
        clipped(mask.masked == Masked::clipped) {}

  __device__ __forceinline__ bool operator()(float x, float rounded, Levels levels) const {
    return (negative & (x < 0.0f)) | (clipped & is_clipped(rounded, levels.low, levels.high));
  }
};

}  // namespace noisyq::cuda
