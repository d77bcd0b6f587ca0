// Convolutions of 8-bit codes in exact 32-bit sums, with the dot products of AVX512-VNNI. Images
// and outputs have their channels last.
#include <cmath>
#include <cstring>
#include <vector>

#include "../kernels.h"
#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define NOISYQ_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#endif

namespace noisyq::cpu {

#ifdef NOISYQ_VNNI

namespace {

constexpr int kLanes = 16;  // of 32 bits
constexpr int kGroup = 4;   // codes in each
constexpr int kQuad = 4;    // lanes of 128 bits

// From this number of input channels on, 16 codes of a pixel are loaded at once and multiplied with
// four registers of weights, each of which sums its four groups of codes separately. Below it, 4
// codes are multiplied with one register.
constexpr int kWide = kQuad * kGroup;

// The moments of 16 output channels, exact: integers below 2^31, and below 2^53.
struct Lanes {
  int32_t sum[kLanes] = {};
  double squares[kLanes] = {};
  int32_t low[kLanes], high[kLanes];

  Lanes() {
    std::fill(low, low + kLanes, INT32_MAX);
    std::fill(high, high + kLanes, INT32_MIN);
  }
};

struct Task {
  Convolution how;
  bool is_wide;
  int64_t width;   // of a pixel: input channels, in whole groups
  int64_t blocks;  // of 16 output channels
  int64_t padded_height, padded_width;
  uint8_t zero;
  const int8_t* weight;  // [blocks, kernel, width / 4, 16, 4]; wide: [.., width / 16, 4, 4, 4, 4]
  const int32_t* shift;  // [blocks, 16]: zero times the sum of the weights of a channel
  // Runs of adjacent codes, in the order of the weights: where each begins, relative to a pixel.
  std::vector<int64_t> runs;
  int64_t run_length;
};

// Weights as the dot products read them. Wide, register q has output 4 i + q in its lane i.
std::vector<int8_t> packed(Weight<int8_t> weight, const Task& task) {
  const Convolution& how = task.how;
  const int64_t kernel = how.kernel[0] * how.kernel[1];
  const int64_t of_channel = weight.strides[1];
  // Of an output and a tap: runs of adjacent channels, and from one to the next.
  const int64_t run = task.is_wide ? kWide : kGroup, next = run * kLanes;
  std::vector<int8_t> out(task.blocks * kLanes * kernel * task.width);
  for (int64_t o = 0; o < how.outputs; ++o) {
    const int64_t lane = o % kLanes;
    const int64_t first =
        task.is_wide ? lane % kQuad * kLanes * kGroup + lane / kQuad * kWide : lane * kGroup;
    for (int64_t k = 0; k < kernel; ++k) {
      const int8_t* in = weight.at(o, k / how.kernel[1], k % how.kernel[1]);
      int8_t* to = &out[(o / kLanes * kernel + k) * task.width * kLanes + first];
      for (int64_t c = 0; c < how.channels; c += run, to += next) {
        const int64_t count = std::min(run, how.channels - c);
        if (of_channel == 1) {
          memcpy(to, in + c, count);
        } else {
          for (int64_t i = 0; i < count; ++i) to[i] = in[(c + i) * of_channel];
        }
      }
    }
  }
  return out;
}

// A row of pixels as unsigned codes, in whole groups of channels.
NOISYQ_VNNI void widen(const uint8_t* __restrict in, int64_t pixels, int64_t channels,
                       int64_t width, uint8_t flip, uint8_t* __restrict out) {
  if (width == channels) {
#pragma omp simd
    for (int64_t i = 0; i < pixels * width; ++i) out[i] = in[i] ^ flip;
    return;
  }
  for (int64_t x = 0; x < pixels; ++x) {
    for (int64_t c = 0; c < channels; ++c) out[x * width + c] = in[x * channels + c] ^ flip;
  }
}

void pad(const uint8_t* image, bool are_signed, const Task& task, uint8_t* out) {
  const Convolution& how = task.how;
  memset(out, task.zero, task.padded_height * task.padded_width * task.width);
  for (int64_t y = 0; y < how.height; ++y) {
    const int64_t first = (y + how.padding[0]) * task.padded_width + how.padding[1];
    widen(image + y * how.width * how.channels, how.width, how.channels, task.width,
          are_signed ? 0x80 : 0, out + first * task.width);
  }
}

// Masked stores are slow and rarely needed.
NOISYQ_VNNI inline void store(__m512i sums, float* out, int64_t count) {
  const __m512 values = _mm512_cvtepi32_ps(sums);
  if (count >= kLanes) {
    _mm512_storeu_ps(out, values);
  } else {
    _mm512_mask_storeu_ps(out, (1u << count) - 1, values);
  }
}
NOISYQ_VNNI inline void store(__m512i sums, int16_t* out, int64_t count) {
  const __m256i values = _mm512_cvtepi32_epi16(sums);
  if (count >= kLanes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), values);
  } else {
    _mm256_mask_storeu_epi16(out, (1u << count) - 1, values);
  }
}

