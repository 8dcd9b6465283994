// The thread blocks that share a row, and their reductions: within a warp by shuffles, then over a
// block's warps through shared memory, then over the blocks. Always in the order of the ranks, so
// that every thread of every block ends with the same bits.
//
// The blocks are a cluster, which reads each other's shared memory, or, on GPUs without clusters,
// meet in memory (Scratch).
#pragma once

#include "common/pairs.h"
#include "cuda/primitives.h"

namespace kdk {
namespace gpu {

constexpr int kMaxWarps = 16;
constexpr int kMaxFields = 6;
constexpr int kMaxTeamBlocks = 32;  // a lane each
constexpr int kMaxBlocks = 1024;    // of a grid whose blocks meet in memory

// At the front of a block's shared memory. What one reduction leaves is read while the next one
// writes, hence the pairs.
struct alignas(128) Exchange {
  Barrier arrived[2];
  float warps[2][kMaxWarps][kMaxFields];
  float blocks[2][kMaxFields];
};

// The memory of a call. What `prepare` (reduce_kernels.h) leaves there: 1 / the denominator of the
// mean in two floats and whether it is 0; no arrivals.
struct Scratch {
  float inverse[2];
  float empty;
  std::uint32_t arrivals[kMaxBlocks];  // of a team
  float blocks[2][kMaxBlocks][kMaxFields];
};

struct Team {
  Exchange* exchange;
  Scratch* scratch;  // null: a cluster
  int rank, blocks;  // this block among its team's
  int index, teams;  // this team among the grid's
  int turn;
  std::uint32_t met;
};

// The block's team, `blocks` strong; its cluster where `scratch` is null.
KDK_DEVICE Team join_team(int blocks, Scratch* scratch) {
  Team team{};
  team.exchange = reinterpret_cast<Exchange*>(shared_memory());
  team.scratch = scratch;
  team.blocks = scratch == nullptr ? cluster_blocks() : blocks;
  team.rank = scratch == nullptr ? block_rank() : block_index() % blocks;
  team.index = block_index() / team.blocks;
  team.teams = grid_blocks() / team.blocks;
  return team;
}

KDK_DEVICE bool leads(const Team& team) { return thread_rank() == 0 && team.rank == 0; }

// Leaves the block's values, the first thread's, for the team's other blocks and waits for theirs.
template <int kFields>
KDK_DEVICE void publish(const float (&values)[kFields], Team& team) {
  if (team.scratch == nullptr) {
    if (thread_rank() == 0) {
      KDK_UNROLL
      for (int i = 0; i < kFields; ++i) team.exchange->blocks[team.turn][i] = values[i];
    }
    sync_cluster();
    return;
  }
  team.met += static_cast<std::uint32_t>(team.blocks);
  if (thread_rank() == 0) {
    float* slot = team.scratch->blocks[team.turn][team.index * team.blocks + team.rank];
    KDK_UNROLL
    for (int i = 0; i < kFields; ++i) slot[i] = values[i];
    memory_arrive(&team.scratch->arrivals[team.index]);
    memory_await(&team.scratch->arrivals[team.index], team.met);
  }
  sync_block();
}

KDK_DEVICE float load_published(const Team& team, int rank, int field) {
  if (team.scratch == nullptr) {
    return load_remote(&team.exchange->blocks[team.turn][field], rank);
  }
  return load_from_block(&team.scratch->blocks[team.turn][team.index * team.blocks + rank][field]);
}

// `reduce(values, lanes)` leaves with each of `lanes` neighbouring lanes, a power of 2, the
// reduction over them. Blocks have a power of 2 of warps, and teams of blocks: see plan.h.
template <int kFields, typename Reduce>
KDK_DEVICE void team_reduce(float (&values)[kFields], Team& team, const Reduce& reduce) {
  static_assert(kFields <= kMaxFields);
  auto& slots = team.exchange->warps[team.turn];
  reduce(values, 32);
  if (thread_rank() % 32 == 0) {
    KDK_UNROLL
    for (int i = 0; i < kFields; ++i) slots[thread_rank() / 32][i] = values[i];
  }
  sync_block();
  const int warps = block_threads() / 32;
  KDK_UNROLL
  for (int i = 0; i < kFields; ++i) values[i] = slots[thread_rank() % warps][i];
  reduce(values, warps);
  if (team.blocks > 1) {
    publish(values, team);
    KDK_UNROLL
    for (int i = 0; i < kFields; ++i) {
      values[i] = load_published(team, thread_rank() % team.blocks, i);
    }
    reduce(values, team.blocks);
  }
  team.turn ^= 1;
}

// `combine(a, b)` adds b to a, in either order the same bits.
template <int kFields, typename Combine>
KDK_DEVICE void reduce_lanes(float (&values)[kFields], int lanes, const Combine& combine) {
  KDK_ROLLED
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    float other[kFields];
    shuffle_xor(values, mask, other);
    combine(values, other);
  }
}

template <int kFields>
KDK_DEVICE void team_sum(float (&values)[kFields], Team& team) {
  team_reduce(values, team, [](float (&mine)[kFields], int lanes) {
    reduce_lanes(mine, lanes, [](float (&into)[kFields], const float (&other)[kFields]) {
      KDK_UNROLL
      for (int i = 0; i < kFields; ++i) into[i] += other[i];
    });
  });
}

// Sums of pairs of floats, one pair after the other; the rest, kFields − 2 kPairs, plain.
template <int kPairs, int kFields>
KDK_DEVICE void team_sum_pairs(float (&values)[kFields], Team& team) {
  team_reduce(values, team, [](float (&mine)[kFields], int lanes) {
    reduce_lanes(mine, lanes, [](float (&into)[kFields], const float (&other)[kFields]) {
      KDK_UNROLL
      for (int i = 0; i < 2 * kPairs; i += 2) {
        const TwoFloats sum = add({into[i], into[i + 1]}, {other[i], other[i + 1]});
        into[i] = sum.hi;
        into[i + 1] = sum.lo;
      }
      KDK_UNROLL
      for (int i = 2 * kPairs; i < kFields; ++i) into[i] += other[i];
    });
  });
}

KDK_DEVICE float team_max(float value, Team& team) {
  float values[1] = {value};
  team_reduce(values, team, [](float (&mine)[1], int lanes) {
    reduce_lanes(mine, lanes, [](float (&into)[1], const float (&other)[1]) {
      into[0] = larger(other[0], into[0]);
    });
  });
  return values[0];
}

}  // namespace gpu
}  // namespace kdk
