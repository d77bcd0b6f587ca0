// Learned quantizers: a map forward, a map and sums backward, chunk by chunk and in float. Chunks
// of other types, or that are not contiguous, are copied first.
#include <vector>

#include "../chunks.h"
#include "../rules.h"
#include "loops.h"
#include "parallel.h"

namespace noisyq::cpu {

namespace {

template <class T>
NOISYQ_EACH_VECTOR_WIDTH void to_floats(const T* x, float* y, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) y[i] = to_float(x[i]);
}

template <class T>
NOISYQ_EACH_VECTOR_WIDTH void from_floats(const float* x, T* y, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) y[i] = from_float<T>(x[i]);
}

template <>
void from_floats<int16_t>(const float* x, int16_t* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = static_cast<int16_t>(x[i] == x[i] ? x[i] : 0.0f);
}

// Elements of a chunk as floats: in place, or copied to `buffer`.
template <class T>
const float* read(const Chunks& chunks, int64_t chunk, const T* x, float* buffer) {
  const int64_t c = chunks.channel(chunk), first = chunks.first(chunk);
  const int64_t count = chunks.elements(chunk);
  if (chunks.lies_together()) {
    const T* from = x + chunks.offset(c, first);
    if constexpr (std::is_same_v<T, float>) return from;
    if constexpr (!std::is_same_v<T, float>) to_floats(from, buffer, count);
  } else {
    for (int64_t i = 0; i < count; ++i) buffer[i] = to_float(x[chunks.offset(c, first + i)]);
  }
  return buffer;
}

// Where to write a chunk: in place, or to `buffer`, from which `write` copies it.
template <class T>
float* place(const Chunks& chunks, int64_t chunk, T* y, float* buffer) {
  if constexpr (std::is_same_v<T, float>) {
    if (chunks.lies_together()) {
      return y + chunks.offset(chunks.channel(chunk), chunks.first(chunk));
    }
  }
  return buffer;
}

template <class T>
void write(const Chunks& chunks, int64_t chunk, const float* from, T* y) {
  const int64_t c = chunks.channel(chunk), first = chunks.first(chunk);
  const int64_t count = chunks.elements(chunk);
  if (chunks.lies_together()) {
    T* to = y + chunks.offset(c, first);
    if (static_cast<const void*>(to) != from) from_floats(from, to, count);
    return;
  }
  T elements[kChunk];
  from_floats(from, elements, count);
  for (int64_t i = 0; i < count; ++i) y[chunks.offset(c, first + i)] = elements[i];
}

template <class Rule>
NOISYQ_EACH_VECTOR_WIDTH void values_of(const float* x, float* y, int64_t count, Rule rule) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) y[i] = rule.value(rule.code(x[i]));
}

template <class Rule>
NOISYQ_EACH_VECTOR_WIDTH void codes_of(const float* x, float* y, int64_t count, Rule rule) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) y[i] = rule.code(x[i]);
}

// `lanes` folded in halves, into the first.
inline float folded(float* lanes) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  }
  return lanes[0];
}

template <class Rule>
NOISYQ_INLINE void add_row(const float* x, const float* grad, float* dx, int count,
                           const Rule& rule, float (*lanes)[kLanes]) {
#pragma omp simd
  for (int j = 0; j < count; ++j) {
    const float g = grad[j];
    const Derivatives d = rule.derivatives(x[j]);
    dx[j] = chained(g, d.x);
    lanes[0][j] += chained(g, d.p);
    if constexpr (Rule::kParameters > 1) lanes[1][j] += chained(g, d.q);
    if constexpr (Rule::kParameters > 2) lanes[2][j] += chained(g, d.r);
  }
}

// dx, and the sum of the chunk for each parameter, `stride` apart.
template <class Rule>
NOISYQ_EACH_VECTOR_WIDTH void derivatives_of(const float* x, const float* grad, float* dx,
                                             int64_t count, Rule rule, float* sums,
                                             int64_t stride) {
  alignas(64) float lanes[Rule::kParameters][kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    add_row(x + i, grad + i, dx + i, kLanes, rule, lanes);
  }
  add_row(x + i, grad + i, dx + i, static_cast<int>(count - i), rule, lanes);
  for (int p = 0; p < Rule::kParameters; ++p) sums[p * stride] = folded(lanes[p]);
}