// Adds the sums of kPixels pixels to the moments.
template <int kPixels>
NOISYQ_VNNI inline void observe(const __m512i* v, Lanes* lanes) {
  __m512i sum = _mm512_loadu_si512(lanes->sum);
  __m512i low = _mm512_loadu_si512(lanes->low), high = _mm512_loadu_si512(lanes->high);
  __m512d first = _mm512_loadu_pd(lanes->squares), second = _mm512_loadu_pd(lanes->squares + 8);
  for (int p = 0; p < kPixels; ++p) {
    sum = _mm512_add_epi32(sum, v[p]);
    low = _mm512_min_epi32(low, v[p]);
    high = _mm512_max_epi32(high, v[p]);
    const __m512d half = _mm512_cvtepi32_pd(_mm512_castsi512_si256(v[p]));
    const __m512d other = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(v[p], 1));
    first = _mm512_fmadd_pd(half, half, first);
    second = _mm512_fmadd_pd(other, other, second);
  }
  _mm512_storeu_si512(lanes->sum, sum);
  _mm512_storeu_si512(lanes->low, low);
  _mm512_storeu_si512(lanes->high, high);
  _mm512_storeu_pd(lanes->squares, first);
  _mm512_storeu_pd(lanes->squares + 8, second);
}

// What is done with the sums of kPixels neighbours and 16 output channels.
template <int kPixels, bool kObserves, class Out>
NOISYQ_VNNI inline void finish(const Task& task, const __m512i* sums, int64_t block, Out* out,
                               Lanes* lanes) {
  const __m512i shift = _mm512_loadu_si512(task.shift + block * kLanes);
  __m512i v[kPixels];
  for (int p = 0; p < kPixels; ++p) {
    v[p] = _mm512_sub_epi32(sums[p], shift);
    store(v[p], out + p * task.how.outputs + block * kLanes, task.how.outputs - block * kLanes);
  }
  if (kObserves) observe<kPixels>(v, lanes + block);
}

template <int kPixels, bool kObserves, class Out>
NOISYQ_VNNI inline void narrow_tile(const Task& task, const uint8_t* image, int64_t block, Out* out,
                                    Lanes* lanes) {
  __m512i sums[kPixels];
  for (int p = 0; p < kPixels; ++p) sums[p] = _mm512_setzero_si512();
  const int64_t step = task.how.stride[1] * task.width, length = task.run_length;
  const int8_t* weight = task.weight + block * task.runs.size() * length * kLanes;
  for (const int64_t run : task.runs) {
    const uint8_t* x = image + run;
    for (int64_t c = 0; c < length; c += kGroup, weight += kLanes * kGroup) {
      const __m512i w = _mm512_loadu_si512(weight);
      for (int p = 0; p < kPixels; ++p) {
        int32_t four;
        memcpy(&four, x + p * step + c, sizeof four);
        sums[p] = _mm512_dpbusd_epi32(sums[p], _mm512_set1_epi32(four), w);
      }
    }
  }
  finish<kPixels, kObserves>(task, sums, block, out, lanes);
}

