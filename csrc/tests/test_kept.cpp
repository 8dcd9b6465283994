// common/kept.h against definitions in long double.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <vector>

#include "check.h"
#include "common/kept.h"
#include "definition.h"

namespace {

using kdk::Divergence;
using kdk::KeptHard;
using kdk::KeptShare;
using kdk::KeptSums;
using kdk::LogSum;
using kdk::test::exact_share;
using kdk::test::ExactShare;

constexpr double kNone = -static_cast<double>(kdk::kInfinity);
constexpr double kUnit = 0x1p-53;

void raise(double& so_far, long double error) {
  so_far = std::fmax(so_far, static_cast<double>(error));
}

// Relative; summands that are subnormal have their last places besides.
long double off(double got, long double want) {
  const long double error = std::fabs(got - want) - 4 * 0x1p-1074L;
  if (std::isnan(error)) return INFINITY;
  return error > 0 ? error / std::fabs(want) : 0;
}

// body(x) for x of either sign from 1e-8 to 700.
template <typename Body>
void for_all_logarithms(const Body& body) {
  for (int i = 0; i <= 6000; ++i) {
    const double x = std::pow(10.0, -8 + i * (std::log10(700.0) + 8) / 6000);
    body(x);
    body(-x);
  }
}

void test_term() {
  double error = 0;
  bool never_negative = true;
  for_all_logarithms([&](double log_ratio) {
    const double a = log_ratio > 0 ? 0.7 : 1e-280;
    const long double b = a * std::exp(-static_cast<long double>(log_ratio));
    const double got = kdk::kept_term(a, static_cast<double>(b), log_ratio);
    const long double want = a * (std::expm1(-static_cast<long double>(log_ratio)) + log_ratio);
    never_negative &= got >= 0;
    // Beside the terms' own size, the second summand in it has that of the first.
    raise(error, off(got, want) / (1 + 1 / std::fabs(log_ratio)));
  });
  std::printf("term: %.2g (1 + 1/|log(a/b)|)\n", error);
  CHECK(error < 8 * kUnit);
  CHECK(never_negative);
  CHECK(kdk::kept_term(0.3, 0.3, 0) == 0);
  CHECK(kdk::kept_term(0, 0.3, kNone) == 0.3);
  CHECK(kdk::kept_term(0, 0, kdk::kNaN) == 0);
  CHECK(kdk::kept_term(0.3, 0, -kNone) == -kNone);
}

void test_log_share(double w) {
  double error = 0;
  for_all_logarithms([&](double x) {
    const long double exact_w = w, exact_x = x;
    raise(error, off(kdk::log_share(w, 1 - w, x), std::log1p((1 - exact_w) * std::expm1(exact_x))));
  });
  std::printf("log share, w = %.3g: %.2g\n", w, error);
  CHECK(error < 6 * kUnit);
  CHECK(kdk::log_share(w, 1 - w, 0) == 0);
  CHECK(std::fabs(kdk::log_share(w, 1 - w, kNone) - std::log(w)) <= 1e-15);
  CHECK(off(kdk::log_share(w, 1 - w, 1e4), 1e4L + std::log(1 - static_cast<long double>(w))) <
        kUnit);
  CHECK(kdk::log_share(w, 1 - w, -kNone) == -kNone);
}

// Logarithms from 0 to −700, as many near 0 as far away, and some whose e^x is 0.
std::vector<double> logarithms() {
  std::vector<double> all = {-800, -10000};
  for (int i = 0; i < 160; ++i) all.push_back(-700 * std::pow(i / 159.0, 3));
  return all;
}

struct Pairs {
  Divergence divergence;
  double beta, w_p, w_q;
  double near = 0, term = 0, push = 0;
  bool never_negative = true;

  Pairs(Divergence divergence, double beta)
      : divergence(divergence),
        beta(beta),
        w_p(divergence == Divergence::kSkewReverseKL ? 1 - beta : beta),
        w_q(1 - w_p) {}

  KeptShare share(double log_p, double log_q) const {
    return kdk::kept_share(divergence, {log_p, log_q}, w_p, w_q);
  }

