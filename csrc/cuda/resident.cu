// Dynamic absmax of a tensor that fits on chip: one cooperative launch. Each block keeps its share
// in shared memory between the reduction and the map, so that memory is read once.
#include <cooperative_groups.h>

#include "walk.cuh"

namespace noisyq::cuda {
namespace {

constexpr int kResidentThreads = 1024;
constexpr int kReservedBytes = 1024;  // static shared memory, and the driver's share

template <class T, int N>
__global__ void __launch_bounds__(kResidentThreads, 1)
    resident_kernel(const T* x, T* y, int64_t elements, uint32_t* partial, float qmax,
                    MovingAverage average) {
  auto* kept = reinterpret_cast<Pack<T, N>*>(shared_memory());
  const auto* packs = reinterpret_cast<const Pack<T, N>*>(x);
  auto* out = reinterpret_cast<Pack<T, N>*>(y);
  const int64_t count = elements / N;
  const int64_t begin = count * blockIdx.x / gridDim.x;
  const auto size = static_cast<int>(count * (blockIdx.x + 1) / gridDim.x - begin);

  uint32_t largest = 0;
  const auto at = [&](int i) { return begin + i; };
  for_each_pack(packs, kResidentThreads, 0, size, kResidentThreads * kInFlight, at, [&] {
    return [&](int i, const Pack<T, N>& pack) {
      store(kept + i, pack);
      largest = absmax_of_pack(pack, largest);
    };
  });
  largest = block_max(largest);
  if (threadIdx.x == 0) partial[blockIdx.x] = largest;
  cooperative_groups::this_grid().sync();

  largest = 0;
  for (int i = threadIdx.x; i < static_cast<int>(gridDim.x); i += kResidentThreads) {
    largest = max(largest, partial[i]);
  }
  const float absmax = absmax_from<T>(block_max(largest));
  const float scale = scale_of(absmax, qmax);
  if (blockIdx.x == 0 && threadIdx.x == 0) observe(average, 0, absmax);
  // Each thread maps the very packs that it kept: no barrier is needed.
#pragma unroll 4
  for (int i = threadIdx.x; i < size; i += kResidentThreads) {
    store(out + begin + i, map_pack<FakeQuantize<T>, T>(load(kept + i), symmetric(scale, qmax)));
  }
}

template <class T, int N>
Status quantize_packs(const T* x, T* y, int64_t elements, int blocks, uint32_t* partial, int qmax,
                      MovingAverage average, Stream stream) {
  const auto kernel = resident_kernel<T, N>;
  const int64_t packs = (elements / N + blocks - 1) / blocks;
  const auto bytes = static_cast<size_t>(packs) * sizeof(Pack<T, N>);
  if (const Status status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(bytes))) {
    return status;
  }
  return launch(kernel, {blocks, kResidentThreads, bytes, true}, stream, x, y, elements, partial,
                qmax, average);
}

}  // namespace

int64_t resident_bytes_per_block(int device) {
  int cooperative = 0, shared = 0;
  cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return cooperative ? shared - kReservedBytes : 0;
}

Status fake_quantize_resident(DType dtype, const void* x, void* y, int64_t elements, int blocks,
                              uint32_t* partial, int qmax, MovingAverage average, Stream stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto quantize = fits_packs<T, T>({1, 1, elements}, x, y)
                              ? quantize_packs<T, kPerAccess<T, T>>
                              : quantize_packs<T, 1>;
    return quantize(static_cast<const T*>(x), static_cast<T*>(y), elements, blocks, partial, qmax,
                    average, stream);
  });
}

}  // namespace noisyq::cuda
