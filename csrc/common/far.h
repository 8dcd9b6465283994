// The divergences where p and q are far apart.
//
// Where p and q differ by so much that no difference needs help, D and φ follow from the distances
// x = s − max_s and y = t − max_t, from e_s = e^{x/T} = z_s q and e_t = e^{y/T} = z_t p: with
// balance = w_p z_s / (w_q z_t)
//
//   m / (w_q q) = 1 + balance e^{(y − x)/T},   z_s m / w_q = e_s + balance e_t,
//   log(q/m) = x/T − log(z_s m),               log(p/m) = y/T − log(z_s m) + log(z_s / z_t).
//
// Logarithms have base 2. Slopes are in units of far_unit() and less the constant that makes them 0
// where only the student has the class: there the gradient is smallest, and would be lost in it.
#pragma once

#include <cmath>

#include "common/divergence.h"

namespace kdk {

template <Divergence kDivergence>
constexpr bool kHasFar = kDivergence != Divergence::kTVD;

// From which D on, in units of 1 + |log(z_s / z_t)|, it is exact enough. Errors of logarithms are
// absolute: half an ulp, on GPUs 2^-22, of log(z_s m), which is 17 where 128,256 classes share q.
template <Divergence kDivergence>
constexpr double kFarFrom = kDivergence == Divergence::kJSD ? 1.0 / 24 : 1.0 / 12;

// Up to which D, of the largest one: beyond, the gradients of most classes vanish beside φ.
constexpr double kFarUpTo = 0.8;

// Up to this mean slope, in the units of logits / T, one float holds it.
constexpr double kFarSlope = 4;

// The D up to which a row can be far apart; 0 for mixtures that have no such row: near one of the
// two distributions the gradient is small beside the slopes it is a difference of.
inline double far_limit(Divergence divergence, double w_p, double w_q) {
  if (divergence == Divergence::kForwardKL || divergence == Divergence::kReverseKL) return 1e30;
  const bool jsd = divergence == Divergence::kJSD;
  const double smallest = 1.0 / 1024, smallest_p = jsd ? 1.0 / 6 : smallest;
  const double largest = divergence == Divergence::kSkewReverseKL ? 0.5 : 1;
  if (w_p < smallest_p || w_q < smallest || w_q > largest) return 0;
  if (jsd) {
    return kFarUpTo * -(w_p * std::log(w_p) + w_q * std::log(w_q));
  }
  return kFarUpTo * -std::log(divergence == Divergence::kSkewForwardKL ? w_p : w_q);
}

template <Divergence kDivergence>
KDK_FN float far_unit(float w_p, float w_q, float inv_temperature) {
  if constexpr (kDivergence == Divergence::kReverseKL) return inv_temperature;
  if constexpr (kDivergence == Divergence::kJSD) return w_q * kLog2;
  if constexpr (kDivergence == Divergence::kSkewForwardKL) return w_q / w_p;
  return kLog2;
}

template <Divergence kDivergence>
KDK_FN float far_slope(float x, float y, TwoFloats rate, float balance) {
  if constexpr (kDivergence == Divergence::kReverseKL) {
    // Finite: its product with e_s = 0 is 0. Where e_s is not, x is above -1e8 at every T.
    return larger(x - y, -1e9f);
  } else {
    const float distance = (y - x) * rate.hi;
    const float ratio = balance * exp2_unit(smaller(distance, 100.0f));
    if constexpr (kDivergence == Divergence::kSkewForwardKL) {
      return -ratio * reciprocal(1 + ratio);
    } else {
      // What was cut off comes back, up to distances at which e_s is 0.
      const float log = log2_unit(1 + ratio) + 128 * saturate(distance * 0.0078125f - 0.78125f);
      if constexpr (kDivergence == Divergence::kJSD) return -log;
      return static_cast<float>(kLog2E) * ratio * reciprocal(1 + ratio) - log;
    }
  }
}

// What a class adds to the sums over a row; 0 what the divergence does not need.
struct FarTerms {
  float mass;    // e_s
  float from_p;  // e_t (log(p/m) − log(z_s/z_t))
  float from_q;  // e_s log(q/m)
  float slope;   // e_s times the slope plus far_offset()
};

// Without kGuarded it is no finite number for logits that are ruled out or so small that both
// exponentials are 0.
template <Divergence kDivergence, bool kGuarded>
KDK_FN FarTerms far_terms(float x, float y, TwoFloats rate, float balance, float w_q) {
  FarTerms terms{};
  float a = x * rate.hi;
  if constexpr (kDivergence == Divergence::kReverseKL) {
    terms.mass = exp2_unit(a);
    terms.slope = terms.mass * far_slope<kDivergence>(x, y, rate, balance);
    return terms;
  }
  float b = y * rate.hi;
  if constexpr (kGuarded) {
    a = larger(a, -1e4f);
    b = larger(b, -1e4f);
  }
  const float e_s = exp2_unit(a), e_t = exp2_unit(b);
  float m = w_q * fused(balance, e_t, e_s);
  if constexpr (kGuarded) m = larger(m, 1e-37f);
  const float log_m = log2_unit(m);
  terms.mass = e_s;
  if constexpr (kDivergence != Divergence::kSkewReverseKL) terms.from_p = e_t * (b - log_m);
  if constexpr (kDivergence != Divergence::kSkewForwardKL) terms.from_q = e_s * (a - log_m);
  if constexpr (kDivergence == Divergence::kJSD) {
    terms.slope = terms.from_q;
  } else if constexpr (kDivergence == Divergence::kSkewForwardKL) {
    terms.slope = -e_s * (w_q * balance * e_t * reciprocal(m));
  } else {
    const float share = w_q * static_cast<float>(kLog2E);
    terms.slope = terms.from_q - e_s * (share * e_s * reciprocal(m));
  }
  return terms;
}

template <Divergence kDivergence>
KDK_FN float far_offset(float w_q) {
  if constexpr (kDivergence == Divergence::kJSD) return -log2_unit(w_q);
  if constexpr (kDivergence == Divergence::kSkewReverseKL) {
    return -log2_unit(w_q) - static_cast<float>(kLog2E);
  }
  return 0;
}

// D from the sums over a row: w_p KL(p‖m) + w_q KL(q‖m), or one of the two.
template <Divergence kDivergence>
KDK_FN float far_value(float from_p, float from_q, float z_s, float z_t, TwoFloats log_ratio,
                       float w_p, float w_q) {
  const float kl_p = (log_ratio.hi + kLog2 * from_p / z_t) + log_ratio.lo;
  const float kl_q = kLog2 * from_q / z_s;
  if constexpr (kDivergence == Divergence::kJSD) return w_p * kl_p + w_q * kl_q;
  return kDivergence == Divergence::kSkewForwardKL ? kl_p : kl_q;
}

}  // namespace kdk
