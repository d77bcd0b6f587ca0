// The gradients of `convolve` with AVX512: products of floats, or of bfloat16 with float sums.
// Images and gradients have their channels last. A few images are computed at a time, so that their
// temporaries (the gradient of the sums and the codes as floats) stay in a cache.
#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "../dtypes.h"
#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
// The compiler uses the bfloat16 target only for intrinsics, which are in `PairOfBFloat16`.
#define NOISYQ_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#endif

namespace noisyq::cpu {

#ifdef NOISYQ_AVX512

namespace {

constexpr int kLanes = 16;                  // of 32 bits, each of a channel
constexpr int kOutputs = 8;                 // of which `add_products` keeps the sums in registers
constexpr int64_t kPixelsAtOnce = 128;      // at least, of as many images, while these stay there
constexpr int64_t kValuesAtOnce = 1 << 18;  // at most, of as many images, or one image
constexpr int64_t kPixelsPerSum = 4096;     // and sums of these, so that errors stay small

// What a lane multiplies: a word of a factor or, in bfloat16, of two, whose products it adds.
struct Float {
  using Value = float;
  using Word = float;
  static constexpr int kFactors = 1;

  static NOISYQ_AVX512 __m512 load_word(const Word* x) { return _mm512_loadu_ps(x); }
  static NOISYQ_AVX512 __m512 broadcast(const Word* x) { return _mm512_set1_ps(*x); }
  static NOISYQ_AVX512 __m512 add_product(__m512 a, __m512 b, __m512 sum) {
    return _mm512_fmadd_ps(a, b, sum);
  }
  static NOISYQ_AVX512 __m512 load(const Value* x) { return _mm512_loadu_ps(x); }
  static NOISYQ_AVX512 void store(__m512 x, Value* out) { _mm512_storeu_ps(out, x); }
  static Word word(Value first, Value) { return first; }
};

struct PairOfBFloat16 {
  using Value = BFloat16;
  using Word = uint32_t;
  static constexpr int kFactors = 2;

  static NOISYQ_AVX512 __m512 load_word(const Word* x) { return _mm512_loadu_ps(x); }
  static NOISYQ_AVX512 __m512 broadcast(const Word* x) {
    return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*x)));
  }
  static NOISYQ_AVX512 __m512 add_product(__m512 a, __m512 b, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static NOISYQ_AVX512 __m512 load(const Value* x) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  }
  // As `from_float`.
  static NOISYQ_AVX512 void store(__m512 x, Value* out) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i found = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256((__m256i*)out, _mm512_cvtepi32_epi16(found));
  }
  static Word word(Value first, Value second) {
    return first.bits | static_cast<Word>(second.bits) << 16;
  }
};

struct Task {
  Convolution how;
  int64_t height, width;  // of the output
  int64_t left, columns;  // of a row of gradients: zeros before it, and all that are kept of it
  int64_t image_columns;  // of a row of the image, with its padding
};

// The columns `first`, `first + stride`, ... of the input. The i-th of them meets, for t < taps,
// column `tap + stride * t` of the kernel and column `i + offset - t` of the gradient.
struct Columns {
  int64_t first, count, tap, taps, offset;
};

std::vector<Columns> columns_of(const Convolution& how) {
  std::vector<Columns> found;
  const int64_t stride = how.stride[1];
  for (int64_t first = 0; first < std::min(stride, how.width); ++first) {
    const int64_t padded = first + how.padding[1], tap = padded % stride;
    const int64_t taps = tap < how.kernel[1] ? (how.kernel[1] - tap + stride - 1) / stride : 0;
    const int64_t count = (how.width - first + stride - 1) / stride;
    found.push_back({first, count, tap, taps, padded / stride});
  }
  return found;
}

Task task_of(const Convolution& how) {
  Task task{how, how.output_height(), how.output_width(), 0, 0, 0};
  int64_t right = 0;
  for (const Columns& of : columns_of(how)) {
    task.left = std::max(task.left, of.taps - 1 - of.offset);
    right = std::max(right, of.count + of.offset - task.width);
  }
  // The second factor of the last word of a row is an additional column of zeros.
  task.columns = task.left + task.width + std::max<int64_t>(right, 1);
  task.image_columns = how.width + 2 * how.padding[1] + how.stride[1];
  return task;
}

