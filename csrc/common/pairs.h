// Unevaluated sums of two floats, for the few numbers of a row that one float is too short for, on
// devices whose doubles are slow (Dekker 1971; Knuth, The Art of Computer Programming 2, 4.2.2).
#pragma once

#include "common/math.h"

namespace kdk {

// a + b = hi + lo exactly.
KDK_FN TwoFloats two_sum(float a, float b) {
  const float hi = a + b;
  const float back = hi - a;
  return {hi, (a - (hi - back)) + (b - back)};
}

// a · b = hi + lo exactly. As a fused multiply-add, because compilers fuse a mere product with
// whatever it is added to, and then lo is of another hi.
KDK_FN TwoFloats two_product(float a, float b) {
  const float hi = fused(a, b, 0.0f);
  return {hi, fused(a, b, -hi)};
}

// hi + lo in its normal form; an infinite hi keeps no lo.
KDK_FN TwoFloats pair(float hi, float lo) {
  lo = lo == lo ? lo : 0.0f;
  const float sum = hi + lo;
  const float rest = lo - (sum - hi);
  return {sum, rest == rest ? rest : 0.0f};
}

KDK_FN TwoFloats add(TwoFloats a, TwoFloats b) {
  const TwoFloats sum = two_sum(a.hi, b.hi);
  return pair(sum.hi, sum.lo + (a.lo + b.lo));
}

KDK_FN TwoFloats multiply(TwoFloats a, TwoFloats b) {
  const TwoFloats product = two_product(a.hi, b.hi);
  return pair(product.hi, product.lo + (a.hi * b.lo + a.lo * b.hi));
}

KDK_FN TwoFloats divide(TwoFloats a, TwoFloats b) {
  const float quotient = a.hi / b.hi;
  const float rest = fused(-quotient, b.hi, a.hi) + (a.lo - quotient * b.lo);
  return pair(quotient, rest / b.hi);
}

// A double that lies in memory, without double-precision instructions. Beyond a float's range: 0
// or infinity.
KDK_FN TwoFloats pair_from_double(const double* memory) {
  std::uint64_t bits;
  std::memcpy(&bits, memory, sizeof(bits));
  const int exponent = static_cast<int>((bits >> 52) & 2047) - 1023;
  const std::uint64_t fraction = bits & ((1ull << 52) - 1);
  const float sign = bits >> 63 ? -1.0f : 1.0f;
  if (exponent == 1024) return {fraction == 0 ? sign * kInfinity : kNaN, 0.0f};
  if (exponent < -126) return {0.0f, 0.0f};
  if (exponent > 127) return {sign * kInfinity, 0.0f};
  const float power = sign * from_bits(static_cast<std::uint32_t>(exponent + 127) << 23);
  const auto high = static_cast<std::uint32_t>((fraction | (1ull << 52)) >> 29);  // 24 bits
  const auto low = static_cast<std::uint32_t>(fraction & ((1u << 29) - 1));
  const float unit = 1.0f / (1 << 23);
  return pair(static_cast<float>(high) * unit * power,
              static_cast<float>(low) * (unit / (1 << 29)) * power);
}

// log(a / b), absolute error about 2^-24, for normal positive a, b and a / b.
KDK_FN TwoFloats log_ratio(float a, float b) {
  const float ratio = a / b;
  const float lost = fused(-ratio, b, a) / a;
  const Logarithm log = logarithm(ratio);
  // 0.693145752 has so few bits that its product with the exponent is exact.
  return pair(log.exponent * 6.93145752e-1f,
              log.exponent * 1.42860677e-6f + (log.of_fraction + lost));
}

// log(1 + y) for y > -1, relative error about 2^-23.
KDK_FN float log1p_of(float y) {
  return absolute(y) < 0.25f ? y - y * y * log1p_gap(y) : log_of(1.0f + y);
}

}  // namespace kdk
