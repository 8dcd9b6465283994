// The kernels of csrc/cuda over rows, compiled by divergence, from kernels.cpp. Weak, so that a
// program can do without those that it does not call; to call one of them is a crash.
#pragma once

#include "cuda/shard_task.h"

namespace kdk::gpu {

template <Divergence kDivergence>
[[gnu::weak]] void run_rows(const RowTask& task);
template <Divergence kDivergence>
[[gnu::weak]] void run_shard_rows(const ShardTask& task);

}  // namespace kdk::gpu
