// Convolutions of AdderNet (arXiv 1912.13200), which sum absolute differences; forward and
// backward.
//
// Every sum has the reference's order, whatever the vectors and threads: the lanes of a vector are
// channels, never terms of a sum. noisyq_fast/backends/native_cpu/adder.py lays the tensors out:
// channels come last; tensors that are read by vectors have them in padded blocks of kBlock.
#include <algorithm>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "../kernels.h"
#include "parallel.h"

namespace noisyq::cpu {
namespace {

constexpr int64_t kBlock = 16;  // channels, a multiple of kLanes
constexpr int kTile = 8;        // outputs, or inputs, that share a weight while it is in a register

// The elements of the kernel that an input is combined with: every stride-th row and column.
struct Taps {
  int64_t rows, columns;    // how many
  int64_t w_row, w_column;  // from one to the next in the weights
  int64_t g_row;            // from one to the next row in the gradient
};

// Not target_clones: GCC applies it after it has split vectors to the default width.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define NOISYQ_WIDER_VECTORS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace v4 {
#define NOISYQ_LANES 16
#include "adder_loops.h"
}  // namespace v4
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace v3 {
#define NOISYQ_LANES 8
#include "adder_loops.h"
}  // namespace v3
#pragma GCC pop_options
#endif
namespace narrow {
#define NOISYQ_LANES 4
#include "adder_loops.h"
}  // namespace narrow

struct Loops {
  int64_t lanes;
  decltype(&narrow::forward_tile) forward;
  decltype(&narrow::input_gradient_tile) input_gradient;
  decltype(&narrow::weight_gradient_tile) weight_gradient;
};

// The loops for the widest vectors of this processor.
const Loops& loops() {
#define NOISYQ_LOOPS(width)                                                                     \
  {                                                                                             \
    width::kLanes, width::forward_tile, width::input_gradient_tile, width::weight_gradient_tile \
  }
  static const Loops chosen = [] {
#ifdef NOISYQ_WIDER_VECTORS
    if (__builtin_cpu_supports("x86-64-v4")) return Loops NOISYQ_LOOPS(v4);
    if (__builtin_cpu_supports("x86-64-v3")) return Loops NOISYQ_LOOPS(v3);
#endif
    return Loops NOISYQ_LOOPS(narrow);
  }();
#undef NOISYQ_LOOPS
  return chosen;
}

// A position among images, in the order of memory.
struct Position {
  int64_t image, row, column;

  Position(int64_t index, int64_t rows, int64_t columns)
      : image(index / (rows * columns)), row(index / columns % rows), column(index % columns) {}

  void advance(int64_t rows, int64_t columns) {
    if (++column < columns) return;
    column = 0;
    if (++row < rows) return;
    row = 0;
    ++image;
  }
};

// Calls `body(position of each t, tile)` for the member's tiles of kTile positions. Beyond the last
// position it stands again.
template <class Place, class Body>
void for_each_tile(Member member, int64_t images, int64_t rows, int64_t columns, const Place& place,
                   const Body& body) {
  const int64_t count = images * rows * columns;
  const int64_t tiles = (count + kTile - 1) / kTile;
  const int64_t begin = member.begin(tiles), end = member.end(tiles);
  if (begin == end) return;
  Position position(begin * kTile, rows, columns);
  for (int64_t tile = begin; tile < end; ++tile) {
    for (int t = 0; t < kTile; ++t) {
      place(t, position);
      if (tile * kTile + t + 1 < count) position.advance(rows, columns);
    }
    body();
  }
}

}  // namespace

void adder_forward(const float* x, const float* w, float* y, AdderShape s, int threads) {
  const int64_t row = s.kernel_columns * s.inputs, next_row = s.columns * s.inputs;
  const int64_t kernel = s.kernel_rows * row;
  const int64_t work = s.images * s.out_rows * s.out_columns * s.outputs * kernel / 8;
  const Loops& with = loops();
  parallel(useful_threads(work, threads), [&](Member member) {
    int64_t x_of[kTile], y_of[kTile];
    const auto place = [&](int t, const Position& at) {
      const int64_t top = at.image * s.rows + at.row * s.row_stride;
      x_of[t] = top * next_row + at.column * s.column_stride * s.inputs;
      y_of[t] = ((at.image * s.out_rows + at.row) * s.out_columns + at.column) * s.outputs;
    };
    for_each_tile(member, s.images, s.out_rows, s.out_columns, place, [&] {
      for (int64_t o = 0; o < s.outputs; o += kBlock) {
        for (int64_t l = 0; l < kBlock; l += with.lanes) {
          with.forward(x, x_of, s.kernel_rows, row, next_row, w + o * kernel + l, y + o + l, y_of);
        }
      }
    });
  });
}