// Weights as `tile` reads them: words of one or two outputs, [channels / 16, kernel, outputs, 16].
// A member of a team writes its part.
template <class E>
void pack(Weight<float> weight, const Convolution& how, Member member, typename E::Word* out) {
  const int64_t kernel = how.kernel[0] * how.kernel[1], words = how.outputs / E::kFactors;
  const int64_t blocks = how.channels / kLanes, of_output = weight.strides[0];
  const auto write = [&](auto of_channel) {
    for (int64_t i = member.begin(blocks * kernel); i < member.end(blocks * kernel); ++i) {
      const int64_t k = i % kernel, next = (E::kFactors - 1) * of_output;
      const float* values =
          weight.at(0, k / how.kernel[1], k % how.kernel[1]) + i / kernel * kLanes * of_channel;
      auto* at = out + i * words * kLanes;
      for (int64_t o = 0; o < words; ++o, at += kLanes, values += E::kFactors * of_output) {
        for (int lane = 0; lane < kLanes; ++lane) {
          const float* first = values + lane * of_channel;
          at[lane] = E::word(from_float<typename E::Value>(*first),
                             from_float<typename E::Value>(first[next]));
        }
      }
    }
  };
  if (weight.strides[1] == 1) {
    write(std::integral_constant<int64_t, 1>{});  // reads many at a time
  } else {
    write(weight.strides[1]);
  }
}

// A row of a gradient and the row of the kernel that it is multiplied with.
template <class E>
struct Rows {
  const typename E::Word *gradient, *weight;
};

// How far apart words of neighbours are: of pixels of a gradient, of taps and of blocks of 16
// channels of a kernel; and values of neighbours in the output.
struct Steps {
  int64_t pixel, tap, block, out;
};

// The sums of kPixels neighbours and 16 or 32 channels. Each loaded gradient is used for all taps.
template <class E, int kTaps, int kPixels, int kBlocks>
NOISYQ_AVX512 inline void tile(const std::vector<Rows<E>>& rows, int64_t column, Steps steps,
                               typename E::Value* out) {
  __m512 sums[kPixels][kBlocks];
  for (int p = 0; p < kPixels; ++p) {
    for (int b = 0; b < kBlocks; ++b) sums[p][b] = _mm512_setzero_ps();
  }
  for (const Rows<E>& row : rows) {
    const auto* gradient = row.gradient + column * steps.pixel;
    const auto* weight = row.weight;
    for (int64_t o = 0; o < steps.pixel; ++o, weight += kLanes) {
      __m512 w[kTaps][kBlocks];
      for (int t = 0; t < kTaps; ++t) {
        for (int b = 0; b < kBlocks; ++b) {
          w[t][b] = E::load_word(weight + t * steps.tap + b * steps.block);
        }
      }
#pragma GCC unroll 32
      for (int j = 0; j < kPixels + kTaps - 1; ++j) {
        const __m512 g = E::broadcast(gradient + j * steps.pixel + o);
#pragma GCC unroll 4
        for (int t = 0; t < kTaps; ++t) {
          const int p = j - (kTaps - 1 - t);
          if (p < 0 || p >= kPixels) continue;
          for (int b = 0; b < kBlocks; ++b) sums[p][b] = E::add_product(g, w[t][b], sums[p][b]);
        }
      }
    }
  }
  for (int p = 0; p < kPixels; ++p) {
    for (int b = 0; b < kBlocks; ++b) E::store(sums[p][b], out + p * steps.out + b * kLanes);
  }
}

// `count` columns of a row, in tiles of which the last may overlap the one before.
template <class E, int kTaps, int kPixels, int kBlocks>
void tiles(const std::vector<Rows<E>>& rows, int64_t count, Steps steps, typename E::Value* out) {
  for (int64_t i = 0; i < count; i += kPixels) {
    const int64_t at = std::min(i, count - kPixels);
    tile<E, kTaps, kPixels, kBlocks>(rows, at, steps, out + at * steps.out);
  }
}

template <class E, int kTaps, int kBlocks>
void tiles_of_any_size(const std::vector<Rows<E>>& rows, int64_t count, Steps steps,
                       typename E::Value* out) {
  if (kBlocks == 1 && count >= 16) return tiles<E, kTaps, 16, 1>(rows, count, steps, out);
  if (count >= 8) return tiles<E, kTaps, 8, kBlocks>(rows, count, steps, out);
  if (count >= 4) return tiles<E, kTaps, 4, kBlocks>(rows, count, steps, out);
  tiles<E, kTaps, 1, kBlocks>(rows, count, steps, out);
}

