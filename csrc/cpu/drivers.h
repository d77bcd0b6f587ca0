// Distribution of the loops over threads and over the phases of an operator. Results do not depend
// on the number of threads: the only reductions are integer maxima.
#pragma once

#include <vector>

#include "grids.h"
#include "parallel.h"

namespace noisyq::cpu {

// y = Op(x) with given levels.
template <class Op, class In, class Out, class Channels>
void map(const In* x, Out* y, Layout layout, Channels levels, int threads) {
  const int64_t row_size = layout.channels * layout.inner;
  parallel(useful_threads(layout.outer * row_size, threads), [&](Member member) {
    if (layout.outer == 1) {
      const int64_t c = member.begin(layout.channels);
      const int64_t end = member.end(layout.channels);
      map_rows<Op>(x + c * layout.inner, y + c * layout.inner, 1, end - c, layout.inner, levels, c);
    } else {
      const int64_t row = member.begin(layout.outer);
      const int64_t end = member.end(layout.outer);
      map_rows<Op>(x + row * row_size, y + row * row_size, end - row, layout.channels, layout.inner,
                   levels, 0);
    }
  });
}

// One bit per element, Op(x), in memory order.
template <class Op, class In, class Channels>
void map_to_bits(const In* x, uint8_t* bits, Layout layout, Channels levels, int threads) {
  const bool is_row = layout.outer == 1;
  const int64_t units = is_row ? layout.channels : layout.outer;
  const int64_t unit = is_row ? layout.inner : layout.channels * layout.inner;
  // A multiple, so that each block begins with a byte of the mask.
  const int64_t block = 8 * std::max<int64_t>(1, 512 / std::max<int64_t>(1, unit));
  parallel(useful_threads(units * unit, threads), [&](Member member) {
    std::vector<uint8_t> bytes(std::min(block, units) * unit);
    const int64_t blocks = (units + block - 1) / block;
    for (int64_t b = member.begin(blocks); b < member.end(blocks); ++b) {
      const int64_t first = b * block;
      const int64_t count = std::min(block, units - first);
      map_rows<Op>(x + first * unit, bytes.data(), is_row ? 1 : count,
                   is_row ? count : layout.channels, layout.inner, levels, is_row ? first : 0);
      pack_bits(bytes.data(), bits + first * unit / 8, count * unit);
    }
  });
}

// Channels that are contiguous (weights): each is read once and mapped while it is in the cache.
template <class Op, class In, class Out, class Channels, class Observe>
void map_contiguous_channels(const In* x, Out* y, Layout layout, Channels levels,
                             const Observe& observe, int threads) {
  using Reduction = typename Channels::template Reduction<In>;
  parallel(threads, [&](Member member) {
    // Short channels together.
    const int64_t block = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, layout.inner));
    std::vector<typename Reduction::Key> keys(block * Reduction::kKeys);
    const int64_t end = member.end(layout.channels);
    for (int64_t c = member.begin(layout.channels); c < end; c += block) {
      const int64_t count = std::min(block, end - c);
      const In* channels = x + c * layout.inner;
      std::fill(keys.begin(), keys.end(), 0);
      Reduction::rows(channels, 1, count, layout.inner, keys.data());
      for (int64_t i = 0; i < count; ++i) {
        const Range range = Reduction::range(keys.data(), count, i);
        observe(c + i, range);
        levels.set(c + i, range);
      }
      map_rows<Op>(channels, y + c * layout.inner, 1, count, layout.inner, levels, c);
    }
  });
}

// Channels that are not contiguous, or a single one: reduce, then map.
template <class Op, class In, class Out, class Channels, class Observe>
void map_spread_channels(const In* x, Out* y, Layout layout, Channels levels,
                         const Observe& observe, int threads) {
  using Reduction = typename Channels::template Reduction<In>;
  using Key = typename Reduction::Key;
  const int64_t row_size = layout.channels * layout.inner;
  const int64_t keys = layout.channels * Reduction::kKeys;
  // Padded by a cache line per thread, so that no two threads write to the same line.
  const int64_t stride = keys + 64 / static_cast<int64_t>(sizeof(Key));
  std::vector<Key> partial(stride * threads, 0);

  parallel(threads, [&](Member member) {
    const int64_t begin = member.begin(layout.outer);
    const int64_t end = member.end(layout.outer);
    Reduction::rows(x + begin * row_size, end - begin, layout.channels, layout.inner,
                    partial.data() + stride * member.index);
    member.wait_for_team();
    if (member.index == 0) {
      for (int64_t k = 0; k < keys; ++k) {
        for (int i = 1; i < member.team; ++i) {
          partial[k] = std::max(partial[k], partial[stride * i + k]);
        }
      }
      for (int64_t c = 0; c < layout.channels; ++c) {
        const Range range = Reduction::range(partial.data(), layout.channels, c);
        observe(c, range);
        levels.set(c, range);
      }
    }
    member.wait_for_team();
    // Backwards: the part that was reduced last is still in the cache.
    const int64_t block = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, row_size));
    for (int64_t stop = end; stop > begin; stop -= block) {
      const int64_t start = std::max(begin, stop - block);
      map_rows<Op>(x + start * row_size, y + start * row_size, stop - start, layout.channels,
                   layout.inner, levels, 0);
    }
  });
}

// y = Op(x) with the levels of each channel's range; `observe(channel, range)` is called once per
// channel. `levels` receives the levels.
template <class Op, class In, class Out, class Channels, class Observe>
void map_with_own_range(const In* x, Out* y, Layout layout, Channels levels, const Observe& observe,
                        int threads) {
  threads = useful_threads(layout.outer * layout.channels * layout.inner, threads);
  if (layout.outer == 1) {
    map_contiguous_channels<Op>(x, y, layout, levels, observe, threads);
  } else {
    map_spread_channels<Op>(x, y, layout, levels, observe, threads);
  }
}

}  // namespace noisyq::cpu
