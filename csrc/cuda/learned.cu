// Learned quantizers: a map forward; a map and sums backward, with one block per chunk.
#include "../chunks.h"
#include "../rules.h"
#include "known.cuh"

namespace noisyq::cuda {
namespace {

// The rule of each channel, with its parameters.
template <class Rule>
struct Rules {
  const float* parameters;
  int64_t channels;
  CodeEnds ends;

  __device__ __forceinline__ Rule operator()(int64_t channel) const {
    return Rule(parameters + channel, channels, ends);
  }
};

struct LearnedValue {
  template <class T, class Rule>
  static __device__ __forceinline__ T apply(T x, const Rule& rule) {
    return from_float<T>(rule.value(rule.code(to_float(x))));
  }
};

struct LearnedCode {
  template <class T, class Rule>
  static __device__ __forceinline__ int16_t apply(T x, const Rule& rule) {
    const float code = rule.code(to_float(x));
    return static_cast<int16_t>(code == code ? code : 0.0f);
  }
};

// The chunk of a warp that only adds, of which each thread has the lanes `first` and `first +
// kWarp`, in memory that goes on to `end`.
struct ChunkOfWarp {
  int64_t chunk;
  int64_t channel;
  int64_t end;
  int64_t first;
  bool exists;

  explicit __device__ __forceinline__ ChunkOfWarp(const Chunks& chunks)
      : chunk((int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp),
        channel(chunks.channel(chunk)),
        end(channel * chunks.size() + chunks.first(chunk) + chunks.elements(chunk)),
        first(channel * chunks.size() + chunks.first(chunk) + threadIdx.x % kWarp),
        exists(chunk < chunks.count()) {}
};

// `lanes`, two of each thread of a warp, folded in halves: the sum, in every thread.
__device__ __forceinline__ float folded(float lane, float upper_lane) {
  float sum = lane + upper_lane;
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sum += bit_cast<float>(__shfl_xor_sync(0xffffffffu, bit_cast<uint32_t>(sum), offset));
  }
  return sum;
}

// What a thread of a block has of a chunk, and how much of it it loads before it uses the first.
constexpr int kShare = kChunk / kThreads;
constexpr int kLoads = 4;

// dx, and the sum of each chunk for each parameter, times `factor`. All threads of a block compute
// the terms of a chunk; then one warp per parameter adds them in order, two lanes per thread.
template <class T, class Rule>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const T* grad, const T* x, T* dx, Rules<Rule> rules, float* sums, float factor,
                    Chunks chunks) {
  __shared__ float terms[Rule::kParameters][kChunk];
  const int64_t chunk = blockIdx.x;
  const int64_t channel = chunks.channel(chunk);
  const int64_t begin = channel * chunks.size() + chunks.first(chunk);
  const auto elements = static_cast<int>(chunks.elements(chunk));
  const Rule rule = rules(channel);
#pragma unroll 1
  for (int k = 0; k < kShare && k * kThreads < elements; k += kLoads) {
    T values[kLoads] = {}, grads[kLoads] = {};
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const int i = (k + l) * kThreads + threadIdx.x;
      if (i >= elements) continue;
      values[l] = x[begin + i];
      grads[l] = grad[begin + i];
    }
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const int i = (k + l) * kThreads + threadIdx.x;
      if (i >= elements) continue;
      const float g = to_float(grads[l]);
      const Derivatives d = rule.derivatives(to_float(values[l]));
      dx[begin + i] = from_float<T>(chained(g, d.x));
      terms[0][i] = chained(g, d.p);
      if constexpr (Rule::kParameters > 1) terms[1][i] = chained(g, d.q);
      if constexpr (Rule::kParameters > 2) terms[2][i] = chained(g, d.r);
    }
  }
  __syncthreads();
  const int p = static_cast<int>(threadIdx.x) / kWarp;
  if (p >= Rule::kParameters) return;
  float lane = 0.0f, upper_lane = 0.0f;