// All channels of a row of the input's gradient.
template <class E, int kTaps>
void input_row(std::vector<Rows<E>> rows, int64_t count, int64_t blocks, Steps steps,
               typename E::Value* out) {
  for (int64_t b = 0; b < blocks;) {
    const bool two = b + 2 <= blocks && count < 16;
    if (two) {
      tiles_of_any_size<E, kTaps, 2>(rows, count, steps, out);
    } else {
      tiles_of_any_size<E, kTaps, 1>(rows, count, steps, out);
    }
    const int taken = two ? 2 : 1;
    for (Rows<E>& row : rows) row.weight += taken * steps.block;
    out += taken * kLanes;
    b += taken;
  }
}

// Words of images and gradients, of `count` pixels in each row, that `add_products` sums over; how
// far apart their rows and their pixels are.
template <class E>
struct Meeting {
  const typename E::Word *image, *gradient;
  int64_t images, rows, count, image_step, gradient_step, image_row, gradient_row, image_pixel,
      gradient_pixel, tap;
  bool starts;  // sums of their own
};

// Adds to the weight's gradient [taps, 8 outputs, 16 channels] of a row of the kernel.
template <class E, int kTaps>
NOISYQ_AVX512 void add_products(Meeting<E> of, float* sums) {
  __m512 sum[kTaps][kOutputs];
  for (int t = 0; t < kTaps; ++t) {
    for (int q = 0; q < kOutputs; ++q) {
      sum[t][q] =
          of.starts ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + (t * kOutputs + q) * kLanes);
    }
  }
  for (int64_t n = 0; n < of.images; ++n) {
    for (int64_t y = 0; y < of.rows; ++y) {
      const auto* image = of.image + n * of.image_step + y * of.image_row;
      const auto* gradient = of.gradient + n * of.gradient_step + y * of.gradient_row;
      for (int64_t x = 0; x < of.count; ++x) {
        __m512 near[kTaps];
        for (int t = 0; t < kTaps; ++t) near[t] = E::load_word(image + t * of.tap);
#pragma GCC unroll 8
        for (int q = 0; q < kOutputs; ++q) {
          const __m512 g = E::broadcast(gradient + q);
          for (int t = 0; t < kTaps; ++t) sum[t][q] = E::add_product(g, near[t], sum[t][q]);
        }
        image += of.image_pixel;
        gradient += of.gradient_pixel;
      }
    }
  }
  for (int t = 0; t < kTaps; ++t) {
    for (int q = 0; q < kOutputs; ++q) {
      _mm512_storeu_ps(sums + (t * kOutputs + q) * kLanes, sum[t][q]);
    }
  }
}

NOISYQ_AVX512 inline __m512 load_sums(const int16_t* v) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)v)));
}
NOISYQ_AVX512 inline __m512 load_sums(const float* v) { return _mm512_loadu_ps(v); }

// `grads_of_sums` for a row.
template <class E, class V>
NOISYQ_AVX512 void gradient_row(const typename E::Value* grad, const V* v, const GradOfSums& of,
                                int64_t pixels, int64_t outputs, typename E::Value* out) {
  for (int64_t o = 0; o < outputs; o += kLanes) {
    const __m512 factor = _mm512_loadu_ps(of.factor + o), term = _mm512_loadu_ps(of.term + o);
    const __m512 mean = _mm512_loadu_ps(of.mean + o), slope = _mm512_loadu_ps(of.slope + o);
    const __m512 shift = _mm512_loadu_ps(of.shift + o), tilt = _mm512_loadu_ps(of.tilt + o);
    for (int64_t i = o; i < pixels * outputs; i += outputs) {
      const __m512 sums = load_sums(v + i);
      __m512 g = E::load(grad + i);
      if (of.relu) {
        const __m512 y = _mm512_add_ps(_mm512_mul_ps(sums, factor), term);
        g = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_GT_OQ), g);
      }
      const __m512 centred = _mm512_mul_ps(_mm512_sub_ps(sums, mean), tilt);
      E::store(_mm512_sub_ps(_mm512_sub_ps(_mm512_mul_ps(slope, g), shift), centred), out + i);
    }
  }
}