  void add(double log_p, double log_q) {
    const KeptShare got = share(log_p, log_q);
    const long double d = std::fabs(static_cast<long double>(log_q) - log_p);
    const ExactShare want = exact_share(divergence, log_p, log_q, beta);
    never_negative &= got.term >= 0;
    // A logarithm of the size of d, rounded; near 0 the term is the square of one of w · d.
    const long double of_term = off(got.term, want.term) / (1 + d);
    d < 1 ? raise(near, of_term * d) : raise(term, of_term);
    raise(push, off(got.push, want.push) / (1 + d));
  }
};

void test_share(const char* name, Divergence divergence, double beta) {
  Pairs pairs(divergence, beta);
  const std::vector<double> all = logarithms();
  for (double log_p : all) {
    for (double log_q : all) {
      if (log_p != log_q) pairs.add(log_p, log_q);
    }
    for (int i = 0; i < 40; ++i) {
      const double d = std::pow(10.0, -0.2 * i);  // to 1e-8
      if (log_p != log_p - d) pairs.add(log_p, log_p - d);
      if (log_p != log_p - d) pairs.add(log_p - d, log_p);
    }
    const KeptShare equal = pairs.share(log_p, log_p);
    CHECK(equal.term == 0 && equal.push == 0);
  }
  // The skew divergences are from a mixture that has this much of the other side.
  const bool reverse = divergence == Divergence::kSkewReverseKL;
  const double other = reverse                                    ? pairs.w_p
                       : divergence == Divergence::kSkewForwardKL ? pairs.w_q
                                                                  : 1;
  // The reverse one's slope, other² d near 0, is a difference of terms of the size of other · d.
  const double term_bound = 4 * kUnit / other, push_bound = 8 * kUnit / (reverse ? other : 1);
  std::printf("%s, beta = %.2g: term %.2g, near %.2g, push %.2g\n", name, beta, pairs.term,
              pairs.near, pairs.push);
  CHECK(pairs.near < term_bound);
  CHECK(pairs.term < term_bound);
  CHECK(pairs.push < push_bound);
  CHECK(pairs.never_negative);

  // A class that one of the two is without, or both: by its logarithm, or because e^x is 0.
  for (double none : {kNone, -800.0}) {
    const KeptShare absent = pairs.share(none, kNone);
    CHECK(absent.term == 0 && absent.push == 0);
    const KeptShare small = pairs.share(none, -750);
    CHECK(small.term == 0 && small.push == 0);
  }
  for (double log_x : all) {
    if (log_x < -700) continue;
    const KeptShare missing = pairs.share(log_x, kNone), extra = pairs.share(kNone, log_x);
    const ExactShare want_missing = exact_share(divergence, log_x, kNone, beta);
    const ExactShare want_extra = exact_share(divergence, kNone, log_x, beta);
    CHECK(off(missing.push, want_missing.push) <= kUnit);
    if (divergence == Divergence::kForwardKL) {
      CHECK(missing.term == -kNone);
    } else {
      CHECK(off(missing.term, want_missing.term) < term_bound);
    }
    if (divergence == Divergence::kReverseKL) {
      CHECK(extra.term == -kNone && extra.push == -kNone);
    } else {
      CHECK(off(extra.term, want_extra.term) < term_bound);
      CHECK(off(extra.push, want_extra.push) < push_bound);
    }
  }
  CHECK(std::isnan(pairs.share(kdk::kNaN, -1).term));
  CHECK(std::isnan(pairs.share(-1, kdk::kNaN).term));
}

// The gradient of a JSD that is next to nothing has all its digits too.
void test_small_beta(double beta) {
  double error = 0;
  for (double log_p : logarithms()) {
    for (double log_q : logarithms()) {
      const double d = log_q - log_p;
      if (std::fabs(d) > 30 || d == 0) continue;
      const long double q = std::exp(static_cast<long double>(log_q));
      const long double log_mq = std::log1p(beta * std::expm1(-static_cast<long double>(d)));
      const KeptShare got = kdk::kept_share(Divergence::kJSD, {log_p, log_q}, beta, 1 - beta);
      raise(error,
            off(got.push, -(1 - static_cast<long double>(beta)) * q * log_mq) / (1 + std::fabs(d)));
    }
  }
  std::printf("JSD, beta = %.2g: push %.2g\n", beta, error);
  CHECK(error < 8 * kUnit);
}

// ---- Sums -------------------------------------------------------------------------------------

void test_log_sum() {
  const LogSum nothing = kdk::log_sum_of_nothing();
  CHECK(kdk::log_of(nothing) == kNone);
  CHECK(kdk::share_of(nothing, 0) == 0 && kdk::share_of(nothing, kNone) == 0);
  const auto same = [](LogSum a, LogSum b) { return a.max == b.max && a.sum == b.sum; };
  const LogSum one = kdk::add(nothing, -3, 2.5);
  CHECK(one.max == -3 && one.sum == 2.5);
  CHECK(same(kdk::add(nothing, kNone, 1), nothing) && same(kdk::add(nothing, 5, 0), nothing));
  CHECK(same(kdk::add(one, kNone, 1), one) && same(kdk::add(one, 1000, 0), one));
  CHECK(std::isnan(kdk::log_of(kdk::add(one, kdk::kNaN, 1))));
  CHECK(std::isnan(kdk::log_of(kdk::add(one, 0, kdk::kNaN))));

  // Ascending, descending and mixed; no exponential of these fits a double.
  double error = 0, share_error = 0;
  for (double shift : {-1e5, 0.0, 1e5}) {
    for (int order : {1, 36, 13}) {
      const auto x = [&](int i) { return shift - 20.0 * (i * order % 37); };
      const auto w = [](int i) { return 0.25 + i; };
      LogSum total = nothing;
      long double sum = 0;
      for (int i = 0; i < 37; ++i) {
        total = kdk::add(total, x(i), w(i));
        sum += w(i) * std::exp(static_cast<long double>(x(i)) - shift);
      }
      const long double want = shift + std::log(sum);
      raise(error, off(kdk::log_of(total), want));
      for (int i = 0; i < 35; ++i) {
        const long double share = std::exp(static_cast<long double>(x(i)) - shift) / sum;
        raise(share_error, off(kdk::share_of(total, x(i)), share));
      }
      CHECK(kdk::share_of(total, kNone) == 0);
    }
  }
  std::printf("log sum: %.2g, share %.2g\n", error, share_error);
  CHECK(error < 4 * kUnit);
  CHECK(share_error < 8 * kUnit);
}

// A row of `count` equal other classes and as many kept ones, `above` of them below the label.
struct HardRow {
  KeptHard hard;
  double label, others, kept;

