// Quantizers that learn: a map forward; backward a map and sums, with a warp for each chunk.
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

// What a thread loads before it uses the first: so many rows of a chunk.
constexpr int kRows = 2;

// The chunk of a warp, of which each thread has the lanes `first` and `first + kWarp`, in memory
// that goes on to `end`.
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

template <class Kernel, class... Arguments>
Status launch_on(const Chunks& chunks, Kernel kernel, Stream stream, Arguments... arguments) {
  constexpr int kWarps = kThreads / kWarp;
  const int64_t blocks = (chunks.count() + kWarps - 1) / kWarps;
  return launch(kernel, {blocks, kThreads}, stream, arguments..., chunks);
}

// `lanes`, two of each thread of a warp, folded in halves: the sum, in every thread.
__device__ __forceinline__ float folded(float lane, float upper_lane) {
  float sum = lane + upper_lane;
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sum += bit_cast<float>(__shfl_xor_sync(0xffffffffu, bit_cast<uint32_t>(sum), offset));
  }
  return sum;
}

// dx, and the sum of each chunk for each parameter, times `factor`.
template <class T, class Rule>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const T* grad, const T* x, T* dx, Rules<Rule> rules, float* sums, float factor,
                    Chunks chunks) {
  const ChunkOfWarp at(chunks);
  if (!at.exists) return;
  const Rule rule = rules(at.channel);
  float lanes[2][Rule::kParameters] = {};
#pragma unroll 1
  for (int64_t i = at.first; i < at.end; i += kRows * kLanes) {
    T values[2 * kRows], grads[2 * kRows];
#pragma unroll
    for (int k = 0; k < 2 * kRows; ++k) {
      if (i + k * kWarp >= at.end) continue;
      values[k] = x[i + k * kWarp];
      grads[k] = grad[i + k * kWarp];
    }
#pragma unroll
    for (int k = 0; k < 2 * kRows; ++k) {
      if (i + k * kWarp >= at.end) continue;
      const float g = to_float(grads[k]);
      const Derivatives d = rule.derivatives(to_float(values[k]));
      dx[i + k * kWarp] = from_float<T>(chained(g, d.x));
      lanes[k % 2][0] += chained(g, d.p);
      if constexpr (Rule::kParameters > 1) lanes[k % 2][1] += chained(g, d.q);
      if constexpr (Rule::kParameters > 2) lanes[k % 2][2] += chained(g, d.r);
    }
  }
#pragma unroll
  for (int p = 0; p < Rule::kParameters; ++p) {
    const float sum = folded(lanes[0][p], lanes[1][p]) * factor;
    if (threadIdx.x % kWarp == 0) sums[p * chunks.count() + at.chunk] = sum;
  }
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
      return launch_on(chunks, backward_kernel<T, Rule>, stream, static_cast<const T*>(grad),
                       static_cast<const T*>(x), static_cast<T*>(dx),
                       Rules<Rule>{parameters, channels, ends_of(low, high)}, found,
                       factor_of(chunks));
    });
  });
  for (int64_t count = chunks.each(); count > 1 && status == 0;) {
    const Chunks of_sums{{1, rows, count}};
    float* const sums_of_chunks = is_last(of_sums) ? sums : found + rows * count;
    status = launch_on(of_sums, sum_kernel, stream, static_cast<const float*>(found),
                       sums_of_chunks, factor_of(of_sums));
    found = sums_of_chunks;
    count = of_sums.each();
  }
  return status;
}

}  // namespace noisyq::cuda
