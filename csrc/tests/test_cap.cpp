// common/cap.h against the long double library functions.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <initializer_list>

#include "check.h"
#include "common/cap.h"

namespace {

using kdk::Cap;
using kdk::Tanh;

constexpr std::uint32_t kStep = 4093;  // an exponent has 2^23 floats
constexpr float kBranch = 0.25f;       // from here on tanh_of() is no series
constexpr float kLastSlope = 43.625f;  // above, e^{−2u} may be subnormal

// In units of the last place of the float that `want` is nearest to.
double ulps(float got, long double want) {
  if (std::isnan(got)) return kdk::kInfinity;
  const int exponent = std::max(std::ilogb(want), -126);
  return static_cast<double>(std::ldexp(std::fabs(got - want), 23 - exponent));
}

long double exact_slope(long double u) {
  const long double e = std::exp(-2 * std::fabs(u));
  return 4 * e / ((1 + e) * (1 + e));
}

bool same_bits(float a, float b) { return kdk::to_bits(a) == kdk::to_bits(b); }

// body(x) for positive floats of every exponent, ascending.
template <typename Body>
void for_all_magnitudes(const Body& body) {
  const std::uint32_t end = kdk::to_bits(kdk::kInfinity);
  for (std::uint32_t bits = 1; bits < end; bits += bits < kStep ? 1 : kStep) {
    body(kdk::from_bits(bits));
  }
}

struct Errors {
  double series = 0, value = 0, slope = 0;
  float largest = 0, steepest = 0;
  bool odd = true, ascending = true;
  Tanh before{0, 1};

  void add(float u) {
    const Tanh got = kdk::tanh_of(u), mirrored = kdk::tanh_of(-u);
    double& of_value = u < kBranch ? series : value;
    of_value = std::fmax(of_value, ulps(got.value, std::tanh(static_cast<long double>(u))));
    if (u <= kLastSlope) slope = std::fmax(slope, ulps(got.slope, exact_slope(u)));
    odd &= same_bits(mirrored.value, -got.value) && same_bits(mirrored.slope, got.slope);
    ascending &= got.value >= before.value;
    largest = std::fmax(largest, got.value);
    steepest = std::fmax(steepest, got.slope);
    before = got;
  }

  void check(const char* name) const {
    std::printf("tanh, %s: series %.2f ulp, value %.2f ulp, slope %.2f ulp\n", name, series, value,
                slope);
    CHECK(series < 1);
    CHECK(value < 4);
    CHECK(slope < 5.5);
    CHECK(odd);
    CHECK(ascending);
    CHECK(largest <= 1);
    CHECK(steepest <= 1.0000002f);
  }
};

void test_tanh() {
  Errors all;
  for_all_magnitudes([&](float u) { all.add(u); });
  all.check("all magnitudes");

  Errors branch;
  const std::uint32_t bits = kdk::to_bits(kBranch);
  for (std::uint32_t i = bits - 50000; i < bits + 50000; ++i) branch.add(kdk::from_bits(i));
  branch.check("around the branch");

  // To where e^{−2u} has become subnormal.
  Errors curve;
  for (int i = 0; i < 480000; ++i) curve.add(static_cast<float>(i) * 1e-4f);
  curve.check("0 to 48");

  for (float zero : {0.0f, -0.0f}) {
    CHECK(same_bits(kdk::tanh_of(zero).value, zero));
    CHECK(kdk::tanh_of(zero).slope == 1);
  }
  for (float huge : {50.0f, 1e30f, 3.4e38f, kdk::kInfinity}) {
    CHECK(kdk::tanh_of(huge).value == 1 && kdk::tanh_of(-huge).value == -1);
    CHECK(same_bits(kdk::tanh_of(huge).slope, 0) && same_bits(kdk::tanh_of(-huge).slope, 0));
  }
}

void test_cap(double scale, double c) {
  const Cap cap = kdk::make_cap(scale, c);
  CHECK(kdk::changes(cap));
  double value_error = 0, slope_error = 0;
  bool odd = true, ordered = true, bounded = true;
  float before = 0;
  for_all_magnitudes([&](float x) {
    const float value = kdk::capped(x, cap), slope = kdk::cap_slope(x, cap);
    const long double u = x * static_cast<long double>(scale) / c, size = std::fabs(u);
    // Its argument must be a normal float.
    if (size > 1.2e-38L) value_error = std::fmax(value_error, ulps(value, c * std::tanh(u)));
    // e^{−2u} has 2u times the relative error of u.
    if (size < kLastSlope) {
      const double error = ulps(slope, scale * exact_slope(u));
      slope_error = std::fmax(slope_error, error / static_cast<double>(1 + size));
    }
    odd &= same_bits(kdk::capped(-x, cap), -value) && same_bits(kdk::cap_slope(-x, cap), slope);
    ordered &= scale > 0 ? value >= before : value <= before;
    bounded &= std::fabs(value) <= cap.cap;
    before = value;
  });
  std::printf("scale %g, cap %g: value %.2f ulp, slope %.2f (1 + |u|) ulp\n", scale, c, value_error,
              slope_error);
  CHECK(value_error < 5.5);
  CHECK(slope_error < 5);
  CHECK(odd);
  CHECK(ordered);
  CHECK(bounded);
  const float sign = scale > 0 ? 1.0f : -1.0f;
  for (float infinity : {kdk::kInfinity, -kdk::kInfinity}) {
    CHECK(kdk::capped(infinity, cap) == std::copysign(cap.cap, sign * infinity));
    CHECK(kdk::cap_slope(infinity, cap) == 0);
  }
  CHECK(kdk::capped(0, cap) == 0 && kdk::cap_slope(0, cap) == cap.scale);
}

void test_no_cap() {
  CHECK(!kdk::changes(Cap{}) && !kdk::changes(kdk::make_cap(1, 0)));
  const Cap cap = kdk::make_cap(-0.7, 0);
  CHECK(kdk::changes(cap));
  for (float x : {0.0f, 1.5f, -3e38f, 1e-45f, kdk::kInfinity}) {
    CHECK(kdk::capped(x, cap) == x * -0.7f);
    CHECK(kdk::cap_slope(x, cap) == -0.7f);
  }
}

// Whatever the payload of a NaN, neither value nor slope turns into a number.
void test_nan() {
  const Cap cap = kdk::make_cap(0.5, 30);
  for (std::uint32_t payload : {0u, 1u, 0x1ffu, 0x12345u, 0x3fffffu}) {
    for (std::uint32_t sign : {0x7fc00000u, 0xffc00000u}) {
      const float nan = kdk::from_bits(sign | payload);
      CHECK(std::isnan(kdk::tanh_of(nan).value) && std::isnan(kdk::tanh_of(nan).slope));
      CHECK(std::isnan(kdk::capped(nan, cap)) && std::isnan(kdk::cap_slope(nan, cap)));
      CHECK(std::isnan(kdk::capped(nan, kdk::make_cap(2, 0))));
    }
  }
}

}  // namespace

int main() {
  test_tanh();
  test_cap(1, 30);
  test_cap(1.7, 50);
  test_cap(-0.0625, 5);
  // A product that overflows, and one that never leaves the straight part.
  test_cap(0x1p60, 0x1p-60);
  test_cap(0x1p-60, 0x1p60);
  test_no_cap();
  test_nan();
  return kdk::test::checks_failed();
}
