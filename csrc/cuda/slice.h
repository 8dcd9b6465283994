// A block's share of a row, columns counted from its first one: in shared memory or where the
// tensors lie, taken kChunk at a time. Which thread gets which chunk depends on the columns alone,
// never on addresses: the sums are the same bits wherever a row lies.
#pragma once

#include "common/rows.h"
#include "cuda/primitives.h"

namespace kdk {
namespace gpu {

constexpr int kChunk = 8;
constexpr std::int64_t kMaxColumns = std::int64_t{1} << 30;  // they and their chunks count in ints

// The share of one tensor's row.
struct Side {
  char* data;
  DType dtype;

  KDK_DEVICE_METHOD char* at(int column) const { return data + column * size_of(dtype); }
};

KDK_DEVICE int misalignment(const Side& side) {
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(side.data) & 15);
}

KDK_DEVICE float load_one(const Side& side, int column) {
  const char* address = side.at(column);
  if (side.dtype == DType::kFloat32) return *reinterpret_cast<const float*>(address);
  const std::uint16_t bits = *reinterpret_cast<const std::uint16_t*>(address);
  return side.dtype == DType::kBFloat16 ? float_from_bfloat16(bits) : float_from_float16(bits);
}

KDK_DEVICE void store_one(const Side& side, int column, float value) {
  char* address = side.at(column);
  if (side.dtype == DType::kFloat32) {
    *reinterpret_cast<float*>(address) = value;
  } else {
    *reinterpret_cast<std::uint16_t*>(address) =
        side.dtype == DType::kBFloat16 ? bfloat16_from_float(value) : float16_from_float(value);
  }
}

KDK_DEVICE void load_aligned(const Side& side, int column, float (&out)[kChunk]) {
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
  if (side.dtype == DType::kBFloat16) {
    KDK_UNROLL
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = from_bits(eight.word[i] << 16);
      out[2 * i + 1] = from_bits(eight.word[i] & 0xffff0000u);
    }
  } else {
    KDK_UNROLL
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = float_from_float16(static_cast<std::uint16_t>(eight.word[i]));
      out[2 * i + 1] = float_from_float16(static_cast<std::uint16_t>(eight.word[i] >> 16));
    }
  }
}

KDK_DEVICE void store_aligned(const Side& side, int column, const float (&values)[kChunk]) {
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
  if (side.dtype == DType::kBFloat16) {
    KDK_UNROLL
    for (int i = 0; i < 4; ++i) {
      eight.word[i] = bfloat16s_from_floats(values[2 * i], values[2 * i + 1]);
    }
  } else {
    KDK_UNROLL
    for (int i = 0; i < 4; ++i) {
      eight.word[i] = float16s_from_floats(values[2 * i], values[2 * i + 1]);
    }
  }
  words[0] = eight;
}

// kWhole: every chunk is aligned and whole, padded where the row ends. Else the first n columns of
// a chunk are there, at any address.

template <bool kWhole>
KDK_DEVICE void load_chunk(const Side& side, int column, int n, float (&out)[kChunk]) {
  if constexpr (kWhole) {
    load_aligned(side, column, out);
  } else if (n == kChunk && misalignment(side) == 0) {
    load_aligned(side, column, out);
  } else {
    KDK_UNROLL
    for (int i = 0; i < kChunk; ++i) out[i] = i < n ? load_one(side, column + i) : -kInfinity;
  }
}

template <bool kWhole>
KDK_DEVICE void store_chunk(const Side& side, int column, int n, const float (&values)[kChunk]) {
  if constexpr (kWhole) {
    store_aligned(side, column, values);
  } else if (n == kChunk && misalignment(side) == 0) {
    store_aligned(side, column, values);
  } else {
    KDK_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      if (i < n) store_one(side, column + i, values[i]);
    }
  }
}

// body(column, n) for each of the thread's chunks.
template <typename Body>
KDK_DEVICE void for_each_chunk(int columns, const Body& body) {
  KDK_ROLLED
  for (int column = thread_rank() * kChunk; column < columns; column += block_threads() * kChunk) {
    const int left = columns - column;
    body(column, left < kChunk ? left : kChunk);
  }
}

// ---- Between memory and shared memory ---------------------------------------------------------

// What bulk copies take of a share in memory: whole 16-byte units. The columns before and after
// are its edges.
struct Interior {
  int begin, end;

  KDK_DEVICE_METHOD int edges(int columns) const { return columns - (end - begin); }
  // The i-th column that is an edge.
  KDK_DEVICE_METHOD int edge(int i) const { return i < begin ? i : i + (end - begin); }
};

KDK_DEVICE Interior interior_of(const Side& memory, int columns) {
  const int size = static_cast<int>(size_of(memory.dtype));
  const int begin = ((16 - misalignment(memory)) & 15) / size;
  const int end =
      columns - static_cast<int>(reinterpret_cast<std::uintptr_t>(memory.at(columns)) & 15) / size;
  return begin < end ? Interior{begin, end} : Interior{0, 0};
}

KDK_DEVICE std::uint32_t bulk_bytes(const Side& memory, Interior interior) {
  return static_cast<std::uint32_t>((interior.end - interior.begin) * size_of(memory.dtype));
}

}  // namespace gpu
}  // namespace kdk
