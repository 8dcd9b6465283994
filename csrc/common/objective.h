// What a row computes, element by element.
//
// Every divergence here is an f-divergence of p (teacher) and q (student): D = Σ p f(q/p). As Σ q =
// Σ p, a multiple of q − p may be added to each term without changing the sum; the terms below are
// the ones that make f(1) = f'(1) = 0. Then no term is negative, each vanishes exactly where q = p,
// and an error common to all q (of the normaliser) enters the sum only squared (hazards.md, N2).
// The gradient by the student's logits is (1/T) q (φ − Σ q φ), with φ = f'(q/p), the slope.
#pragma once

#include "common/math.h"

namespace kdk {

enum class Divergence : int {
  kForwardKL = 0,
  kReverseKL = 1,
  kJSD = 2,
  kSkewForwardKL = 3,
  kSkewReverseKL = 4,
  kTVD = 5,
};

// Where the two logits of a class stand after the row statistics.
struct RowFrame {
  float max_s, max_t;      // maxima of the logits
  float inv_z_s, inv_z_t;  // 1 / Σ e^{(logit − max) / T}
  TwoFloats log_ratio;     // T · log(Z_s / Z_t), in units of the logits
  TwoFloats rate;          // log2(e) / T
  float inv_temperature;
};

// One class: its probabilities, d = log q − log p, and q − p.
struct Element {
  float p, q, d, difference;
};

// From this KL on, in units of 1 + |log(z_s / z_t)|, the forward KL that the statistics give is
// exact enough (relative error below 1e-5 at every instruction-set level), and the gradient without
// series.
constexpr double kFarKL = 1.0 / 12;
// Below this KL the two distributions differ too little for a difference of their rounded
// normalisers.
constexpr double kNearKL = 1e-3;

// What a row asks of the arithmetic.
enum class Care {
  kFarNormal,  // as kFar, and no exponential underflows
  kFar,        // p and q differ by so much that no difference needs help: there is no element()
  kNear,       // q − p and the terms by series where they cancel, differences in two floats each
};

KDK_FN Element element(float s, float t, float e_s, float e_t, RowFrame frame) {
  Element x;
  x.q = e_s * frame.inv_z_s;
  x.p = e_t * frame.inv_z_t;
  // Maxima first: any shift of s or t that is exact leaves every bit below as it is.
  const TwoFloats from_max_s = two_diff(s, frame.max_s);
  const TwoFloats from_max_t = two_diff(t, frame.max_t);
  const float gap = from_max_s.hi - from_max_t.hi;
  float low = (from_max_s.lo - from_max_t.lo) - frame.log_ratio.lo;
  low = low == low ? low : 0.0f;  // NaN next to an infinite difference
  const float d = ((gap - frame.log_ratio.hi) + low) * frame.inv_temperature;
  x.d = d == d ? d : 0.0f;  // −inf on both sides: no probability, no difference
  // q − p by expm1 where it cancels; where the logits are far apart and only the normalisers bring
  // the probabilities together, d is the less exact of the two.
  const bool near = absolute(x.d) < 0.5f && absolute(gap) * frame.inv_temperature < 4.0f;
  x.difference = near ? x.p * (x.d + x.d * x.d * expm1_gap(x.d)) : x.q - x.p;
  return x;
}

// The term a ((m − a)/a − log(m/a)) of KL(a‖m), and log(m/a); both 0-safe in a.
struct Mixed {
  float term, log_ratio;
};

KDK_FN Mixed mixed(float a, float m, float difference /* m − a */) {
  const float inverse = reciprocal(a > 0.0f ? a : 1.0f);
  const float y = difference * inverse;
  const bool near = absolute(y) < 0.25f;
  const float squared = y * y * log1p_gap(y);
  // log(1 + y) from the ratio that does not cancel, and what its rounding lost where that shows.
  const float ratio = m * inverse;
  const float lost = (y - (ratio - 1.0f)) * (2.0f - ratio);
  const float far_log = log_of(ratio) + (ratio > 0.5f && ratio < 2.0f ? lost : 0.0f);
  Mixed result;
  result.log_ratio = a > 0.0f ? (near ? y - squared : far_log) : 0.0f;
  result.term = near && a > 0.0f ? a * squared : difference - a * result.log_ratio;
  return result;
}

struct Contribution {
  float term, slope;
};

// w_p and w_q are the weights of the mixture m = w_p p + w_q q, for the divergences that have one.
template <Divergence kDivergence>
KDK_FN Contribution contribution(float p, float q, float d, float difference, float w_p,
                                 float w_q) {
  const bool near = absolute(d) < 0.5f;
  Contribution c;
  if constexpr (kDivergence == Divergence::kForwardKL) {
    const float far = difference - p * d;
    const float term = near ? p * (d * d * expm1_gap(d)) : far;
    const float finite = p > 0.0f ? term : q;
    c.term = d == -kInfinity ? kInfinity : finite;
    c.slope = 0.0f;  // (q − p)/q: its product with q is `difference`, and Σ q φ = 0
  } else if constexpr (kDivergence == Divergence::kReverseKL) {
    const float far = q * d - difference;
    const float term = near ? q * (d * d * expm1_gap(-d)) : far;
    const float finite = q > 0.0f ? term : p;
    c.term = d == kInfinity ? kInfinity : finite;
    c.slope = q > 0.0f ? d : 0.0f;
  } else if constexpr (kDivergence == Divergence::kTVD) {
    c.term = 0.5f * absolute(difference);
    c.slope = difference > 0.0f ? 0.5f : difference < 0.0f ? -0.5f : 0.0f;
  } else {
    const float m = w_p * p + w_q * q;
    const Mixed from_p = mixed(p, m, w_q * difference);
    const Mixed from_q = mixed(q, m, -w_p * difference);
    const float relative = difference / (m > 0.0f ? m : 1.0f);
    if constexpr (kDivergence == Divergence::kJSD) {
      c.term = w_p * from_p.term + w_q * from_q.term;
      c.slope = -w_q * from_q.log_ratio;
    } else if constexpr (kDivergence == Divergence::kSkewForwardKL) {
      c.term = from_p.term;
      c.slope = w_q * w_q * relative;
    } else {
      c.term = from_q.term;
      c.slope = -from_q.log_ratio - w_q * w_p * relative;
    }
  }
  return c;
}

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
// terms.
template <bool kDistill, bool kHard, int kPower, bool kUnderflow, bool kLow = kHard>
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
    // NaN where the student rules out a class whose e_t is merely too small for a float.
    terms.gap = !kUnderflow || y > -kInfinity ? e_t * (x.hi - y) : 0.0f;
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
  float distill;           // of q (φ − mean_slope)
  TwoFloats mean_slope;    // Σ q φ: one float of it would be missing in the sum of every row
  float student, teacher;  // of e^{(s − max_s)/T} and e^{(t − max_t)/T}, for Care::kFar
  float hard;              // of e^{s − max_s}
  float smoothing;         // ε/V of every class
};

// One class in the gradient: its share of D, what the mean slope needs, and ∂(row loss)/∂s.
struct Visit {
  float term, q, slope, part;
};

template <Divergence kDivergence, bool kDistill, bool kHard, int kPower, Care kCare>
KDK_FN Visit visit(float s, float t, RowFrame frame, GradientFrame g, float w_p, float w_q) {
  constexpr bool kUnderflow = kCare != Care::kFarNormal;
  Visit at{};
  const float x = s - frame.max_s;
  float e_s = 0;
  at.part = kHard ? -g.smoothing : 0.0f;
  if constexpr (kDistill) {
    e_s = exp_of<false, kUnderflow>(x, 0.0f, frame.rate);
    const float e_t = exp_of<false, kUnderflow>(t - frame.max_t, 0.0f, frame.rate);
    if constexpr (kCare != Care::kNear) {
      at.part = (g.student * e_s + at.part) - g.teacher * e_t;
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
      e = exp_of<false, kUnderflow>(x, 0.0f, kUnitRate);
    }
    at.part += g.hard * e;
  }
  return at;
}

}  // namespace kdk