void adder_input_gradient(const float* x, const float* w, const float* g, float* dx, AdderShape s,
                          AdderBorder border, int threads) {
  const int64_t g_columns = border.left + s.out_columns + border.right;
  const int64_t g_rows = border.top + s.out_rows + border.bottom;
  const int64_t kernel = s.kernel_rows * s.kernel_columns;
  const int64_t phases = s.row_stride * s.column_stride;
  const int64_t pixels = s.images * s.rows * s.columns;
  const Loops& with = loops();
  // How many from `from` there are below `to`.
  const auto every = [](int64_t from, int64_t to, int64_t stride) {
    return from < to ? (to - from + stride - 1) / stride : 0;
  };
  // The first input that an element of the kernel is combined with.
  const auto first_of = [](int64_t element, int64_t padding, int64_t stride) {
    return ((element - padding) % stride + stride) % stride;
  };
  const int64_t work = pixels * s.inputs * s.outputs * kernel / phases / 8;
  parallel(useful_threads(work, threads), [&](Member member) {
    // Inputs at the same offset modulo the stride are combined with the same elements, from (i, j)
    // on.
    for (int64_t phase = 0; phase < phases; ++phase) {
      const int64_t i = phase / s.column_stride, j = phase % s.column_stride;
      const int64_t top = first_of(i, s.row_padding, s.row_stride);
      const int64_t left = first_of(j, s.column_padding, s.column_stride);
      const Taps taps{every(i, s.kernel_rows, s.row_stride),
                      every(j, s.kernel_columns, s.column_stride),
                      s.row_stride * s.kernel_columns * s.outputs * kBlock,
                      s.column_stride * s.outputs * kBlock, g_columns * s.outputs};
      int64_t x_of[kTile], g_of[kTile];
      const auto place = [&](int t, const Position& at) {
        const int64_t row = top + at.row * s.row_stride;
        const int64_t column = left + at.column * s.column_stride;
        x_of[t] = ((at.image * s.rows + row) * s.columns + column) * kBlock;
        const int64_t p = (top + s.row_padding - i) / s.row_stride + at.row + border.top;
        const int64_t q = (left + s.column_padding - j) / s.column_stride + at.column + border.left;
        g_of[t] = ((at.image * g_rows + p) * g_columns + q) * s.outputs;
      };
      for_each_tile(member, s.images, every(top, s.rows, s.row_stride),
                    every(left, s.columns, s.column_stride), place, [&] {
                      for (int64_t c = 0; c < s.inputs; c += kBlock) {
                        const float* weights =
                            w + (c * kernel + (i * s.kernel_columns + j) * kBlock) * s.outputs;
                        for (int64_t l = 0; l < kBlock; l += with.lanes) {
                          with.input_gradient(x + c * pixels + l, x_of, g, g_of, taps, s.outputs,
                                              weights + l, dx + c * pixels + l);
                        }
                      }
                    });
    }
  });
}

void adder_weight_gradient(const float* x, const float* w, const float* g, float* dw, AdderShape s,
                           int threads) {
  const int64_t kernel = s.kernel_rows * s.kernel_columns;
  const int64_t groups = (s.outputs + kTile - 1) / kTile;
  const int64_t tasks = s.inputs / kBlock * kernel * groups;
  const int64_t pixels = s.out_rows * s.out_columns;
  const int64_t work = s.images * pixels * s.outputs * s.inputs * kernel / 8;
  const Loops& with = loops();
  std::fill_n(dw, s.inputs * kernel * s.outputs, 0.0f);
  parallel(useful_threads(work, threads), [&](Member member) {
    // All sums of an image while it is in the cache.
    for (int64_t n = 0; n < s.images; ++n) {
      for (int64_t task = member.begin(tasks); task < member.end(tasks); ++task) {
        const int64_t block = task / (kernel * groups);
        const int64_t element = task / groups % kernel;
        const int64_t first = task % groups * kTile;
        const int count = static_cast<int>(std::min<int64_t>(kTile, s.outputs - first));
        int64_t g_of[kTile], w_of[kTile];
        for (int t = 0; t < kTile; ++t) {
          g_of[t] = first + std::min(t, count - 1);
          w_of[t] = ((block * kernel + element) * s.outputs + g_of[t]) * kBlock;
        }
        const int64_t i = element / s.kernel_columns, j = element % s.kernel_columns;
        const int64_t top = (block * s.images + n) * s.rows + i;
        for (int64_t l = 0; l < kBlock; l += with.lanes) {
          with.weight_gradient(x + (top * s.columns + j) * kBlock + l,
                               s.row_stride * s.columns * kBlock, s.column_stride * kBlock,
                               g + n * pixels * s.outputs, g_of, s.out_rows, s.out_columns,
                               s.outputs, w + l, w_of, dw + l, count);
        }
      }
    }
  });
}

}  // namespace noisyq::cpu
