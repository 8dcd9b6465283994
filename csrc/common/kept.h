// The divergences over the classes that a sparse teacher knows and one more class for the rest, in
// double: there are few of them.
//
// As in divergence.h a multiple of q − p is added to each term so that none is negative, and to
// each slope φ a constant so that it vanishes where q = p. A rest to which the teacher gives no
// probability stands for all its classes: without p, every divergence is linear in q.
#pragma once

#include <cmath>

#include "common/divergence.h"

namespace kdk {

// log p and log q of a class; −inf: none.
struct KeptClass {
  double log_p, log_q;
};

struct KeptShare {
  double term;  // of D
  double push;  // q φ
};

// The term a log(a / b) + b − a, with log_ratio = log(a / b).
KDK_FN double kept_term(double a, double b, double log_ratio) {
  if (a <= 0) return b;
  if (log_ratio < -1) return (b - a) + a * log_ratio;
  return a * (expm1(-log_ratio) + log_ratio);
}

// log(w + v e^x), with v = 1 − w: one of the two may be too small for a difference from 1.
KDK_FN double log_share(double w, double v, double x) {
  if (x > 700) return x + log(v + w * exp(-x));
  if (x < -1 && w < 0.5) return log(w + v * exp(x));
  return log1p(v * expm1(x));
}

KDK_FN KeptShare kept_share(Divergence divergence, KeptClass of, double w_p, double w_q) {
  const double p = exp(of.log_p), q = exp(of.log_q), d = of.log_q - of.log_p;
  if (p == 0 && q == 0) return {0, 0};
  const double difference = fabs(d) < 0.5 ? p * expm1(d) : q - p;
  switch (divergence) {
    case Divergence::kForwardKL:
      return {kept_term(p, q, -d), difference};
    case Divergence::kReverseKL:
      return {kept_term(q, p, d), q > 0 ? q * d : 0};
    case Divergence::kTVD:
      return {0.5 * fabs(difference), difference > 0 ? 0.5 * q : difference < 0 ? -0.5 * q : 0};
    default:
      break;
  }
  const double m = w_p * p + w_q * q;
  const double log_p_m = -log_share(w_p, w_q, d), log_q_m = -log_share(w_q, w_p, -d);
  const double from_q = q > 0 ? q * log_q_m : 0;
  const double relative = m > 0 ? q * (difference / m) : 0;
  if (divergence == Divergence::kJSD) {
    const double term = w_p * kept_term(p, m, log_p_m) + w_q * kept_term(q, m, log_q_m);
    return {term, w_q * from_q};
  }
  if (divergence == Divergence::kSkewForwardKL) {
    return {kept_term(p, m, log_p_m), w_q * w_q * relative};
  }
  return {kept_term(q, m, log_q_m), from_q - w_q * w_p * relative};
}

// ---- A row ------------------------------------------------------------------------------------

// log Σ w e^x, without underflow.
struct LogSum {
  double max, sum;
};

KDK_FN LogSum log_sum_of_nothing() { return {-static_cast<double>(kInfinity), 0}; }

KDK_FN LogSum add(LogSum total, double x, double w) {
  if (w == 0 || x == -static_cast<double>(kInfinity)) return total;
  if (!(x > total.max)) return {total.max, total.sum + w * exp(x - total.max)};
  return {x, total.sum * exp(total.max - x) + w};
}

KDK_FN double log_of(LogSum total) { return total.max + log(total.sum); }

// e^x as a share of the sum.
KDK_FN double share_of(LogSum total, double x) {
  return total.sum == 0 ? 0 : exp(x - total.max) / total.sum;
}

// What a sweep over the classes that are neither kept nor the label and a look at these leave.
// Logits are less the highest of the row.
struct KeptSums {
  double others;          // the highest of the others
  double z, z_hard;       // Σ e^{(s − others)/T}, Σ e^{s − others} over the others
  double kept_z;          // Σ e^{s/T} over the kept classes
  double kept_z_hard;     // Σ e^s over those that are not the label
  bool has_label, apart;  // there is one; and it is not kept
  double label;           // its logit
};

// One by one of what D is made of.
struct KeptFrame {
  double rate;  // 1 / T
  LogSum rest;  // over the classes that are not kept, at T
  double log_z, log_q_rest;
};

KDK_FN KeptFrame kept_frame(KeptSums sums, double temperature) {
  KeptFrame frame{1 / temperature, log_sum_of_nothing(), 0, 0};
  frame.rest = add(frame.rest, sums.others * frame.rate, sums.z);
  if (sums.apart) frame.rest = add(frame.rest, sums.label * frame.rate, 1);
  LogSum all = add(frame.rest, 0, sums.kept_z);
  frame.log_z = log_of(all);
  frame.log_q_rest = log_of(frame.rest) - frame.log_z;
  return frame;
}

// The gradient of D by a kept class with logit s, in units of distill_weight / T; `mean` is Σ q φ.
KDK_FN double kept_part(KeptFrame frame, KeptShare of, double mean, double s) {
  return of.push - exp(s * frame.rate - frame.log_z) * mean;
}

// That by the rest as a whole, of which a class has its share.
KDK_FN double rest_part(KeptFrame frame, KeptShare of_rest, double mean) {
  return of_rest.push - exp(frame.log_q_rest) * mean;
}

// Whether D, of a student that nearly equals the teacher, is so small that it shows what z has lost
// as a sum of floats: 2^-24 of itself. `rest` is what rest_part has found.
KDK_FN bool needs_exact_rest(double distill, double rest) {
  return 6e-8 * fabs(rest) > 2e-6 * fabs(distill);
}

// The cross-entropy at T = 1.
struct KeptHard {
  LogSum all, other;  // all classes; without the label
};

KDK_FN KeptHard kept_hard(KeptSums sums) {
  KeptHard hard{};
  hard.other = add(log_sum_of_nothing(), sums.others, sums.z_hard);
  hard.other = add(hard.other, 0, sums.kept_z_hard);
  hard.all = add(hard.other, sums.label, 1);
  return hard;
}

// −log q of the label: neither form subtracts what cancels.
KDK_FN double label_loss(KeptHard hard, double label) {
  const double other = hard.other.sum == 0 ? 0 : exp(log_of(hard.other));
  return label == 0 ? log1p(other) : log_of(hard.all) - label;
}

// The gradient by a class with logit s, but for smoothing. The label's is −Σ_{j≠y} q_j and not
// q_y − 1, which a confident row would lose to rounding.
KDK_FN double hard_part(KeptHard hard, double s, bool is_label) {
  if (!is_label) return share_of(hard.all, s);
  return hard.other.sum == 0 ? 0 : -exp(log_of(hard.other) - log_of(hard.all));
}

}  // namespace kdk
