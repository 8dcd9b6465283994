// Reductions over the blocks that share a row: within a warp by shuffles, within a block and a
// cluster through shared memory, always in the order of the ranks, so that every thread of every
// block ends with the same bits.
#pragma once

#include "cuda/primitives.h"

namespace kdk {
namespace gpu {

constexpr int kMaxWarps = 16;
constexpr int kMaxFields = 8;

// At the front of a block's shared memory.
struct alignas(128) Exchange {
  Barrier arrived[2];
  float warps[kMaxWarps][kMaxFields];
  float blocks[2][kMaxFields];  // in turns: the next reduction writes while others still read
};

// `combine(a, b)` adds b to a and must not care for their order.
template <int kFields, typename Combine>
KDK_DEVICE void team_reduce(float (&values)[kFields], Exchange& exchange, int& turn,
                            const Combine& combine) {
  static_assert(kFields <= kMaxFields);
  float other[kFields];
  KDK_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) {
    KDK_UNROLL
    for (int i = 0; i < kFields; ++i) other[i] = shuffle_xor(values[i], mask);
    combine(values, other);
  }
  const int warps = block_threads() / 32;
  if (thread_rank() % 32 == 0) {
    KDK_UNROLL
    for (int i = 0; i < kFields; ++i) exchange.warps[thread_rank() / 32][i] = values[i];
  }
  sync_block();
  KDK_UNROLL
  for (int i = 0; i < kFields; ++i) values[i] = exchange.warps[0][i];
  for (int warp = 1; warp < warps; ++warp) {
    KDK_UNROLL
    for (int i = 0; i < kFields; ++i) other[i] = exchange.warps[warp][i];
    combine(values, other);
  }
  if (cluster_blocks() == 1) {
    sync_block();
    return;
  }
  float* slot = exchange.blocks[turn];
  turn ^= 1;
  if (thread_rank() == 0) {
    KDK_UNROLL
    for (int i = 0; i < kFields; ++i) slot[i] = values[i];
  }
  sync_cluster();
  KDK_UNROLL
  for (int i = 0; i < kFields; ++i) values[i] = load_remote(slot + i, 0);
  for (int rank = 1; rank < cluster_blocks(); ++rank) {
    KDK_UNROLL
    for (int i = 0; i < kFields; ++i) other[i] = load_remote(slot + i, rank);
    combine(values, other);
  }
}

}  // namespace gpu
}  // namespace kdk
