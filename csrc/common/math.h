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

// Arithmetic for GPUs, whose kernels the tests run on a CPU too.
#if defined(__CUDA_ARCH__) || defined(KDK_CUDA_ON_CPU)
constexpr bool kForGPU = true;
#else
constexpr bool kForGPU = false;
#endif

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr double kLog2E = 1.4426950408889634074;
constexpr float kLog2 = 0.69314718f;

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

// log2(e), the rate of e^x.
constexpr TwoFloats kUnitRate = {static_cast<float>(kLog2E),
                                 static_cast<float>(kLog2E - static_cast<float>(kLog2E))};

KDK_FN TwoFloats split(double x) {
  const float hi = static_cast<float>(x);
  return {hi, static_cast<float>(x - hi)};
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

// Adding 1.5 · 2^23 rounds to an integer n; adding the exponent bias as well leaves n + 127 in the
// low bits, which shifted into place are 2^n.
constexpr float kShift = 12582912.0f + 127.0f;

// 2^f · 2^n for |f| <= ½ and shifted = n + kShift: relative error 2e-9 before it is rounded, and 1
// at 0. Without kUnderflow 2^n must be a normal float; else the result is 0 where it is not.
template <bool kUnderflow>
KDK_FN float exp2_of(float f, float shifted) {
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

// What a GPU has an instruction for.
#ifdef __CUDA_ARCH__

// 2^x to 2 ulp; 0 where it is subnormal.
static __device__ __forceinline__ float exp2_unit(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x) to 2^-22, absolute between ½ and 2, else relative; subnormal x count as 0.
static __device__ __forceinline__ float log2_unit(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger or smaller one; b where a is NaN.
static __device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
static __device__ __forceinline__ float smaller(float a, float b) { return fminf(a, b); }

// Between 0 and 1; 0 where x is NaN.
static __device__ __forceinline__ float saturate(float x) { return __saturatef(x); }

// 1 / x to 1 ulp.
static __device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#else

KDK_FN float exp2_unit(float x) {
  const float shifted = x + kShift;
  return exp2_of<true>(x - (shifted - kShift), shifted);
}

KDK_FN float log2_unit(float x) {
  const Logarithm log = logarithm(x);
  const float y = log.exponent + log.of_fraction * static_cast<float>(kLog2E);
  if (!(x <= std::numeric_limits<float>::max())) return x;
  return x < std::numeric_limits<float>::min() ? -kInfinity : y;
}

KDK_FN float larger(float a, float b) { return a > b ? a : b; }
KDK_FN float smaller(float a, float b) { return a < b ? a : b; }
KDK_FN float saturate(float x) { return x > 0 ? smaller(x, 1.0f) : 0.0f; }

KDK_FN float reciprocal(float x) { return 1.0f / x; }

#endif

// e^{(x + x_lo) / T} for x <= 0, with rate = log2(e) / T in two floats: 2 ulp, on GPUs 4 ulp.
// Exactly 1 at 0, exactly 0 at −inf and wherever the result would be subnormal; NaN stays NaN.
// Without kUnderflow x must be above −kUnderflowAt · T. Without kLow x_lo counts as 0, and on GPUs
// the exponent's argument is one float: an error of 2^-23 |x| / T more.
template <bool kLow, bool kUnderflow = true>
KDK_FN float exp_of(float x, float x_lo, TwoFloats rate) {
  if constexpr (kForGPU && !kLow) return exp2_unit(x * rate.hi);
  const float shifted = x * rate.hi + kShift;
  const float n = shifted - kShift;
  float f = fused(x, rate.hi, -n);
  f = x * rate.lo + f;
  if constexpr (kLow) f = x_lo * rate.hi + f;
  if constexpr (!kForGPU) return exp2_of<kUnderflow>(f, shifted);
  const float y = exp2_unit(f) * from_bits(to_bits(shifted) << 23);
  return shifted < 12582912.0f + 1.0f ? 0.0f : y;
}

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

// log(x) for normal x > 0; finite for 0 and subnormal x, where only a product with 0 is wanted of
// it.
KDK_FN float log_of(float x) {
  const Logarithm log = logarithm(x);
  return log.exponent * kLog2 + log.of_fraction;
}

}  // namespace kdk
