// common/rows.h: every half-precision value, and rounding to nearest even around every midpoint.
#include <cmath>
#include <cstdint>

#include "check.h"
#include "common/rows.h"

namespace {

// The value of a binary16, from its fields.
float value_of_float16(std::uint16_t half) {
  const int exponent = (half >> 10) & 31, mantissa = half & 1023;
  const float sign = half & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? kdk::kNaN : sign * kdk::kInfinity;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
}

bool same(float a, float b) {
  return std::isnan(a) ? std::isnan(b) : kdk::to_bits(a) == kdk::to_bits(b);
}

template <typename ToFloat, typename FromFloat>
void test_rounding(std::uint16_t largest, const ToFloat& to_float, const FromFloat& from_float) {
  bool exact = true, below = true, above = true, ties = true, negative = true;
  for (std::uint32_t bits = 0; bits < largest; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const auto next = static_cast<std::uint16_t>(bits + 1);
    const float low = to_float(half), high = to_float(next);
    const float middle = static_cast<float>((static_cast<double>(low) + high) / 2);
    exact &= from_float(low) == half;
    below &= from_float(std::nextafter(middle, 0.0f)) == half;
    above &= from_float(std::nextafter(middle, kdk::kInfinity)) == next;
    ties &= from_float(middle) == (bits % 2 ? next : half);
    negative &= from_float(-middle) == (from_float(middle) | 0x8000);
  }
  CHECK(exact);
  CHECK(below);
  CHECK(above);
  CHECK(ties);
  CHECK(negative);
  CHECK(std::isnan(to_float(from_float(kdk::kNaN))));
  // A NaN whose payload lies in the bits that are cut off stays a NaN.
  CHECK(std::isnan(to_float(from_float(kdk::from_bits(0x7f800001u)))));
  CHECK(to_float(from_float(kdk::kInfinity)) == kdk::kInfinity);
  CHECK(to_float(from_float(3.4e38f)) == kdk::kInfinity);
}

}  // namespace

int main() {
  bool all = true;
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    all &= same(kdk::float_from_float16(half), value_of_float16(half));
    all &= same(kdk::float_from_bfloat16(half), kdk::from_bits(bits << 16));
  }
  CHECK(all);
  // Up to the largest finite value.
  test_rounding(0x7bff, kdk::float_from_float16, kdk::float16_from_float);
  test_rounding(0x7f7f, kdk::float_from_bfloat16, kdk::bfloat16_from_float);
  // float16 overflows from the midpoint between the largest value and 65536 on.
  CHECK(kdk::float16_from_float(65519.996f) == 0x7bff);
  CHECK(kdk::float16_from_float(65520.0f) == 0x7c00);
  return kdk::test::checks_failed();
}
