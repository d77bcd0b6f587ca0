// Contiguous channels (weights, groups, tokens), on the signed grid of one tensor or of many, in
// one launch: a block for each channel. The channel stays in shared memory between its range and
// its codes, so that it is read once.
#include "grids.cuh"

namespace noisyq::cuda {
namespace {

// Channels up to this size stay on chip: the shared memory that needs no opt-in.
constexpr int kKeptBytes = 48 * 1024 - 256;
constexpr int kMaxThreads = 512;

template <class T>
__host__ __device__ bool is_kept(int64_t inner) {
  return inner * static_cast<int64_t>(sizeof(T)) <= kKeptBytes;
}

// Passed by value: kernel arguments need no copy to the device. 4 KB is the limit.
constexpr int kTensorsPerLaunch = 80;
struct Table {
  const void* x[kTensorsPerLaunch];
  void* y[kTensorsPerLaunch];
  float* scale[kTensorsPerLaunch];
  int64_t inner[kTensorsPerLaunch];
  int first_block[kTensorsPerLaunch + 1];
  int qmax[kTensorsPerLaunch];
  int count;
};
static_assert(sizeof(Table) <= 4096, "kernel arguments are limited to 4 KB");

// Computes the levels of a channel on the signed grid. `scale` may be null.
template <class T>
struct SignedChannel {
  struct Found {
    uint32_t absmax = 0;

    template <int N>
    __device__ __forceinline__ void take(const Pack<T, N>& pack) {
      absmax = absmax_of_pack(pack, absmax);
    }
  };
  static constexpr bool kMarks = false;

  float qmax;
  float* scale;

  __device__ __forceinline__ Levels levels_of(Found found) const {
    const Levels levels = symmetric(scale_of(absmax_from<T>(block_max(found.absmax)), qmax), qmax);
    if (scale != nullptr && threadIdx.x == 0) *scale = levels.scale;
    return levels;
  }
};

// The same on any grid. `scale` with `zero`, and the bits of the marks, may be null.
template <class T>
struct ChannelOnGrid {
  using Found = Extremes<T>;
  static constexpr bool kMarks = true;

  AnyGrid grid;
  float* scale;
  uint8_t* zero;
  Marks marks;