// The sum of `count` values, which it overwrites.
float sum(float* values, int64_t count) {
  while (true) {
    const int64_t chunks = chunks_of(count);
    for (int64_t c = 0; c < chunks; ++c) {
      float lanes[kLanes] = {};
      const int64_t end = std::min<int64_t>(count, (c + 1) * kChunk);
      for (int64_t i = c * kChunk; i < end; ++i) lanes[i % kLanes] += values[i];
      values[c] = folded(lanes);
    }
    if (chunks == 1) return values[0];
    count = chunks;
  }
}

// `body(chunk, buffers)` for each chunk, on several threads.
template <class Body>
void each_chunk(const Chunks& chunks, int threads, const Body& body) {
  const int64_t elements = chunks.size() * chunks.layout.channels;
  parallel(useful_threads(elements, threads), [&](Member member) {
    std::vector<float> buffers(3 * kChunk);
    const int64_t end = member.end(chunks.count());
    for (int64_t chunk = member.begin(chunks.count()); chunk < end; ++chunk) {
      body(chunk, buffers.data());
    }
  });
}

}  // namespace

void fake_quantize_learned(DType dtype, const void* x, const float* parameters, void* y,
                           Layout layout, RuleKind kind, int low, int high, int threads) {
  const Chunks chunks{layout};
  const CodeEnds ends{static_cast<float>(low), static_cast<float>(high)};
  if (chunks.size() == 0) return;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    with_rule(kind, [&](auto* of) {
      using Rule = std::remove_pointer_t<decltype(of)>;
      each_chunk(chunks, threads, [&](int64_t chunk, float* buffers) {
        const Rule rule(parameters + chunks.channel(chunk), layout.channels, ends);
        T* const to = static_cast<T*>(y);
        const float* from = read(chunks, chunk, static_cast<const T*>(x), buffers);
        float* values = place(chunks, chunk, to, buffers + kChunk);
        values_of(from, values, chunks.elements(chunk), rule);
        write(chunks, chunk, values, to);
      });
    });
  });
}

void quantize_learned(DType dtype, const void* x, const float* parameters, int16_t* codes,
                      Layout layout, RuleKind kind, int low, int high, int threads) {
  const Chunks chunks{layout};
  const CodeEnds ends{static_cast<float>(low), static_cast<float>(high)};
  if (chunks.size() == 0) return;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    with_rule(kind, [&](auto* of) {
      using Rule = std::remove_pointer_t<decltype(of)>;
      each_chunk(chunks, threads, [&](int64_t chunk, float* buffers) {
        const Rule rule(parameters + chunks.channel(chunk), layout.channels, ends);
        const float* from = read(chunks, chunk, static_cast<const T*>(x), buffers);
        codes_of(from, buffers + kChunk, chunks.elements(chunk), rule);
        write(chunks, chunk, buffers + kChunk, codes);
      });
    });
  });
}

void fake_quantize_learned_backward(DType grad_dtype, const void* grad, DType dtype, const void* x,
                                    const float* parameters, void* dx, float* sums, Layout layout,
                                    RuleKind kind, int low, int high, int threads) {
  const Chunks chunks{layout};
  const CodeEnds ends{static_cast<float>(low), static_cast<float>(high)};
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    with_rule(kind, [&](auto* of) {
      using Rule = std::remove_pointer_t<decltype(of)>;
      std::vector<float> partial(Rule::kParameters * chunks.count());
      if (chunks.size() > 0) {
        each_chunk(chunks, threads, [&](int64_t chunk, float* buffers) {
          const Rule rule(parameters + chunks.channel(chunk), layout.channels, ends);
          T* const to = static_cast<T*>(dx);
          const float* from = read(chunks, chunk, static_cast<const T*>(x), buffers);
          const float* g = with_type(grad_dtype, [&](auto grad_type) {
            using G = decltype(grad_type);
            return read(chunks, chunk, static_cast<const G*>(grad), buffers + kChunk);
          });
          float* values = place(chunks, chunk, to, buffers + 2 * kChunk);
          derivatives_of(from, g, values, chunks.elements(chunk), rule, &partial[chunk],
                         chunks.count());
          write(chunks, chunk, values, to);
        });
      }
      for (int64_t i = 0; i < Rule::kParameters * layout.channels; ++i) {
        sums[i] = sum(&partial[i * chunks.each()], chunks.each());
      }
    });
  });
}

}  // namespace noisyq::cpu
