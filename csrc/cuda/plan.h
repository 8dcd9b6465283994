// How rows are shared out over thread blocks: one visible table.
#pragma once

#include <algorithm>

#include "common/args.h"
#include "cuda/slice.h"
#include "cuda/team.h"

namespace kdk {
namespace gpu {

constexpr int kMaxThreads = 32 * kMaxWarps;
constexpr int kKeptRowBytes = 256;  // see kept_row.h

struct Plan {
  int threads;       // of a block: 32 times a power of 2
  int team_blocks;   // that share a row, a power of 2
  bool clusters;     // the teams are clusters; else they meet in memory, all of them at once
  int teams;         // in the grid
  int slice;         // columns of a block, a multiple of kChunk
  int stages;        // rows in shared memory at a time; 0: every sweep reads memory
  int kept_bytes;    // of a block, where the teacher is sparse: a bit for each column, and KeptRow
  int shared_bytes;  // of a block
};

// What the device allows.
struct Limits {
  int shared_bytes;         // of a block
  int shared_bytes_of_two;  // of a block that leaves its multiprocessor room for another one
  int cluster_blocks;       // 0: no clusters
  int multiprocessors;
  std::int64_t l2_bytes;
};

// A row of one tensor in shared memory may begin anywhere within 16 bytes.
inline std::int64_t stage_bytes(const DistillArgs& args, std::int64_t slice) {
  const std::int64_t teacher = args.kept.count > 0 ? 0 : size_of(args.teacher.dtype);
  return slice * (size_of(args.student.dtype) + teacher) + 32;
}

inline Plan plan_of(const DistillArgs& args, int team_blocks, bool clusters, int stages,
                    int max_threads) {
  const std::int64_t slice = (args.objective.vocab_size + team_blocks - 1) / team_blocks;
  Plan plan{};
  plan.team_blocks = team_blocks;
  plan.clusters = clusters;
  plan.stages = stages;
  plan.slice = static_cast<int>((slice + kChunk - 1) / kChunk * kChunk);
  plan.threads = plan.slice <= 1024 ? 128 : plan.slice <= 4096 ? 256 : max_threads;
  const int left_out_bytes = (plan.slice / kChunk + 15) / 16 * 16;
  plan.kept_bytes = args.kept.count > 0 ? left_out_bytes + kKeptRowBytes : 0;
  plan.shared_bytes =
      static_cast<int>(sizeof(Exchange) + stages * stage_bytes(args, plan.slice)) + plan.kept_bytes;
  return plan;
}

// The fewest blocks whose shared memory holds a row and the one after it; else one row. Two blocks
// to a multiprocessor where that is possible: one computes while the other waits for its team.
// Where the rows are too long, or there are no clusters, the sweeps read memory: so many blocks
// share a row that half of the L2 cache holds all the rows in work. `resident(plan)`: how many
// teams the device can run at the same time.
template <typename Resident>
Plan make_plan(const DistillArgs& args, const Limits& limits, const Resident& resident) {
  const std::int64_t rows = args.batch * args.length;
  const auto with_teams = [&](Plan plan, std::int64_t teams) {
    plan.teams = static_cast<int>(std::max<std::int64_t>(1, std::min(rows, teams)));
    return plan;
  };
  struct Way {
    int stages, shared_bytes, threads;
  };
  const Way ways[] = {{2, limits.shared_bytes_of_two, kMaxThreads / 2},
                      {2, limits.shared_bytes, kMaxThreads},
                      {1, limits.shared_bytes_of_two, kMaxThreads / 2},
                      {1, limits.shared_bytes, kMaxThreads}};
  for (const Way& way : ways) {
    for (int blocks = 1; blocks <= limits.cluster_blocks; blocks *= 2) {
      const std::int64_t slice = args.objective.vocab_size / blocks;
      if (way.stages * stage_bytes(args, slice) > way.shared_bytes) continue;  // nor fits an int
      const Plan plan = plan_of(args, blocks, true, way.stages, way.threads);
      if (plan.shared_bytes > way.shared_bytes) continue;
      if (const int teams = resident(plan)) return with_teams(plan, teams);
    }
  }
  const std::int64_t row_bytes = stage_bytes(args, args.objective.vocab_size) +
                                 args.objective.vocab_size * size_of(args.student.dtype);
  int blocks = 1;
  while (2 * blocks <= std::min(kMaxTeamBlocks, limits.multiprocessors) &&
         limits.multiprocessors / blocks * row_bytes > limits.l2_bytes / 2) {
    blocks *= 2;
  }
  const Plan plan = plan_of(args, blocks, false, 0, kMaxThreads);
  return with_teams(plan, std::min(resident(plan), kMaxBlocks / blocks));
}

}  // namespace gpu
}  // namespace kdk