template <int kPixels, bool kObserves, class Out>
NOISYQ_VNNI inline void wide_tile(const Task& task, const uint8_t* image, int64_t block, Out* out,
                                  Lanes* lanes) {
  __m512i sums[kPixels][kQuad];
  for (int p = 0; p < kPixels; ++p) {
    for (int q = 0; q < kQuad; ++q) sums[p][q] = _mm512_setzero_si512();
  }
  const int64_t step = task.how.stride[1] * task.width, length = task.run_length;
  const int8_t* weight = task.weight + block * task.runs.size() * length * kLanes;
  for (const int64_t run : task.runs) {
    const uint8_t* x = image + run;
    for (int64_t c = 0; c < length; c += kWide, weight += kLanes * kWide) {
      __m512i w[kQuad];
      for (int q = 0; q < kQuad; ++q) w[q] = _mm512_loadu_si512(weight + q * kLanes * kGroup);
      for (int p = 0; p < kPixels; ++p) {
        const __m512i codes = _mm512_broadcast_i32x4(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + p * step + c)));
        for (int q = 0; q < kQuad; ++q) sums[p][q] = _mm512_dpbusd_epi32(sums[p][q], codes, w[q]);
      }
    }
  }
  // Of a lane of four groups in each register, the sums of the groups.
  __m512i whole[kPixels];
  for (int p = 0; p < kPixels; ++p) {
    const __m512i* s = sums[p];
    const __m512i one =
        _mm512_add_epi32(_mm512_unpacklo_epi32(s[0], s[1]), _mm512_unpackhi_epi32(s[0], s[1]));
    const __m512i two =
        _mm512_add_epi32(_mm512_unpacklo_epi32(s[2], s[3]), _mm512_unpackhi_epi32(s[2], s[3]));
    whole[p] = _mm512_add_epi32(_mm512_unpacklo_epi64(one, two), _mm512_unpackhi_epi64(one, two));
  }
  finish<kPixels, kObserves>(task, whole, block, out, lanes);
}

template <bool kObserves, class Out>
NOISYQ_VNNI void row(const Task& task, const uint8_t* image, int64_t block, int64_t width, Out* out,
                     Lanes* lanes) {
  const int64_t step = task.how.stride[1] * task.width, outputs = task.how.outputs;
  int64_t x = 0;
  if (task.is_wide) {
    for (; x + 4 <= width; x += 4) {
      wide_tile<4, kObserves>(task, image + x * step, block, out + x * outputs, lanes);
    }
    for (; x < width; ++x) {
      wide_tile<1, kObserves>(task, image + x * step, block, out + x * outputs, lanes);
    }
  } else {
    for (; x + 16 <= width; x += 16) {
      narrow_tile<16, kObserves>(task, image + x * step, block, out + x * outputs, lanes);
    }
    for (; x < width; ++x) {
      narrow_tile<1, kObserves>(task, image + x * step, block, out + x * outputs, lanes);
    }
  }
}

// Moves the moments from the lanes to their channels.
void carry(std::vector<Lanes>* lanes, int64_t outputs, Moments moments) {
  for (int64_t o = 0; o < outputs; ++o) {
    const Lanes& of_block = (*lanes)[o / kLanes];
    const int lane = o % kLanes;
    moments.sum[o] += of_block.sum[lane];
    moments.squares[o] += static_cast<int64_t>(of_block.squares[lane]);
    moments.low[o] = std::min(moments.low[o], static_cast<float>(of_block.low[lane]));
    moments.high[o] = std::max(moments.high[o], static_cast<float>(of_block.high[lane]));
  }
  std::fill(lanes->begin(), lanes->end(), Lanes());
}

template <bool kObserves, class Out>
NOISYQ_VNNI void images(const Task& task, const uint8_t* x, bool are_signed, Out* out,
                        Member member, Moments moments) {
  const Convolution& how = task.how;
  const int64_t height = how.output_height(), width = how.output_width();
  std::vector<uint8_t> image(task.padded_height * task.padded_width * task.width);
  std::vector<Lanes> lanes(task.blocks);
  int64_t since = 0;
  for (int64_t n = member.begin(how.images); n < member.end(how.images); ++n) {
    pad(x + n * how.height * how.width * how.channels, are_signed, task, image.data());
    for (int64_t y = 0; y < height; ++y) {
      const uint8_t* begin = image.data() + y * how.stride[0] * task.padded_width * task.width;
      Out* line = out + (n * height + y) * width * how.outputs;
      for (int64_t block = 0; block < task.blocks; ++block) {
        row<kObserves>(task, begin, block, width, line, lanes.data());
      }
      // Keeps the total of 16-bit sums below 2^31.
      since += width;
      if (kObserves && since + width > 65536) {
        carry(&lanes, how.outputs, moments);
        since = 0;
      }
    }
  }
  if (kObserves) carry(&lanes, how.outputs, moments);
}

}  // namespace