template <class Code, class Value>
NOISYQ_AVX512 void image_row(const Code* codes, int zero, int64_t count, Value* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    out[i] = from_float<Value>(static_cast<float>(codes[i] - zero));
  }
}

// The temporaries of a thread for its images, in memory that is reused.
template <class E>
class Images {
 public:
  Images(const Task& task, const GradOfSums& of, ConvolvedCodes x, const typename E::Word* weight,
         typename E::Value* dx, float* dw)
      : task_(task),
        how_(task.how),
        of_(of),
        x_(x),
        weight_(weight),
        dx_(dx),
        dw_(dw),
        words_(how_.outputs / E::kFactors),
        columns_(columns_of(how_)) {
    const int64_t pixels = std::max<int64_t>(1, task.height * task.width);
    per_sum_ = std::max<int64_t>(1, kPixelsPerSum / pixels);
    gradient_size_ = task.height * task.columns * how_.outputs;
    image_size_ = how_.height * task.image_columns * how_.channels;
    const int64_t fit = kValuesAtOnce / std::max<int64_t>({1, gradient_size_, image_size_});
    const int64_t useful = (kPixelsAtOnce + pixels - 1) / pixels;
    at_once_ = std::clamp<int64_t>(fit, 1, std::min(per_sum_, useful));
    gradient_.resize(at_once_ * gradient_size_);
    if (dw == nullptr) return;
    image_.resize(at_once_ * image_size_);
    if (E::kFactors == 1) return;
    pairs_ = (task.width + 1) / 2;
    image_words_.resize(image_.size());
    gradient_words_.resize(at_once_ * task.height * pairs_ * how_.outputs);
  }

  void run(Member member) {
    const int64_t first = member.begin(how_.images), past = member.end(how_.images);
    const int64_t weights = how_.outputs * how_.channels * how_.kernel[0] * how_.kernel[1];
    if (dw_ != nullptr && first == past) std::fill_n(dw_, weights, 0.0f);
    if (dw_ != nullptr && past - first > per_sum_) sums_.resize(weights);
    for (int64_t begin = first; begin < past; begin += per_sum_) {
      const int64_t end = std::min(begin + per_sum_, past);
      float* sums = begin == first ? dw_ : sums_.data();
      for (int64_t n = begin; n < end; n += at_once_) {
        const int64_t count = std::min(at_once_, end - n);
        for (int64_t i = 0; i < count; ++i) {
          make_gradient(n + i, i);
          if (dx_ != nullptr) input_gradient(n + i, i);
          if (dw_ != nullptr) make_image(n + i, i);
        }
        if (dw_ != nullptr) add_weight_gradient(count, n == begin, sums);
      }
      if (sums == dw_) continue;
      for (int64_t k = 0; k < weights; ++k) dw_[k] += sums[k];
    }
  }

 private:
  // Of image n, kept as the i-th.
  void make_gradient(int64_t n, int64_t i) {
    const int64_t row = task_.width * how_.outputs;
    const auto* grad = static_cast<const typename E::Value*>(of_.grad);
    for (int64_t y = 0; y < task_.height; ++y) {
      const int64_t at = (n * task_.height + y) * row;
      auto* out =
          gradient_.data() + i * gradient_size_ + (y * task_.columns + task_.left) * how_.outputs;
      if (of_.v.values == nullptr) {
        std::copy_n(grad + at, row, out);
      } else if (of_.v.are_narrow) {
        gradient_row<E>(grad + at, static_cast<const int16_t*>(of_.v.values) + at, of_, task_.width,
                        how_.outputs, out);
      } else {
        gradient_row<E>(grad + at, static_cast<const float*>(of_.v.values) + at, of_, task_.width,
                        how_.outputs, out);
      }
    }
  }

