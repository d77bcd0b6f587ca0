// What happens to one element, from storage type to storage type: the loops of every backend apply
// one of these. `scale` belongs to the element's channel. And what happens to its moving average.
#pragma once

#include "dtypes.h"

namespace noisyq {

template <class T>
struct FakeQuantize {
  static NOISYQ_INLINE T apply(T x, float scale, float qmax) {
    return from_float<T>(fake_quantize(to_float(x), scale, qmax));
  }
};

template <class T>
struct Code {
  static NOISYQ_INLINE int8_t apply(T x, float scale, float qmax) {
    return code_of(to_float(x), scale, qmax);
  }
};

template <class T>
struct Clipped {
  static NOISYQ_INLINE uint8_t apply(T x, float scale, float qmax) {
    return is_clipped(rounded_of(to_float(x), scale), qmax);
  }
};

struct Value {
  static NOISYQ_INLINE float apply(int8_t code, float scale, float) { return code * scale; }
};

NOISYQ_INLINE void observe(MovingAverage average, int64_t channel, float absmax) {
  if (average.running_absmax == nullptr || !is_observation(absmax)) return;
  float& running = average.running_absmax[channel];
  const float observed = average.observed == nullptr ? 1.0f : average.observed[channel];
  running = averaged(running / observed, absmax, average.constant);
  if (average.observed != nullptr) average.observed[channel] = 1.0f;
}

}  // namespace noisyq
