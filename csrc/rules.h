// The rules of learned quantizers, one value at a time. noisyq_fast/rules.py has their equations,
// noisyq_fast/backends/reference/learned.py is the same in PyTorch.
//
// Each is a struct, constructed from the parameters of a group, `stride` apart, with
//   code(x)              the code, an integer,
//   value(code)          its dequantized value,
//   derivatives(x)       dy/dx, and dy/d each of its `kParameters`.
// A NaN stays NaN: it compares false.
#pragma once

#include "elementary.h"

namespace noisyq {

// Ends of the codes.
struct CodeEnds {
  float low;
  float high;
};

struct Derivatives {
  float x;
  float p;
  float q = 0.0f;
  float r = 0.0f;
};

NOISYQ_INLINE float least(float scale) { return scale < FLT_MIN ? FLT_MIN : scale; }

// The product; 0 if the derivative is 0, even for a gradient that is not finite.
NOISYQ_INLINE float chained(float grad, float derivative) {
  const float product = grad * derivative;
  return derivative == 0.0f ? 0.0f : product;
}

struct LSQ {
  static constexpr int kParameters = 1;
  float scale, low, high;

  NOISYQ_INLINE LSQ(const float* p, int64_t, CodeEnds ends)
      : scale(least(p[0])), low(ends.low), high(ends.high) {}
  NOISYQ_INLINE float code(float x) const { return rintf(clamp_to(x / scale, low, high)); }
  NOISYQ_INLINE float value(float code) const { return code * scale; }
  NOISYQ_INLINE Derivatives derivatives(float x) const {
    const float v = x / scale;
    const bool below = v <= low, above = v >= high;
    const float inside = above ? high : rintf(v) - v;
    return {below | above ? 0.0f : 1.0f, below ? low : inside};
  }
};

enum class ClipKind { pact, sat, aqd, aqd_odd };

template <ClipKind kKind>
struct Clip {
  static constexpr int kParameters = 1;
  static constexpr bool kOdd = kKind == ClipKind::aqd_odd;
  float clip, n, scale;

  NOISYQ_INLINE Clip(const float* p, int64_t, CodeEnds ends)
      : clip(p[0]), n(ends.high), scale(least(p[0] / ends.high)) {}
  NOISYQ_INLINE float rounded(float v) const {
    if (kOdd) return rintf((clamp_to(v, -n, n) + n) * 0.5f) * 2.0f - n;
    return rintf(clamp_to(v, 0.0f, n));
  }
  NOISYQ_INLINE float code(float x) const { return rounded(x / scale); }
  NOISYQ_INLINE float value(float code) const { return code * scale; }
  NOISYQ_INLINE Derivatives derivatives(float x) const {
    const float v = x / scale;
    const bool below = kOdd ? x < -clip : x < 0.0f;
    const bool above = kOdd || kKind == ClipKind::aqd ? x > clip : x >= clip;
    float inside = kKind == ClipKind::pact ? 0.0f : (rounded(v) - v) / n;
    inside = below ? (kOdd ? -1.0f : 0.0f) : inside;
    return {below | above ? 0.0f : 1.0f, above ? 1.0f : inside};
  }
};

// For weights with an exponent and the sign of the weight; for activations without.
template <bool kOdd>
struct QIL {
  static constexpr int kParameters = kOdd ? 3 : 2;
  float center, width, whole, exponent, n, scale;

  NOISYQ_INLINE QIL(const float* p, int64_t stride, CodeEnds ends)
      : center(p[0]),
        width(p[stride]),
        whole(least(2.0f * p[stride])),
        exponent(kOdd ? p[2 * stride] : 1.0f),
        n(ends.high),
        scale(1.0f / ends.high) {}
  NOISYQ_INLINE float distance(float x) const { return (kOdd ? fabsf(x) : x) - center; }
  NOISYQ_INLINE float sign(float x) const {
    if (!kOdd) return 1.0f;
    const float positive = x > 0.0f ? 1.0f : x;  // a zero or a NaN itself
    return x < 0.0f ? -1.0f : positive;
  }
  NOISYQ_INLINE float log_inside(float v) const {
    return log_of((v <= 0.0f) | (v >= 1.0f) ? 0.5f : v);
  }
  // clip(v, 0, 1)^g
  NOISYQ_INLINE float power(float v) const {
    const float clipped = clamp_to(v, 0.0f, 1.0f);
    if (!kOdd || exponent == 1.0f) return clipped;
    const float inside = exp_of(exponent * log_inside(v));
    return (clipped <= 0.0f) | (clipped >= 1.0f) ? clipped : inside;
  }
  NOISYQ_INLINE float code(float x) const {
    return rintf(power(distance(x) / whole + 0.5f) * n) * sign(x);
  }
  NOISYQ_INLINE float value(float code) const { return code * scale; }
  NOISYQ_INLINE Derivatives derivatives(float x) const {
    const float v = distance(x) / whole + 0.5f;
    const float raised = power(v);
    const float slope = kOdd ? exponent * (raised / v) * (1.0f / whole) : 1.0f / whole;
    const float by_center = -(sign(x) * slope);
    const float by_distance = by_center * (distance(x) / width);
    const float by_exponent = kOdd ? sign(x) * raised * log_inside(v) : 0.0f;
    const bool outside = (v <= 0.0f) | (v >= 1.0f);
    return {outside ? 0.0f : slope, outside ? 0.0f : by_center, outside ? 0.0f : by_distance,
            outside ? 0.0f : by_exponent};
  }
};

struct DSQ {
  static constexpr int kParameters = 3;
  float low, high, n, scale, k, z, alpha, turn;

