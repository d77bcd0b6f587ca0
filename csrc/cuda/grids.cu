// Any grid and any layout, in two launches: one reduces the range of each channel, one maps with
// given ranges.
#include "grids.cuh"
#include "known.cuh"

namespace noisyq::cuda {
namespace {

// What becomes known of each channel; `scale` and `zero` may be null. `progress` is its two maxima
// and how many of its blocks are done: 0 before and after.
struct Found {
  Ranges ranges;
  float* scale;
  uint8_t* zero;
  MovingAverage average;
  uint32_t* progress;

  template <class T>
  __device__ __forceinline__ void take(int64_t channel, Extremes<T> of_block, int blocks) const {
    uint32_t* of_channel = progress + 3 * channel;
    atomicMax(of_channel, of_block.low);
    atomicMax(of_channel + 1, of_block.high);
    __threadfence();
    if (atomicAdd(of_channel + 2, 1u) < static_cast<uint32_t>(blocks - 1)) return;
    __threadfence();  // The last block sees what all others did.
    const Extremes<T> found{atomicExch(of_channel, 0u), atomicExch(of_channel + 1, 0u)};
    of_channel[2] = 0;
    write(channel, ranges.grid.range_of(found));
  }

 private:
  __device__ __forceinline__ void write(int64_t channel, Range range) const {
    if (scale != nullptr) {
      const Levels levels = ranges.grid.levels_of(range);
      scale[channel] = levels.scale;
      zero[channel] = static_cast<uint8_t>(levels.zero);
    }
    if (ranges.grid.is_affine()) {
      observe(average, channel, ranges.channels, range);
    } else {
      observe(average, channel, range.high);
    }
    ranges.set(channel, range);
  }
};

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    range_kernel(const T* x, Layout layout, int splits, Found found) {
  const Share<N> share(layout, splits);
  Extremes<T> extremes;
  share.forwards(reinterpret_cast<const Pack<T, N>*>(x),
                 [&] { return [&](int64_t, const Pack<T, N>& pack) { extremes.take(pack); }; });
  extremes = extremes.over_block();
  if (threadIdx.x == 0) found.take(share.channel, extremes, splits);
}

template <class T>
Status find_ranges(const T* x, Layout layout, int splits, Found found, Stream stream) {
  layout = as_run(layout);
  const auto kernel =
      fits_packs<T, T>(layout, x, x) ? range_kernel<T, kPerAccess<T, T>> : range_kernel<T, 1>;
  return launch(kernel, {layout.channels * splits, kThreads}, stream, x, layout, splits, found);
}

template <class T, bool kWide, Channels kChannels>
__global__ void __launch_bounds__(kThreads)
    map_kernel(const T* x, T* y, Layout layout, Ranges ranges, Marks marks) {
  // The end first: what was reduced last is still in the cache.
  const GroupShare share(layout, gridDim.x - 1 - blockIdx.x);
  const Levels first_levels = ranges(0);
  const auto levels_of = [&](int64_t channel) {
    return kChannels == Channels::one ? first_levels : ranges(channel);
  };
  for (int64_t g = share.begin + threadIdx.x; g < share.end; g += kThreads) {
    const int64_t first = g * kGroup;
    Group<T, kWide> group(x + first, share.size_of(g));
    const ChannelWalk<kChannels> at(layout, first);
    const uint8_t bits = quantize_group(group, at, layout, levels_of, marks);
    group.store_to(y + first, share.size_of(g));
    if (marks.bits != nullptr) marks.bits[g] = bits;
  }
}

template <class T>
Status map(const T* x, T* y, Layout layout, int blocks, Ranges ranges, Marks marks, Stream stream) {
  return with_width(x, y, layout, [&](auto wide) {
    const auto kernel = layout.channels == 1 ? map_kernel<T, wide, Channels::one>
                                             : map_kernel<T, wide, Channels::any>;
    return launch(kernel, {blocks, kThreads}, stream, x, y, layout, ranges, marks);
  });
}

}  // namespace

Status fake_quantize_on_grid(DType dtype, const void* x, void* y, Mask mask, Layout layout,
                             Splits splits, float* range, uint32_t* progress, Grid grid,
                             MovingAverage average, Stream stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* in = static_cast<const T*>(x);
    const Ranges ranges{AnyGrid(grid), range, layout.channels};
    const Found found{ranges, nullptr, nullptr, average, progress};
    if (const Status status = find_ranges(in, layout, splits.of_reduction, found, stream)) {
      return status;
    }
    return map(in, static_cast<T*>(y), layout, splits.of_map, ranges, Marks(mask, grid), stream);
  });
}

Status fake_quantize_fixed_range_on_grid(DType dtype, const void* x, const float* range, void* y,
                                         Mask mask, Layout layout, int blocks, Grid grid,
                                         Stream stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    // Not written to.
    const Ranges ranges{AnyGrid(grid), const_cast<float*>(range), layout.channels};
    return map(static_cast<const T*>(x), static_cast<T*>(y), layout, blocks, ranges,
               Marks(mask, grid), stream);
  });
}

Status quantize_on_grid(DType dtype, const void* x, void* codes, float* scale, uint8_t* zero,
                        Layout layout, Splits splits, float* range, uint32_t* progress, Grid grid,
                        Stream stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* in = static_cast<const T*>(x);
    const Ranges ranges{AnyGrid(grid), range, layout.channels};
    const Found found{ranges, scale, zero, {}, progress};
    if (const Status status = find_ranges(in, layout, splits.of_reduction, found, stream)) {
      return status;
    }
    return map_known<Code<T>>(in, static_cast<uint8_t*>(codes), layout, splits.of_map, ranges,
                              stream);
  });
}

}  // namespace noisyq::cuda
