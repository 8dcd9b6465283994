// The divergences as they are defined, in long double.
#pragma once

#include <cmath>

#include "common/divergence.h"

namespace kdk::test {

struct Exact {
  long double term, slope;
};

// p f(q/p) and f'(q/p), with f(1) = f'(1) = 0; x = q/p = e^d.
inline Exact definition(Divergence divergence, long double p, long double d, long double beta) {
  const long double x = std::exp(d), y = std::expm1(d);
  const long double w_p = divergence == Divergence::kSkewReverseKL ? 1 - beta : beta, w_q = 1 - w_p;
  const long double log_mp = std::log1p(w_q * y), relative = y / (1 + w_q * y);
  switch (divergence) {
    case Divergence::kForwardKL:
      return {p * (y - d), -std::expm1(-d)};
    case Divergence::kReverseKL:
      return {p * (x * d - y), d};
    case Divergence::kTVD:
      return {p * std::fabs(y) / 2, y > 0 ? 0.5L : -0.5L};
    case Divergence::kJSD:
      return {p * (w_q * x * (d - log_mp) - w_p * log_mp), w_q * (d - log_mp)};
    case Divergence::kSkewForwardKL:
      return {p * (w_q * y - log_mp), w_q * w_q * relative};
    case Divergence::kSkewReverseKL:
      return {p * (x * (d - log_mp) - w_p * y), (d - log_mp) - w_q * w_p * relative};
    case Divergence::kKept:
      break;
  }
  return {};
}

// Its limits: f(0), and f'(∞), which is f(x)/x there.
inline Exact limits(Divergence divergence, long double beta) {
  const long double w_p = divergence == Divergence::kSkewReverseKL ? 1 - beta : beta, w_q = 1 - w_p;
  switch (divergence) {
    case Divergence::kForwardKL:
      return {INFINITY, 1};
    case Divergence::kReverseKL:
      return {1, INFINITY};
    case Divergence::kTVD:
      return {0.5L, 0.5L};
    case Divergence::kJSD:
      return {-w_p * std::log(w_p), -w_q * std::log(w_q)};
    case Divergence::kSkewForwardKL:
      return {-w_q - std::log(w_p), w_q};
    case Divergence::kSkewReverseKL:
      return {w_p, -w_p - std::log(w_q)};
    case Divergence::kKept:
      break;
  }
  return {};
}

struct ExactShare {
  long double term, push;  // p f(q/p), q f'(q/p)
};

// Of a class by log p and log q, either of which may be −inf.
inline ExactShare exact_share(Divergence divergence, long double log_p, long double log_q,
                              long double beta) {
  const long double p = std::exp(log_p), q = std::exp(log_q);
  if (log_p == log_q) return {0, 0};
  if (q == 0) {
    const bool forward = divergence == Divergence::kForwardKL;  // its q f' is q − p
    return {p * limits(divergence, beta).term, forward ? -p : 0};
  }
  if (p == 0) {
    const long double linear = q * limits(divergence, beta).slope;
    return {linear, linear};
  }
  const Exact of = definition(divergence, p, log_q - log_p, beta);
  return {of.term, q * of.slope};
}

}  // namespace kdk::test