  NOISYQ_INLINE DSQ(const float* p, int64_t stride, CodeEnds ends)
      : low(p[0]),
        high(p[stride]),
        n(ends.high),
        scale(least((p[stride] - p[0]) / ends.high)),
        k(log_of(2.0f / p[2 * stride] - 1.0f)),
        z(1.0f / (1.0f - p[2 * stride])),
        alpha(p[2 * stride]),
        turn(2.0f / (alpha * (2.0f - alpha))) {}
  NOISYQ_INLINE float steps(float x) const { return (clamp_to(x, low, high) - low) / scale; }
  NOISYQ_INLINE float cell(float steps) const {
    const float cell = floorf(steps);
    return cell > n - 1.0f ? n - 1.0f : cell;
  }
  NOISYQ_INLINE float rounded(float steps) const {
    const float i = cell(steps);
    return i + ((steps - i) - 0.5f >= 0.0f ? 1.0f : 0.0f);
  }
  NOISYQ_INLINE float code(float x) const { return rounded(steps(x)); }
  NOISYQ_INLINE float value(float code) const { return code * scale + low; }
  NOISYQ_INLINE Derivatives derivatives(float x) const {
    const float at = steps(x);
    const float place = (at - cell(at)) - 0.5f;
    const float t = tanh_of(k * place);
    const float bump = 1.0f - t * t;
    const float slope = z * k * 0.5f * bump;
    const float share = at / n, code = rounded(at) / n;
    const bool below = x<low, above = x> high;
    const float by_low = (1.0f - code) + slope * (share - 1.0f);
    const float by_high = code - slope * share;
    const float by_alpha = scale * 0.5f * (z * z * t - z * bump * (place * turn));
    const float under = below ? 1.0f : by_low, over = above ? 1.0f : by_high;
    return {below | above ? 0.0f : slope, above ? 0.0f : under, below ? 0.0f : over,
            below | above ? 0.0f : by_alpha};
  }
};

enum class Rounding { original, modified, centered };

template <Rounding kRounding>
struct DoReFa {
  static constexpr int kParameters = 2;
  float factor, most, of_most, low, high, scale;

  NOISYQ_INLINE DoReFa(const float* p, int64_t stride, CodeEnds ends)
      : factor(p[stride]),
        most(least(tanh_of(p[0]))),
        of_most((1.0f - most * most) / most),
        low(ends.low),
        high(ends.high),
        scale(p[stride] / (kRounding == Rounding::original   ? ends.high
                           : kRounding == Rounding::modified ? -ends.low
                                                             : ends.high + 1.0f)) {}
  NOISYQ_INLINE float code(float x) const {
    const float w = clamp_to((tanh_of(x) / most + 1.0f) * 0.5f, 0.0f, 1.0f);
    if (kRounding == Rounding::original) return rintf(w * high) * 2.0f - high;
    const float n = kRounding == Rounding::modified ? high - low : high;
    const float floored = floorf(w * (n + 1.0f));
    const float cell = floored > n ? n : floored;
    return kRounding == Rounding::modified ? cell + low : cell * 2.0f - high;
  }
  NOISYQ_INLINE float value(float code) const { return code * scale; }
  NOISYQ_INLINE Derivatives derivatives(float x) const {
    const float t = tanh_of(x);
    return {factor * ((1.0f - t * t) / most), -(factor * ((t / most) * of_most))};
  }
};

// Returns body(null pointer of the rule's type).
template <class Body>
auto with_rule(RuleKind kind, const Body& body) {
  switch (kind) {
    case RuleKind::lsq:
      return body(static_cast<LSQ*>(nullptr));
    case RuleKind::pact:
      return body(static_cast<Clip<ClipKind::pact>*>(nullptr));
    case RuleKind::sat:
      return body(static_cast<Clip<ClipKind::sat>*>(nullptr));
    case RuleKind::aqd:
      return body(static_cast<Clip<ClipKind::aqd>*>(nullptr));
    case RuleKind::aqd_odd:
      return body(static_cast<Clip<ClipKind::aqd_odd>*>(nullptr));
    case RuleKind::qil:
      return body(static_cast<QIL<false>*>(nullptr));
    case RuleKind::qil_odd:
      return body(static_cast<QIL<true>*>(nullptr));
    case RuleKind::dsq:
      return body(static_cast<DSQ*>(nullptr));
    case RuleKind::dorefa_original:
      return body(static_cast<DoReFa<Rounding::original>*>(nullptr));
    case RuleKind::dorefa_modified:
      return body(static_cast<DoReFa<Rounding::modified>*>(nullptr));
    default:
      return body(static_cast<DoReFa<Rounding::centered>*>(nullptr));
  }
}

}  // namespace noisyq
