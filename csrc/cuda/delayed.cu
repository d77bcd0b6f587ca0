// Delayed scale: quantizes with the range of the batches before, while the absmax of this batch is
// reduced in the same pass. One read, one write, one launch. Here values do clip.
#include "walk.cuh"

namespace noisyq::cuda {
namespace {

constexpr int kGroup = 8;  // elements whose clipped bits make a byte

// A channel's absmax so far, and how many of its blocks are done. Both are 0 before and after.
struct Progress {
  uint32_t absmax;
  uint32_t done;
};

// Eight elements from `first` on, of which `count` exist.
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

  __device__ __forceinline__ uint32_t absmax(uint32_t largest) const {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      largest = max(largest, static_cast<uint32_t>(magnitude(values[i])));
    }
    return largest;
  }

  // Quantizes in place; the bits tell which were clipped.
  __device__ __forceinline__ uint8_t quantize(float scale, float qmax) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      bits |= static_cast<uint32_t>(Clipped<T>::apply(values[i], scale, qmax)) << i;
      values[i] = FakeQuantize<T>::apply(values[i], scale, qmax);
    }
    return static_cast<uint8_t>(bits);
  }
};

// Quantizes groups begin, begin + step, .. of a tensor of `elements`; returns their absmax.
template <class T, bool kWide>
__device__ uint32_t quantize_groups(const T* x, T* y, uint8_t* clipped, int64_t elements,
                                    int64_t begin, int64_t end, bool write, float scale,
                                    float qmax) {
  uint32_t largest = 0;
  for (int64_t g = begin + threadIdx.x; g < end; g += kThreads) {
    const int64_t left = elements - g * kGroup;
    const int count = left < kGroup ? static_cast<int>(left) : kGroup;
    Group<T, kWide> group(x + g * kGroup, count);
    largest = group.absmax(largest);
    if (write) {
      const uint8_t bits = group.quantize(scale, qmax);
      group.store_to(y + g * kGroup, count);
      if (clipped != nullptr) clipped[g] = bits;
    }
  }
  return largest;
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads)
    delayed_kernel(const T* x, T* y, uint8_t* clipped, int64_t elements, float qmax,
                   float* running_absmax, float averaging_constant, Progress* progress) {
  const int64_t groups = (elements + kGroup - 1) / kGroup;
  const float range = *running_absmax;
  const bool seen = range == range;
  const uint32_t largest = block_max(quantize_groups<T, kWide>(
      x, y, clipped, elements, groups * blockIdx.x / gridDim.x,
      groups * (blockIdx.x + 1) / gridDim.x, seen, scale_of(range, qmax), qmax));

  __shared__ uint32_t absmax_bits;
  __shared__ bool last;
  if (threadIdx.x == 0) {
    atomicMax(&progress->absmax, largest);
    __threadfence();
    last = atomicAdd(&progress->done, 1u) == gridDim.x - 1;
    if (last) absmax_bits = atomicMax(&progress->absmax, 0u);
  }
  __syncthreads();
  if (!last) return;

  const float absmax = absmax_from<T>(absmax_bits);
  // The first batch has no range before it: the last block quantizes it all by its own absmax.
  if (!seen) {
    quantize_groups<T, kWide>(x, y, clipped, elements, 0, groups, true, scale_of(absmax, qmax),
                              qmax);
  }
  if (threadIdx.x == 0) {
    *running_absmax = averaged(range, absmax, averaging_constant);
    *progress = {0u, 0u};
  }
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads)
    zero_clipped_kernel(const T* grad, T* out, const uint8_t* clipped, int64_t elements) {
  const int64_t groups = (elements + kGroup - 1) / kGroup;
  const int64_t end = groups * (blockIdx.x + 1) / gridDim.x;
  for (int64_t g = groups * blockIdx.x / gridDim.x + threadIdx.x; g < end; g += kThreads) {
    const int64_t left = elements - g * kGroup;
    const int count = left < kGroup ? static_cast<int>(left) : kGroup;
    Group<T, kWide> group(grad + g * kGroup, count);
    const uint32_t bits = clipped[g];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (bits >> i & 1u) group.values[i] = T{};
    }
    group.store_to(out + g * kGroup, count);
  }
}

template <class T>
bool whole_groups(const void* x, const void* y, int64_t elements) {
  return elements % kGroup == 0 && aligned(x, kWidestAccess) && aligned(y, kWidestAccess);
}

}  // namespace

Status fake_quantize_delayed(DType dtype, const void* x, void* y, uint8_t* clipped,
                             int64_t elements, int blocks, int qmax, float* running_absmax,
                             float averaging_constant, void* progress, Stream stream) {
  return with_type(dtype, [&](auto type) -> Status {
    using T = decltype(type);
    const auto kernel =
        whole_groups<T>(x, y, elements) ? delayed_kernel<T, true> : delayed_kernel<T, false>;
    kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const T*>(x), static_cast<T*>(y), clipped, elements, qmax, running_absmax,
        averaging_constant, static_cast<Progress*>(progress));
    return cudaGetLastError();
  });
}

Status zero_clipped(DType dtype, const void* grad, void* out, const uint8_t* clipped,
                    int64_t elements, int blocks, Stream stream) {
  return with_type(dtype, [&](auto type) -> Status {
    using T = decltype(type);
    const auto kernel = whole_groups<T>(grad, out, elements) ? zero_clipped_kernel<T, true>
                                                             : zero_clipped_kernel<T, false>;
    kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const T*>(grad), static_cast<T*>(out), clipped, elements);
    return cudaGetLastError();
  });
}

}  // namespace noisyq::cuda
