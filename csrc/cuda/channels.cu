// Contiguous channels (weights), of one tensor or of many, in one launch: a block for each channel.
// The channel stays in shared memory between its absmax and its codes, so that it is read once.
#include "device.cuh"

namespace noisyq::cuda {
namespace {

// Channels up to this size stay on chip; it is what every architecture grants without asking.
constexpr int kKeptBytes = 48 * 1024 - 256;
constexpr int kMaxThreads = 512;

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

// One channel. `kept` holds it where `keep`; otherwise it is read twice.
template <class Op, class T, class Out, int N>
__device__ void quantize_channel(const T* x, Out* y, float* scale_out, int64_t inner, float qmax,
                                 bool keep, Pack<T, N>* kept) {
  const auto* packs = reinterpret_cast<const Pack<T, N>*>(x);
  const int64_t count = inner / N;
  uint32_t largest = 0;
  const auto block = static_cast<int>(blockDim.x);
  const auto at = [](int64_t i) { return i; };
  const auto for_each = [&](const Pack<T, N>* from, const auto& take) {
    for_each_pack(from, block, int64_t{0}, count, int64_t{block} * kInFlight, at,
                  [&] { return take; });
  };
  for_each(packs, [&](int64_t i, const Pack<T, N>& pack) {
    if (keep) store(kept + i, pack);
    largest = absmax_of_pack(pack, largest);
  });
  const float scale = scale_of(absmax_from<T>(block_max(largest)), qmax);
  if (scale_out != nullptr && threadIdx.x == 0) *scale_out = scale;
  auto* out = reinterpret_cast<Pack<Out, N>*>(y);
  // Each thread maps the very packs that it kept: no barrier is needed.
  for_each(keep ? kept : packs, [&](int64_t i, const Pack<T, N>& pack) {
    store(out + i, map_pack<Op, Out>(pack, scale, qmax));
  });
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
  const bool keep = inner * static_cast<int64_t>(sizeof(T)) <= kKeptBytes;

  constexpr int N = kPerAccess<T, Out>;
  const bool wide = inner % N == 0 && reinterpret_cast<uintptr_t>(x) % sizeof(Pack<T, N>) == 0 &&
                    reinterpret_cast<uintptr_t>(y) % sizeof(Pack<Out, N>) == 0;
  if (wide) {
    quantize_channel<Op, T, Out, N>(x, y, scale, inner, qmax, keep,
                                    reinterpret_cast<Pack<T, N>*>(shared_memory()));
  } else {
    quantize_channel<Op, T, Out, 1>(x, y, scale, inner, qmax, keep,
                                    reinterpret_cast<Pack<T, 1>*>(shared_memory()));
  }
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
      const int64_t bytes = tensor.inner * static_cast<int64_t>(sizeof(T));
      if (bytes <= kKeptBytes) kept = max(kept, bytes);
    }
    if (blocks == 0) continue;
    const int64_t per_warp = kWarp * kPerAccess<T, Out>;
    const int64_t warps = min((longest + per_warp - 1) / per_warp, int64_t{kMaxThreads / kWarp});
    const Grid grid{blocks, max(warps, int64_t{1}) * kWarp, static_cast<size_t>(kept)};
    if (const Status status = launch(channels_kernel<Op, T, Out>, grid, stream, table)) {
      return status;
    }
  }
  return cudaSuccess;
}

}  // namespace

Status fake_quantize_channels(DType dtype, const ChannelTensor* tensors, int count,
                              Stream stream) {
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

}  // namespace noisyq::cuda