  void input_gradient(int64_t n, int64_t i) {
    const int64_t kernel = how_.kernel[1], channels = how_.channels;
    const Steps steps{words_, how_.stride[1] * words_ * kLanes,
                      how_.kernel[0] * kernel * words_ * kLanes, how_.stride[1] * channels};
    const auto* words =
        reinterpret_cast<const typename E::Word*>(gradient_.data() + i * gradient_size_);
    for (int64_t y = 0; y < how_.height; ++y) {
      for (const Columns& of : columns_) {
        auto* out = dx_ + ((n * how_.height + y) * how_.width + of.first) * channels;
        rows_.clear();
        for (int64_t k = 0; k < how_.kernel[0] && of.taps > 0; ++k) {
          const int64_t below = y + how_.padding[0] - k, row = below / how_.stride[0];
          if (below < 0 || below % how_.stride[0] != 0 || row >= task_.height) continue;
          const int64_t column = task_.left + of.offset - (of.taps - 1);
          rows_.push_back({words + (row * task_.columns + column) * words_,
                           weight_ + (k * kernel + of.tap) * words_ * kLanes});
        }
        const int64_t blocks = channels / kLanes;
        if (rows_.empty()) {
          for (int64_t x = 0; x < of.count; ++x) {
            std::fill_n(out + x * steps.out, channels, typename E::Value{});
          }
        } else if (of.taps == 1) {
          input_row<E, 1>(rows_, of.count, blocks, steps, out);
        } else if (of.taps == 2) {
          input_row<E, 2>(rows_, of.count, blocks, steps, out);
        } else {
          input_row<E, 3>(rows_, of.count, blocks, steps, out);
        }
      }
    }
  }

  void make_image(int64_t n, int64_t i) {
    const int64_t row = how_.width * how_.channels;
    for (int64_t y = 0; y < how_.height; ++y) {
      const int64_t at = (n * how_.height + y) * row;
      auto* out = image_.data() + i * image_size_ +
                  (y * task_.image_columns + how_.padding[1]) * how_.channels;
      if (x_.are_signed) {
        image_row(static_cast<const int8_t*>(x_.codes) + at, x_.zero, row, out);
      } else {
        image_row(static_cast<const uint8_t*>(x_.codes) + at, x_.zero, row, out);
      }
    }
    if (E::kFactors == 1) return;
    // A word is a pixel and what its right neighbour in the output meets.
    const int64_t next = how_.stride[1] * how_.channels, outputs = how_.outputs;
    const auto* image = image_.data() + i * image_size_;
    pair(image, image + next, image_size_ - next, image_words_.data() + i * image_size_);
    for (int64_t y = 0; y < task_.height; ++y) {
      const auto* g =
          gradient_.data() + i * gradient_size_ + (y * task_.columns + task_.left) * outputs;
      auto* out = gradient_words_.data() + (i * task_.height + y) * pairs_ * outputs;
      for (int64_t x = 0; x < pairs_; ++x) {
        pair(g + 2 * x * outputs, g + (2 * x + 1) * outputs, outputs, out + x * outputs);
      }
    }
  }

  static NOISYQ_AVX512 void pair(const typename E::Value* first, const typename E::Value* second,
                                 int64_t count, typename E::Word* out) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = E::word(first[i], second[i]);
  }

  void add_weight_gradient(int64_t images, bool starts, float* sums) {
    const int64_t channels = how_.channels, outputs = how_.outputs, kernel = how_.kernel[1];
    const int64_t stride = how_.stride[0];
    Meeting<E> of{};
    of.images = images;
    of.image_step = image_size_;
    of.image_row = stride * task_.image_columns * channels;
    of.image_pixel = E::kFactors * how_.stride[1] * channels;
    of.gradient_pixel = outputs;
    of.tap = channels;
    of.starts = starts;
    const typename E::Word *image, *gradient;
    if constexpr (E::kFactors == 1) {
      image = image_.data();
      gradient = gradient_.data() + task_.left * outputs;
      of.count = task_.width;
      of.gradient_row = task_.columns * outputs;
    } else {
      image = image_words_.data();
      gradient = gradient_words_.data();
      of.count = pairs_;
      of.gradient_row = pairs_ * outputs;
    }
    of.gradient_step = task_.height * of.gradient_row;
    for (int64_t k = 0; k < how_.kernel[0]; ++k) {
      // The rows of the gradient that are multiplied with rows of the image; `shift` rows are
      // above.
      const int64_t shift = k - how_.padding[0], last = how_.height - 1 - shift;
      const int64_t first = shift < 0 ? (stride - 1 - shift) / stride : 0;
      const int64_t past = last < 0 ? 0 : std::min(task_.height, last / stride + 1);
      of.rows = std::max<int64_t>(0, past - first);
      const int64_t image_first = (first * stride + shift) * task_.image_columns * channels;
      for (int64_t c = 0; c < channels; c += kLanes) {
        for (int64_t o = 0; o < outputs; o += kOutputs, sums += kernel * kOutputs * kLanes) {
          of.image = image + image_first + c;
          of.gradient = gradient + first * of.gradient_row + o;
          if (kernel == 1) {
            add_products<E, 1>(of, sums);
          } else {
            add_products<E, 3>(of, sums);
          }
        }
      }
    }
  }

  const Task& task_;
  const Convolution& how_;
  const GradOfSums& of_;
  const ConvolvedCodes x_;
  const typename E::Word* weight_;
  typename E::Value* dx_;
  float* dw_;            // [kernel rows, channels / 16, outputs / 8, kernel columns, 8, 16]
  const int64_t words_;  // of the outputs of a pixel
  int64_t per_sum_, at_once_, gradient_size_, image_size_, pairs_ = 0;
  const std::vector<Columns> columns_;
  std::vector<Rows<E>> rows_;
  // Of the images that are multiplied at once:
  std::vector<typename E::Value> gradient_;       // [.., height, columns, outputs]
  std::vector<typename E::Value> image_;          // [.., height, image columns, channels]
  std::vector<typename E::Word> image_words_;     // the same
  std::vector<typename E::Word> gradient_words_;  // [.., height, pairs of columns, outputs]
  std::vector<float> sums_;                       // like dw_, of a few images
};

