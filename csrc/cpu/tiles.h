// Rows of logits, tile by tile, as floats.
//
// A tile is a multiple of every vector length: the last one is padded with −inf, which has no
// probability. So the order of additions depends on the row alone: its bits do not change with its
// address, its neighbours or the threads.
#pragma once

#include <algorithm>
#include <vector>

#include "common/cap.h"
#include "common/rows.h"

// Unnamed, here and in the files that include this: kernels.cpp is compiled once per
// instruction-set level, and a copy shared by the linker would run one level's instructions on
// another level's processor.
namespace kdk {
namespace KDK_ISA {
namespace {

constexpr std::int64_t kTile = 512;
constexpr std::int64_t kLanes = 64;

using Buffer = float[kTile];

void load_floats(const void* row, DType dtype, std::int64_t begin, std::int64_t n, float* out) {
  if (dtype == DType::kFloat32) {
    std::copy_n(static_cast<const float*>(row) + begin, n, out);
    return;
  }
  const std::uint16_t* in = static_cast<const std::uint16_t*>(row) + begin;
  if (dtype == DType::kBFloat16) {
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) out[i] = float_from_bfloat16(in[i]);
  } else {
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) out[i] = float_from_float16(in[i]);
  }
}

void store_floats(const float* in, DType dtype, std::int64_t begin, std::int64_t n, void* row) {
  if (dtype == DType::kFloat32) {
    std::copy_n(in, n, static_cast<float*>(row) + begin);
    return;
  }
  std::uint16_t* out = static_cast<std::uint16_t*>(row) + begin;
  if (dtype == DType::kBFloat16) {
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) out[i] = bfloat16_from_float(in[i]);
  } else {
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) out[i] = float16_from_float(in[i]);
  }
}

float load_float(const void* row, DType dtype, std::int64_t column) {
  float value;
  load_floats(row, dtype, column, 1, &value);
  return value;
}

void fill(float value, DType dtype, std::int64_t begin, std::int64_t end, void* row) {
  alignas(64) Buffer values;
  std::fill_n(values, std::min(kTile, std::max<std::int64_t>(end - begin, 0)), value);
  for (std::int64_t i = begin; i < end; i += kTile) {
    store_floats(values, dtype, i, std::min(kTile, end - i), row);
  }
}

// One side of a row: its logits, tile by tile.
struct Side {
  const void* row;
  DType dtype;
  Cap cap;

  // The columns [begin, begin + n) as floats, padded with −inf to a multiple of kLanes; read where
  // they lie when that is already so.
  const float* tile(std::int64_t begin, std::int64_t n, Buffer& buffer) const {
    if (dtype == DType::kFloat32 && n % kLanes == 0 && !changes(cap)) {
      return static_cast<const float*>(row) + begin;
    }
    load_floats(row, dtype, begin, n, buffer);
    if (changes(cap)) apply([this](float x) { return capped(x, cap); }, n, buffer);
    std::fill(buffer + n, buffer + padded(n), -kInfinity);
    return buffer;
  }

  float logit(std::int64_t column) const { return capped(load_float(row, dtype, column), cap); }

  // What the gradient by the logits has to be multiplied by, column for column.
  void slopes(std::int64_t begin, std::int64_t n, Buffer& buffer) const {
    load_floats(row, dtype, begin, n, buffer);
    apply([this](float x) { return cap_slope(x, cap); }, n, buffer);
  }

  template <typename Function>
  static void apply(const Function& function, std::int64_t n, Buffer& buffer) {
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) buffer[i] = function(buffer[i]);
  }

  static std::int64_t padded(std::int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
};

// ---- Tiles -------------------------------------------------------------------------------------

// body(begin, n) for every tile, in either direction.
template <typename Body>
void for_each_tile(std::int64_t columns, bool backward, const Body& body) {
  const std::int64_t tiles = (columns + kTile - 1) / kTile;
  for (std::int64_t k = 0; k < tiles; ++k) {
    const std::int64_t begin = (backward ? tiles - 1 - k : k) * kTile;
    body(begin, std::min(kTile, columns - begin));
  }
}

// What differences are taken from: the maximum, or 0 while everything is −inf.
float anchor(float maximum) { return maximum == -kInfinity ? 0.0f : maximum; }

// A row of floats that one sweep leaves for another, in cache: the thread's own, whole tiles.
float* row_of_floats(std::int64_t columns) {
  struct alignas(64) Tile {
    Buffer values;
  };
  thread_local std::vector<Tile> tiles;
  const auto count = static_cast<std::size_t>((columns + kTile - 1) / kTile);
  if (tiles.size() < count) tiles.resize(count);
  return tiles.data()->values;
}

float tile_min(const float* x, std::int64_t n) { return *std::min_element(x, x + n); }

float tile_max(const float* x, std::int64_t n) {
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, -kInfinity);
  for (std::int64_t i = 0; i < n; i += kLanes) {
#pragma omp simd
    for (std::int64_t j = 0; j < kLanes; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  }
  // A NaN is never the greater one: the sums find it.
  return *std::max_element(lanes, lanes + kLanes);
}

float largest(const float* x, std::int64_t n, float so_far) {
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, so_far);
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (std::int64_t j = 0; j < kLanes; ++j) {
      const float size = absolute(x[i + j]);
      lanes[j] = size > lanes[j] ? size : lanes[j];
    }
  }
  for (; i < n; ++i) lanes[0] = std::max(lanes[0], absolute(x[i]));
  return *std::max_element(lanes, lanes + kLanes);
}

}  // namespace
}  // namespace KDK_ISA
}  // namespace kdk
