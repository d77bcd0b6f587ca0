// How the loops are spread over threads and over the phases of an operator. Results do not depend
// on the number of threads: the only reduction is an integer maximum.
#pragma once

#include <vector>

#include "../kernels.h"
#include "../operators.h"
#include "loops.h"
#include "parallel.h"

namespace noisyq::cpu {

// y = Op(x) with scales that are known before.
template <class Op, class In, class Out>
void map(const In* x, Out* y, Layout layout, const float* scale, float qmax, int threads) {
  const int64_t row_size = layout.channels * layout.inner;
  parallel(useful_threads(layout.outer * row_size, threads), [&](Member member) {
    if (layout.outer == 1) {
      const int64_t c = member.begin(layout.channels);
      const int64_t end = member.end(layout.channels);
      map_rows<Op>(x + c * layout.inner, y + c * layout.inner, 1, end - c, layout.inner, scale + c,
                   qmax);
    } else {
      const int64_t row = member.begin(layout.outer);
      const int64_t end = member.end(layout.outer);
      map_rows<Op>(x + row * row_size, y + row * row_size, end - row, layout.channels,
                   layout.inner, scale, qmax);
    }
  });
}

// Channels that are contiguous (weights): each is read once and mapped while it is in the cache.
template <class Op, class In, class Out, class Observe>
void map_contiguous_channels(const In* x, Out* y, Layout layout, float* scale, float qmax,
                             const Observe& observe, int threads) {
  parallel(threads, [&](Member member) {
    const int64_t end = member.end(layout.channels);
    for (int64_t c = member.begin(layout.channels); c < end; ++c) {
      const In* channel = x + c * layout.inner;
      Magnitude<In> largest = 0;
      absmax_rows(channel, 1, 1, layout.inner, &largest);
      const float absmax = absmax_of(In{}, largest);
      observe(c, absmax);
      scale[c] = scale_of(absmax, qmax);
      map_rows<Op>(channel, y + c * layout.inner, 1, 1, layout.inner, scale + c, qmax);
    }
  });
}

// Channels that are spread over the memory, or a single one: reduce, then map.
template <class Op, class In, class Out, class Observe>
void map_spread_channels(const In* x, Out* y, Layout layout, float* scale, float qmax,
                         const Observe& observe, int threads) {
  const int64_t row_size = layout.channels * layout.inner;
  // A cache line more for each thread, so that no two write to the same.
  const int64_t stride = layout.channels + 64 / static_cast<int64_t>(sizeof(Magnitude<In>));
  std::vector<Magnitude<In>> partial(stride * threads, 0);

  parallel(threads, [&](Member member) {
    const int64_t begin = member.begin(layout.outer);
    const int64_t end = member.end(layout.outer);
    absmax_rows(x + begin * row_size, end - begin, layout.channels, layout.inner,
                partial.data() + stride * member.index);
    member.wait_for_team();
    if (member.index == 0) {
      for (int64_t c = 0; c < layout.channels; ++c) {
        Magnitude<In> largest = 0;
        for (int i = 0; i < member.team; ++i) largest = std::max(largest, partial[stride * i + c]);
        const float absmax = absmax_of(In{}, largest);
        observe(c, absmax);
        scale[c] = scale_of(absmax, qmax);
      }
    }
    member.wait_for_team();
    // Backwards: what was reduced last is still in the cache.
    const int64_t block = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, row_size));
    for (int64_t stop = end; stop > begin; stop -= block) {
      const int64_t start = std::max(begin, stop - block);
      map_rows<Op>(x + start * row_size, y + start * row_size, stop - start, layout.channels,
                   layout.inner, scale, qmax);
    }
  });
}

// y = Op(x) with the scale of each channel's absmax, which `observe(channel, absmax)` sees once.
// `scale` receives the scales.
template <class Op, class In, class Out, class Observe>
void map_with_absmax(const In* x, Out* y, Layout layout, float* scale, float qmax,
                     const Observe& observe, int threads) {
  threads = useful_threads(layout.outer * layout.channels * layout.inner, threads);
  if (layout.outer == 1) {
    map_contiguous_channels<Op>(x, y, layout, scale, qmax, observe, threads);
  } else {
    map_spread_channels<Op>(x, y, layout, scale, qmax, observe, threads);
  }
}

}  // namespace noisyq::cpu