template <class E>
void convolve_backward_in(const GradOfSums& of, ConvolvedCodes x, Weight<float> weight,
                          const Convolution& how, void* dx, float* dw, int threads) {
  const Task task = task_of(how);
  const int64_t rows = how.kernel[0], columns = how.kernel[1];
  const int64_t size = how.outputs * how.channels * rows * columns;
  const std::unique_ptr<typename E::Word[]> words(new typename E::Word[size / E::kFactors]);
  threads = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(1, how.images)));
  const std::unique_ptr<float[]> parts(new float[dw == nullptr ? 0 : size * threads]);
  parallel(threads, [&](Member member) {
    if (dx != nullptr) pack<E>(weight, how, member, words.get());
    member.wait_for_team();
    float* part = dw == nullptr ? nullptr : parts.get() + member.index * size;
    Images<E>(task, of, x, words.get(), static_cast<typename E::Value*>(dx), part).run(member);
    member.wait_for_team();
    if (dw == nullptr) return;
    const int64_t blocks = rows * (how.channels / kLanes), pairs = how.outputs * columns;
    for (int64_t i = member.begin(blocks); i < member.end(blocks); ++i) {
      const int64_t row = i / (how.channels / kLanes), channel = i % (how.channels / kLanes);
      for (int64_t k = 0; k < pairs; ++k) {
        const int64_t q = k % kOutputs, t = k / kOutputs % columns;
        const int64_t o = k / kOutputs / columns * kOutputs + q;
        const float* sums = parts.get() + (i * pairs + k) * kLanes;
        float* out = dw + ((o * rows + row) * columns + t) * how.channels + channel * kLanes;
        for (int lane = 0; lane < kLanes; ++lane) {
          float sum = sums[lane];
          for (int m = 1; m < member.team; ++m) sum += sums[m * size + lane];
          out[lane] = sum * x.scale;
        }
      }
    }
  });
}

}  // namespace

bool has_products(DType dtype) {
  const bool has_floats = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (dtype == DType::bfloat16) return has_floats && __builtin_cpu_supports("avx512bf16");
  return has_floats && dtype == DType::float32;
}

void convolve_backward(DType dtype, const GradOfSums& of, ConvolvedCodes x, Weight<float> weight,
                       const Convolution& how, void* dx, float* dw, int threads) {
  if (dtype == DType::bfloat16) {
    convolve_backward_in<PairOfBFloat16>(of, x, weight, how, dx, dw, threads);
  } else {
    convolve_backward_in<Float>(of, x, weight, how, dx, dw, threads);
  }
}

#else

bool has_products(DType) { return false; }
void convolve_backward(DType, const GradOfSums&, ConvolvedCodes, Weight<float>, const Convolution&,
                       void*, float*, int) {}

#endif

}  // namespace noisyq::cpu
