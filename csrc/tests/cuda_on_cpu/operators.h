// The row operators of csrc/cuda, run on the CPU.
#pragma once

#include <cstdint>

#include "common/args.h"
#include "cuda/plan.h"

namespace kdk::gpu {

// Returns a row whose label is out of range, or -1. The device's multiprocessors have room for a
// block each; `seed` is that of the schedule.
std::int64_t distill_rows_on_cpu(const DistillArgs& args, const Limits& device, std::uint64_t seed);
std::int64_t shard_rows_on_cpu(const ShardArgs& args, Phase phase, Limits device,
                               std::uint64_t seed);
void scale_rows_on_cpu(const ScaleArgs& args);

}  // namespace kdk::gpu
