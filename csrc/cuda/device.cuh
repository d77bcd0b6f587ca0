// Common code of the CUDA kernels: launches, 16-byte accesses, the maximum over a block.
#pragma once

#include <cuda_runtime.h>

#include "../kernels.h"
#include "../operators.h"

namespace noisyq::cuda {

constexpr int kWarp = 32;
constexpr int kWidestAccess = 16;

struct LaunchGrid {
  int64_t blocks;
  int64_t threads;
  size_t shared_bytes = 0;   // what `shared_memory` is to hold
  bool cooperative = false;  // all blocks run at once, and may wait for each other
};

// Plain C++ rather than <<<>>>: a compiler for the host alone can read it (tests/cuda_emulator).
template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), LaunchGrid grid, Stream stream,
              Arguments... arguments) {
  if (grid.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(grid.blocks);
  config.blockDim = static_cast<unsigned>(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cooperative;
  config.numAttrs = grid.cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(kWidestAccess) unsigned char shared[];
  return shared;
}

// How many elements one access holds, for the wider of the types read and written.
template <class T, class Out>
constexpr int kPerAccess =
    kWidestAccess / static_cast<int>(sizeof(T) > sizeof(Out) ? sizeof(T) : sizeof(Out));

// N values that are loaded or stored at once.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T values[N];
};

template <int kBytes>
struct WordOf;
template <>
struct WordOf<16> {
  using Type = uint4;
};
template <>
struct WordOf<8> {
  using Type = uint2;
};
template <>
struct WordOf<4> {
  using Type = uint32_t;
};
template <>
struct WordOf<2> {
  using Type = uint16_t;
};
template <>
struct WordOf<1> {
  using Type = uint8_t;
};

// The compiler copies a struct member by member; as a word it is one access.
template <class P>
__device__ __forceinline__ P load(const P* pack) {
  using Word = typename WordOf<sizeof(P)>::Type;
  return bit_cast<P>(*reinterpret_cast<const Word*>(pack));
}

template <class P>
__device__ __forceinline__ void store(P* pack, const P& values) {
  using Word = typename WordOf<sizeof(P)>::Type;
  *reinterpret_cast<Word*>(pack) = bit_cast<Word>(values);
}

constexpr int kInFlight = 2;

// A block of `block` threads takes the packs `begin` to `end` in tiles of block * kInFlight, the
// first at `begin` and each `stride` after the one before. What make_take() returns is called with
// (i, pack) for each i, which lies at packs[at(i)]. The first loads are under way before that, and
// all of a tile before one is used, also at the end, where a loop that the compiler unrolls would
// take its last packs one by one.
template <class P, class Index, class At, class MakeTake>
__device__ __forceinline__ void for_each_pack(const P* packs, int block, Index begin, Index end,
                                              Index stride, const At& at,
                                              const MakeTake& make_take) {
  Index first = begin + threadIdx.x;
  P batch[kInFlight];
  const auto load_batch = [&] {
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (first + k * block < end) batch[k] = load(packs + at(first + k * block));
    }
  };
  load_batch();
  const auto take = make_take();
#pragma unroll 1
  while (first < end) {
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (first + k * block < end) take(first + k * block, batch[k]);
    }
    first += stride;
    load_batch();
  }
}

template <class T, int N>
__device__ __forceinline__ uint32_t absmax_of_pack(const Pack<T, N>& pack, uint32_t absmax) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    absmax = max(absmax, static_cast<uint32_t>(magnitude(pack.values[i])));
  }
  return absmax;
}

template <class Op, class Out, class T, int N, class Levels>
__device__ __forceinline__ Pack<Out, N> map_pack(const Pack<T, N>& pack, const Levels& levels) {
  Pack<Out, N> mapped;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    mapped.values[i] = Op::apply(pack.values[i], levels);
  }
  return mapped;
}

// The maximum over all threads of a block, in every thread.
__device__ __forceinline__ uint32_t block_max(uint32_t value) {
  __shared__ uint32_t of_warp[kWarp];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = max(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  if (blockDim.x <= kWarp) return value;
  __syncthreads();  // `of_warp` may still be read from a call before
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  const unsigned warps = blockDim.x / kWarp;
  value = threadIdx.x % kWarp < warps ? of_warp[threadIdx.x % kWarp] : 0u;
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = max(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}

template <class T>
__device__ __forceinline__ float absmax_from(uint32_t largest) {
  return absmax_of(T{}, static_cast<Magnitude<T>>(largest));
}

inline bool aligned(const void* address, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

}  // namespace noisyq::cuda
