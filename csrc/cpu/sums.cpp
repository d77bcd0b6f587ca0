// Passes over the exact sums v of products of codes, integers laid out as [rows, channels], for the
// operations of a chain. `noisyq_fast/backends/reference/sums.py` is the same in PyTorch.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "grids.h"
#include "parallel.h"

namespace noisyq::cpu {

namespace {

using Wide = __int128;

// A few rows are taken as one period, so that inner loops are long even with few channels. The mask
// bits of a period fill whole bytes.
struct Periods {
  int64_t elements;
  int64_t channels;
  int64_t period;

  Periods(int64_t rows, int64_t channels) : elements(rows * channels), channels(channels) {
    const int64_t whole = 8 / std::gcd<int64_t>(8, std::max<int64_t>(1, channels));
    const int64_t wanted = (256 + channels - 1) / std::max<int64_t>(1, channels);
    period = channels * ((wanted + whole - 1) / whole * whole);
  }

  int64_t count() const { return elements == 0 ? 0 : (elements + period - 1) / period; }
  int useful(int threads) const { return useful_threads(elements, threads); }

  // Of each channel, for each element of a period.
  std::vector<float> repeated(const float* of_channel) const {
    std::vector<float> values(of_channel == nullptr ? 0 : period);
    for (size_t k = 0; k < values.size(); ++k) values[k] = of_channel[k % channels];
    return values;
  }

  // Calls `body(begin, count)` for the periods from `first` to `last`.
  template <class Body>
  void each(int64_t first, int64_t last, const Body& body) const {
    for (int64_t p = first; p < last; ++p) {
      body(p * period, std::min(period, elements - p * period));
    }
  }
  template <class Body>
  void each(Member member, const Body& body) const {
    each(member.begin(count()), member.end(count()), body);
  }
};

template <class Body>
void with_bool(bool value, const Body& body) {
  if (value) {
    body(std::true_type{});
  } else {
    body(std::false_type{});
  }
}

// Sums are int16 if that is wide enough, else float.
template <class Body>
void with_sums(Sums v, const Body& body) {
  if (v.are_narrow) {
    body(static_cast<const int16_t*>(v.values));
  } else {
    body(static_cast<const float*>(v.values));
  }
}

template <bool kNarrows>
NOISYQ_EACH_VECTOR_WIDTH void add_moments(const float* v, int16_t* narrow, int64_t count,
                                          int64_t* sum, int64_t* square, float* low, float* high) {
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) {
    const auto whole = static_cast<int32_t>(v[k]);
    if (kNarrows) narrow[k] = static_cast<int16_t>(whole);
    sum[k] += whole;
    square[k] += static_cast<int64_t>(whole) * whole;
    low[k] = v[k] < low[k] ? v[k] : low[k];
    high[k] = v[k] > high[k] ? v[k] : high[k];
  }
}

// The moments of each element of a period, of one thread.
struct PartialMoments {
  std::vector<int64_t> sum, square;
  std::vector<Wide> squares;  // those of `square` before it could overflow
  std::vector<float> low, high;

  explicit PartialMoments(int64_t period)
      : sum(period),
        square(period),
        squares(period),
        low(period, INFINITY),
        high(period, -INFINITY) {}

  void carry() {
    for (size_t k = 0; k < square.size(); ++k) {
      squares[k] += square[k];
      square[k] = 0;
    }
  }
};

// relu(v * factor + term + residual), with ReLU and residual optional.
template <bool kRelu, bool kAdds, class V>
NOISYQ_INLINE float mapped(V v, float factor, float term, float residual) {
  float x = static_cast<float>(v) * factor + term;
  if (kAdds) x += residual;
  return kRelu && x < 0.0f ? 0.0f : x;
}

template <bool kRelu, bool kAdds, class V>
NOISYQ_EACH_VECTOR_WIDTH void map_period(const V* v, const float* factor, const float* term,
                                         const float* residual, float* y, int64_t count) {
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) {
    y[k] = mapped<kRelu, kAdds>(v[k], factor[k], term[k], kAdds ? residual[k] : 0.0f);
  }
}

