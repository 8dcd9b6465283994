// The divergences, class by class.
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
  // A kernel's, on GPUs: any of these over the classes that a sparse teacher knows, see kept.h.
  kKept = 6,
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

}  // namespace kdk