  __device__ __forceinline__ Levels levels_of(Found found) const {
    const Levels levels = grid.levels_of(grid.range_of(found.over_block()));
    if (scale != nullptr && threadIdx.x == 0) {
      *scale = levels.scale;
      *zero = static_cast<uint8_t>(levels.zero);
    }
    return levels;
  }
};

// If `keep`, `kept` holds the channel; otherwise it is read twice.
template <class Op, class T, class Out, int N, class Channel>
__device__ __forceinline__ void quantize_packs(const T* x, Out* y, int64_t inner,
                                               const Channel& channel, bool keep,
                                               Pack<T, N>* kept) {
  const auto* packs = reinterpret_cast<const Pack<T, N>*>(x);
  const int64_t count = inner / N;
  typename Channel::Found found;
  const auto block = static_cast<int>(blockDim.x);
  const auto at = [](int64_t i) { return i; };
  const auto for_each = [&](const Pack<T, N>* from, const auto& take) {
    for_each_pack(from, block, int64_t{0}, count, int64_t{block} * kInFlight, at,
                  [&] { return take; });
  };
  for_each(packs, [&](int64_t i, const Pack<T, N>& pack) {
    if (keep) store(kept + i, pack);
    found.take(pack);
  });
  const Levels levels = channel.levels_of(found);
  if constexpr (Channel::kMarks && std::is_same_v<T, Out>) {
    if (channel.marks.bits != nullptr) {
      __syncthreads();  // others kept some packs of a group
      const auto* from = reinterpret_cast<const T*>(keep ? kept : packs);
      for (int64_t g = threadIdx.x; g < inner / kGroup; g += block) {
        Group<T, (N > 1)> group(from + g * kGroup, kGroup);
        const ChannelWalk<Channels::one> at({}, 0);
        channel.marks.bits[g] =
            quantize_group(group, at, {}, [&](int64_t) { return levels; }, channel.marks);
        group.store_to(y + g * kGroup, kGroup);
      }
      return;
    }
  }
  auto* out = reinterpret_cast<Pack<Out, N>*>(y);
  // Each thread maps the very packs that it kept: no barrier is needed.
  for_each(keep ? kept : packs, [&](int64_t i, const Pack<T, N>& pack) {
    store(out + i, map_pack<Op, Out>(pack, levels));
  });
}

template <class Op, class T, class Out, class Channel>
__device__ __forceinline__ void quantize_channel(const T* x, Out* y, int64_t inner,
                                                 const Channel& channel) {
  const bool keep = is_kept<T>(inner);
  constexpr int N = kPerAccess<T, Out>;
  const bool wide = inner % N == 0 && reinterpret_cast<uintptr_t>(x) % sizeof(Pack<T, N>) == 0 &&
                    reinterpret_cast<uintptr_t>(y) % sizeof(Pack<Out, N>) == 0;
  if (wide) {
    quantize_packs<Op, T, Out, N>(x, y, inner, channel, keep,
                                  reinterpret_cast<Pack<T, N>*>(shared_memory()));
  } else {
    quantize_packs<Op, T, Out, 1>(x, y, inner, channel, keep,
                                  reinterpret_cast<Pack<T, 1>*>(shared_memory()));
  }
}

template <class Op, class T, class Out>
__global__ void __launch_bounds__(kMaxThreads)
    channels_kernel(const __grid_constant__ Table table) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (static_cast<int>(blockIdx.x) >= table.first_block[middle]) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int64_t channel = blockIdx.x - table.first_block[low];
  const int64_t inner = table.inner[low];
  const T* x = static_cast<const T*>(table.x[low]) + channel * inner;
  Out* y = static_cast<Out*>(table.y[low]) + channel * inner;
  float* scale = table.scale[low] == nullptr ? nullptr : table.scale[low] + channel;
  const float qmax = table.qmax[low];
  quantize_channel<Op>(x, y, inner, SignedChannel<T>{qmax, scale});
}

template <class Op, class T, class Out>
__global__ void __launch_bounds__(kMaxThreads)
    channels_on_grid_kernel(const T* x, Out* y, int64_t inner, ChannelOnGrid<T> channel) {
  const int64_t index = blockIdx.x;
  if (channel.scale != nullptr) {
    channel.scale += index;
    channel.zero += index;
  }
  if (channel.marks.bits != nullptr) channel.marks.bits += index * inner / kGroup;
  quantize_channel<Op>(x + index * inner, y + index * inner, inner, channel);
}

// Blocks for so many channels, of at most `longest` elements, of which they keep at most `kept`.
template <class T, class Out>
LaunchGrid grid_of(int64_t channels, int64_t longest, int64_t kept) {
  const int64_t per_warp = kWarp * kPerAccess<T, Out>;
  const int64_t warps = min((longest + per_warp - 1) / per_warp, int64_t{kMaxThreads / kWarp});
  return {channels, max(warps, int64_t{1}) * kWarp, kept * sizeof(T)};
}

template <class Op, class T, class Out>
Status quantize_all(const ChannelTensor* tensors, int count, Stream stream) {
  for (int start = 0; start < count; start += kTensorsPerLaunch) {
    Table table{};
    table.count = min(count - start, kTensorsPerLaunch);
    int64_t blocks = 0, longest = 0, kept = 0;
    for (int i = 0; i < table.count; ++i) {
      const ChannelTensor& tensor = tensors[start + i];
      table.x[i] = tensor.x;
      table.y[i] = tensor.y;
      table.scale[i] = tensor.scale;
      table.inner[i] = tensor.inner;
      table.qmax[i] = tensor.qmax;
      table.first_block[i] = static_cast<int>(blocks);
      blocks += tensor.channels;
      longest = max(longest, tensor.inner);
      if (is_kept<T>(tensor.inner)) kept = max(kept, tensor.inner);
    }
    if (blocks == 0) continue;
    const LaunchGrid grid = grid_of<T, Out>(blocks, longest, kept);
    if (const Status status = launch(channels_kernel<Op, T, Out>, grid, stream, table)) {
      return status;
    }
  }
  return cudaSuccess;
}

template <class Op, class T, class Out>
Status quantize_on_grid(const void* x, void* y, int64_t channels, int64_t inner,
                        ChannelOnGrid<T> channel, Stream stream) {
  const LaunchGrid grid = grid_of<T, Out>(channels, inner, is_kept<T>(inner) ? inner : 0);
  return launch(channels_on_grid_kernel<Op, T, Out>, grid, stream, static_cast<const T*>(x),
                static_cast<Out*>(y), inner, channel);
}

}  // namespace

Status fake_quantize_channels(DType dtype, const ChannelTensor* tensors, int count, Stream stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return quantize_all<FakeQuantize<T>, T, T>(tensors, count, stream);
  });
}

Status quantize_channels(DType dtype, const ChannelTensor* tensors, int count, Stream stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return quantize_all<Code<T>, T, int8_t>(tensors, count, stream);
  });
}

Status fake_quantize_channels_on_grid(DType dtype, const void* x, void* y, Mask mask,
                                      int64_t channels, int64_t inner, Grid grid, Stream stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const ChannelOnGrid<T> channel{AnyGrid(grid), nullptr, nullptr, Marks(mask, grid)};
    return quantize_on_grid<FakeQuantize<T>, T, T>(x, y, channels, inner, channel, stream);
  });
}

Status quantize_channels_on_grid(DType dtype, const void* x, void* codes, float* scale,
                                 uint8_t* zero, int64_t channels, int64_t inner, Grid grid,
                                 Stream stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const ChannelOnGrid<T> channel{AnyGrid(grid), scale, zero, Marks({}, grid)};
    return quantize_on_grid<Code<T>, T, uint8_t>(x, codes, channels, inner, channel, stream);
  });
}

}  // namespace noisyq::cuda