template <bool kRelu, class V>
NOISYQ_EACH_VECTOR_WIDTH void codes_of_period(const V* v, const float* factor, const float* term,
                                              Levels levels, uint8_t* codes, int64_t count) {
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) {
    const float x = mapped<kRelu, false>(v[k], factor[k], term[k], 0.0f);
    codes[k] = static_cast<uint8_t>(code_of(x, levels));
  }
}

NOISYQ_EACH_VECTOR_WIDTH void bytes_of_period(const float* y, uint8_t* bytes, int64_t count) {
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) bytes[k] = !(y[k] > 0.0f);
}

// The gradient before the ReLU: 0 where its output is 0.
template <bool kRelu, class V>
NOISYQ_INLINE float passed(float grad, V v, float factor, float term) {
  return kRelu && !(mapped<false, false>(v, factor, term, 0.0f) > 0.0f) ? 0.0f : grad;
}

// Of a few periods, of which the last may end early. A number of lanes at a time, whose sums stay
// in registers; each lane adds its elements in order.
template <bool kRelu, class G, class V>
NOISYQ_EACH_VECTOR_WIDTH void add_grads(const G* grad, const V* v, const float* factor,
                                        const float* term, const float* mean, float* sum,
                                        float* product, int64_t period, int64_t count) {
  constexpr int64_t kLanes = 32;
  const auto add = [&](int64_t element, int64_t k, float& sum, float& product) {
    const float g = passed<kRelu>(to_float(grad[element]), v[element], factor[k], term[k]);
    sum += g;
    product += g * (static_cast<float>(v[element]) - mean[k]);
  };
  const int64_t whole = count / period * period;
  for (int64_t first = 0; first < period; first += kLanes) {
    if (period - first >= kLanes) {
      float sums[kLanes], products[kLanes];
      std::copy_n(sum + first, kLanes, sums);
      std::copy_n(product + first, kLanes, products);
      for (int64_t begin = first; begin < whole; begin += period) {
#pragma omp simd
        for (int64_t i = 0; i < kLanes; ++i) add(begin + i, first + i, sums[i], products[i]);
      }
      std::copy_n(sums, kLanes, sum + first);
      std::copy_n(products, kLanes, product + first);
    } else {
      for (int64_t begin = 0; begin < whole; begin += period) {
        for (int64_t k = first; k < period; ++k) add(begin + k, k, sum[k], product[k]);
      }
    }
  }
  for (int64_t k = 0; k < count - whole; ++k) add(whole + k, k, sum[k], product[k]);
}

template <bool kRelu, class G, class V, class T>
NOISYQ_EACH_VECTOR_WIDTH void grads_of_period(const G* grad, const V* v, const float* factor,
                                              const float* term, const float* mean,
                                              const float* slope, const float* shift,
                                              const float* tilt, T* out, int64_t count) {
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) {
    const float g = passed<kRelu>(to_float(grad[k]), v[k], factor[k], term[k]);
    const float centred = static_cast<float>(v[k]) - mean[k];
    out[k] = from_float<T>(slope[k] * g - shift[k] - centred * tilt[k]);
  }
}

}  // namespace