#pragma unroll 8
  for (int i = static_cast<int>(threadIdx.x) % kWarp; i < elements; i += kLanes) {
    lane += terms[p][i];
    if (i + kWarp < elements) upper_lane += terms[p][i + kWarp];
  }
  const float sum = folded(lane, upper_lane) * factor;
  if (threadIdx.x % kWarp == 0) sums[p * chunks.count() + chunk] = sum;
}

// The sum of each chunk of values, times `factor`.
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const float* values, float* sums, float factor, Chunks chunks) {
  const ChunkOfWarp at(chunks);
  if (!at.exists) return;
  float lanes[2] = {};
  for (int64_t i = at.first; i < at.end; i += kLanes) {
    lanes[0] += values[i];
    if (i + kWarp < at.end) lanes[1] += values[i + kWarp];
  }
  const float sum = folded(lanes[0], lanes[1]) * factor;
  if (threadIdx.x % kWarp == 0) sums[at.chunk] = sum;
}

template <class Op, class T, class Out>
Status map(const void* x, const float* parameters, Out* y, Layout layout, int splits, RuleKind kind,
           CodeEnds ends, Stream stream) {
  return with_rule(kind, [&](auto* of) {
    using Rule = std::remove_pointer_t<decltype(of)>;
    return map_known<Op>(static_cast<const T*>(x), y, layout, splits,
                         Rules<Rule>{parameters, layout.channels, ends}, stream);
  });
}

CodeEnds ends_of(int low, int high) { return {static_cast<float>(low), static_cast<float>(high)}; }

}  // namespace

Status fake_quantize_learned(DType dtype, const void* x, const float* parameters, void* y,
                             Layout layout, int splits, RuleKind kind, int low, int high,
                             Stream stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return map<LearnedValue, T>(x, parameters, static_cast<T*>(y), layout, splits, kind,
                                ends_of(low, high), stream);
  });
}

Status quantize_learned(DType dtype, const void* x, const float* parameters, int16_t* codes,
                        Layout layout, int splits, RuleKind kind, int low, int high,
                        Stream stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return map<LearnedCode, T>(x, parameters, codes, layout, splits, kind, ends_of(low, high),
                               stream);
  });
}

Status fake_quantize_learned_backward(DType dtype, const void* grad, const void* x,
                                      const float* parameters, void* dx, float* sums,
                                      float* partial, int64_t channels, int64_t inner,
                                      RuleKind kind, int low, int high, float gradient_scale,
                                      Stream stream) {
  const Chunks chunks{{1, channels, inner}};
  const auto is_last = [](const Chunks& chunks) { return chunks.each() == 1; };
  const auto factor_of = [&](const Chunks& chunks) { return is_last(chunks) ? gradient_scale : 1; };
  float* found = is_last(chunks) ? sums : partial;
  int64_t rows = 0;
  Status status = with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return with_rule(kind, [&](auto* of) {
      using Rule = std::remove_pointer_t<decltype(of)>;
      rows = Rule::kParameters * channels;
      return launch(backward_kernel<T, Rule>, {chunks.count(), kThreads}, stream,
                    static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<T*>(dx),
                    Rules<Rule>{parameters, channels, ends_of(low, high)}, found, factor_of(chunks),
                    chunks);
    });
  });
  for (int64_t count = chunks.each(); count > 1 && status == 0;) {
    const Chunks of_sums{{1, rows, count}};
    float* const sums_of_chunks = is_last(of_sums) ? sums : found + rows * count;
    const int64_t blocks = (of_sums.count() + kThreads / kWarp - 1) / (kThreads / kWarp);
    status = launch(sum_kernel, {blocks, kThreads}, stream, static_cast<const float*>(found),
                    sums_of_chunks, factor_of(of_sums), of_sums);
    found = sums_of_chunks;
    count = of_sums.each();
  }
  return status;
}

}  // namespace noisyq::cuda
