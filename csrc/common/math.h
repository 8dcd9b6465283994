// Scalar mathematics of a row, the same on the host and on a GPU: branch-free, so that a loop over
// it vectorises, and free of the library functions that would stop it.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

// Internal linkage and always inlined: csrc/cpu/kernels.cpp is compiled once per instruction set,
// and a copy shared by the linker would run one level's instructions on another level's processor.
#ifdef __CUDACC__
#define KDK_FN static __host__ __device__ __forceinline__
#else
#define KDK_FN static inline __attribute__((always_inline))
#endif

namespace kdk {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr double kLog2E = 1.4426950408889634074;

KDK_FN float from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

KDK_FN std::uint32_t to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

KDK_FN float absolute(float x) { return from_bits(to_bits(x) & 0x7fffffffu); }

// e^-87 is a normal float, and so is what is greater.
constexpr float kUnderflowAt = 87.0f;

struct TwoFloats {
  float hi;
  float lo;
};

// log2(e), the rate of e^x; see split_rate.
constexpr TwoFloats kUnitRate = {static_cast<float>(kLog2E),
                                 static_cast<float>(kLog2E - static_cast<float>(kLog2E))};
static_assert(kUnitRate.lo > 0);

KDK_FN TwoFloats split(double x) {
  const float hi = static_cast<float>(x);
  return {hi, static_cast<float>(x - hi)};
}

// The same for a rate log2(e) / T, both parts positive: −inf times each of them is −inf, and their
// sum no NaN.
KDK_FN TwoFloats split_rate(double rate) {
  TwoFloats parts = split(rate);
  if (parts.lo <= 0) parts.hi = from_bits(to_bits(parts.hi) - 1);
  return {parts.hi, static_cast<float>(rate - parts.hi)};
}

// a − b = hi + lo exactly (Knuth, The Art of Computer Programming 2, 4.2.2 theorem B); lo is NaN
// where hi is infinite.
KDK_FN TwoFloats two_diff(float a, float b) {
  const float hi = a - b;
  const float back = a - hi;
  return {hi, (a - (hi + back)) + (back - b)};
}

// a · b + c with one rounding. Without the instruction the product is exact in double.
KDK_FN float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__) || defined(__CUDACC__)
  return __builtin_fmaf(a, b, c);
#else
  return static_cast<float>(static_cast<double>(a) * b + c);
#endif
}

#ifdef __CUDA_ARCH__

// 2^x by the special-function unit, to 2 ulp; subnormal results are 0.
static __device__ __forceinline__ float exp2_unit(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger one; that of b where a is NaN.
static __device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }

// 1 / x to 1 ulp.
static __device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// As on the host, below, but without kLow the exponent's argument is rounded: an error of 2^-24
// |x| / T more.
template <bool kLow, bool kUnderflow = true>
static __device__ __forceinline__ float exp_of(float x, float x_lo, TwoFloats rate) {
  float y;
  if constexpr (kLow) {
    constexpr float kShift = 12582912.0f + 127.0f;
    const float shifted = x * rate.hi + kShift;
    const float n = shifted - kShift;
    float f = fused(x, rate.hi, -n);
    f = x * rate.lo + f;
    f = x_lo * rate.hi + f;
    y = exp2_unit(f) * from_bits(to_bits(shifted) << 23);
    y = shifted < 12582912.0f + 1.0f ? 0.0f : y;
  } else {
    y = exp2_unit(fused(x, rate.hi, x * rate.lo));
  }
  return y;
}

#else

KDK_FN float larger(float a, float b) { return a > b ? a : b; }

KDK_FN float reciprocal(float x) { return 1.0f / x; }

// e^{(x + x_lo) / T} for x <= 0, with rate = log2(e) / T in two floats: 2 ulp. Exactly 1 at 0,
// exactly 0 at −inf and wherever the result would be subnormal; NaN stays NaN. Without kUnderflow x
// must be above −kUnderflowAt · T.
template <bool kLow, bool kUnderflow = true>
KDK_FN float exp_of(float x, float x_lo, TwoFloats rate) {
  // Adding 1.5 · 2^23 rounds to an integer n; adding the exponent bias as well leaves n + 127 in
  // the low bits, which shifted into place are 2^n.
  constexpr float kShift = 12582912.0f + 127.0f;
  const float shifted = x * rate.hi + kShift;
  const float n = shifted - kShift;
  float f = fused(x, rate.hi, -n);
  f = x * rate.lo + f;
  if constexpr (kLow) f = x_lo * rate.hi + f;
  // 2^f on [−½, ½], relative error 2e-9, and 1 at 0.
  float y = 1.5353362e-4f;
  y = y * f + 1.3398874e-3f;
  y = y * f + 9.6184374e-3f;
  y = y * f + 5.5503325e-2f;
  y = y * f + 2.4022648e-1f;
  y = y * f + 6.9314720e-1f;
  y = y * f + 1.0f;
  y *= from_bits(to_bits(shifted) << 23);
  if constexpr (!kUnderflow) return y;
  const std::uint32_t mask = shifted < 12582912.0f + 1.0f ? 0u : ~0u;
  return from_bits(to_bits(y) & mask);
}

#endif

KDK_FN float exp_of(float x, TwoFloats rate) { return exp_of<false>(x, 0.0f, rate); }

// (e^d − 1 − d) / d² for |d| < ½, relative error 5e-8.
KDK_FN float expm1_gap(float d) {
  float y = 1.9875629e-4f;
  y = y * d + 1.3981997e-3f;
  y = y * d + 8.3334522e-3f;
  y = y * d + 4.1665796e-2f;
  y = y * d + 1.6666665e-1f;
  return y * d + 0.5f;
}

// (y − log(1 + y)) / y² for |y| < ¼, relative error 3e-9.
KDK_FN float log1p_gap(float y) {
  float z = 1.1357451e-1f;
  z = z * y - 1.2500031e-1f;
  z = z * y + 1.2428257e-1f;
  z = z * y - 1.4218845e-1f;
  z = z * y + 1.6668151e-1f;
  z = z * y - 2.0001176e-1f;
  z = z * y + 2.4999990e-1f;
  z = z * y - 3.3333328e-1f;
  return z * y + 0.5f;
}

// log(x) = exponent · log 2 + of_fraction, for normal x > 0.
struct Logarithm {
  float exponent, of_fraction;
};

KDK_FN Logarithm logarithm(float x) {
  constexpr std::uint32_t kSqrtHalf = 0x3f3504f3u;
  const std::uint32_t bits = to_bits(x) - kSqrtHalf;
  const float exponent = static_cast<float>(static_cast<std::int32_t>(bits) >> 23);
  const float f = from_bits((bits & 0x7fffffu) + kSqrtHalf) - 1.0f;  // [√½ − 1, √2 − 1]
  float y = 7.0376792e-2f;
  y = y * f - 1.1514607e-1f;
  y = y * f + 1.1676999e-1f;
  y = y * f - 1.2420141e-1f;
  y = y * f + 1.4249323e-1f;
  y = y * f - 1.6668058e-1f;
  y = y * f + 2.0000715e-1f;
  y = y * f - 2.4999994e-1f;
  y = y * f + 3.3333331e-1f;
  y = y * f * f * f - 0.5f * f * f;
  return {exponent, y + f};
}

// log(x) for normal x > 0; finite for 0 and subnormal x, where only a product with 0 is wanted of
// it.
KDK_FN float log_of(float x) {
  const Logarithm log = logarithm(x);
  return log.exponent * 0.69314718f + log.of_fraction;
}

}  // namespace kdk
