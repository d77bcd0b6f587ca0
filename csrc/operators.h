// Operations on one element, from storage type to storage type, which the loops of every backend
// apply; the levels are those of the element's channel. And the update of a moving average.
#pragma once

#include "dtypes.h"

namespace noisyq {

template <class T>
struct FakeQuantize {
  static NOISYQ_INLINE T apply(T x, Levels levels) {
    return from_float<T>(fake_quantize(to_float(x), levels));
  }
};

template <class T>
struct Code {
  static NOISYQ_INLINE int apply(T x, Levels levels) { return code_of(to_float(x), levels); }
};

template <class T>
struct Clipped {
  static NOISYQ_INLINE uint8_t apply(T x, Levels levels) {
    return is_clipped(rounded_of(to_float(x), levels.scale), levels.low, levels.high);
  }
};

template <class T>
struct Negative {
  static NOISYQ_INLINE uint8_t apply(T x, Levels) { return to_float(x) < 0.0f; }
};

// Negative or clipped.
template <class T>
struct Outside {
  static NOISYQ_INLINE uint8_t apply(T x, Levels levels) {
    return Negative<T>::apply(x, levels) | Clipped<T>::apply(x, levels);
  }
};

struct Value {
  template <class Code>
  static NOISYQ_INLINE float apply(Code code, Levels levels) {
    return (code - levels.zero) * levels.scale;
  }
};

inline Codes codes_on(Grid grid) {
  const auto qmax = static_cast<float>(grid.qmax);
  switch (grid.kind) {
    case GridKind::is_signed:
      return {qmax, -qmax, qmax};
    case GridKind::is_full:
      return {qmax + 0.5f, -qmax - 1, qmax};
    default:
      return {2 * qmax + 1, 0.0f, 2 * qmax + 1};
  }
}

NOISYQ_INLINE void observe(MovingAverage average, int64_t channel, float absmax) {
  if (average.running_absmax == nullptr || !is_observation(absmax)) return;
  float& running = average.running_absmax[channel];
  const float observed = average.observed == nullptr ? 1.0f : average.observed[channel];
  running = averaged(running / observed, absmax, average.constant);
  if (average.observed != nullptr) average.observed[channel] = 1.0f;
}

// For an affine grid, with the averages of all low ends, then of all high ends.
NOISYQ_INLINE void observe(MovingAverage average, int64_t channel, int64_t channels, Range range) {
  if (average.running_absmax == nullptr || !is_observation(range.high - range.low)) return;
  float& low = average.running_absmax[channel];
  float& high = average.running_absmax[channels + channel];
  const float observed = average.observed == nullptr ? 1.0f : average.observed[channel];
  low = averaged(low / observed, range.low, average.constant);
  high = averaged(high / observed, range.high, average.constant);
  if (average.observed != nullptr) average.observed[channel] = 1.0f;
}

}  // namespace noisyq
