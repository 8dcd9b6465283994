// What a row computes, class by class.
#pragma once

#include "common/far.h"

namespace kdk {

// Below this KL the two distributions differ too little for a difference of their rounded
// normalisers.
constexpr double kNearKL = 1e-3;

// What a row asks of the arithmetic.
enum class Care {
  kFarNormal,  // as kFar, and no exponential underflows; of the forward KL only
  kFar,        // p and q differ by so much that no difference needs help: there is no element()
  kNear,       // q − p and the terms by series where they cancel, differences in two floats each
};

// e^{z} from e^{z/T}: a few products where T is a small integer.
template <int kPower>
KDK_FN float power(float e) {
  static_assert(kPower >= 1 && kPower <= 4, "T = 1, 2, 3, 4");
  if constexpr (kPower == 1) return e;
  if constexpr (kPower == 2) return e * e;
  if constexpr (kPower == 3) return e * e * e;
  return (e * e) * (e * e);
}

// What one class adds to the sums, and how far it lies above and below the maxima.
struct Terms {
  float z_s, z_t, gap, z_rest, above, below;
};

// kPower: e^s is that power of e^{s/T}; 0: it takes an exponential of its own.
// Without kUnderflow no logit may be kUnderflowAt · min(T, 1) below the maximum: not checked here.
// kLow: with what a float loses of s − max_s; a confident row's loss is as exact as its smallest
// terms. kSwapped: the gap is the reverse KL's, of e_s.
template <bool kDistill, bool kHard, int kPower, bool kUnderflow, bool kLow = kHard,
          bool kSwapped = false>
KDK_FN Terms terms_of(float s, float t, float max_s, float max_t, TwoFloats rate) {
  Terms terms{};
  const TwoFloats x = two_diff(s, max_s);
  terms.above = terms.below = x.hi;
  if constexpr (kDistill) {
    const float y = t - max_t;
    terms.above = y > x.hi ? y : x.hi;
    terms.below = y < x.hi ? y : x.hi;
    const float e_t = exp_of<false, kUnderflow>(y, 0.0f, rate);
    terms.z_s = exp_of<kLow, kUnderflow>(x.hi, x.lo, rate);
    terms.z_t = e_t;
    // NaN where one side rules out a class whose weight is merely too small for a float.
    if constexpr (kSwapped) {
      terms.gap = !kUnderflow || x.hi > -kInfinity ? terms.z_s * (y - x.hi) : 0.0f;
    } else {
      terms.gap = !kUnderflow || y > -kInfinity ? e_t * (x.hi - y) : 0.0f;
    }
  }
  if constexpr (kHard) {
    if constexpr (kPower > 0) {
      terms.z_rest = power<kPower>(terms.z_s);
    } else {
      terms.z_rest = exp_of<kLow, kUnderflow>(x.hi, x.lo, kUnitRate);
    }
  }
  return terms;
}

KDK_FN Terms operator+(Terms a, Terms b) {
  return {a.z_s + b.z_s,
          a.z_t + b.z_t,
          a.gap + b.gap,
          a.z_rest + b.z_rest,
          a.above > b.above ? a.above : b.above,
          a.below < b.below ? a.below : b.below};
}

// The gradient's constants, rounded once.
struct GradientFrame {
  float distill;         // of q (φ − mean_slope)
  TwoFloats mean_slope;  // Σ q φ: one float of it would be missing in the sum of every row
  // For Care::kFar, see far.h: of e^{(s − max_s)/T}, of e^{(t − max_t)/T}, of the first times
  // φ − mean_slope.
  float student, teacher, slope, balance;
  float hard;       // of e^{s − max_s}
  float smoothing;  // ε/V of every class, that `base` is less by
};

// One class in the gradient: its share of D, what the mean slope needs, and ∂(row loss)/∂s.
struct Visit {
  float term, q, slope, part;
  float e_s;  // e^{(s − max_s)/T}
};

// `base` is what the caller adds to the gradient anyway.
template <Divergence kDivergence, bool kDistill, bool kHard, int kPower, Care kCare>
KDK_FN Visit visit(float s, float t, RowFrame frame, GradientFrame g, float w_p, float w_q,
                   float base) {
  constexpr bool kUnderflow = kCare != Care::kFarNormal;
  constexpr bool kExact = kForGPU && kCare == Care::kNear;  // a CPU's exponential always is
  Visit at{};
  const float x = s - frame.max_s;
  float e_s = 0;
  at.part = base;
  if constexpr (kDistill) {
    at.e_s = e_s = exp_of<kExact, kUnderflow>(x, 0.0f, frame.rate);
    const float y = t - frame.max_t;
    const float e_t = exp_of<kExact, kUnderflow>(y, 0.0f, frame.rate);
    if constexpr (kCare != Care::kNear && kDivergence == Divergence::kForwardKL) {
      at.part = (g.student * e_s + at.part) - g.teacher * e_t;
    } else if constexpr (kCare != Care::kNear) {
      const float slope = far_slope<kDivergence>(x, y, frame.rate, g.balance);
      at.part += e_s * (g.student + g.slope * (slope - g.mean_slope.hi));
    } else {
      const Element c = element(s, t, e_s, e_t, frame);
      const Contribution of = contribution<kDivergence>(c.p, c.q, c.d, c.difference, w_p, w_q);
      at.term = of.term;
      at.q = c.q;
      at.slope = of.slope;
      if constexpr (kDivergence == Divergence::kForwardKL) {
        at.part += g.distill * c.difference;
      } else {
        at.part += g.distill * (c.q * ((of.slope - g.mean_slope.hi) - g.mean_slope.lo));
      }
    }
  }
  if constexpr (kHard) {
    float e;
    if constexpr (kPower > 0) {
      e = power<kPower>(e_s);
    } else {
      e = exp_of<kExact, kUnderflow>(x, 0.0f, kUnitRate);
    }
    at.part += g.hard * e;
  }
  return at;
}

}  // namespace kdk
