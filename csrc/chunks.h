// The order of sums (noisyq_fast/rules.py): the position of the chunks of a channel in memory.
#pragma once

#include "kernels.h"
#include "quantize.h"

namespace noisyq {

constexpr int kLanes = 64;
constexpr int kChunk = kLanes * kLanes;

// At least one.
NOISYQ_INLINE int64_t chunks_of(int64_t count) {
  return count <= kChunk ? 1 : (count + kChunk - 1) / kChunk;
}

// `kChunk` elements of a channel each, in the order of memory.
struct Chunks {
  Layout layout;

  NOISYQ_INLINE int64_t size() const { return layout.outer * layout.inner; }  // of a channel
  NOISYQ_INLINE int64_t each() const { return chunks_of(size()); }
  NOISYQ_INLINE int64_t count() const { return layout.channels * each(); }
  NOISYQ_INLINE int64_t channel(int64_t chunk) const { return chunk / each(); }
  NOISYQ_INLINE int64_t first(int64_t chunk) const { return chunk % each() * kChunk; }
  NOISYQ_INLINE int64_t elements(int64_t chunk) const {
    const int64_t left = size() - first(chunk);
    return left < kChunk ? left : kChunk;
  }
  NOISYQ_INLINE bool lies_together() const { return layout.outer <= 1 || layout.channels == 1; }
  // Where the i-th element of a channel is.
  NOISYQ_INLINE int64_t offset(int64_t c, int64_t i) const {
    if (lies_together()) return c * size() + i;
    return (i / layout.inner * layout.channels + c) * layout.inner + i % layout.inner;
  }
};

}  // namespace noisyq