void moments_of_sums(const float* v, int16_t* narrow, int64_t rows, int64_t channels, int64_t bound,
                     Moments moments, int threads) {
  const auto [sum, squares, low, high] = moments;
  const Periods periods(rows, channels);
  threads = periods.useful(threads);
  // The sum of this many squares fits into 63 bits.
  const double fit = 0x1p62 / (static_cast<double>(bound) * static_cast<double>(bound));
  const auto before_carry = static_cast<int64_t>(std::clamp(fit, 1.0, 0x1p40));
  std::vector<PartialMoments> parts(threads, PartialMoments(periods.period));
  parallel(threads, [&](Member member) {
    PartialMoments& part = parts[member.index];
    int64_t since = 0;
    with_bool(narrow != nullptr, [&](auto narrows) {
      periods.each(member, [&](int64_t begin, int64_t count) {
        add_moments<narrows.value>(v + begin, narrows ? narrow + begin : nullptr, count,
                                   part.sum.data(), part.square.data(), part.low.data(),
                                   part.high.data());
        if (++since == before_carry) {
          part.carry();
          since = 0;
        }
      });
    });
    part.carry();
  });
  for (int64_t c = 0; c < channels; ++c) {
    Wide square = 0;
    sum[c] = 0;
    low[c] = INFINITY;
    high[c] = -INFINITY;
    for (const PartialMoments& part : parts) {
      for (int64_t k = c; k < periods.period; k += channels) {
        sum[c] += part.sum[k];
        square += part.squares[k];
        low[c] = std::min(low[c], part.low[k]);
        high[c] = std::max(high[c], part.high[k]);
      }
    }
    squares[2 * c] = static_cast<int64_t>(square >> 32);
    squares[2 * c + 1] = static_cast<int64_t>(square & 0xffffffff);
  }
}

namespace {

void track(RunningStatistics running, double rows, int64_t channels, const double* mean,
           const double* variance) {
  const double correction = rows / (rows - 1);
  const auto kept = static_cast<float>(1 - running.momentum);
  const auto momentum = static_cast<float>(running.momentum);
  *running.batches += 1;
  for (int64_t c = 0; c < channels; ++c) {
    const double bias = running.bias == nullptr ? 0.0 : static_cast<double>(running.bias[c]);
    const auto of_batch = static_cast<float>(mean[c] + bias);
    running.mean[c] = running.mean[c] * kept + momentum * of_batch;
    const auto spread = static_cast<float>(variance[c] * correction);
    running.variance[c] = running.variance[c] * kept + momentum * spread;
  }
}

}  // namespace

void normalization(const int64_t* sum, const int64_t* squares, int64_t rows, int64_t channels,
                   const float* scale, const float* weight, const float* bias, double eps,
                   float* factor, float* term, float* mean, float* inverse, double* batch_mean,
                   double* batch_variance, RunningStatistics running) {
  const auto n = static_cast<double>(rows);
  for (int64_t c = 0; c < channels; ++c) {
    const double nearest = std::rint(static_cast<double>(sum[c]) / n);
    const auto p = static_cast<int64_t>(nearest);
    const int64_t left = sum[c] - rows * p;
    const Wide square = static_cast<Wide>(squares[2 * c]) * (INT64_C(1) << 32) + squares[2 * c + 1];
    const Wide centred = square - static_cast<Wide>(p) *
                                      (static_cast<Wide>(2) * sum[c] - static_cast<Wide>(rows) * p);
    const auto d = static_cast<double>(left);
    const double s = scale[c];
    batch_mean[c] = (nearest + d / n) * s;
    batch_variance[c] = (static_cast<double>(centred) - d * d / n) / n * (s * s);
    inverse[c] = static_cast<float>(1.0 / std::sqrt(batch_variance[c] + eps));
    const double slope = (weight == nullptr ? 1.0 : static_cast<double>(weight[c])) *
                         static_cast<double>(inverse[c]);
    factor[c] = static_cast<float>(slope * s);
    term[c] = static_cast<float>((bias == nullptr ? 0.0 : static_cast<double>(bias[c])) -
                                 batch_mean[c] * slope);
    mean[c] = static_cast<float>(nearest + d / n);
  }
  if (running.mean != nullptr) track(running, n, channels, batch_mean, batch_variance);
}

