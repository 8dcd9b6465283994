// common/divergence.h and common/far.h: the terms and slopes of every divergence against their
// definitions in long double.
#include <cmath>
#include <cstdio>
#include <initializer_list>

#include "check.h"
#include "common/far.h"
#include "definition.h"

namespace {

using kdk::Divergence;
using kdk::test::definition;
using kdk::test::Exact;

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

// Of a class in a row with the normalisers z_s and z_t: p, d, and what far.h makes of the logits.
struct FarClass {
  long double p, d, e_s, e_t;
  float slope;
  kdk::FarTerms terms;
};

constexpr double kTemperature = 1.7, kZs = 3.25, kZt = 1.5;

template <Divergence kDivergence>
FarClass far_class(float x, float y, float w_p, float w_q) {
  const kdk::TwoFloats rate = kdk::split(kdk::kLog2E / kTemperature);
  const float balance = w_p / w_q * static_cast<float>(kZs / kZt);
  FarClass at{};
  at.e_s = std::exp(x / static_cast<long double>(kTemperature));
  at.e_t = std::exp(y / static_cast<long double>(kTemperature));
  at.p = at.e_t / kZt;
  at.d = (static_cast<long double>(x) - y) / kTemperature - std::log(kZs / kZt);
  at.slope = kdk::far_slope<kDivergence>(x, y, rate, balance);
  at.terms = kdk::far_terms<kDivergence, true>(x, y, rate, balance, w_q);
  return at;
}

template <Divergence kDivergence>
void test_far(const char* name, float beta) {
  const bool reverse = kDivergence == Divergence::kSkewReverseKL;
  const float w_p = reverse ? 1 - beta : beta, w_q = reverse ? beta : 1 - beta;
  const float unit = kdk::far_unit<kDivergence>(w_p, w_q, static_cast<float>(1 / kTemperature));
  // Slopes are known but for a constant.
  const FarClass origin = far_class<kDivergence>(-1, -2, w_p, w_q);
  const long double slope_0 = definition(kDivergence, origin.p, origin.d, beta).slope;
  double slope_error = 0, term_error = 0;
  const float offset = kdk::far_offset<kDivergence>(w_q);
  // Down to where e_s and e_t are 0.
  for (int i = 0; i <= 400; ++i) {
    for (int j = 0; j <= 400; ++j) {
      const float x = -0.37f * static_cast<float>(i), y = -0.41f * static_cast<float>(j);
      const FarClass at = far_class<kDivergence>(x, y, w_p, w_q);
      const long double slope = definition(kDivergence, at.p, at.d, beta).slope - slope_0;
      const long double got = (static_cast<long double>(at.slope) - origin.slope) * unit;
      if (at.e_s > 1.2e-38L) {  // what is smaller is 0
        slope_error = std::fmax(slope_error, std::fabs(got - slope) / (1 + std::fabs(slope)));
      }
      const auto off = [&](float term, long double e, long double factor) {
        if (e < 1e-30L) return;  // beside it the other exponential counts, and may be 0
        const long double distance = (std::fabs(x) + std::fabs(y)) / kTemperature;
        const long double scale = e * (1 + distance) * (1 + std::fabs(factor));
        term_error = std::fmax(term_error, std::fabs(term - e * factor) / scale);
      };
      off(at.terms.mass, at.e_s, 1);
      off(at.terms.slope, at.e_s, static_cast<long double>(at.slope) + offset);
      if constexpr (kDivergence != Divergence::kReverseKL) {
        const long double log_mp = std::log(w_p + w_q * std::exp(at.d));
        const long double log_2 = std::log(2.0L), log_zz = std::log(kZs / kZt);
        if (kDivergence != Divergence::kSkewReverseKL) {
          off(at.terms.from_p, at.e_t, (-log_mp - log_zz) / log_2);
        }
        if (kDivergence != Divergence::kSkewForwardKL) {
          off(at.terms.from_q, at.e_s, (at.d - log_mp) / log_2);
        }
      }
    }
  }
  std::printf("far %s: slope %.2g, terms %.2g\n", name, slope_error, term_error);
  CHECK(slope_error < 1e-6);
  CHECK(term_error < 1e-6);
  // Ruled out by the student, the teacher, both: what is multiplied with 0 is finite. The reverse
  // KL of what only the teacher rules out is infinite.
  for (const float x : {-1.0f, -kdk::kInfinity}) {
    for (const float y : {-1.0f, -kdk::kInfinity}) {
      if (kDivergence == Divergence::kReverseKL && x > y) continue;
      const FarClass at = far_class<kDivergence>(x, y, w_p, w_q);
      CHECK(std::isfinite(at.slope));
      CHECK(std::isfinite(at.terms.from_p) && std::isfinite(at.terms.from_q));
      CHECK(std::isfinite(at.terms.slope));
    }
  }
}

}  // namespace

int main() {
  test_divergence<Divergence::kForwardKL>("forward KL", 0);
  test_divergence<Divergence::kReverseKL>("reverse KL", 0);
  test_divergence<Divergence::kTVD>("TVD", 0);
  test_far<Divergence::kReverseKL>("reverse KL", 0);
  for (float beta : {0.1f, 0.5f, 0.9f}) {
    test_divergence<Divergence::kJSD>("JSD", beta);
    test_divergence<Divergence::kSkewForwardKL>("skew forward KL", beta);
    test_divergence<Divergence::kSkewReverseKL>("skew reverse KL", beta);
    test_far<Divergence::kJSD>("JSD", beta);
    test_far<Divergence::kSkewForwardKL>("skew forward KL", beta);
    test_far<Divergence::kSkewReverseKL>("skew reverse KL", beta);
  }
  return kdk::test::checks_failed();
}
