// common/math.h against the long double library functions.
#include <cmath>
#include <cstdio>
#include <initializer_list>

#include "check.h"
#include "common/math.h"

namespace {

using kdk::TwoFloats;

double worst(double& so_far, long double got, long double want) {
  const double error = static_cast<double>(std::fabs((got - want) / want));
  so_far = error > so_far ? error : so_far;
  return so_far;
}

void test_two_diff() {
  const float values[] = {1.0f, -3.1415927f, 1e-7f, 65537.25f, -8388607.5f, 0.0f, 1.1754944e-38f};
  for (float a : values) {
    for (float b : values) {
      const TwoFloats d = kdk::two_diff(a, b);
      CHECK(static_cast<long double>(d.hi) + d.lo == static_cast<long double>(a) - b);
    }
  }
}

void test_exp() {
  for (double temperature : {0.1, 1.0, 2.0, 3.7, 1024.0}) {
    const TwoFloats rate = kdk::split(kdk::kLog2E / temperature);
    double error = 0;
    for (int i = 0; i < 200000; ++i) {
      const float x = static_cast<float>(-86.0 * temperature * i / 200000);
      const float low = x * 2.9e-8f;
      worst(error, kdk::exp_of<true>(x, low, rate),
            std::exp((static_cast<long double>(x) + low) / temperature));
    }
    std::printf("exp, T = %g: %.2g\n", temperature, error);
    CHECK(error < 3e-7);
    CHECK(kdk::exp_of(0.0f, rate) == 1.0f);
    CHECK(kdk::exp_of(-kdk::kInfinity, rate) == 0.0f);
    CHECK(kdk::exp_of<true>(-kdk::kInfinity, kdk::kNaN, rate) == 0.0f);
    CHECK(kdk::exp_of(static_cast<float>(-200 * temperature), rate) == 0.0f);
    CHECK(kdk::exp_of(-3e38f, rate) == 0.0f);
    // Whatever the payload of a NaN, it does not turn into a number.
    for (std::uint32_t payload : {0u, 1u, 0x1ffu, 0x12345u, 0x3fffffu}) {
      CHECK(std::isnan(kdk::exp_of(kdk::from_bits(0x7fc00000u | payload), rate)));
      CHECK(std::isnan(kdk::exp_of(kdk::from_bits(0xffc00000u | payload), rate)));
    }
  }
}

void test_gaps() {
  double expm1_error = 0, log1p_error = 0;
  for (int i = -49999; i < 50000; ++i) {
    if (i == 0) continue;
    const float x = static_cast<float>(i) * 1e-5f;
    const long double d = x;
    // The series by hand: the library's difference would cancel.
    long double term = 0.5L, expm1_gap = 0, log1p_gap = 0, power = 1;
    for (int k = 2; k < 80; ++k) {
      expm1_gap += term;
      term *= d / (k + 1);
      log1p_gap += power / k;
      power *= -d;
    }
    worst(expm1_error, kdk::expm1_gap(x), expm1_gap);
    if (std::fabs(x) < 0.25f) worst(log1p_error, kdk::log1p_gap(x), log1p_gap);
  }
  std::printf("expm1_gap: %.2g, log1p_gap: %.2g\n", expm1_error, log1p_error);
  CHECK(expm1_error < 1.5e-7);
  CHECK(log1p_error < 1.5e-7);
  CHECK(kdk::expm1_gap(0.0f) == 0.5f);
}

void test_log() {
  double error = 0;
  for (int exponent = -120; exponent <= 120; ++exponent) {
    for (int i = 0; i < 1000; ++i) {
      const float x = std::ldexp(1.0f + static_cast<float>(i) * 1e-3f, exponent);
      if (x != 1.0f) worst(error, kdk::log_of(x), std::log(static_cast<long double>(x)));
    }
  }
  std::printf("log: %.2g\n", error);
  CHECK(error < 4e-7);
  CHECK(kdk::log_of(1.0f) == 0.0f);
  CHECK(std::isfinite(kdk::log_of(0.0f)) && std::isfinite(kdk::log_of(1e-45f)));
}

}  // namespace

int main() {
  test_two_diff();
  test_exp();
  test_gaps();
  test_log();
  return kdk::test::checks_failed();
}