void ends_of_line(const float* least, const float* largest, const float* factor, const float* term,
                  int64_t channels, bool relu, float* ends) {
  float low = INFINITY, high = -INFINITY;
  bool has_nan = false;
  for (int64_t c = 0; c < channels; ++c) {
    for (const float v : {least[c], largest[c]}) {
      const float y = v * factor[c] + term[c];
      has_nan |= y != y;
      low = std::min(low, y);
      high = std::max(high, y);
    }
  }
  low = relu ? 0.0f : std::min(low, 0.0f);
  ends[0] = has_nan ? NAN : low;
  ends[1] = has_nan || !std::isfinite(low) ? NAN : std::max(high, 0.0f);
}

void observe(const float* ends, GridKind kind, MovingAverage average, float* range) {
  const float low = ends[0], high = ends[1];
  if (kind == GridKind::is_affine) {
    range[0] = low;
    range[1] = high;
    noisyq::observe(average, 0, 1, Range{low, high});
    return;
  }
  range[0] = kind == GridKind::is_unsigned || high != high ? high : std::max(-low, high);
  noisyq::observe(average, 0, range[0]);
}

void map_sums(Sums v, int64_t rows, int64_t channels, const float* factor, const float* term,
              const float* residual, bool relu, float* y, uint8_t* zeros, float* range,
              int threads) {
  const Periods periods(rows, channels);
  threads = periods.useful(threads);
  const std::vector<float> factors = periods.repeated(factor), terms = periods.repeated(term);
  std::vector<int32_t> lowest(threads, 0), highest(threads, 0);
  with_sums(v, [&](auto sums) {
    with_bool(relu, [&](auto is_relu) {
      with_bool(residual != nullptr, [&](auto adds) {
        parallel(threads, [&](Member member) {
          std::vector<uint8_t> bytes(periods.period);
          int32_t low = 0, high = 0;  // not shared: a cache line that two write to is slow
          periods.each(member, [&](int64_t begin, int64_t count) {
            map_period<is_relu.value, adds.value>(sums + begin, factors.data(), terms.data(),
                                                  adds ? residual + begin : nullptr, y + begin,
                                                  count);
            if (range != nullptr) extremes_rows(y + begin, 1, 1, count, &low, &high);
            if (zeros != nullptr) {
              bytes_of_period(y + begin, bytes.data(), count);
              pack_bits(bytes.data(), zeros + begin / 8, count);
            }
          });
          lowest[member.index] = low;
          highest[member.index] = high;
        });
      });
    });
  });
  if (range == nullptr) return;
  const Range found = extremes_of(0.0f, *std::max_element(lowest.begin(), lowest.end()),
                                  *std::max_element(highest.begin(), highest.end()));
  range[0] = found.low;
  range[1] = found.high;
}

void codes_of_sums(Sums v, int64_t rows, int64_t channels, const float* factor, const float* term,
                   bool relu, const float* range, Grid grid, uint8_t* codes, float* scale,
                   uint8_t* zero, int threads) {
  const Periods periods(rows, channels);
  const std::vector<float> factors = periods.repeated(factor), terms = periods.repeated(term);
  float zero_point = 0.0f;
  with_grid(grid, scale, &zero_point, [&](auto of_grid) {
    of_grid.set(0, {range[0], grid.kind == GridKind::is_affine ? range[1] : range[0]});
    const Levels levels = of_grid.at(0);
    with_sums(v, [&](auto sums) {
      with_bool(relu, [&](auto is_relu) {
        parallel(periods.useful(threads), [&](Member member) {
          periods.each(member, [&](int64_t begin, int64_t count) {
            codes_of_period<is_relu.value>(sums + begin, factors.data(), terms.data(), levels,
                                           codes + begin, count);
          });
        });
      });
    });
  });
  if (zero != nullptr) *zero = static_cast<uint8_t>(zero_point);
  // A line that is not finite makes the scale NaN: 0 times what is finite is 0.
  for (int64_t c = 0; c < channels; ++c) *scale += (factor[c] + term[c]) * 0.0f;
}

