// From a task to a running kernel. The kernels of one divergence each are compiled by themselves,
// from distill.cu and shard.cu.
#pragma once

#include <cuda_runtime.h>

#include "cuda/shard_task.h"

namespace kdk {
namespace gpu {

// What the device allows a kernel.
cudaError_t limits_of(const void* kernel, int device, Limits* limits);

// How many of the plan's teams run at the same time; 0 where it cannot be launched at all.
cudaError_t resident_teams(const void* kernel, int device, const Plan& plan, int* teams);

cudaError_t launch(const void* kernel, const Plan& plan, cudaStream_t stream, void** arguments);

// The kernel that computes the task.
template <Divergence kDivergence>
const void* kernel_of(const RowTask& task);
template <Divergence kDivergence>
const void* kernel_of(const ShardTask& task);

}  // namespace gpu
}  // namespace kdk
