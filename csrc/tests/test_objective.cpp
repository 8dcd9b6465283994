// common/objective.h: the terms and slopes of every divergence against their definitions in long
// double.
#include <cmath>
#include <cstdio>
#include <initializer_list>

#include "check.h"
#include "common/objective.h"

namespace {

using kdk::Care;
using kdk::Divergence;

struct Exact {
  long double term, slope;
};

// p f(q/p) and f'(q/p), with f(1) = f'(1) = 0; x = q/p.
Exact definition(Divergence divergence, long double p, long double d, long double beta) {
  const long double x = std::exp(d), y = std::expm1(d);
  const long double w_p = divergence == Divergence::kSkewReverseKL ? 1 - beta : beta, w_q = 1 - w_p;
  const long double log_mp = std::log1p(w_q * y);
  switch (divergence) {
    case Divergence::kForwardKL:
      return {p * (y - d), 1 - 1 / x};
    case Divergence::kReverseKL:
      return {p * (x * d - y), d};
    case Divergence::kTVD:
      return {p * std::fabs(y) / 2, y > 0 ? 0.5L : -0.5L};
    case Divergence::kJSD:
      return {p * (w_q * x * (d - log_mp) - w_p * log_mp), w_q * (d - log_mp)};
    case Divergence::kSkewForwardKL:
      return {p * (w_q * y - log_mp), w_q - w_q / (w_p + w_q * x)};
    case Divergence::kSkewReverseKL:
      return {p * (x * (d - log_mp) - w_p * y), d - log_mp + 1 - w_q * x / (w_p + w_q * x) - w_p};
  }
  return {};
}

template <Divergence kDivergence>
void test_divergence(const char* name, float beta) {
  const bool reverse = kDivergence == Divergence::kSkewReverseKL;
  const float w_p = reverse ? 1 - beta : beta, w_q = reverse ? beta : 1 - beta;
  double term_error = 0, slope_error = 0;
  bool never_negative = true;
  const float p = 0x1.8p-7f;
  for (int i = -8000; i <= 8000; ++i) {
    if (i == 0) continue;
    // From 1e-4 to 10 on either side.
    const double d_exact = std::copysign(std::pow(10.0, std::abs(i) / 1600.0 - 4), i);
    const auto d = static_cast<float>(d_exact);
    const auto q = static_cast<float>(p * std::exp(static_cast<long double>(d)));
    const auto difference = static_cast<float>(p * std::expm1(static_cast<long double>(d)));
    const auto got = kdk::contribution<kDivergence>(p, q, d, difference, w_p, w_q);
    const Exact want = definition(kDivergence, p, d, beta);
    never_negative &= got.term >= 0;
    term_error = std::fmax(term_error, std::fabs((got.term - want.term) / want.term));
    if (kDivergence == Divergence::kForwardKL) continue;  // has no slope of its own
    slope_error = std::fmax(slope_error, std::fabs((got.slope - want.slope) / want.slope));
  }
  std::printf("%s: term %.2g, slope %.2g\n", name, term_error, slope_error);
  CHECK(never_negative);
  CHECK(term_error < 2e-6);  // where the series ends, the direct form loses a factor of 9
  // The slope of the skew reverse KL, w_p² d near 0, is a difference of terms of the size of w_p d.
  CHECK(slope_error < (reverse ? 1e-6 / w_p : 1e-6));

  const auto equal = kdk::contribution<kDivergence>(p, p, 0, 0, w_p, w_q);
  CHECK(equal.term == 0 && equal.slope == 0);
  // Absent from both; from the teacher; from the student.
  const auto none = kdk::contribution<kDivergence>(0, 0, 0, 0, w_p, w_q);
  CHECK(none.term == 0 && none.slope * 0 == 0);
  const auto extra = kdk::contribution<kDivergence>(0, p, kdk::kInfinity, p, w_p, w_q);
  CHECK(std::isfinite(extra.term) == (kDivergence != Divergence::kReverseKL));
  CHECK(extra.term > 0);
  const auto missing = kdk::contribution<kDivergence>(p, 0, -kdk::kInfinity, -p, w_p, w_q);
  CHECK(std::isfinite(missing.term) == (kDivergence != Divergence::kForwardKL));
  CHECK(missing.term > 0);
  CHECK(std::isfinite(missing.slope));
}

}  // namespace

int main() {
  test_divergence<Divergence::kForwardKL>("forward KL", 0);
  test_divergence<Divergence::kReverseKL>("reverse KL", 0);
  test_divergence<Divergence::kTVD>("TVD", 0);
  for (float beta : {0.1f, 0.5f, 0.9f}) {
    test_divergence<Divergence::kJSD>("JSD", beta);
    test_divergence<Divergence::kSkewForwardKL>("skew forward KL", beta);
    test_divergence<Divergence::kSkewReverseKL>("skew reverse KL", beta);
  }
  return kdk::test::checks_failed();
}
