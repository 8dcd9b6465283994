// How a row is shared out over thread blocks: one visible table.
#pragma once

#include "cuda/slice.h"
#include "cuda/task.h"
#include "cuda/team.h"

namespace kdk {
namespace gpu {

// What the device allows.
struct Limits {
  int shared_bytes;    // of a block
  int cluster_blocks;  // 1: no clusters
  int resident;        // blocks that run at the same time
};

inline std::int64_t stage_bytes(const DistillArgs& args, std::int64_t slice) {
  const std::int64_t element = size_of(args.student.dtype) + size_of(args.teacher.dtype);
  return slice * element + 32;
}

// The fewest blocks whose shared memory holds a row and the next one; then one row; else none, and
// the sweeps read memory.
inline Plan make_plan(const DistillArgs& args, const Limits& limits) {
  const std::int64_t columns = args.objective.vocab_size, rows = args.batch * args.length;
  const std::int64_t room = limits.shared_bytes - static_cast<std::int64_t>(sizeof(Exchange));
  Plan plan{};
  const auto slice_of = [&](int blocks) {
    const std::int64_t slice = (columns + blocks - 1) / blocks;
    return (slice + kChunk - 1) / kChunk * kChunk;
  };
  const auto choose = [&](int stages) {
    for (int blocks = 1; blocks <= limits.cluster_blocks; blocks *= 2) {
      if (stages * stage_bytes(args, slice_of(blocks)) > room) continue;
      plan.cluster_blocks = blocks;
      plan.stages = stages;
      return true;
    }
    return false;
  };
  if (limits.cluster_blocks == 1 || (!choose(2) && !choose(1))) {
    plan.cluster_blocks = limits.cluster_blocks;
    plan.stages = 0;
  }
  const std::int64_t slice = slice_of(plan.cluster_blocks);
  plan.slice = static_cast<int>(slice);
  plan.threads = slice <= 1024 ? 128 : slice <= 4096 ? 256 : 512;
  plan.shared_bytes = static_cast<int>(sizeof(Exchange) + plan.stages * stage_bytes(args, slice));
  const std::int64_t clusters = std::max(1, limits.resident / plan.cluster_blocks);
  plan.clusters = static_cast<int>(std::max<std::int64_t>(1, std::min(rows, clusters)));
  return plan;
}

}  // namespace gpu
}  // namespace kdk
