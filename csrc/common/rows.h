// Rows of logits as they lie in memory, and the conversion of their elements.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace kdk {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

KDK_FN std::int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// (B, L, V) with unit stride along V. The two other strides, in elements, are free: 0 for expanded
// rows, L' · V with L' > L for a shifted view. Offsets are 64-bit throughout.
struct Rows {
  void* data;
  DType dtype;
  std::int64_t stride_b;
  std::int64_t stride_l;
};

KDK_FN void* row_pointer(const Rows& rows, std::int64_t b, std::int64_t l) {
  return static_cast<char*>(rows.data) +
         (b * rows.stride_b + l * rows.stride_l) * size_of(rows.dtype);
}

KDK_FN float float_from_bfloat16(std::uint16_t bits) {
  return from_bits(static_cast<std::uint32_t>(bits) << 16);
}

#ifdef __CUDA_ARCH__

KDK_FN float float_from_float16(std::uint16_t half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}

// Two at a time, the first in the low bits; to nearest, ties to even.

KDK_FN std::uint32_t bfloat16s_from_floats(float low, float high) {
  std::uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

KDK_FN std::uint32_t float16s_from_floats(float low, float high) {
  std::uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

KDK_FN std::uint16_t bfloat16_from_float(float value) {
  return static_cast<std::uint16_t>(bfloat16s_from_floats(value, value));
}

KDK_FN std::uint16_t float16_from_float(float value) {
  return static_cast<std::uint16_t>(float16s_from_floats(value, value));
}

#else

KDK_FN float float_from_float16(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000u) << 16;
  const std::uint32_t magnitude = (half & 0x7fffu) << 13;
  const float normal = from_bits(magnitude + (112u << 23));
  // 2^-14 + m is a normal float, so that no processor mode flushes the subnormal halves.
  const float subnormal = from_bits(magnitude + (113u << 23)) - from_bits(113u << 23);
  const float special = from_bits(magnitude | 0x7f800000u);
  const float value = magnitude < 0x00800000u    ? subnormal
                      : magnitude >= 0x0f800000u ? special
                                                 : normal;
  return from_bits(to_bits(value) | sign);
}

// Both round to nearest, ties to even.

KDK_FN std::uint16_t bfloat16_from_float(float value) {
  const std::uint32_t bits = to_bits(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>(value == value ? rounded : (bits >> 16) | 0x0040u);
}

KDK_FN std::uint16_t float16_from_float(float value) {
  const std::uint32_t bits = to_bits(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // The spacing of floats at ½ is the smallest half: the addition itself rounds.
  const std::uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  const std::uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const std::uint32_t half = magnitude < 0x38800000u    ? subnormal
                             : magnitude >= 0x47800000u ? special
                                                        : normal;
  return static_cast<std::uint16_t>(sign | half);
}

KDK_FN std::uint32_t bfloat16s_from_floats(float low, float high) {
  return bfloat16_from_float(low) | static_cast<std::uint32_t>(bfloat16_from_float(high)) << 16;
}

KDK_FN std::uint32_t float16s_from_floats(float low, float high) {
  return float16_from_float(low) | static_cast<std::uint32_t>(float16_from_float(high)) << 16;
}

#endif

}  // namespace kdk