void grads_of_norm(DType dtype, const void* grad, Sums v, int64_t rows, int64_t channels,
                   const float* factor, const float* term, bool relu, const float* mean,
                   const float* inverse, const float* scale, const float* weight, bool uses_batch,
                   float* slope, float* shift, float* tilt, float* of_weight, float* of_bias,
                   int threads) {
  const Periods periods(rows, channels);
  const std::vector<float> factors = periods.repeated(factor), terms = periods.repeated(term),
                           means = periods.repeated(mean);
  // Blocks that do not depend on the number of threads, and so neither does the order of summation.
  const int64_t block = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, periods.period));
  const int64_t blocks = (periods.count() + block - 1) / block;
  std::vector<double> partial(2 * blocks * channels);
  with_sums(v, [&](auto sums) {
    with_bool(relu, [&](auto is_relu) {
      with_type(dtype, [&](auto type) {
        const auto* g = static_cast<const decltype(type)*>(grad);
        parallel(periods.useful(threads), [&](Member member) {
          std::vector<float> of_period(2 * periods.period);
          float *one = of_period.data(), *other = one + periods.period;
          for (int64_t b = member.begin(blocks); b < member.end(blocks); ++b) {
            std::fill(of_period.begin(), of_period.end(), 0.0f);
            const int64_t begin = b * block * periods.period;
            const int64_t count = std::min(block * periods.period, periods.elements - begin);
            add_grads<is_relu.value>(g + begin, sums + begin, factors.data(), terms.data(),
                                     means.data(), one, other, periods.period, count);
            double* out = partial.data() + 2 * b * channels;
            for (int64_t k = 0; k < periods.period; ++k) {
              out[k % channels] += one[k];
              out[channels + k % channels] += other[k];
            }
          }
        });
      });
    });
  });
  for (int64_t c = 0; c < channels; ++c) {
    double total = 0.0, product = 0.0;
    for (int64_t b = 0; b < blocks; ++b) {
      total += partial[2 * b * channels + c];
      product += partial[(2 * b + 1) * channels + c];
    }
    const double steep = (weight == nullptr ? 1.0 : static_cast<double>(weight[c])) *
                         static_cast<double>(inverse[c]);
    // From v to normalized values.
    const double spread = static_cast<double>(inverse[c]) * static_cast<double>(scale[c]);
    const auto count = static_cast<double>(rows);
    slope[c] = static_cast<float>(steep);
    shift[c] = uses_batch ? static_cast<float>(steep * total / count) : 0.0f;
    tilt[c] = uses_batch ? static_cast<float>(steep * spread * spread * product / count) : 0.0f;
    of_weight[c] = static_cast<float>(spread * product);
    of_bias[c] = static_cast<float>(total);
  }
}

void grads_of_sums(DType dtype, const void* grad, Sums v, int64_t rows, int64_t channels,
                   const float* factor, const float* term, bool relu, const float* mean,
                   const float* slope, const float* shift, const float* tilt, void* out,
                   int threads) {
  const Periods periods(rows, channels);
  const auto repeated = [&](const float* x) { return periods.repeated(x); };
  const std::vector<float> factors = repeated(factor), terms = repeated(term),
                           means = repeated(mean), slopes = repeated(slope),
                           shifts = repeated(shift), tilts = repeated(tilt);
  with_sums(v, [&](auto sums) {
    with_bool(relu, [&](auto is_relu) {
      with_type(dtype, [&](auto type) {
        using T = decltype(type);
        parallel(periods.useful(threads), [&](Member member) {
          periods.each(member, [&](int64_t begin, int64_t count) {
            grads_of_period<is_relu.value>(static_cast<const T*>(grad) + begin, sums + begin,
                                           factors.data(), terms.data(), means.data(),
                                           slopes.data(), shifts.data(), tilts.data(),
                                           static_cast<T*>(out) + begin, count);
          });
        });
      });
    });
  });
}

}  // namespace noisyq::cpu