  HardRow(double above, double count, double kept_count, bool apart) {
    label = std::min(above, 0.0);
    others = label - above;
    kept = others - 1;
    const KeptSums sums{others, count, count, 0, kept_count * std::exp(kept), true, apart, label};
    hard = kdk::kept_hard(sums);
  }
};

// The label from far below the others to far above them, where 1 − q of it is no double.
void test_hard() {
  double loss_error = 0, part_error = 0, share_error = 0;
  for (int i = -640; i <= 640; ++i) {
    const double above = 1.0 * i;
    for (double count : {1.0, 3.5, 1e5}) {
      for (double kept_count : {0.0, 2.0}) {
        const HardRow row(above, count, kept_count, i % 2 == 0);
        const long double size = std::fabs(above);
        const long double other = (count + kept_count * std::exp(-1.0L)) * std::exp(-above * 1.0L);
        const long double loss = std::log1p(other), rest = other / (1 + other);
        const double distance = static_cast<double>(1 + size);
        raise(loss_error, off(kdk::label_loss(row.hard, row.label), loss) / distance);
        raise(part_error, off(kdk::hard_part(row.hard, row.label, true), -rest) / distance);
        const long double q = std::exp(-above * 1.0L) / (1 + other);
        raise(share_error, off(kdk::hard_part(row.hard, row.others, false), q) / distance);
      }
    }
  }
  std::printf("label: loss %.2g, gradient %.2g, of others %.2g (1 + |distance|)\n", loss_error,
              part_error, share_error);
  CHECK(loss_error < 4 * kUnit);
  CHECK(part_error < 6 * kUnit);
  CHECK(share_error < 4 * kUnit);

  // Nothing beside the label; a label that is ruled out.
  const KeptHard alone = kdk::kept_hard({kNone, 0, 0, 0, 0, true, true, 0});
  CHECK(kdk::label_loss(alone, 0) == 0 && kdk::hard_part(alone, 0, true) == 0);
  CHECK(kdk::hard_part(alone, kNone, false) == 0);
  const KeptHard out = kdk::kept_hard({0, 3, 3, 0, 0, true, true, kNone});
  CHECK(kdk::label_loss(out, kNone) == -kNone && kdk::hard_part(out, kNone, true) == -1);
  CHECK(std::fabs(kdk::hard_part(out, 0, false) - 1.0 / 3) < 1e-16);
}

}  // namespace

int main() {
  test_term();
  for (double w : {0x1p-10, 0.1, 0.5, 0.9, 1 - 0x1p-10}) test_log_share(w);
  test_share("forward KL", Divergence::kForwardKL, 0);
  test_share("reverse KL", Divergence::kReverseKL, 0);
  test_share("TVD", Divergence::kTVD, 0);
  for (double beta : {0.1, 0.5, 0.9}) {
    test_share("JSD", Divergence::kJSD, beta);
    test_share("skew forward KL", Divergence::kSkewForwardKL, beta);
    test_share("skew reverse KL", Divergence::kSkewReverseKL, beta);
  }
  for (double beta : {0x1p-100, 1e-12, 1e-6}) test_small_beta(beta);
  test_log_sum();
  test_hard();
  return kdk::test::checks_failed();
}