bool has_dot_products() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

void convolve(const void* codes, bool are_signed, int zero, Weight<int8_t> weight,
              const Convolution& how, bool narrow, void* out, Moments moments, int threads) {
  Task task{};
  task.how = how;
  task.is_wide = how.channels % kWide == 0;
  task.width = (how.channels + kGroup - 1) / kGroup * kGroup;
  task.blocks = (how.outputs + kLanes - 1) / kLanes;
  task.padded_height = how.height + 2 * how.padding[0];
  task.padded_width = how.width + 2 * how.padding[1];
  task.zero = static_cast<uint8_t>(are_signed ? 0x80 : zero);
  const std::vector<int8_t> weights = packed(weight, task);
  std::vector<int32_t> shift(task.blocks * kLanes);
  const int64_t terms = how.channels * how.kernel[0] * how.kernel[1];
  for (int64_t o = 0; o < how.outputs && task.zero != 0; ++o) {
    const int8_t* of_output = weight.at(o, 0, 0);  // dense, in some order
    int32_t total = 0;
    for (int64_t k = 0; k < terms; ++k) total += of_output[k];
    shift[o] = total * task.zero;
  }
  const bool are_near = how.dilation[1] == 1;
  task.run_length = are_near ? how.kernel[1] * task.width : task.width;
  for (int64_t ky = 0; ky < how.kernel[0]; ++ky) {
    for (int64_t kx = 0; kx < (are_near ? 1 : how.kernel[1]); ++kx) {
      const int64_t pixel = ky * how.dilation[0] * task.padded_width + kx * how.dilation[1];
      task.runs.push_back(pixel * task.width);
    }
  }
  task.weight = weights.data();
  task.shift = shift.data();
  const auto* x = static_cast<const uint8_t*>(codes);
  threads = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(1, how.images)));
  if (moments.sum == nullptr) {
    parallel(threads, [&](Member member) {
      if (narrow) {
        images<false>(task, x, are_signed, static_cast<int16_t*>(out), member, {});
      } else {
        images<false>(task, x, are_signed, static_cast<float*>(out), member, {});
      }
    });
    return;
  }
  const int64_t outputs = how.outputs;
  std::vector<int64_t> sums(2 * outputs * threads);
  // Of all threads: OpenMP may start fewer.
  std::vector<float> lows(outputs * threads, INFINITY), highs(outputs * threads, -INFINITY);
  parallel(threads, [&](Member member) {
    const int64_t at = outputs * member.index;
    const Moments own{&sums[2 * at], &sums[2 * at] + outputs, &lows[at], &highs[at]};
    images<true>(task, x, are_signed, static_cast<int16_t*>(out), member, own);
  });
  for (int64_t o = 0; o < outputs; ++o) {
    int64_t sum = 0, square = 0;
    float low = INFINITY, high = -INFINITY;
    for (int t = 0; t < threads; ++t) {
      sum += sums[2 * outputs * t + o];
      square += sums[2 * outputs * t + outputs + o];
      low = std::min(low, lows[outputs * t + o]);
      high = std::max(high, highs[outputs * t + o]);
    }
    moments.sum[o] = sum;
    moments.squares[2 * o] = square >> 32;
    moments.squares[2 * o + 1] = square & 0xffffffff;
    moments.low[o] = low;
    moments.high[o] = high;
  }
}

#else

bool has_dot_products() { return false; }
void convolve(const void*, bool, int, Weight<int8_t>, const Convolution&, bool, void*, Moments,
              int) {}

#endif

}  // namespace noisyq::cpu
