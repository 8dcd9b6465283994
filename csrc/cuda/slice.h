// A block's share of a row: columns [begin, end), in shared memory or where the tensors lie, taken
// kChunk at a time. Which thread gets which chunk depends on the columns alone, never on addresses:
// the sums are the same bits wherever a row lies.
#pragma once

#include "common/rows.h"
#include "cuda/primitives.h"

namespace kdk {
namespace gpu {

constexpr int kChunk = 8;

// The columns of one tensor's row that a block uses.
struct Side {
  char* row;  // address of column 0, were it there too
  DType dtype;
  bool aligned;  // chunks begin at multiples of 16 bytes

  KDK_DEVICE_METHOD char* at(std::int64_t column) const { return row + column * size_of(dtype); }
};

KDK_DEVICE bool is_aligned(const void* address) {
  return (reinterpret_cast<std::uintptr_t>(address) & 15) == 0;
}

KDK_DEVICE Side side_of(void* row, DType dtype, std::int64_t begin) {
  Side side{static_cast<char*>(row), dtype, false};
  side.aligned = is_aligned(side.at(begin));
  return side;
}

KDK_DEVICE float load_one(const Side& side, std::int64_t column) {
  const char* address = side.at(column);
  if (side.dtype == DType::kFloat32) return *reinterpret_cast<const float*>(address);
  const std::uint16_t bits = *reinterpret_cast<const std::uint16_t*>(address);
  return side.dtype == DType::kBFloat16 ? float_from_bfloat16(bits) : float_from_float16(bits);
}

KDK_DEVICE void store_one(const Side& side, std::int64_t column, float value) {
  char* address = side.at(column);
  if (side.dtype == DType::kFloat32) {
    *reinterpret_cast<float*>(address) = value;
  } else {
    *reinterpret_cast<std::uint16_t*>(address) =
        side.dtype == DType::kBFloat16 ? bfloat16_from_float(value) : float16_from_float(value);
  }
}

// The columns [column, column + n) of a chunk, n <= kChunk, and −inf beyond them.
KDK_DEVICE void load_chunk(const Side& side, std::int64_t column, int n, float (&out)[kChunk]) {
  if (n < kChunk || !side.aligned) {
    KDK_UNROLL
    for (int i = 0; i < kChunk; ++i) out[i] = i < n ? load_one(side, column + i) : -kInfinity;
    return;
  }
  const auto* words = reinterpret_cast<const Bytes16*>(side.at(column));
  if (side.dtype == DType::kFloat32) {
    KDK_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Bytes16 four = words[half];
      KDK_UNROLL
      for (int i = 0; i < 4; ++i) out[4 * half + i] = from_bits(four.word[i]);
    }
    return;
  }
  const Bytes16 eight = words[0];
  KDK_UNROLL
  for (int i = 0; i < kChunk; ++i) {
    const auto bits = static_cast<std::uint16_t>(eight.word[i / 2] >> (16 * (i % 2)));
    out[i] = side.dtype == DType::kBFloat16 ? float_from_bfloat16(bits) : float_from_float16(bits);
  }
}

KDK_DEVICE void store_chunk(const Side& side, std::int64_t column, int n,
                            const float (&values)[kChunk]) {
  if (n < kChunk || !side.aligned) {
    KDK_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      if (i < n) store_one(side, column + i, values[i]);
    }
    return;
  }
  auto* words = reinterpret_cast<Bytes16*>(side.at(column));
  if (side.dtype == DType::kFloat32) {
    KDK_UNROLL
    for (int half = 0; half < 2; ++half) {
      Bytes16 four;
      KDK_UNROLL
      for (int i = 0; i < 4; ++i) four.word[i] = to_bits(values[4 * half + i]);
      words[half] = four;
    }
    return;
  }
  Bytes16 eight;
  KDK_UNROLL
  for (int i = 0; i < 4; ++i) {
    const bool bfloat16 = side.dtype == DType::kBFloat16;
    const float low = values[2 * i], high = values[2 * i + 1];
    const std::uint32_t low_bits = bfloat16 ? bfloat16_from_float(low) : float16_from_float(low);
    const std::uint32_t high_bits = bfloat16 ? bfloat16_from_float(high) : float16_from_float(high);
    eight.word[i] = low_bits | high_bits << 16;
  }
  words[0] = eight;
}

// ---- Between memory and shared memory ---------------------------------------------------------

// The part of [begin, end) that bulk copies can take: whole 16-byte units of the tensor's memory.
struct Interior {
  std::int64_t begin, end;  // columns
};

KDK_DEVICE Interior interior_of(const Side& memory, std::int64_t begin, std::int64_t end) {
  const int size = static_cast<int>(size_of(memory.dtype));
  const auto first = reinterpret_cast<std::uintptr_t>(memory.at(begin));
  const auto last = reinterpret_cast<std::uintptr_t>(memory.at(end));
  const std::uintptr_t aligned_first = (first + 15) & ~std::uintptr_t{15};
  const std::uintptr_t aligned_last = last & ~std::uintptr_t{15};
  if (aligned_first >= aligned_last) return {begin, begin};
  return {begin + static_cast<std::int64_t>(aligned_first - first) / size,
          end - static_cast<std::int64_t>(last - aligned_last) / size};
}

// The slice in `room` of shared memory, as far from a 16-byte boundary as it is in memory.
KDK_DEVICE Side shared_side(const Side& memory, char* room, std::int64_t begin) {
  const auto offset = reinterpret_cast<std::uintptr_t>(memory.at(begin)) & 15;
  Side side = memory;
  side.row = room + offset - begin * size_of(memory.dtype);
  return side;
}

}  // namespace gpu
}  // namespace kdk
